"""Where an answer ends: the demo model with generation_config.json, against transformers' own `generate`."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from headrace_core.batch.finish import FinishRule
from headrace_core.config import DecodeSettings
from headrace_core.model.model import Model
from headrace_core.request import SamplingParams
from headrace_core.testing.paged_sequences import generate_greedy
from headrace_core.worker.loading import load_worker_model

MAX_TOKENS = 40
PARAMS = SamplingParams(max_tokens=MAX_TOKENS)
PROMPT = "Once upon a time there was a little fox named Zorvim."


@pytest.fixture(params=[[1, 18], 18, [], [305, 18]], ids=str)
def folder(request, tmp_path, model_dir):
    for path in model_dir.iterdir():
        if path.name != "generation_config.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": request.param}))
    return tmp_path


def test_an_answer_ends_where_transformers_ends_it(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompt = transformers.AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
        ids = torch.tensor([prompt])
        output = oracle.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=2)
    expected = output[0, len(prompt) :].tolist()
    assert ("18" in folder.joinpath("generation_config.json").read_text()) == (len(expected) < MAX_TOKENS)

    loaded = load_worker_model(DecodeSettings(model=folder, dtype="float32", kv_pool_mib=1))
    assert isinstance(loaded.model, Model)
    (tokens,) = generate_greedy(loaded.model, [prompt], MAX_TOKENS, page_size=16, max_chunk=64)
    rule = FinishRule(PARAMS, loaded.limits)
    ends = [
        rule.reason(token, num_output_tokens=count, num_tokens=len(prompt) + count)
        for count, token in enumerate(tokens, start=1)
    ]
    assert tokens[: next(index for index, end in enumerate(ends, start=1) if end)] == expected

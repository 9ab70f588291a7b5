"""The module for multi-token prediction gives the logits that plain torch gives, however the step is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from headrace_core.batch.step import ForwardPlan
from headrace_core.model.load import load_model
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import Variation
from headrace_demo.evaluate import measure_losses
from headrace_demo.export import from_checkpoint
from headrace_demo.stream import validation_rows
from tokenizers import Tokenizer

from tests.parity.mtp_reference import MtpReference

DEMO = Path(__file__).parents[2] / "demo" / "model"
TOLERANCE = 1e-3


def cut(model, token_ids, sizes):
    """Return the logits of each token's guess, the sequence computed in pieces of these sizes."""
    sequences = PagedSequences(model, page_size=4, num_pages=64)
    found = []
    for size in sizes:
        start = sequences.num_computed(0)
        chunk = sequences.chunk(0, token_ids[start : start + size])
        found += model.all_mtp_logits([chunk], {0: [token_ids[start + size]]}, sequences.cache)
    return torch.cat(found)


@pytest.mark.parametrize("sizes", [[25], [1] * 25, [7, 1, 1, 9, 2, 5]], ids=str)
@pytest.mark.parametrize("name", ["v3", "v3-no-q-lora", "v3-one-group", "demo"])
def test_logits_are_those_of_plain_torch(name, sizes, checkpoint, oracle, random_tokens):
    directory = DEMO if name == "demo" else checkpoint(name, Variation(num_mtp_layers=1))
    token_ids = random_tokens(26, seed=5)
    expected = MtpReference(directory).logits(oracle(directory).hidden(token_ids[:-1]), token_ids)
    found = cut(load_model(directory, dtype="float32", has_mtp=True), token_ids, sizes)
    assert (found - expected).abs().max() < TOLERANCE, "largest difference"


def test_several_sequences_and_wrong_drafts_share_a_step(checkpoint, oracle, random_tokens):
    """A prompt's end, its middle, a token alone, and a token with a draft of which one is right."""
    directory = checkpoint("v3", Variation(num_mtp_layers=1))
    model, reference = load_model(directory, has_mtp=True), MtpReference(directory)
    sequences = PagedSequences(model, page_size=4, num_pages=64)
    texts = [random_tokens(20, seed=seed) for seed in range(4)]
    before = [sequences.chunk(key, texts[key][: [5, 6, 7, 8][key]], is_sampled=False) for key in range(4)]
    model.all_mtp_logits([replace(c, next_id=texts[c.key][len(c.token_ids)]) for c in before], {}, sequences.cache)
    wrong = (texts[3][10] + 1) % 160
    chunks = [
        sequences.chunk(0, texts[0][5:11]),
        replace(sequences.chunk(1, texts[1][6:11], is_sampled=False), next_id=texts[1][11]),
        sequences.chunk(2, texts[2][7:8]),
        replace(sequences.chunk(3, [*texts[3][8:10], wrong, 7]), num_draft=3),
    ]
    given = {0: texts[0][11:12], 2: texts[2][8:9], 3: texts[3][9:11]}
    model.forward(ForwardPlan(chunks).rows, sequences.cache)
    model.guess(chunks, given, sequences.cache)
    ends = [11, 11, 8, 10]
    after = [
        sequences.chunk(key, texts[key][ends[key] : ends[key] + 2], is_sampled=False)
        if key != 3
        else replace(chunks[3], token_ids=texts[3][10:12], start=10, num_draft=0, is_sampled=False)
        for key in range(4)
    ]
    found = model.all_mtp_logits(
        [replace(c, next_id=texts[c.key][ends[c.key] + 2]) for c in after], {}, sequences.cache
    )
    for key, logits in enumerate(found):
        text = texts[key][: ends[key] + 3]
        expected = reference.logits(oracle(directory).hidden(text[:-1]), text)[-2:]
        assert (logits - expected).abs().max() < TOLERANCE, f"sequence {key}"


def test_the_demo_models_module_is_right_as_often_as_when_it_was_trained():
    """79.6 % is what its training code measured; the same rows, the same answers, and neither half of the join lost."""
    rows = validation_rows(Tokenizer.from_file(str(DEMO / "tokenizer.json")), num_tokens=288, num_rows=6)
    model = load_model(DEMO, dtype="float32", has_mtp=True)
    num_right = num_counted = 0
    for ids, weights in zip(rows.ids[:, :-1].tolist(), rows.weights.tolist(), strict=True):
        sequences = PagedSequences(model, page_size=16, num_pages=32)
        chunk = sequences.chunk(0, ids)
        said = model.all_logits([chunk], sequences.cache)[0].argmax(dim=1)
        guessed = model.all_mtp_logits([replace(chunk, is_sampled=False)], {}, sequences.cache)[0].argmax(dim=1)
        counted = torch.tensor(weights)[1:] > 0
        num_right += int(((said[1:] == guessed) & counted).sum())
        num_counted += int(counted.sum())
    _, expected = measure_losses(from_checkpoint(DEMO), rows)
    assert abs(num_right / num_counted - expected) < 2e-3
    assert 0.75 < expected < 0.84

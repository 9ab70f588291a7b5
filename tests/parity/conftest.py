"""The oracle: transformers on the same files."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

os.environ["TRANSFORMERS_OFFLINE"] = "1"

with warnings.catch_warnings():
    # transformers' own imports warn about things that are not ours to mend.
    warnings.simplefilter("ignore")
    import transformers

from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, Variation, write_checkpoint

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Oracle:
    """transformers' model of a checkpoint, in float32."""

    def __init__(self, directory: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.from_pretrained(directory)
            # One that sees is no causal language model to transformers.
            sees = hasattr(config, "vision_config")
            auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
            self._model = auto.from_pretrained(directory, dtype=torch.float32)
        self._model.eval()
        # generate() would fill an unset end from here.
        self._model.generation_config.eos_token_id = None

    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits at every position, [T, V]."""
        with torch.no_grad():
            return self._model(torch.tensor([token_ids])).logits[0]

    def hidden(self, token_ids: list[int]) -> Tensor:
        """The network's output at every position, after the final norm, [T, N]."""
        with torch.no_grad():
            return self._model.model(torch.tensor([token_ids])).last_hidden_state[0]

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Greedy tokens, by the oracle's own cached decoding."""
        ids = torch.tensor([prompt])
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
        )
        return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """Write a tiny checkpoint by the name of its config, once a session."""
    written: dict[tuple[str, Variation], Path] = {}

    def write(name: str, variation: Variation | None = None) -> Path:
        key = (name, variation or Variation())
        if key not in written:
            written[key] = tmp_path_factory.mktemp(name)
            write_checkpoint(written[key], TINY_CONFIGS[name], key[1])
        return written[key]

    return write


@pytest.fixture(scope="session")
def oracle() -> Callable[[Path], Oracle]:
    """Open a checkpoint with transformers, once a session."""
    opened: dict[Path, Oracle] = {}

    def open_checkpoint(directory: Path) -> Oracle:
        if directory not in opened:
            opened[directory] = Oracle(directory)
        return opened[directory]

    return open_checkpoint


@pytest.fixture
def random_tokens() -> Callable[..., list[int]]:
    """Draw token ids of the tiny vocabulary."""

    def draw(count: int, seed: int = 0) -> list[int]:
        return random.Random(seed).choices(range(3, 160), k=count)

    return draw

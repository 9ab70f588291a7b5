"""No draft changes a token of a real model: the demo's, on texts that repeat and texts that do not.

Tokens are drawn by (seed, sample, position), so drawn output is compared to the token, too; there is no distribution
whose likeness would have to be tested.
"""

from pathlib import Path

import pytest
import torch
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.request import SamplingParams
from headrace_decode.speculation import NO_DRAFTS, Speculation
from headrace_kernels import backend
from tokenizers import Tokenizer

from tests.parity.decoding import Decoding

FOLDER = Path(__file__).parents[2] / "demo" / "model"
NUM_PROMPTS, NUM_TOKENS = 100, 32
NAMES = ["Zorvim", "Talu", "Brin", "Okla", "Fenny"]


def prompts() -> list[list[int]]:
    """Return 100 beginnings of stories; every other one says so more than once."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    texts = [
        f"Once upon a time there was a little fox named {NAMES[i % 5]}{i}. " * (1 + i % 2 * 3)
        for i in range(NUM_PROMPTS)
    ]
    return [[0, *tokenizer.encode(text, add_special_tokens=False).ids] for text in texts]


@pytest.mark.skipif(
    backend(torch.empty(0)) != "cpu",
    reason="bits are the same whatever the batch with compiled CPU kernels: make setup",
)
@pytest.mark.parametrize(
    ("numerics", "num_prompts", "pool_tokens", "speculation"),
    [
        (Numerics.FAST, 100, 16384, Speculation(4, 12)),
        (Numerics.EXACT, 100, 16384, Speculation(4, 12)),
        (Numerics.EXACT, 20, 224, Speculation(4, 12)),
        (Numerics.FAST, 100, 16384, Speculation(1, 12, "mtp")),
        (Numerics.EXACT, 100, 16384, Speculation(3, 12, "mtp")),
        (Numerics.EXACT, 20, 224, Speculation(2, 12, "mtp")),
    ],
    ids=["fast", "exact", "exact, pre-empted", "mtp, fast", "mtp:3, exact", "mtp:2, exact, pre-empted"],
)
def test_prompts_have_the_same_tokens_with_and_without_drafts(numerics, num_prompts, pool_tokens, speculation):
    """Greedy, drawn by seeds, and with penalties, by turns."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 0.7, "repetition_penalty": 1.05, "min_tokens": 20},
    ]
    params = [
        SamplingParams(seed=i, max_tokens=NUM_TOKENS, ignore_eos=bool(i % 4), **kinds[i % 3])
        for i in range(NUM_PROMPTS)
    ]
    plain, drafted = (
        Decoding(load_model(FOLDER, numerics=numerics, has_mtp=kind.is_mtp), max_sequences=4, page_size=16).run(
            prompts()[:num_prompts], params[:num_prompts], kind, pool_tokens=pool_tokens
        )
        for kind in (NO_DRAFTS, speculation)
    )
    assert drafted.outputs == plain.outputs
    assert drafted.num_right > num_prompts / 2
    assert (drafted.num_preempted > 0) == (pool_tokens < 16384)

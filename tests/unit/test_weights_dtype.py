"""`--weights-dtype int8`: what is held in 8 bits, what that says of itself, where it can't be had."""

from contextlib import nullcontext

import pytest
import torch
from headrace_core.errors import StartupError
from headrace_core.model.build import num_weight_bytes
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.model.weights_dtype import Holding, WeightsDtype, check_int8
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_kernels import backend, use_backend
from headrace_kernels.linear import Linear

CONFIGS = ["v3", "v3-no-q-lora", "v3-tied", "v2-groups", "mixtral", "qwen3-moe"]
TOKENS = list(range(3, 40))


def logits(model):
    sequences = PagedSequences(model, page_size=8, num_pages=8)
    (found,) = model.all_logits([sequences.chunk(0, TOKENS)], sequences.cache)
    return found


@pytest.mark.parametrize("kernels", ["reference", None])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_in_8_bits_says_about_the_same(name, kernels, tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS[name])
    with use_backend(kernels) if kernels else nullcontext():
        wide, narrow = (load_model(tmp_path, weights_dtype=each) for each in (WeightsDtype.AUTO, WeightsDtype.INT8))
        expected, found = logits(wide), logits(narrow)
    assert not torch.equal(found, expected)
    # A router may choose others: so the middle of all logits, not the worst.
    assert (found - expected).abs().median() < 0.05 * expected.abs().median()
    assert narrow.fingerprint != wide.fingerprint
    assert len(narrow.fingerprint) == len(wide.fingerprint)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_bytes_are_those_that_it_takes(name, tmp_path, monkeypatch):
    """Nothing that is multiplied is counted and held as numbers, or the other way round."""
    write_checkpoint(tmp_path, TINY_CONFIGS[name])
    model = load_model(tmp_path, dtype="bfloat16")
    multiplied = []
    take = Linear.__init__

    def note(layer, weight, bias=None, *, is_packed=True, is_int8=False, dtype=None):
        take(layer, weight, bias, is_packed=is_packed, is_int8=is_int8)
        multiplied.append(is_int8 == is_packed)

    monkeypatch.setattr(Linear, "__init__", note)
    narrow = load_model(tmp_path, dtype="bfloat16", weights_dtype=WeightsDtype.INT8)
    assert multiplied
    assert all(multiplied)
    assert narrow.weight_bytes == num_weight_bytes(model.config, torch.bfloat16, Holding(WeightsDtype.INT8))
    assert narrow.weight_bytes < model.weight_bytes


def test_where_there_are_no_such_kernels_it_is_refused():
    check_int8("cpu")
    with pytest.raises(StartupError, match="--weights-dtype int8: there are no such kernels for --device cuda") as told:
        check_int8("cuda")
    assert told.value.reason == "NO_INT8"


@pytest.mark.skipif(backend(torch.empty(0)) != "cpu", reason="the compiled CPU kernels are not built: make setup")
def test_exact_numerics_of_it_are_a_fingerprint_of_their_own(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    found = {load_model(tmp_path, weights_dtype=each).fingerprint for each in (WeightsDtype.AUTO, WeightsDtype.INT8)}
    found |= {
        load_model(tmp_path, weights_dtype=each, numerics=Numerics.EXACT).fingerprint
        for each in (WeightsDtype.AUTO, WeightsDtype.INT8)
    }
    assert len(found) == 4

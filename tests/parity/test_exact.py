"""Exact numerics: a token's bits depend on nothing but the tokens before it. `python -m tests.exactness` tries more."""

import pytest
import torch
from headrace_core.errors import StartupError
from headrace_core.kv.layout import CacheDtype
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_kernels import backend, use_backend

from tests.exactness.cases import DTYPES, FAMILIES, check, tiny_model
from tests.exactness.holder import Holder

_CASES = 12


needs_library = pytest.mark.skipif(
    backend(torch.empty(0)) != "cpu", reason="the compiled CPU kernels are not built: make setup"
)


@needs_library
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_the_tokens_before_alone(family, dtype, tmp_path):
    model = tiny_model(family, dtype, tmp_path)
    assert [seed for seed in range(_CASES) if not check(model, seed)] == []


@needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_nor_do_they_with_weights_in_8_bits(family, tmp_path):
    model = tiny_model(family, "bfloat16", tmp_path, weights_dtype=WeightsDtype.INT8)
    assert [seed for seed in range(_CASES) if not check(model, seed)] == []


@needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_numerics_differ_somewhere(family, tmp_path):
    """Else the cases would tell nothing."""
    model = tiny_model(family, "float32", tmp_path, Numerics.FAST)
    assert any(not check(model, seed) for seed in range(_CASES))


@needs_library
def test_a_page_that_is_lost_on_the_way_to_another_worker_is_seen(tmp_path, monkeypatch):
    """Else the cases would tell nothing of a hand-off."""
    model = tiny_model("v3", "float32", tmp_path)
    monkeypatch.setattr(Holder, "take", lambda *_: None)
    assert any(not check(model, seed) for seed in range(_CASES))


@needs_library
def test_exact_is_another_fingerprint(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    fast, exact = (load_model(tmp_path, numerics=numerics).fingerprint for numerics in Numerics)
    assert (len(fast), len(exact)) == (32, 32)
    assert fast != exact


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, "--dtype bfloat16 or float32"),
        ({"kv_cache_dtype": CacheDtype.FP8_E4M3.value}, "--kv-cache-dtype fp8_e4m3"),
    ],
)
@needs_library
def test_exact_is_refused_where_it_can_not_be_held(options, says, tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    with pytest.raises(StartupError, match=says) as caught:
        load_model(tmp_path, numerics=Numerics.EXACT, **options)
    assert caught.value.reason == "NO_EXACT"


def test_plain_torch_promises_nothing_exact(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    with use_backend("reference"), pytest.raises(StartupError, match="kernels on reference"):
        load_model(tmp_path, numerics=Numerics.EXACT)

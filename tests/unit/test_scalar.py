"""One table of types: what it says of each is what torch and safetensors say."""

import safetensors.torch
import torch
from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES, scalar_of
from headrace_core.kv.layout import CacheDtype
from headrace_core.scalar import SAFETENSORS, Scalar


def test_every_scalar_is_torchs():
    for scalar in Scalar:
        dtype = TORCH_DTYPES[scalar]
        assert torch.empty(0, dtype=dtype).element_size() == scalar.itemsize
        assert scalar_of(dtype) is scalar


def test_the_names_of_files_are_those_of_safetensors():
    theirs = safetensors.torch._TYPES
    assert [name for name in SAFETENSORS if name not in theirs] in ([], ["F8_E8M0"])
    for name in SAFETENSORS.keys() & theirs.keys():
        assert TORCH_DTYPES[SAFETENSORS[name]] is theirs[name]


def test_elements_of_a_cache():
    assert {dtype.value: dtype.element.value for dtype in CacheDtype} == {
        "float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "fp8_e4m3": "uint8"
    }  # fmt: skip

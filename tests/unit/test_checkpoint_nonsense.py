"""Whatever a checkpoint's files hold: it is read, or a line of `CheckpointError` says what is wrong with which file."""

from __future__ import annotations

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from headrace_core.checkpoint.check_tensors import check_tensors
from headrace_core.checkpoint.safetensors_file import read_headers
from headrace_core.errors import CheckpointError
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import weights
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Derandomised: a run that fails is one that fails again.
many = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 300)
    | st.sampled_from([2**31 - 1, 2**31, 2**63, 10**400, -1])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["yarn", "default", "silu", "F32", "F8_E8M0", "BF16", "full_attention", "greedy", "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
NESTED = ("rope_scaling", "rope_parameters", "quantization_config")
NESTED_FIELDS = (
    "type", "rope_type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
    "original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "quant_method", "fmt",
    "weight_block_size",
)  # fmt: skip
OPTIONAL = (
    "sliding_window",
    "layer_types",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
    "head_dim",
    "mlp_bias",
    "num_local_experts",
    "mlp_only_layers",
    "mlp_layer_types",
    "use_sliding_window",
    *NESTED,
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config that could be read, with some fields of other values, or none."""
    config: dict[str, Any] = dict(draw(st.sampled_from(list(TINY_CONFIGS.values()))))
    names = sorted({*config, *OPTIONAL})
    for name in draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        if draw(st.booleans()):
            config.pop(name, None)
        elif name in NESTED:
            config[name] = draw(st.dictionaries(st.sampled_from(NESTED_FIELDS), VALUES, max_size=5))
        else:
            config[name] = draw(VALUES)
    return config


def one_line(error: CheckpointError, *files: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 700
    assert any(file in text for file in files), text


@many
@given(configs())
def test_a_config_of_whatever_fields_is_read_or_refused_by_name(config):
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), config)
        try:
            parsed = parse_config(Path(folder))
        except CheckpointError as error:
            one_line(error, "config.json")
        else:
            assert all(min(weight.shape) >= 0 for weight in islice(weights(parsed), 500))


@many
@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_file_of_whatever_bytes_is_read_or_refused_by_name(name: str, content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), TINY_CONFIGS["v3"])
        (Path(folder) / name).write_bytes(content)
        try:
            parse_config(Path(folder))
            if "index" in name:
                read_headers(Path(folder))
        except CheckpointError as error:
            one_line(error, name, folder)


ENTRY = {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64"]) | VALUES,
        "shape": st.lists(st.integers(-1, 40) | SCALARS, max_size=70) | VALUES,
        "data_offsets": st.tuples(st.integers(-1, 99), st.integers(-1, 99)).map(list) | VALUES,
    },
)
HEADERS = st.dictionaries(st.text(max_size=300), ENTRIES.map(lambda entry: {**ENTRY, **entry}) | VALUES, max_size=4)


@many
@given(HEADERS, st.integers(0, 64), st.integers(-9, 9) | st.integers(0, 2**64 - 1))
def test_a_weight_file_of_whatever_header_is_read_or_refused_by_name(header, num_bytes, off_by):
    text = json.dumps(header).encode()
    size = (len(text) + off_by) % 2**64 if off_by in range(-9, 10) else off_by
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + text + bytes(num_bytes))
        try:
            stored = read_headers(Path(folder))
            for tensor in stored.values():
                assert 0 <= tensor.offset <= tensor.offset + tensor.size <= path.stat().st_size
            write_config(Path(folder), TINY_CONFIGS["v3"])
            check_tensors(parse_config(Path(folder)), stored)
        except CheckpointError as error:
            one_line(error, "model.safetensors", "tensor")

"""How many launches a decode layer takes, counted on tensors without memory at the widths of real models."""

from __future__ import annotations

import pytest
import torch
from headrace_core.families.config import MlaShape
from headrace_core.model.feed_forward import DenseMlp, MoeMlp
from headrace_core.model.mla import LatentAttentionLayer, MlaWeights
from headrace_core.model.op_timer import OFF
from headrace_core.model.step_inputs import DecodeRows, StepInputs
from headrace_kernels import use_backend
from headrace_kernels.gpu.experts import StackedExperts
from headrace_kernels.gpu.launch import recording
from headrace_kernels.linear import Linear
from headrace_kernels.routing_rule import Router, RoutingRule
from torch.utils._python_dispatch import TorchDispatchMode

_NO_LAUNCH = (
    "empty",
    "view",
    "split",
    "slice",
    "select",
    "transpose",
    "unsqueeze",
    "expand",
    "as_strided",
    "detach",
    "t.",
)
PAGE_SIZE = 64


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


class Operations(TorchDispatchMode):
    """Counts torch's own operations that would launch something."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.removeprefix("_unsafe_").removeprefix("new_").startswith(_NO_LAUNCH):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def attention(hidden, heads, q_lora):
    shape = MlaShape(q_lora, 512, 128, 64, 128, True)
    query_in = q_lora or heads * 192
    weights = MlaWeights(
        input_proj=Linear(meta(query_in + 576, hidden)),
        query_norm=meta(q_lora) if q_lora else None,
        query_b=Linear(meta(heads * 192, q_lora)) if q_lora else None,
        kv_norm=meta(512),
        w_uk=meta(heads, 128, 512),
        w_uv=meta(heads, 128, 512),
        output_proj=Linear(meta(hidden, heads * 128)),
    )
    return LatentAttentionLayer(shape, heads, 0.1, weights)


def experts(hidden, width, num_experts, num_shared, rule):
    count = num_experts + num_shared
    weight, bias = meta(num_experts, hidden, dtype=torch.float32), meta(num_experts, dtype=torch.float32)
    stacked = StackedExperts(meta(count, 2 * width, hidden), meta(count, hidden, width))
    return MoeMlp(Router(weight, bias, rule, num_shared), stacked)


V2_LITE = (2048, 16, None, (1408, 64, 2, RoutingRule(6, "softmax")))
V3 = (
    7168,
    128,
    1536,
    (2048, 256, 1, RoutingRule(8, "sigmoid", num_groups=8, num_groups_kept=4, is_group_score_top2=True)),
)


def launches(network, num_rows, *, is_dense=False):
    """Names of what a layer launches, kernels and torch's operations."""
    hidden, heads, q_lora, mixture = network
    with use_backend("triton"), recording("cuda") as recorded:
        layer = attention(hidden, heads, q_lora)
        mlp = experts(hidden, *mixture)
        if is_dense:
            mlp = DenseMlp(Linear(meta(2 * hidden, hidden)), Linear(meta(hidden, hidden)))
        context_lens = meta(num_rows, dtype=torch.int32)
        angles = (meta(num_rows, 32, dtype=torch.float32), meta(num_rows, 32, dtype=torch.float32))
        ids = meta(num_rows, dtype=torch.int64)
        plan = layer.plan_decode(context_lens, PAGE_SIZE)
        rows = DecodeRows(meta(num_rows, 64, dtype=torch.int32), context_lens, plan=plan)
        step = StepInputs(ids, ids, ids, rows, [], [])
        cache, norm = meta(1000, PAGE_SIZE, 576), meta(hidden)

        def decode():
            x = layer(meta(num_rows, hidden), norm, 1e-6, angles, step, cache, OFF)
            return mlp(x, norm, 1e-6, ids, OFF)[0]

        decode()  # makes what is made once a device
        recorded.clear()
        with Operations() as operations:
            assert decode().shape == (num_rows, hidden)
    return [launch.kernel.__name__ for launch in recorded] + operations.names


@pytest.mark.parametrize(
    ("network", "num_rows", "expected"),
    [(V2_LITE, 1, 8), (V2_LITE, 4, 8), (V2_LITE, 32, 9), (V2_LITE, 64, 9), (V3, 1, 9), (V3, 32, 10)],
)
def test_a_decode_layer_is_a_handful_of_launches(network, num_rows, expected):
    names = launches(network, num_rows)
    assert len(names) == expected, names


def test_a_dense_layer_is_a_handful_of_launches():
    names = launches(V2_LITE, 8, is_dense=True)
    assert len(names) == 9, names

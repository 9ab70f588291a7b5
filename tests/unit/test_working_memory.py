"""What a worker on a GPU leaves free for its steps, against what a layer's tensors are, counted without memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import weights
from headrace_core.kv.layout import CacheDtype
from headrace_core.model.build import build_network
from headrace_core.model.op_timer import OFF
from headrace_core.model.step_inputs import PrefillGroup, StepInputs
from headrace_core.model.working_memory import FIXED_BYTES, StepLimits, gpu_working_bytes, layer_bytes
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config
from headrace_kernels import use_backend
from headrace_kernels.gpu.launch import recording
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.perf.gpu_engine.shapes import V2_LITE

CONFIGS = {
    "v2-lite": V2_LITE,
    "v3": {
        **TINY_CONFIGS["v3"],
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "moe_intermediate_size": 2048,
        "max_position_embeddings": 163_840,
    },
    "mixtral": {
        **TINY_CONFIGS["mixtral"],
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
    },
    "qwen3-moe": {
        **TINY_CONFIGS["qwen3-moe"],
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40_960,
    },
}
# So narrow that attention takes more.
CONFIGS["narrow experts"] = {
    **CONFIGS["qwen3-moe"],
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
}
PAGE_SIZE = 64
GIB = 1 << 30


@pytest.fixture
def network(tmp_path):
    """The network of a name, as the engine reads it."""

    def read(name):
        write_config(tmp_path, CONFIGS[name])
        return parse_config(tmp_path)

    return read


class MetaWeights:
    """`WeightSource` of tensors without memory."""

    def __init__(self, config):
        self._shapes = {weight.name: weight.shape for weight in weights(config)}

    def take(self, name, dtype=None, shard=None):
        return self.empty(*self._shapes[name], dtype=dtype or torch.bfloat16)

    def empty(self, *shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")


def tensors_of(tree):
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


class MostAtOnce(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are there at once; `launches` are emptied, they hold tensors."""

    def __init__(self, launches):
        super().__init__()
        self._launches = launches
        self._storages = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {each.untyped_storage()._cdata for each in tensors_of((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tensors_of(found)):
            if storage._cdata not in known:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._launches.clear()
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return found


def counted_bytes(config, num_tokens, num_keys, cache_dtype):
    """Return what a prompt's `num_tokens` behind others, `num_keys` in all, hold at once in a layer of each kind."""

    def integers(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    starts = [torch.tensor([0, count], dtype=torch.int32) for count in (num_tokens, num_keys)]
    group = PrefillGroup(0, num_tokens, integers(num_keys), *starts)
    step = StepInputs(integers(num_tokens), integers(num_tokens), integers(num_tokens), None, [group], [0])
    layout = config.kv_layout(PAGE_SIZE, cache_dtype)
    angles = [torch.empty(num_tokens, config.rope.dim // 2, device="meta") for _ in range(2)]
    with torch.inference_mode(), use_backend("triton"), recording("cuda") as launches:
        layers = build_network(config, MetaWeights(config)).layers
        cache = torch.empty(4096, *layout.page_shape, dtype=TORCH_DTYPES[cache_dtype.element], device="meta")
        found = []
        for layer in layers:
            with MostAtOnce(launches) as counted:
                x = torch.empty(num_tokens, config.hidden_size, dtype=torch.bfloat16, device="meta")
                x = layer.attention(x, layer.attention_norm, 1e-6, angles, step, cache, OFF)
                x, _ = layer.feed_forward(x, layer.feed_forward_norm, 1e-6, step.slot_mapping, OFF)
            found.append(counted.most)
    return max(found)


@pytest.mark.parametrize(
    ("name", "num_tokens", "num_keys"),
    [
        ("v3", 8192, 8192),
        ("v3", 512, 8192),
        ("v2-lite", 8192, 8192),
        ("v2-lite", 512, 40_000),
        ("mixtral", 8192, 8192),
        ("mixtral", 64, 8192),
        ("qwen3-moe", 8192, 8192),
        ("qwen3-moe", 64, 8192),
        ("narrow experts", 8192, 8192),
        ("v2-lite, fp8", 512, 40_000),
    ],
)
def test_the_formula_is_what_a_layer_holds_at_once(name, num_tokens, num_keys, network):
    name, _, cache_dtype = name.partition(", ")
    config = network(name)
    # One layer of each kind.
    moe = replace(config.moe, num_first_dense_layers=min(1, config.moe.num_first_dense_layers))
    config = replace(config, num_layers=1 + moe.num_first_dense_layers, moe=moe)
    cache_dtype = CacheDtype.FP8_E4M3 if cache_dtype else CacheDtype.BFLOAT16
    counted = counted_bytes(config, num_tokens, num_keys, cache_dtype)
    assert layer_bytes(config, 2, num_tokens, num_keys) == pytest.approx(counted, rel=0.01)


def working_bytes(config, *, dtype=CacheDtype.BFLOAT16, kv_pool_bytes=16 * GIB, **limits):
    itemsize = 4 if dtype is CacheDtype.FLOAT32 else 2
    layout = config.kv_layout(PAGE_SIZE, dtype)
    return gpu_working_bytes(config, layout, StepLimits(**limits), kv_pool_bytes, itemsize=itemsize)


def test_v3_at_8192_tokens_takes_two_gigabytes_and_modules(network):
    config = network("v3")
    found = working_bytes(config, max_step_tokens=8192, max_context_tokens=8192)
    assert found - FIXED_BYTES == pytest.approx(2.2e9, rel=0.05)
    assert 2.9e9 < found < 3.1e9


def test_a_smaller_network_a_smaller_step_and_a_shorter_context_take_less(network):
    small, large = network("v2-lite"), network("v3")
    assert working_bytes(small, max_step_tokens=8192, max_context_tokens=8192) - FIXED_BYTES < 0.8e9
    by_step = [working_bytes(large, max_step_tokens=tokens, max_context_tokens=8192) for tokens in (512, 4096, 8192)]
    assert by_step == sorted(set(by_step))
    one_layers_keys = (163_840 - 8192) * (576 + 16 * (128 + 128)) * 2
    few = {"max_step_sequences": 32}  # so that keys take more than logits
    by_context = [working_bytes(small, max_context_tokens=tokens, **few) for tokens in (4096, 8192, 163_840, 0)]
    assert by_context[0] == by_context[1], "contexts of several prompts are expanded together"
    assert by_context[2] == by_context[3] == pytest.approx(by_context[1] + one_layers_keys * 9 / 8, rel=0.01)
    assert working_bytes(small, kv_pool_bytes=GIB // 5, **few) == by_context[1], "no context is longer than the pool"
    assert working_bytes(small, dtype=CacheDtype.FLOAT32, **few) > by_context[3]


def test_with_an_fp8_cache_a_step_takes_the_same_and_a_pool_holds_longer_contexts(network):
    config = network("v2-lite")
    plain, fp8 = (working_bytes(config, dtype=dtype) for dtype in (CacheDtype.BFLOAT16, CacheDtype.FP8_E4M3))
    assert fp8 == plain
    small = {"kv_pool_bytes": GIB, "max_step_sequences": 32}
    plain, fp8 = (working_bytes(config, dtype=dtype, **small) for dtype in (CacheDtype.BFLOAT16, CacheDtype.FP8_E4M3))
    more_keys = GIB // (27 * 656) - GIB // (27 * 1152)
    assert fp8 - plain == pytest.approx(more_keys * (576 + 16 * (128 + 128)) * 2 * 9 / 8, rel=0.01)


def test_many_rows_to_sample_from_take_their_logits(network):
    config = network("v2-lite")
    few, many = (working_bytes(config, max_step_sequences=rows, max_context_tokens=8192) for rows in (64, 512))
    assert many - few > 448 * config.vocab_size * (2 + 4 + 4)

"""The networks and loads that the engine is measured with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from headrace_core.families.config import ModelConfig
from headrace_core.families.config_json import parse_config
from headrace_core.roofline.model_shape import ModelShape
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, Config, write_config

# Widths that matrix units take: multiples of 16.
KERNEL_WIDTHS: Config = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 32,
}
V2_LITE: Config = {
    **TINY_CONFIGS["v2-lite"],
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "max_position_embeddings": 163_840,
    "rope_scaling": {**TINY_CONFIGS["v2-lite"]["rope_scaling"], "factor": 40, "original_max_position_embeddings": 4096},
    "torch_dtype": "bfloat16",
}
TINY: Config = {**TINY_CONFIGS["v2"], **KERNEL_WIDTHS, "q_lora_rank": None, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Shape:
    """A network with the batches and context of its decode step and the loads of its cluster.

    `loads` are (tokens in, tokens out) of a request. A cell of the cluster serves `requests_per_client` requests of
    each of `concurrencies` clients. `num_greedy_tokens` of `greedy_checkpoints` are compared with transformers'.
    """

    name: str
    config: Config
    batches: tuple[int, ...]
    context: int
    page_size: int
    loads: tuple[tuple[int, int], ...]
    concurrencies: tuple[int, ...]
    requests_per_client: int
    greedy_checkpoints: tuple[str, ...]
    num_greedy_tokens: int

    def with_layers(self, num_layers: int) -> Shape:
        """Return it with so many layers.

        Raises:
            ValueError: fewer than 2, one dense and one with experts.
        """
        if num_layers < 2:
            raise ValueError(f"--layers {num_layers}: at least 2, one dense and one with experts")
        return replace(self, config={**self.config, "num_hidden_layers": num_layers})

    def model_config(self, folder: Path) -> ModelConfig:
        """Return the network as the engine reads it; writes config.json into `folder`."""
        write_config(folder, self.config)
        return parse_config(folder)

    def roofline_shape(self) -> ModelShape:
        """Return the network as the roofline reads it."""
        return ModelShape.from_config(self.config, self.name)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "v2-lite",
            V2_LITE,
            batches=(1, 32, 128),
            context=4096,
            page_size=64,
            loads=((256, 256), (4096, 256)),
            concurrencies=(1, 16, 64),
            requests_per_client=4,
            greedy_checkpoints=("v3", "v2-lite", "mixtral", "demo"),
            num_greedy_tokens=64,
        ),
        Shape(
            "tiny",
            TINY,
            batches=(1, 3),
            context=20,
            page_size=16,
            loads=((16, 8), (48, 8)),
            concurrencies=(1, 2),
            requests_per_client=2,
            greedy_checkpoints=("v2-lite",),
            num_greedy_tokens=4,
        ),
    )
}

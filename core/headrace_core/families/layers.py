"""The weights of layers that families have in common; each says their names as its checkpoints have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from headrace_core.families.config import GqaShape, IndexerShape, MlaShape, ModelConfig
from headrace_core.families.weights import Part, Place, Split, Weight, WeightTree

_MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
_MLP = (Part.GATE, Part.UP, Part.DOWN)
_SHARED = (Part.SHARED_GATE, Part.SHARED_UP, Part.SHARED_DOWN)


def decoder(config: ModelConfig, layer: Callable[[str, int], Iterator[Weight]], root: str = "") -> WeightTree:
    """Return the tree of a decoder whose layers have two norms and what `layer` yields for (prefix, index).

    `root` stands before every name. A module for multi-token prediction is a layer more, named as DeepSeek's.
    """
    hidden = config.hidden_size
    vocabulary, by_token = (config.vocab_size, hidden), Split(0, config.vocab_size)
    outside = [
        Weight(f"{root}model.embed_tokens.weight", vocabulary, Place(Part.EMBEDDING), by_token),
        Weight(f"{root}model.norm.weight", (hidden,), Place(Part.FINAL_NORM)),
    ]
    if not config.is_embedding_tied:
        outside.append(Weight(f"{root}lm_head.weight", vocabulary, Place(Part.HEAD), by_token))

    def weights(index: int) -> Iterator[Weight]:
        prefix = f"{root}model.layers.{index}."
        yield Weight(prefix + "input_layernorm.weight", (hidden,), Place(Part.ATTENTION_NORM))
        yield Weight(prefix + "post_attention_layernorm.weight", (hidden,), Place(Part.FEED_FORWARD_NORM))
        yield from layer(prefix, index)
        if index >= config.num_layers:
            yield from _multi_token_prediction(prefix, hidden)

    return WeightTree(tuple(outside), config.num_layers + config.num_run_mtp_layers, weights, root)


def _multi_token_prediction(prefix: str, hidden: int) -> Iterator[Weight]:
    """Yield what a module has beside its layer. Embedding and head are the network's; copies of them are not read."""
    yield Weight(prefix + "enorm.weight", (hidden,), Place(Part.MTP_EMBEDDING_NORM))
    yield Weight(prefix + "hnorm.weight", (hidden,), Place(Part.MTP_HIDDEN_NORM))
    yield Weight(prefix + "eh_proj.weight", (hidden, 2 * hidden), Place(Part.MTP_JOIN))
    yield Weight(prefix + "shared_head.norm.weight", (hidden,), Place(Part.MTP_NORM))


def grouped_query_attention(prefix: str, config: ModelConfig, shape: GqaShape) -> Iterator[Weight]:
    """Yield the weights of attention by keys and values."""
    hidden, heads, groups, width = config.hidden_size, config.num_heads, shape.num_kv_heads, shape.head_dim
    yield Weight(prefix + "q_proj.weight", (heads * width, hidden), Place(Part.QUERY), Split(0, heads))
    yield Weight(prefix + "k_proj.weight", (groups * width, hidden), Place(Part.KEY), Split(0, groups))
    yield Weight(prefix + "v_proj.weight", (groups * width, hidden), Place(Part.VALUE), Split(0, groups))
    yield Weight(prefix + "o_proj.weight", (hidden, heads * width), Place(Part.OUTPUT), Split(1, heads))
    if shape.has_head_norms:
        yield Weight(prefix + "q_norm.weight", (width,), Place(Part.QUERY_NORM))
        yield Weight(prefix + "k_norm.weight", (width,), Place(Part.KEY_NORM))


def latent_attention(prefix: str, config: ModelConfig, shape: MlaShape) -> Iterator[Weight]:
    """Yield the weights of attention by latents, which all heads share."""
    hidden, heads, rank, latent = config.hidden_size, config.num_heads, shape.q_lora_rank, shape.kv_lora_rank
    query_dim, row_dim = heads * (shape.nope_dim + shape.rope_dim), latent + shape.rope_dim
    if rank is None:
        yield Weight(prefix + "q_proj.weight", (query_dim, hidden), Place(Part.QUERY), Split(0, heads))
    else:
        yield Weight(prefix + "q_a_proj.weight", (rank, hidden), Place(Part.QUERY_DOWN))
        yield Weight(prefix + "q_a_layernorm.weight", (rank,), Place(Part.QUERY_NORM))
        yield Weight(prefix + "q_b_proj.weight", (query_dim, rank), Place(Part.QUERY_UP), Split(0, heads))
    yield Weight(prefix + "kv_a_proj_with_mqa.weight", (row_dim, hidden), Place(Part.LATENT))
    yield Weight(prefix + "kv_a_layernorm.weight", (latent,), Place(Part.LATENT_NORM))
    up_dim = heads * (shape.nope_dim + shape.value_dim)
    yield Weight(prefix + "kv_b_proj.weight", (up_dim, latent), Place(Part.LATENT_UP), Split(0, heads))
    yield Weight(prefix + "o_proj.weight", (hidden, heads * shape.value_dim), Place(Part.OUTPUT), Split(1, heads))
    if config.has_attention_bias:
        if rank is not None:
            yield Weight(prefix + "q_a_proj.bias", (rank,), Place(Part.QUERY_DOWN_BIAS))
        yield Weight(prefix + "kv_a_proj_with_mqa.bias", (row_dim,), Place(Part.LATENT_BIAS))
        yield Weight(prefix + "o_proj.bias", (hidden,), Place(Part.OUTPUT_BIAS))


def indexer(prefix: str, config: ModelConfig, shape: IndexerShape, q_lora_rank: int) -> Iterator[Weight]:
    """Yield the weights of what chooses the tokens that sparse attention is over; every rank has all of them."""
    hidden, heads, width = config.hidden_size, shape.num_heads, shape.head_dim
    yield Weight(prefix + "wq_b.weight", (heads * width, q_lora_rank), Place(Part.INDEX_QUERY))
    yield Weight(prefix + "wk.weight", (width, hidden), Place(Part.INDEX_KEY))
    yield Weight(prefix + "k_norm.weight", (width,), Place(Part.INDEX_KEY_NORM))
    yield Weight(prefix + "k_norm.bias", (width,), Place(Part.INDEX_KEY_NORM_BIAS))
    yield Weight(prefix + "weights_proj.weight", (heads, hidden), Place(Part.INDEX_HEADS), is_float32=True)


def feed_forward(prefix: str, config: ModelConfig, index: int) -> Iterator[Weight]:
    """Yield the weights of a dense layer, or of one with experts, as most families name them."""
    if config.is_moe_layer(index):
        yield from mixture(prefix, config, _MLP_NAMES)
    else:
        yield from mlp(prefix, config.hidden_size, config.dense_intermediate_size)


def mixture(prefix: str, config: ModelConfig, names: tuple[str, str, str]) -> Iterator[Weight]:
    """Yield the weights of a layer with experts, whose gate, up and down are of these `names`."""
    hidden, moe = config.hidden_size, config.moe
    yield Weight(prefix + "gate.weight", (moe.num_experts, hidden), Place(Part.ROUTER), is_float32=True)
    if moe.has_correction_bias:
        name = prefix + "gate.e_score_correction_bias"
        yield Weight(name, (moe.num_experts,), Place(Part.ROUTER_BIAS), is_float32=True)
    for expert in range(moe.num_experts):
        yield from mlp(f"{prefix}experts.{expert}.", hidden, moe.intermediate_size, names, expert=expert)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.intermediate_size
        yield from mlp(prefix + "shared_experts.", hidden, width, parts=_SHARED)


def mlp(
    prefix: str,
    hidden: int,
    width: int,
    names: tuple[str, str, str] = _MLP_NAMES,
    *,
    parts: tuple[Part, Part, Part] = _MLP,
    expert: int | None = None,
) -> Iterator[Weight]:
    """Yield gate, up and down of a feed-forward network of `width`."""
    gate, up, down = names
    yield Weight(f"{prefix}{gate}.weight", (width, hidden), Place(parts[0], expert), Split(0, width))
    yield Weight(f"{prefix}{up}.weight", (width, hidden), Place(parts[1], expert), Split(0, width))
    yield Weight(f"{prefix}{down}.weight", (hidden, width), Place(parts[2], expert), Split(1, width))

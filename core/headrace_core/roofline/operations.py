"""What each operation of a step computes, moves through memory, and sends: FLOPs and bytes, as a table of formulas.

All values are per GPU, of the busiest one, and per layer; `Operation` has them for the whole step. What is counted:
fused attention (scores never reach memory), the causal half only, both matrix products of attention; norms and
activations as one pass; weights once per step; an expert's weights only if a token chose it. What is not: keys and
values that later query tiles read again, biases, softmax's few FLOPs per score, FP8 scales of weights.

Symbols (`operation_symbols` has their values; sizes that TP or EP divide are a GPU's share):

    T tokens of this GPU · A of all GPUs · B sequences · L tokens that get logits
    Tp, Td tokens · Cp, Cd tokens of cache read · Pp, Pd query-key pairs; p in prefill, d in decode
    N hidden · H heads · G KV heads · h head size · Q query rank · D latent · R rope · nope, v dims of a head
    E experts · K per token · X distinct experts read · rows tokens x experts of this GPU · F, Fs, Fd widths
    V vocabulary · w bytes of a weight · a of an activation, q on its way to experts · c of a cached value
    kv bytes of what a token caches in a layer, key those of them that are the indexer's key
    J heads of an indexer · I width of one · topk tokens it chooses · S pairs chosen · M rows of cache taken (`sparse`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal

from headrace_core.roofline.communication import (
    ALL_REDUCE_HOPS,
    ATTENTION_REDUCE,
    CHOICES,
    COMBINE,
    COMBINE_HOPS,
    DENSE_REDUCE,
    DISPATCH,
    DISPATCH_HOPS,
    EXCHANGE,
    ONE_GPU,
    REMOTE_RANKS,
    VOCABULARY_GATHER,
    VOCABULARY_HOPS,
    Parallelism,
)
from headrace_core.roofline.formula import Symbols, evaluate
from headrace_core.roofline.model_shape import Dtype, MlaShape, ModelShape
from headrace_core.roofline.routing import UNIFORM, Routing, expected_distinct
from headrace_core.roofline.sparse import SCORE_BYTES, SCORE_FLOPS, SPARSE_SYMBOLS
from headrace_core.roofline.step_load import StepLoad

Phase = Literal["prefill", "decode"]
MlaPath = Literal["auto", "naive", "absorbed"]
Group = Literal["norm", "projection", "attention", "experts", "communication", "vocabulary"]


@dataclass(frozen=True, slots=True)
class OperationFormula:
    """One line of the table: what an operation costs each time it runs.

    `runs` is a symbol, how often it runs in a step. `span` is a symbol, the GPUs that `sent` goes to; "0" another
    worker. `choices`, of an exchange, how many of them a token may choose (`communication.ONCE_A_NODE`); `hops`, of a
    collective, how many follow each other (`communication.LINK_LATENCY`). `math` says which peak counts: "weights" that
    of the weights' type, "activations" that of activations, "cache" that of cached values. `is_overlapped`: it runs
    beside the others, at no time.
    """

    name: str
    group: Group
    runs: str
    flops: str
    bytes: str
    sent: str = "0"
    span: str = "1"
    choices: str = "0"
    hops: str = "0"
    math: Literal["weights", "activations", "cache"] = "activations"
    is_overlapped: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of a step, on the busiest GPU: totals over the `runs` times that it runs."""

    name: str
    group: Group
    runs: int
    flops: float
    bytes: float
    comm_bytes: float
    comm_gpus: int
    math: Dtype
    is_overlapped: bool
    formula: OperationFormula
    choices: int = 0
    hops: float = 0.0

    @property
    def intensity(self) -> float:
        """FLOPs per byte of memory traffic; 0 if it moves none."""
        return self.flops / self.bytes if self.bytes else 0.0


def _matmul(
    name: str, group: Group, runs: str, rows: str, inner: str, outer: str, *, weight: str = "w"
) -> OperationFormula:
    """Return a product of activations [rows, inner] and weights [inner, outer]."""
    return OperationFormula(
        name, group, runs, f"2*{rows}*{inner}*{outer}", f"{weight}*{inner}*{outer} + a*{rows}*({inner}+{outer})",
        math="weights" if weight == "w" else "activations",
    )  # fmt: skip


def _norm(name: str, runs: str) -> OperationFormula:
    # The residual is added in the same pass: two tensors in, two out.
    return OperationFormula(name, "norm", runs, "5*T*N", "4*a*T*N")


_QUERY = {
    False: (_matmul("q_proj", "projection", "layers", "T", "N", "H*(nope+R)"),),
    True: (
        _matmul("q_down_proj", "projection", "layers", "T", "N", "Q"),
        _matmul("q_up_proj", "projection", "layers", "T", "Q", "H*(nope+R)"),
    ),
}
_LATENT = (
    _matmul("kv_down_proj", "projection", "layers", "T", "N", "(D+R)"),
    OperationFormula(
        "latent_norms_and_rope", "norm", "layers", "5*T*(Q+D) + 3*T*(H+1)*R",
        "2*a*T*(Q+H*R) + a*T*(D+R) + kv*T",
    ),
)  # fmt: skip


_INDEX = (
    _matmul("index_key", "projection", "layers", "T", "N", "I"),
    _matmul("index_queries", "projection", "layers", "T", "Q", "(J*I)"),
    _matmul("index_weights", "projection", "layers", "T", "N", "J", weight="a"),
    OperationFormula("index_scores", "attention", "layers", SCORE_FLOPS, SCORE_BYTES, math="cache"),
)


def _absorbed(part: str, *, is_sparse: bool = False) -> tuple[OperationFormula, ...]:
    tokens, rows, pairs = (f"{symbol}{part}" for symbol in ("TMS" if is_sparse else "TCP"))
    return (
        OperationFormula(
            "absorb_query", "projection", "layers", f"2*{tokens}*H*nope*D", f"a*H*nope*D + a*{tokens}*H*(nope+D)"
        ),
        OperationFormula(
            "attention_absorbed", "attention", "layers", f"2*H*{pairs}*(2*D+R)",
            f"{'(kv-key)' if is_sparse else 'kv'}*{rows} + a*{tokens}*H*(2*D+R)",
        ),
        OperationFormula(
            "absorb_value", "projection", "layers", f"2*{tokens}*H*D*v", f"a*H*D*v + a*{tokens}*H*(D+v)"
        ),
    )  # fmt: skip


def _naive(part: str, *, is_sparse: bool = False) -> tuple[OperationFormula, ...]:
    tokens, context, pairs = (f"{symbol}{part}" for symbol in ("TCS" if is_sparse else "TCP"))
    return (
        OperationFormula(
            "kv_up_proj", "projection", "layers", f"2*{context}*D*H*(nope+v)",
            f"w*D*H*(nope+v) + c*{context}*D + a*{context}*H*(nope+v)", math="weights",
        ),
        OperationFormula(
            "attention_naive", "attention", "layers", f"2*H*{pairs}*(nope+R+v)",
            f"a*{tokens}*H*(nope+R+v) + a*{context}*(H*(nope+v)+R)",
        ),
    )  # fmt: skip


def _grouped(part: str) -> OperationFormula:
    name = {"p": "attention_prefill", "d": "attention_decode"}[part]
    return OperationFormula(
        name, "attention", "layers", f"4*H*h*P{part}", f"kv*C{part} + a*2*T{part}*H*h"
    )  # fmt: skip


_GROUPED_PROJECTION = (
    _matmul("qkv_proj", "projection", "layers", "T", "N", "((H+2*G)*h)"),
    OperationFormula("rope_and_cache", "norm", "layers", "3*T*(H+G)*h", "2*a*T*(H+G)*h + a*T*2*G*h + kv*T"),
)


def _attention_output(width: str) -> tuple[OperationFormula, ...]:
    return (
        _matmul("output_proj", "projection", "layers", "T", f"H*{width}", "N"),
        OperationFormula(
            "attention_all_reduce", "communication", "layers", "0", "0", ATTENTION_REDUCE, "tp", hops=ALL_REDUCE_HOPS
        ),
    )


def _feed_forward(name: str, group: Group, runs: str, width: str) -> OperationFormula:
    # Gate and up share their input; their product leaves as one tensor.
    return OperationFormula(
        name, group, runs, f"6*T*N*{width}", f"3*w*N*{width} + 2*a*T*(N+{width})", math="weights"
    )  # fmt: skip


_EXPERTS = (
    OperationFormula("router", "experts", "moe_layers", "2*T*N*E", "a*N*E + a*T*N + 4*T*E"),
    OperationFormula(
        "dispatch", "communication", "moe_layers", "0", "exchange*a*rows*N", DISPATCH, "n", CHOICES, DISPATCH_HOPS
    ),
    OperationFormula("expert_gate", "experts", "moe_layers", "2*rows*N*F", "w*X*N*F + a*rows*N", math="weights"),
    OperationFormula("expert_up", "experts", "moe_layers", "2*rows*N*F", "w*X*N*F + a*rows*F", math="weights"),
    OperationFormula("expert_down", "experts", "moe_layers", "2*rows*F*N", "w*X*F*N + a*rows*(F+N)", math="weights"),
    OperationFormula(
        "combine", "communication", "moe_layers", "2*rows*N", "a*rows*N + a*T*N", COMBINE, "n", CHOICES, COMBINE_HOPS
    ),
)
_SHARED = _feed_forward("shared_experts", "experts", "moe_layers", "Fs")
_DENSE = (
    _feed_forward("dense_ffn", "experts", "dense_layers", "Fd"),
    OperationFormula(
        "dense_all_reduce", "communication", "dense_layers", "0", "0", DENSE_REDUCE, "tp", hops=ALL_REDUCE_HOPS
    ),
)
_VOCABULARY = (
    OperationFormula("final_norm", "norm", "1", "5*L*N", "3*a*L*N"),
    OperationFormula(
        "head", "vocabulary", "1", "2*L*N*V", "a*N*V + a*L*N + 4*L*V", VOCABULARY_GATHER, "tp", hops=VOCABULARY_HOPS
    ),
)  # fmt: skip


# Every GPU of a TP group takes the whole latent, or its own heads' keys and values.
_HANDOFF = OperationFormula("kv_transfer", "communication", "layers", "0", "kv*Tp", "kv*Tp", "0", is_overlapped=True)


@lru_cache(maxsize=256)
def operation_formulas(
    shape: ModelShape, *, has_prefill: bool, has_decode: bool, mla: MlaPath = "auto"
) -> tuple[OperationFormula, ...]:
    """Return the operations of a step in the order in which they run."""
    parts = [(part, mla if mla != "auto" else path) for part, path, is_there in
             (("p", "naive", has_prefill), ("d", "absorbed", has_decode)) if is_there]  # fmt: skip
    table = [OperationFormula("embedding", "vocabulary", "1", "0", "2*a*T*N"), _norm("attention_norm", "layers")]
    if isinstance(shape.attention, MlaShape):
        table += [*_QUERY[shape.attention.q_lora_rank > 0], *_LATENT, *_latent_attention(shape.attention, parts, mla)]
        table += _attention_output("v")
    else:
        table += [*_GROUPED_PROJECTION, *(_grouped(part) for part, _ in parts), *_attention_output("h")]
    table.append(_norm("ffn_norm", "layers"))
    if shape.num_dense_layers:
        table += _DENSE
    if shape.moe:
        table += [*_EXPERTS[:1], *([_SHARED] if shape.moe.shared_intermediate_size else []), *_EXPERTS[1:]]
    table += _VOCABULARY
    if has_prefill:
        table.append(_HANDOFF)
    return tuple(table)


def _latent_attention(shape: MlaShape, parts: Sequence[tuple[str, str]], mla: MlaPath) -> Iterator[OperationFormula]:
    """Yield the operations between projections, each part's in its own way."""
    is_sparse = shape.indexer is not None
    if is_sparse:
        yield from _INDEX
    ways = [(part, path, "") for part, path in parts]
    if is_sparse and mla == "auto" and list(parts[:1]) == [("p", "naive")]:
        # Which of the two a prompt goes depends on its length; the other costs nothing.
        ways[:1] = [("p", "naive", "(1-far)"), ("p", "absorbed", "far")]
    for part, path, factor in ways:
        # A mixed step that runs both parts the same way has each operation twice; names must tell them apart.
        is_twice = sum(path == other for _, other, _ in ways) > 1
        suffix = {"p": "_prefill", "d": "_decode"}[part] if is_twice else ""
        for row in (_naive if path == "naive" else _absorbed)(part, is_sparse=is_sparse):
            flops, moved = (f"{factor}*({text})" if factor else text for text in (row.flops, row.bytes))
            yield replace(row, name=row.name + suffix, flops=flops, bytes=moved)


# Each is computed from those above it and from those of the model, the load, the parallelism and the routing.
DERIVED_SYMBOLS = {
    "n": "tp*dp",
    "sequences": "max(1, num_sequences)",
    # The busiest of dp groups has one sequence more if they do not divide evenly.
    "share": "ceil(sequences/dp)/sequences",
    "A": "prefill_tokens+decode_tokens",
    "T": "share*A",
    "B": "share*sequences",
    "L": "share*num_logits",
    "Tp": "share*prefill_tokens",
    "Cp": "share*prefill_context",
    "Pp": "share*prefill_pairs",
    "Td": "share*decode_tokens",
    "Cd": "share*decode_context",
    "Pd": "share*decode_pairs",
    "H": "heads/tp",
    "G": "max(1, kv_heads/tp)",
    **SPARSE_SYMBOLS,
    # One of G*h and D is 0. A latent of one byte a value has a scale for each 128, and rope columns of two bytes.
    "kv": "c*(2*G*h+D) + max(0, 2-c)*4*ceil(D/128) + max(c, 2)*R + key",
    "V": "vocabulary/tp",
    "Fd": "dense_width/tp",
    "Fs": "shared_width/tp",
    "F": "expert_width*ep/n",
    "rows": "A*K/ep*hot",
    "X": "distinct(A)",
    "own": "A/n",
    "exchange": EXCHANGE,
    "remote": REMOTE_RANKS,
    "q": "min(a, w + 4/128)",
}


def operation_symbols(
    shape: ModelShape, load: StepLoad, parallel: Parallelism, *, routing: Routing = UNIFORM,
    dtype: Dtype = Dtype.BF16, kv_dtype: Dtype | None = None, experts_read: float | None = None,
) -> Symbols:  # fmt: skip
    """Return the value of every symbol that formulas use; see `predict_step`."""
    symbols: dict[str, float | Callable[[float], float]] = dict(shape_symbols(shape))
    symbols |= asdict(load)
    symbols |= {
        "tp": parallel.tp, "dp": parallel.dp, "ep": parallel.ep,
        "w": dtype.itemsize, "a": dtype.activation.itemsize, "c": (kv_dtype or dtype.activation).itemsize,
    }  # fmt: skip
    symbols |= _routing_symbols(shape, routing, parallel.ep)
    if experts_read is not None:
        symbols["distinct"] = lambda num_tokens: experts_read + 0.0 * num_tokens
    for name, formula in DERIVED_SYMBOLS.items():
        (symbols[name],) = evaluate((formula,), symbols)
    return symbols


def shape_symbols(shape: ModelShape) -> dict[str, float]:
    """Return the symbols that are the model's alone; 0 for what it does not have."""
    attention, moe = shape.attention, shape.moe
    is_mla = isinstance(attention, MlaShape)
    indexer = attention.indexer if is_mla else None
    return {
        "layers": shape.num_layers, "moe_layers": shape.num_moe_layers, "dense_layers": shape.num_dense_layers,
        "N": shape.hidden_size, "heads": shape.num_heads, "vocabulary": shape.vocab_size,
        "dense_width": shape.dense_intermediate_size,
        "kv_heads": 0 if is_mla else attention.num_kv_heads, "h": 0 if is_mla else attention.head_dim,
        "Q": attention.q_lora_rank if is_mla else 0, "D": attention.kv_lora_rank if is_mla else 0,
        "R": attention.rope_dim if is_mla else 0, "nope": attention.nope_dim if is_mla else 0,
        "v": attention.value_dim if is_mla else 0, "E": moe.num_experts if moe else 0,
        "K": moe.num_experts_per_token if moe else 0, "expert_width": moe.intermediate_size if moe else 0,
        "shared_width": moe.shared_intermediate_size if moe else 0,
        "J": indexer.num_heads if indexer else 0, "I": indexer.head_dim if indexer else 0,
        "topk": indexer.top_k if indexer else 0,
    }  # fmt: skip


def _routing_symbols(shape: ModelShape, routing: Routing, ep: int) -> dict[str, float | Callable[[float], float]]:
    if shape.moe is None:
        return {"hot": 1.0, "distinct": lambda num_tokens: 0.0 * num_tokens}
    sizes = (shape.moe.num_experts, shape.moe.num_experts_per_token, ep)
    busiest = routing.busiest(*sizes)
    return {"hot": routing.imbalance(*sizes), "distinct": lambda num_tokens: expected_distinct(busiest, num_tokens)}


def step_operations(
    shape: ModelShape, load: StepLoad, parallel: Parallelism = ONE_GPU, *, routing: Routing = UNIFORM,
    dtype: Dtype = Dtype.BF16, kv_dtype: Dtype | None = None, mla: MlaPath = "auto",
    experts_read: float | None = None,
) -> list[Operation]:  # fmt: skip
    """Return what each operation of a step costs the busiest GPU; operations that cost nothing are left out."""
    table = operation_formulas(shape, has_prefill=load.prefill_tokens > 0, has_decode=load.decode_tokens > 0, mla=mla)
    symbols = operation_symbols(
        shape, load, parallel, routing=routing, dtype=dtype, kv_dtype=kv_dtype, experts_read=experts_read
    )
    values = evaluate(
        [text for row in table for text in (row.runs, row.flops, row.bytes, row.sent, row.span, row.choices, row.hops)],
        symbols,
    )
    operations: list[Operation] = []
    for index, row in enumerate(table):
        runs, flops, moved, sent, span, choices, hops = values[7 * index : 7 * index + 7]
        if flops or moved or sent:
            math = {"weights": dtype, "activations": dtype.activation, "cache": kv_dtype or dtype.activation}[row.math]
            operations.append(
                Operation(row.name, row.group, int(runs), runs * flops, runs * moved, runs * sent, int(span), math,
                          row.is_overlapped, row, int(choices), hops)
            )  # fmt: skip
    return operations


def operations(
    shape: ModelShape, *, phase: Phase, batch: int, context: int, new_tokens: int = 1, dtype: Dtype = Dtype.BF16,
    parallel: Parallelism = ONE_GPU, routing: Routing = UNIFORM, kv_dtype: Dtype | None = None,
    mla: MlaPath = "auto",
) -> list[Operation]:  # fmt: skip
    """Return the operations of a step of `batch` equal sequences.

    `context` counts a sequence's tokens after the step, `new_tokens` those of them that the step computes.

    Raises:
        ValueError: `new_tokens` is not in 1..context, or `batch` is below 1.
    """
    if batch < 1 or not 1 <= new_tokens <= context:
        raise ValueError(f"batch {batch} must be at least 1 and new_tokens {new_tokens} in 1..context {context}")
    if phase == "prefill":
        load = StepLoad.prefill(new_tokens, context - new_tokens, batch=batch)
    else:
        load = StepLoad.decode(batch, batch * context, new_tokens=new_tokens)
    return step_operations(shape, load, parallel, routing=routing, dtype=dtype, kv_dtype=kv_dtype, mla=mla)

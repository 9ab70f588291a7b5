"""A group of ranks computes what one process does: 2 and 4 processes over gloo. `make parity-full` tries them all."""

from __future__ import annotations

import pytest
import torch
from headrace_core.families.config_json import parse_config
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.sharding import ExpertsForm, Sharding
from headrace_core.ranks.traffic import step_bytes
from headrace_core.testing.rank_processes import run_ranks
from headrace_kernels import backend

from tests.parity.rank_cases import TOKENS, Case, Generated, Options, ToDo, all_of, steps

NUM_TOKENS = 64
_OF_TWO = [
    (name, attention, experts)
    for name in ("v3", "v2", "mixtral")
    for attention in ("tp2", "dp2")
    for experts in ("tp2", "ep2")
]
_OF_FOUR = [
    ("v3", "tp1", "ep4"),
    ("v3", "tp2", "ep4"),
    ("v3-bias", "tp4", "ep4"),
    ("v2", "dp2", "tp4"),
    ("v3-tied", "tp2", "tp4"),
    ("v32", "tp2", "ep4"),
    ("mixtral", "tp4", "ep4"),
    ("mixtral", "tp1", "ep4"),
]

_TWO_BATCHES = [("v3", "tp2", "ep2"), ("mixtral", "dp2", "ep2"), ("v2", "dp2", "tp2")]

_TURNED = ((1,), (1,), (0,), (0,), (1,), (0,), (0,), (1,))
_COPIED = ((0, 1), (1,), (0, 1), (0,), (1, 0), (1,), (0,), (1,))
_MOVED = [
    (attention, [Options(owners, numerics) for owners in (None, _TURNED, _COPIED)])
    for attention, numerics in (("tp2", Numerics.EXACT), ("tp1", Numerics.EXACT), ("tp1", Numerics.FAST))
]
_FP8 = DispatchDtype.FP8
_MOVED.append(("tp2", [Options(owners, Numerics.EXACT, dispatch=_FP8) for owners in (None, _TURNED, _COPIED)]))
_FP8_NEAR = [(names, Options(dispatch=_FP8)) for names in (("tp2", "ep2"), ("tp1", "ep2"))]
"""One that sums, and one that dispatches."""
_EXACT = Options(numerics=Numerics.EXACT)
_CUT = [("tp2", "ep2"), ("tp1", "ep2")]
"""Which `_MOVED` has as well, as one batch."""
_NEAR = [
    (names, options)
    for names in (("tp2", "ep2"), ("tp1", "ep2"), ("tp1", "tp2"))
    for options in (Options(dtype="bfloat16"), Options(kernels="reference"))
]
_PLAIN = DispatchDtype.AUTO
_SENT = {
    2: [
        ("v2", "tp2", "ep2", _PLAIN),
        ("v3", "tp1", "tp2", _PLAIN),
        ("v3", "tp1", "ep2", _PLAIN),
        ("v3", "tp1", "ep2", _FP8),
    ],
    4: [
        ("v3", "tp4", "ep4", _PLAIN),
        ("v3", "tp2", "tp4", _PLAIN),
        ("mixtral", "tp1", "ep4", _PLAIN),
        ("mixtral", "tp1", "ep4", _FP8),
        ("v2", "tp2", "ep4", _PLAIN),
        ("v2", "tp2", "ep4", _FP8),
    ],
}
_HAS_LIBRARY = backend(torch.empty(0)) == "cpu"
needs_library = pytest.mark.skipif(not _HAS_LIBRARY, reason="the compiled CPU kernels are not built: make setup")


@pytest.fixture(scope="module")
def prompts():
    return [[5, 9, 33, 7, 8, 50, 61], [70, *range(3, 15), 99, 100, 20, 31, 77, 12, 15], [4, 44, 140]]


@pytest.fixture(scope="module")
def of_two(checkpoint, prompts):
    """What the ranks of a group of two found."""
    to_step = [(Case(checkpoint("v2"), *names), options) for names, options in [*_NEAR, *_FP8_NEAR]]
    if _HAS_LIBRARY:
        to_step += [(Case(checkpoint("v3"), attention, "ep2"), each) for attention, all_ in _MOVED for each in all_]
        to_step += [(Case(checkpoint("v3"), *names, 2), _EXACT) for names in _CUT]
    cases = [Case(checkpoint(name), *names) for name, *names in _OF_TWO]
    cases += [Case(checkpoint(name), *names, 2) for name, *names in _TWO_BATCHES]
    to_send = [(Case(checkpoint(name), *names), dtype) for name, *names, dtype in _SENT[2]]
    return run_ranks(2, all_of, ToDo(prompts, NUM_TOKENS, cases, to_step, to_send))


@pytest.fixture(scope="module")
def of_four(checkpoint, prompts):
    """What the ranks of a group of four found."""
    to_step = [(Case(checkpoint("v3"), "tp1", "ep4"), _EXACT)] if _HAS_LIBRARY else []
    cases = [Case(checkpoint(name), *names) for name, *names in _OF_FOUR]
    to_send = [(Case(checkpoint(name), *names), dtype) for name, *names, dtype in _SENT[4]]
    return run_ranks(4, all_of, ToDo(prompts, NUM_TOKENS, cases, to_step, to_send))


@pytest.fixture(scope="module")
def expected(checkpoint, oracle, prompts):
    """The oracle's tokens and our fingerprint by the name of the config, once each."""
    known = {}

    def of(name):
        if name not in known:
            tokens = [oracle(checkpoint(name)).greedy(prompt, NUM_TOKENS) for prompt in prompts]
            known[name] = Generated(tokens, load_model(checkpoint(name)).fingerprint)
        return known[name]

    return of


@pytest.mark.parametrize("case", [*_OF_TWO, *_OF_FOUR], ids="-".join)
def test_greedy_tokens_of_a_group_equal_transformers(case, of_two, of_four, checkpoint, expected):
    name, *names = case
    for found in of_two if case in _OF_TWO else of_four:
        assert found.generated[Case(checkpoint(name), *names)] == expected(name)


@pytest.mark.parametrize("case", _TWO_BATCHES, ids="-".join)
def test_so_do_they_in_two_micro_batches(case, of_two, checkpoint, expected):
    name, *names = case
    alone = expected(name)
    for found in of_two:
        generated = found.generated[Case(checkpoint(name), *names, 2)]
        assert generated._replace(num_cut=0) == alone._replace(tokens=alone.tokens * 2)
        # All but the few in which prompts are computed.
        assert generated.num_cut >= NUM_TOKENS - 4


@needs_library
@pytest.mark.parametrize("names", _CUT)
def test_exact_bits_do_not_depend_on_micro_batches(names, of_two, checkpoint):
    at_once, as_two = (of_two[0].steps[Case(checkpoint("v3"), *names, rows), _EXACT] for rows in (0, 2))
    assert_same_bits(at_once, as_two)
    # The prompts' step is not cut, nor the last, in which one sequence is alone.
    assert (at_once.num_cut, as_two.num_cut) == (0, 2)


def assert_same_bits(one, other):
    assert one.fingerprint == other.fingerprint
    for rows, others in zip(one.logits, other.logits, strict=True):
        assert torch.equal(rows, others)


@needs_library
@pytest.mark.parametrize(("attention", "options"), _MOVED)
def test_moving_or_copying_an_expert_changes_no_bit(attention, options, of_two, checkpoint):
    in_a_row, *others = [of_two[0].steps[Case(checkpoint("v3"), attention, "ep2"), each] for each in options]
    for other in others:
        assert_same_bits(in_a_row, other)


@needs_library
def test_exact_bits_depend_on_what_attention_adds_up_alone(of_two, of_four, checkpoint):
    """Neither on lanes nor on how many ranks hold the experts; models of other sums refuse each other's pages."""
    lanes = of_two[0].steps[Case(checkpoint("v3"), "tp1", "ep2"), _EXACT]
    assert_same_bits(lanes, of_four[0].steps[Case(checkpoint("v3"), "tp1", "ep4"), _EXACT])
    divided = of_two[0].steps[Case(checkpoint("v3"), "tp2", "ep2"), _EXACT]
    alone = steps(checkpoint("v3"), _EXACT)
    assert len({alone.fingerprint, divided.fingerprint, lanes.fingerprint}) == 3


@pytest.mark.parametrize(("names", "options"), _NEAR)
def test_logits_are_near_those_of_one_process_in_another_type_and_other_kernels(names, options, of_two, checkpoint):
    found, of_other = (of_rank.steps[Case(checkpoint("v2"), *names), options] for of_rank in of_two)
    assert all(len(rows) == 0 for rows in of_other.logits)
    alone = steps(checkpoint("v2"), options)
    limit = 1e-4 if options.dtype == "auto" else 0.1
    for rows, expected in zip(found.logits, alone.logits, strict=True):
        assert (rows - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(("names", "options"), _FP8_NEAR)
def test_tokens_in_fp8_are_the_same_tokens_whoever_computes_and_near_those_that_are_not(
    names, options, of_two, checkpoint
):
    """A group's logits are near those of one process that rounds as it does, much nearer than to plain ones."""
    found = of_two[0].steps[Case(checkpoint("v2"), *names), options]
    alone, plain = steps(checkpoint("v2"), options), steps(checkpoint("v2"), Options())
    assert found.fingerprint == alone.fingerprint != plain.fingerprint
    for rows, rounded, expected in zip(found.logits, alone.logits, plain.logits, strict=True):
        assert (rows - rounded).norm() <= 1e-4 * expected.norm()
        assert 1e-3 * expected.norm() < (rows - expected).norm() <= 0.05 * expected.norm()


@needs_library
def test_lanes_check_their_kernels_together_and_rank_0_compares(of_two, of_four):
    for found in (of_two, of_four):
        first, *others = [of_rank.checked for of_rank in found]
        assert 0 < first < 1e-3
        assert others == [0.0] * len(others)


def test_every_rank_learns_of_a_chunk_that_failed_in_another_lane(of_two, of_four):
    assert [found.failures for found in (*of_two, *of_four)] == [["2 BAD_LOGITS"]] * 6


@pytest.mark.parametrize("case", [*_SENT[2], *_SENT[4]], ids=lambda case: "-".join([*case[:3], case[3].value]))
def test_ranks_send_what_the_formulas_say(case, of_two, of_four, checkpoint):
    """To the byte; where tokens travel to their experts, within a tenth of what even choices would send."""
    name, *names, dtype = case
    layout, config = ParallelLayout.parse(*names), parse_config(checkpoint(name))
    by_rank = of_two if layout.size == 2 else of_four
    sent = sum(found.sent_bytes[Case(checkpoint(name), *names), dtype] for found in by_rank)
    tokens = [sum(TOKENS[lane :: layout.num_lanes]) for lane in range(layout.num_lanes)]
    logits = [len(TOKENS[lane :: layout.num_lanes]) for lane in range(layout.num_lanes)]
    sharding = Sharding(layout, 0)
    formula = step_bytes(config, sharding, tokens, logits, 4, dtype)
    if sharding.experts_form is ExpertsForm.DISPATCHED:
        experts = sent - (formula.total - formula.experts)
        assert abs(experts - formula.experts) <= 0.1 * formula.experts
    else:
        assert sent == formula.total

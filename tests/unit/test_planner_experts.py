"""Why a plan divides experts as it does."""

import pytest
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_planner.capacity import DecodeOption
from headrace_planner.plan_experts import experts_choice
from headrace_planner.sim_roofline import Machine

CONTEXT = 2048.0


def option(model, parallel, batch):
    machine = Machine(MODELS[model], find_hardware("h200-attainable"), parallel, Dtype.FP8)
    return DecodeOption(machine, batch, machine.decode_s(batch, CONTEXT), 1 << 20, 1, "")


def test_both_ways_are_told_at_the_plan_s_batch():
    taken = option("deepseek-v3", Parallelism(1, 8, 8), 512)
    why = experts_choice(taken, CONTEXT)
    assert why is not None
    assert why.division == "EP8"
    assert why.ep_step_s == pytest.approx(taken.step_s)
    assert why.tp_step_s == pytest.approx(option("deepseek-v3", Parallelism(1, 8, 1), 512).step_s)
    assert why.active_share == 8 / 256
    assert why.experts_read == pytest.approx(256, rel=1e-3)
    assert why.ep_sending_s < why.tp_sending_s, "tokens go to their experts, and not to everybody"
    assert "experts by EP8: a token uses 3.1% of them, so 512 rows read 256 of 256" in str(why)


def test_few_rows_read_few_experts_and_the_other_division_is_named():
    why = experts_choice(option("deepseek-v3", Parallelism(8, 1, 1), 4), CONTEXT)
    assert why is not None
    assert why.division == "TP8"
    assert 25 < why.experts_read < 32, "4 x 8 choices, some of them the same"


def test_where_ep_is_ahead_is_where_its_steps_are_shorter():
    for model, parallel in (("deepseek-v3", Parallelism(1, 8, 8)), ("mixtral-8x7b", Parallelism(8, 1, 8))):
        why = experts_choice(option(model, parallel, 256), CONTEXT)
        assert why is not None
        is_ahead = why.ep_step_s < why.tp_step_s
        assert is_ahead == (why.ep_from_rows is not None)
        assert ("EP is ahead from" in str(why)) == is_ahead


@pytest.mark.parametrize(
    ("model", "parallel"),
    [("llama-3-8b", Parallelism(8, 1, 1)), ("deepseek-v3", Parallelism()), ("mixtral-8x7b", Parallelism(1, 16, 1))],
)
def test_where_there_is_nothing_to_choose_nothing_is_said(model, parallel):
    assert experts_choice(option(model, parallel, 16), CONTEXT) is None

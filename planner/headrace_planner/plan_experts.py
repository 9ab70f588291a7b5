"""Why a plan divides experts as it does: whole experts on each GPU (EP), or a part of every one's columns (TP).

Either way a GPU reads as many bytes of experts, if choices are even. What differs is what travels: tokens to their
experts and rows back, or tokens and sums to everybody; and how much of the activations a GPU's experts take and give.
Active share and rows say how many experts a step reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace_core.roofline.roofline import Roofline
from headrace_core.roofline.step_load import StepLoad

from headrace_planner.capacity import DecodeOption
from headrace_planner.sim_roofline import Machine
from headrace_planner.sim_tradeoffs import batches

_SENDING = frozenset({"dispatch", "combine"})
_COMPUTING = frozenset({"expert_gate", "expert_up", "expert_down"})


@dataclass(frozen=True, slots=True)
class ExpertsChoice:
    """EP beside TP experts on the same GPUs, at the plan's batch. Seconds of a step, and of all its layers' parts."""

    division: str
    """What the plan takes: "EP8" or "TP8"."""
    active_share: float
    """Experts of a token over all."""
    num_experts: int
    experts_read: float
    """Of a layer, that a step's rows are expected to choose."""
    rows: int
    ep_step_s: float
    tp_step_s: float
    ep_sending_s: float
    tp_sending_s: float
    ep_computing_s: float
    tp_computing_s: float
    ep_from_rows: int | None
    """The power of two from which on EP's step is shorter; None: never up to the plan's batch."""

    def __str__(self) -> str:
        ms = [f"{1e3 * seconds:.2f}" for seconds in (
            self.ep_step_s, self.tp_step_s, self.ep_sending_s, self.tp_sending_s, self.ep_computing_s,
            self.tp_computing_s,
        )]  # fmt: skip
        crossing = (
            f"EP is ahead from {self.ep_from_rows} rows on"
            if self.ep_from_rows
            else f"TP is ahead up to these {self.rows} rows"
        )
        return (
            f"experts by {self.division}: a token uses {self.active_share:.1%} of them, so {self.rows} rows read "
            f"{self.experts_read:.0f} of {self.num_experts} in a layer. A step takes {ms[0]} ms with EP, {ms[1]} with "
            f"TP, of which sending {ms[2]} and {ms[3]}, computing experts {ms[4]} and {ms[5]}; {crossing}"
        )


def experts_choice(option: DecodeOption, context: float) -> ExpertsChoice | None:
    """Return why `option` divides experts so, for sequences of `context` tokens; None: it has nothing to divide."""
    machine = option.machine
    moe, gpus = machine.shape.moe, machine.parallel.num_gpus
    if moe is None or gpus == 1 or moe.num_experts % gpus:
        return None
    ep, tp = (replace(machine, parallel=replace(machine.parallel, ep=each)) for each in (gpus, 1))
    steps = [_step(each, option.batch, context) for each in (ep, tp)]
    share = moe.num_experts_per_token / moe.num_experts
    return ExpertsChoice(
        division=f"EP{machine.parallel.ep}" if machine.parallel.ep > 1 else f"TP{gpus}",
        active_share=share,
        num_experts=moe.num_experts,
        experts_read=moe.num_experts * (1 - (1 - share) ** option.batch),
        rows=option.batch,
        ep_step_s=steps[0].time_s,
        tp_step_s=steps[1].time_s,
        ep_sending_s=_seconds(steps[0], _SENDING),
        tp_sending_s=_seconds(steps[1], _SENDING),
        ep_computing_s=_seconds(steps[0], _COMPUTING),
        tp_computing_s=_seconds(steps[1], _COMPUTING),
        ep_from_rows=_ahead_from(ep, tp, option.batch, context),
    )


def _ahead_from(ep: Machine, tp: Machine, most: int, context: float) -> int | None:
    """Return the least power of two from which on, up to `most` rows, the first machine is the faster."""
    found = None
    for rows in reversed([1, 2, 4, *batches(most)]):
        if _step(ep, rows, context).time_s >= _step(tp, rows, context).time_s:
            break
        found = rows
    return found


def _step(machine: Machine, rows: int, context: float) -> Roofline:
    return machine.step(StepLoad.decode(rows, rows * context))


def _seconds(step: Roofline, names: frozenset[str]) -> float:
    return sum(row.time_s for row in step.operations if row.name in names)

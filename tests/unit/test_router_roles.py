"""Workers of role both help with prompts when prompts wait for prefill workers, and stop when they do not."""

from itertools import pairwise

import numpy as np
from headrace_core.request_trace import Workload
from headrace_planner.sim_config import SimConfig, WorkerSpec
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes
from headrace_router.placement.capacity import Waiting, WorkerView
from headrace_router.placement.policy import lacks_prefill, plan
from headrace_router.placement.roles import Roles


def view(address, role="both", *, in_flight=0, free=100, slots=8, takes_prompts=False):
    can_prefill, can_decode = role != "decode", role != "prefill"
    return WorkerView(
        address, 16, 100, 100, free, 64, in_flight, slots, can_prefill, can_decode, num_slots=8,
        takes_prompts=takes_prompts,
    )  # fmt: skip


def waiting(num_tokens=32):
    return Waiting(num_tokens, num_tokens + 16, 1, num_most_tokens=num_tokens + 16)


def test_one_that_would_wait_for_a_prefill_worker_goes_to_one_on_duty_alone():
    fleet = [view("p", "prefill", in_flight=64), view("a"), view("b", takes_prompts=True)]
    (assignment,) = plan([waiting()], fleet)
    assert (assignment.prefill, assignment.decode) == ("", "b")
    fleet[2].takes_prompts = False
    assert plan([waiting()], fleet) == [], "nobody is on duty"


def test_while_prefill_workers_have_room_pairs_are_made_and_those_on_duty_are_the_last_to_decode():
    fleet = [view("p", "prefill"), view("a", free=50), view("b", takes_prompts=True)]
    (assignment,) = plan([waiting()], fleet)
    assert (assignment.prefill, assignment.decode) == ("p", "a")
    fleet[1].num_free_slots = 0
    (assignment,) = plan([waiting()], fleet)
    assert (assignment.prefill, assignment.decode) == ("p", "b")


def test_one_on_duty_takes_no_more_prompts_than_its_budget():
    fleet = [view("p", "prefill", in_flight=64), view("b", takes_prompts=True)]
    assert [each.decode for each in plan([waiting(32)] * 4, fleet)] == ["b", "b"]


def test_pressure_is_waiting_for_prefill_workers_and_for_nothing_else():
    fleet = [view("p", "prefill", in_flight=64), view("a")]
    assert lacks_prefill(waiting(), fleet)
    assert not lacks_prefill(waiting(), [view("p", "prefill"), view("a")])
    assert not lacks_prefill(waiting(), [fleet[0], view("a", slots=0)]), "it waits for slots as well"
    assert not lacks_prefill(waiting(), [view("a", in_flight=64)]), "there are no prefill workers to help"


def on_duty(roles, now_s, fleet):
    return {worker.address for worker in roles.look(now_s, fleet) if worker.takes_prompts}


def test_duty_follows_pressure_one_worker_at_a_time_and_not_every_burst():
    roles, fleet = Roles(), [view("p", "prefill"), view("a", free=20), view("b", free=90), view("c", free=50)]
    sizes, changes = [], []
    for tick in range(600):  # 60 s: pressed from 10 to 30, but for bursts of a tick before and after
        now_s = tick / 10
        found = on_duty(roles, now_s, fleet)
        if not sizes or sizes[-1] != len(found):
            changes.append(now_s)
        sizes.append(len(found))
        roles.on_round(now_s, is_pressed=10 <= now_s < 30 or tick % 20 == 0)
    assert max(sizes[:100]) == 0, "a burst changes nothing"
    assert max(sizes) == 3
    assert sizes[-1] == 0
    assert all(later - earlier >= 2.0 for earlier, later in pairwise(changes[1:]))
    assert all(abs(later - earlier) <= 1 for earlier, later in pairwise(sizes))


def test_the_freest_begins_and_one_that_left_is_forgotten():
    roles, fleet = Roles(), [view("p", "prefill"), view("a", free=20), view("b", free=90)]
    for tick in range(60):
        on_duty(roles, tick / 10, fleet)
        roles.on_round(tick / 10, is_pressed=True)
        if roles.on_duty:
            break
    assert roles.on_duty == {"b"}
    assert on_duty(roles, 6.0, fleet[:2]) <= {"a"}


def test_a_fleet_of_boths_alone_is_left_as_it_is():
    roles, fleet = Roles(), [view("a"), view("b")]
    for tick in range(100):
        roles.on_round(tick / 10, is_pressed=True)
        assert roles.look(tick / 10, fleet) == fleet


def changing_mix():
    """Prompts, then answers, then prompts: 10 s each."""
    arrivals, prompts, outputs = [], [], []
    for phase, (rate, num_prompt, num_output) in enumerate([(9.0, 2000, 8), (9.0, 64, 200), (9.0, 2000, 8)]):
        count = int(10 * rate)
        arrivals.append(10.0 * phase + np.arange(count) / rate)
        prompts.append(np.full(count, num_prompt))
        outputs.append(np.full(count, num_output))
    return Workload(np.concatenate(arrivals), np.concatenate(prompts), np.concatenate(outputs), block_tokens=64)


def test_simulated_roles_that_follow_the_load_beat_the_ratio_they_start_from():
    spec = WorkerSpec(
        LinearStepTimes(fixed_s=0.01, row_s=2e-4, prompt_token_s=1e-4), num_pages=4000, max_step_tokens=2048
    )
    fixed = simulate(SimConfig(spec, spec, None, 1, 2, fidelity="fast"), changing_mix())
    follows = simulate(SimConfig(spec, None, spec, 1, 0, 2, fidelity="fast"), changing_mix())
    assert fixed.num_done == follows.num_done
    assert np.nanpercentile(follows.ttft_s, 90) < 0.5 * np.nanpercentile(fixed.ttft_s, 90)

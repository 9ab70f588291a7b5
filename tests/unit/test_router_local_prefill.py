"""Which prompts a decode worker had better compute itself, by what hand-offs and steps took."""

from dataclasses import replace

import numpy as np
import pytest
from headrace_core.request_trace import Workload
from headrace_core.testing.async_test import async_test
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes
from headrace_router.fleet.session import LastTransfer
from headrace_router.placement.local_prefill import Costs, local_below
from headrace_router.testing import remembered, remembering_worker, run_router, text_request

from tests.unit.router_dispatch_parts import StubSample, a_queue

COSTS = Costs(start_s=0.1, token_s=0.001, transfer_s=0.0, step_s=0.02, num_running=7)


def here_s(costs, num_tokens):
    return 1.5 * costs.step_s + num_tokens * costs.token_s * (1 + costs.num_running)


def there_s(costs, num_tokens):
    return costs.start_s + num_tokens * (costs.token_s + costs.transfer_s)


def test_it_is_where_both_ways_cost_the_same():
    bound = local_below(COSTS, 1000)
    assert bound == 10
    assert here_s(COSTS, bound) <= there_s(COSTS, bound) + 1e-9
    assert here_s(COSTS, bound + 1) > there_s(COSTS, bound + 1)


def test_more_is_computed_here_where_less_runs_and_moving_costs_more():
    assert local_below(replace(COSTS, num_running=1), 1000) == 70
    assert local_below(replace(COSTS, transfer_s=0.002), 1000) == 14
    assert local_below(replace(COSTS, start_s=0.3), 1000) == 38
    assert local_below(replace(COSTS, num_running=0), 1000) == 1000, "a step's worth is the most"


def test_nothing_is_where_steps_are_longer_than_hand_offs():
    assert local_below(replace(COSTS, step_s=0.1), 1000) == 0


@async_test
async def test_the_router_says_nothing_until_hand_offs_and_pages_were_seen():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        decode = queue.add_worker("d", "decode")
        placement = await queue.placed_now(StubSample())
        dispatcher = queue.dispatcher
        assert dispatcher.local_below(placement) is None
        for num_tokens in (100, 200, 300, 400):
            dispatcher._book.forecast.on_first_token(num_tokens, 0.1 + 0.001 * num_tokens)
        assert dispatcher.local_below(placement) is None, "how fast pages move is not known"
        decode.last_transfer = LastTransfer("shm", 1 << 40)
        decode.session.step_s, decode.load.num_running = 0.02, 7
        assert dispatcher.local_below(placement) == 10


def test_a_worker_is_told_what_is_predicted_and_until_then_what_is_set(tmp_path):
    async def test(router):
        flow = router.service._router._flow
        for predicted in (None, 33, 0):
            flow._dispatcher.local_below = lambda placement, predicted=predicted: predicted
            (sample,) = await router.generate(text_request(f"hi {predicted}", sampling={"max_tokens": 2}))
            assert sample.token_ids == remembered(f"hi {predicted}", 2)
        assert [start.local_below for start in router.workers[1].starts] == [48, 33, 0]

    workers = [remembering_worker("prefill"), remembering_worker("decode")]
    run_router(tmp_path, workers, test, local_below_tokens=48, predict_local=True)


def test_simulated_first_tokens_come_sooner_and_gaps_grow_little():
    """Short prompts behind long ones at a busy prefill worker."""
    count = 120
    num_prompt = np.where(np.arange(count) % 4 == 0, 2000, 24)
    workload = Workload(np.arange(count) * 0.08, num_prompt, np.full(count, 20), block_tokens=64)
    spec = WorkerSpec(
        LinearStepTimes(fixed_s=0.01, row_s=2e-4, prompt_token_s=1e-4), num_pages=4000, max_step_tokens=2048
    )
    config = SimConfig(spec, spec, None, 1, 1, wire=Wire(rpc_s=0.002, latency_s=0.005), fidelity="exact")
    never, predicted = simulate(config, workload), simulate(replace(config, predicts_local=True), workload)
    assert never.num_done == predicted.num_done == count
    short = num_prompt < 100
    assert np.mean(predicted.ttft_s[short]) < 0.6 * np.mean(never.ttft_s[short])
    assert predicted.itl_mean() == pytest.approx(never.itl_mean(), rel=0.15)

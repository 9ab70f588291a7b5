"""A client's request id names a request for that client alone: nobody else who uses it can touch the request."""

import asyncio
import dataclasses
from types import SimpleNamespace

from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import check_request_id
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.testing import (
    RouterUnderTest,
    remembered,
    remembering_worker,
    run_router,
    text_request,
    tokens_request,
    wait_until,
)


def test_requests_of_one_id_run_side_by_side(tmp_path):
    async def test(router):
        prefill, decode = router.workers
        decode.faults.step_gate.clear()
        tasks = [
            asyncio.create_task(router.generate(text_request(text, request_id="job-1", sampling={"max_tokens": 30})))
            for text in ("mine", "yours", "theirs")
        ]
        await wait_until(lambda: len(decode.sequences) == 3 or any(task.done() for task in tasks))
        decode.faults.step_gate.set()
        results = [(await task)[0].token_ids for task in tasks]
        assert results == [remembered(text, 30) for text in ("mine", "yours", "theirs")]
        assert {call.attempt for call in [*prefill.prefills, *decode.starts]} == {1}

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


def test_a_client_sees_its_own_id_and_workers_one_of_the_request_alone(tmp_path):
    async def test(router):
        prefill, decode = router.workers
        names = ["", "job-1", "job-1", "x" * 64]
        told = []
        for name in names:
            call = router.stub.Generate(text_request("a", request_id=name, n=2, sampling={"max_tokens": 3}))
            told.append({message.request_id async for message in call} - {""})
        sent = [call.request_id for call in prefill.prefills]
        assert sorted(sent) == sorted(call.request_id for call in decode.starts)
        assert len(set(sent)) == 4  # both samples of a request share it
        for index, name in enumerate(names):
            sent_id = sent[2 * index]
            check_request_id(sent_id)
            assert told[index] == {name or sent_id}
            assert sent_id.startswith(name[:39])

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


def loaded(model):
    return dataclasses.replace(loaded_fake_model(model=model, num_pages=256), fingerprint="fa4e" * 16)


async def both_exact(folder, addresses, model):
    """Let two routers, each with a client that calls its request the same, use the same workers at one time."""
    workers = [SimpleNamespace(address=address, is_empty=True, start=_nothing, stop=_nothing) for address in addresses]

    def request(*prompt):
        return tokens_request(
            *prompt, request_id="req-1", sampling={"max_tokens": 40, "ignore_eos": True, "temperature": 0}
        )

    async with (
        RouterUnderTest(folder / "a", workers=workers) as first,
        RouterUnderTest(folder / "b", workers=workers) as second,
    ):
        for router in (first, second):
            await router.wait_states(["ready"] * len(workers))
        ((mine,), (yours,)) = await first.generate(request(1, 2, 3)), await second.generate(request(4, 5))
        model.hold()
        tasks = [asyncio.create_task(first.generate(request(1, 2, 3)))]
        await asyncio.to_thread(model.wait_held)
        tasks.append(asyncio.create_task(second.generate(request(4, 5))))
        at_second = second.service._router
        await wait_until(
            lambda: (at_second.num_running and not at_second.num_queued) or any(task.done() for task in tasks)
        )
        model.release()
        assert [(await task)[0].token_ids for task in tasks] == [mine.token_ids, yours.token_ids]
        for router in (first, second):
            assert not [
                sample
                for metric in router.service.registry.collect()
                for sample in metric.samples
                if sample.name == "headrace_retries_total" and sample.value
            ]


async def _nothing(*_):
    pass


def test_two_routers_whose_clients_use_one_id_share_a_worker(tmp_path):
    async def main():
        model = FakeModel()
        service = DecodeService(DecodeSettings(model=".", role="both"), loader=lambda _: loaded(model))
        async with running(service) as addresses:
            await both_exact(tmp_path, addresses, model)

    asyncio.run(main())


def test_two_routers_whose_clients_use_one_id_share_a_prefill_worker(tmp_path):
    async def main():
        model = FakeModel()
        prefill = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded(model))
        decode = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded(FakeModel()))
        async with running(prefill, decode) as addresses:
            await both_exact(tmp_path, addresses, model)

    asyncio.run(main())

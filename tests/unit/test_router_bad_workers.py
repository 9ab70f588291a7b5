"""A worker that says what can't be costs itself: its link, its attempts, nobody else's."""

import asyncio

import pytest
from google.protobuf.internal.encoder import _VarintBytes
from grpc_health.v1 import health_pb2
from headrace.v1 import decode_service_pb2 as pb
from headrace.v1 import worker_service_pb2
from headrace_core.errors import HandoffLostError, InvalidRequestError
from headrace_core.reasons import label
from headrace_core.testing.garbler import no_message, rewriting
from headrace_router.fleet import link
from headrace_router.testing import (
    VOCAB_SIZE,
    remembered,
    remembering_worker,
    run_router,
    text_request,
    wait_until,
)


def info(**fields):
    def change(message):
        for name, value in fields.items():
            message.ClearField(name)
            if isinstance(value, list):
                getattr(message, name).extend(value)
            elif value is not None:
                setattr(message, name, value)

    return "GetInfo", rewriting(worker_service_pb2.GetInfoResponse, change)


def layout(**fields):
    def change(message):
        for name, value in fields.items():
            setattr(message.layout, name, value)

    return "GetInfo", rewriting(worker_service_pb2.GetInfoResponse, change)


def no_width(message):
    message.layout.latent.kv_lora_rank = message.layout.latent.rope_dim = 0


def num_pages_of_60_bits(content):
    return content + bytes([6 << 3]) + _VarintBytes(1 << 60)


HEALTH = health_pb2.HealthCheckResponse
LOAD = worker_service_pb2.WatchLoadResponse
LINK_FAULTS = {
    "health: no message": ("Watch", no_message, "no message"),
    "health: empty": ("Watch", lambda content: b"", "its health is 0"),
    "health: unknown": ("Watch", rewriting(HEALTH, lambda health: setattr(health, "status", 99)), "its health is 99"),
    "health: service unknown": (
        "Watch",
        rewriting(HEALTH, lambda health: setattr(health, "status", 3)),
        "its health is 3",
    ),
    "info: no message": ("GetInfo", no_message, "no message"),
    "info: empty": ("GetInfo", lambda content: b"", "role is 0"),
    "info: role": (*info(role=9), "role is 9"),
    "info: incarnation": (*info(incarnation=None), "incarnation"),
    "info: no fingerprint": (*info(model_fingerprint=None), "fingerprint is ''"),
    "info: fingerprint is no hash": (*info(model_fingerprint="a\nb" * 40), "fingerprint is 'a"),
    "info: no layout": (*info(layout=None), "layout"),
    "info: page size": (*layout(page_size=0), "page size"),
    "info: huge page": (*layout(page_size=1 << 31), "its pages hold 2147483648"),
    "info: no layers": (*layout(num_layers=0), "layers"),
    "info: cache type": (*layout(dtype=7), "dtype"),
    "info: no width": ("GetInfo", rewriting(worker_service_pb2.GetInfoResponse, no_width), "width of 0"),
    "info: no pages": (*info(num_pages=0), "num_pages is 0"),
    "info: 2^60 pages": ("GetInfo", num_pages_of_60_bits, "num_pages is 0"),
    "info: 2^32 - 1 pages": (*info(num_pages=(1 << 32) - 1), "num_pages is 4294967295"),
    "info: context": (*info(max_context_tokens=0), "max_context_tokens is 0"),
    "info: context of 1": (*info(max_context_tokens=1), "max_context_tokens is 1"),
    "info: token budget": (*info(max_step_tokens=0), "max_step_tokens is 0"),
    "info: metrics port": (*info(metrics_port=65_536), "its metrics are at port 65536"),
    "info: huge token budget": (*info(max_step_tokens=(1 << 32) - 1), "max_step_tokens is 4294967295"),
    "info: no sequences": (*info(max_step_sequences=0), "max_step_sequences is 0"),
    "info: no vocabulary": (*info(vocab_size=0), "vocab_size is 0"),
    "info: other vocabulary": (*info(vocab_size=VOCAB_SIZE + 1), "vocabulary has 259 tokens; this fleet's has 258"),
    "info: end outside": (*info(eos_token_ids=[VOCAB_SIZE]), "end-of-sequence id is 258"),
    "info: many ends": (*info(eos_token_ids=[1] * 100_000), "100000 end-of-sequence ids"),
    "info: many transports": (*info(transports=["fake"] * 100_000), "100000 transports"),
    "info: long transport": (*info(transports=["x" * 1_000_000]), "transport"),
    "load: no message": ("WatchLoad", no_message, "no message"),
    "load: too many pages": (
        "WatchLoad",
        rewriting(LOAD, lambda load: setattr(load, "num_free_pages", 257)),
        "257 free pages, of 256",
    ),
    "steps: no message": ("Session", no_message, "no message"),
}


def test_workers_that_say_what_can_not_be_are_refused_by_name_and_come_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(link, "_REFUSED_PAUSE_S", 0.1)

    async def test(router):
        good = asyncio.create_task(router.generate(text_request("good", sampling={"max_tokens": 400})))
        words = {}
        for method, rewrite, expected in LINK_FAULTS.values():
            bad = remembering_worker("both")
            bad.garbler.rewrites[method] = rewrite
            await router.add(bad)
            words[bad.address] = expected
        await router.wait_states(["ready", "ready", *["refused"] * len(words)])
        details = {status.address: status.detail for status in (await router.info()).workers}
        warnings = {getattr(each, "address", ""): each for each in caplog.records if each.levelname == "WARNING"}
        for (address, expected), name in zip(words.items(), LINK_FAULTS, strict=True):
            assert expected in details[address], name
            assert len(details[address]) <= 500, name
            assert expected in warnings[address].detail, name
        assert (await good)[0].token_ids == remembered("good", 400)
        assert router.metric("headrace_retries_total", reason="PROTOCOL") == 0
        for bad in router.workers:
            bad.garbler.rewrites.clear()
        await router.wait_states(["ready"] * (2 + len(words)))

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode", step_s=0.001)], test)


@pytest.mark.parametrize("method", ["Watch", "WatchLoad", "Session"])
def test_a_worker_that_turns_bad_loses_its_sequences_to_another(tmp_path, monkeypatch, method):
    monkeypatch.setattr(link, "_REFUSED_PAUSE_S", 0.02)

    async def test(router):
        first, second = router.workers[1:]
        first.faults.step_gate.clear()
        tasks = [
            asyncio.create_task(router.generate(text_request(str(i), sampling={"max_tokens": 80}))) for i in range(4)
        ]
        await wait_until(lambda: len(first.sequences) == 2 and len(second.sequences) == 2)
        first.garbler.rewrites[method] = no_message
        await first.set_ready(False)
        first.on_change()
        if method == "Session":
            first.faults.step_gate.set()
        await router.wait_states(["ready", "ready", "refused"])
        first.faults.step_gate.set()
        await first.set_ready(True)
        assert [(await task)[0].token_ids for task in tasks] == [remembered(str(i), 80) for i in range(4)]
        assert router.metric("headrace_retries_total", reason="PROTOCOL") == 2
        assert {call.attempt for call in second.starts} == {1, 2}

    run_router(
        tmp_path, [remembering_worker("prefill"), *(remembering_worker("decode", step_s=0.01) for _ in range(2))], test
    )


OUTPUT = pb.SessionResponse


def once(change):
    """Return a rewrite of step messages that changes the first entry of the fifth message that has tokens."""
    counts = {"messages": 0}

    def rewrite(message):
        has_tokens = bool(message.entries) and message.entries[0].HasField("tokens")
        counts["messages"] += has_tokens
        if has_tokens and counts["messages"] == 5:
            counts["messages"] += 1
            change(message.entries[0])

    return rewriting(OUTPUT, rewrite)


def _forever(entry):
    entry.tokens.token_ids.extend([1] * 100)
    if entry.tokens.logprobs:
        entry.tokens.logprobs.extend([entry.tokens.logprobs[0]] * 100)


def tokens(change):
    return lambda entry: change(entry.tokens)


OUTPUT_FAULTS = {
    "token outside the vocabulary": tokens(lambda it: it.token_ids.append(VOCAB_SIZE)),
    "token of 32 bits": tokens(lambda it: it.token_ids.append((1 << 32) - 1)),
    "no token": tokens(lambda it: it.ClearField("token_ids")),
    "an end without a token": tokens(lambda it: (it.ClearField("token_ids"), setattr(it, "finish_reason", 1))),
    "unknown end": tokens(lambda it: setattr(it, "finish_reason", 77)),
    "no log-probabilities": tokens(lambda it: it.ClearField("logprobs")),
    "log-probabilities of another token": tokens(lambda it: it.logprobs.append(it.logprobs[0])),
    "log-probability of NaN": tokens(lambda it: setattr(it.logprobs[0], "logprob", float("nan"))),
    "log-probability above 0": tokens(lambda it: setattr(it.logprobs[0], "logprob", 3.0)),
    "probable token outside": tokens(lambda it: setattr(it.logprobs[0].top[0], "token_id", VOCAB_SIZE)),
    "many probable tokens": tokens(lambda it: it.logprobs[0].top.extend([it.logprobs[0].top[0]] * 30)),
    "what a token stands for": tokens(lambda it: setattr(it.logprobs[0], "token", b"no worker's to say")),
    "more tokens than asked for": _forever,
    "nothing": lambda entry: entry.ClearField("tokens"),
    "a position ahead": lambda entry: setattr(entry, "position", entry.position + 1),
    "it joins again": lambda entry: entry.joined.SetInParent(),
    "failure of no code": lambda entry: setattr(entry.failure, "reason", "\n" * 9),
    "failure of an unknown code": lambda entry: entry.failure.MergeFrom(pb.Failure(code=99, reason="BUG", side=1)),
    "failure for no reason": lambda entry: entry.failure.MergeFrom(pb.Failure(code=10, reason="no reason", side=1)),
    "failure of nobody": lambda entry: entry.failure.MergeFrom(pb.Failure(code=10, reason="STALE_PAGE")),
}


def test_a_sequence_whose_output_can_not_be_goes_on_elsewhere_and_its_neighbour_stays(tmp_path):
    async def test(router):
        _, bad, _ = router.workers
        wanted = {"max_tokens": 60, "top_logprobs": 1}
        for number, (name, change) in enumerate(OUTPUT_FAULTS.items(), 1):
            bad.faults.step_gate.clear()
            tasks = [asyncio.create_task(router.generate(text_request(text, sampling=wanted))) for text in ("a", "b")]
            await wait_until(lambda: len(bad.sequences) == 2)
            bad.garbler.rewrites["Session"] = once(change)
            bad.faults.step_gate.set()
            results = [(await task)[0] for task in tasks]
            assert [result.token_ids for result in results] == [remembered(text, 60) for text in ("a", "b")], name
            assert all(len(result.logprobs) == 60 for result in results), name
            assert router.metric("headrace_retries_total", reason="PROTOCOL") == number, name
            assert len(bad.starts) == 2 * number, name
            await wait_until(lambda number=number: len(bad.cancels) == number)
            await router.wait_empty()

    workers = [
        remembering_worker("prefill"),
        remembering_worker("decode", step_s=0.003, num_pages=4096),
        remembering_worker("decode"),
    ]
    run_router(tmp_path, workers, test)


def test_a_sequence_that_does_not_end_where_it_must_goes_on_elsewhere(tmp_path):
    async def test(router):
        bad = router.workers[1]
        endless = first("tokens", lambda tokens: tokens.ClearField("finish_reason"))
        bad.garbler.rewrites["Session"] = endless
        (sample,) = await router.generate(text_request("a", sampling={"max_tokens": 10}))
        assert sample.token_ids == remembered("a", 10)
        assert router.metric("headrace_retries_total", reason="PROTOCOL") == 1

    run_router(
        tmp_path,
        [remembering_worker("prefill"), remembering_worker("decode", num_pages=4096), remembering_worker("decode")],
        test,
    )


def first(kind, change):
    """Return a rewrite of every entry of a kind."""

    def rewrite(message):
        for entry in message.entries:
            if entry.HasField(kind):
                change(getattr(entry, kind))

    return rewriting(OUTPUT, rewrite)


ANSWER_FAULTS = {
    "prefilled: token outside": first("prefilled", lambda it: setattr(it, "token_id", VOCAB_SIZE)),
    "prefilled: no log-probability": first("prefilled", lambda it: it.ClearField("logprobs")),
    "prefilled: unknown end": first("prefilled", lambda it: setattr(it, "finish_reason", 77)),
    "prefilled: more cached than there was": first("prefilled", lambda it: setattr(it, "num_cached_tokens", 1 << 31)),
    "joined: more pages than there are": first("joined", lambda it: setattr(it, "num_transfer_pages", (1 << 32) - 1)),
    "joined: more bytes than pages": first("joined", lambda it: setattr(it, "transfer_bytes", (1 << 64) - 1)),
    "joined: more hidden bytes than bytes": first("joined", lambda it: setattr(it, "hidden_transfer_bytes", 1 << 63)),
    "joined: unheard-of transport": first("joined", lambda it: setattr(it, "transport", "x" * 1_000_000)),
    "joined: more cached than there was": first("joined", lambda it: setattr(it, "num_cached_tokens", 1 << 31)),
}


def all_take_work(router):
    """Tell whether no worker is held; let each report, which ends it."""
    for each in router.workers:
        each.on_change()
    return len(router.service._router.fleet.workers()) == len(router.workers)


def test_an_attempt_whose_answer_can_not_be_is_made_again_elsewhere(tmp_path):
    async def test(router):
        _, bad, _ = router.workers
        wanted = {"max_tokens": 20, "top_logprobs": 1}
        for name, rewrite in ANSWER_FAULTS.items():
            before = router.metric("headrace_retries_total", reason="PROTOCOL")
            bad.garbler.rewrites = {"Session": rewrite}
            await wait_until(lambda: all_take_work(router))
            for text in "abcd":
                request = text_request(text, include_timings=True, sampling=wanted)
                assert (await router.generate(request))[0].token_ids == remembered(text, 20), name
            assert router.metric("headrace_retries_total", reason="PROTOCOL") > before, name

    workers = [
        remembering_worker("prefill"),
        remembering_worker("decode", num_pages=4096),
        remembering_worker("decode"),
    ]
    run_router(tmp_path, workers, test)


def test_a_workers_words_reach_the_client_cut_and_its_reasons_make_no_metrics(tmp_path):
    async def test(router):
        for number in range(6):
            router.workers[0].faults.join.append(HandoffLostError(f"INVENTED_{number}", "é" * 50_000))
        error = await router.refused(text_request("a"))
        assert error.reason == "RETRIES_EXHAUSTED"
        assert "INVENTED_" in str(error)
        router.workers[0].faults.join.clear()
        router.workers[0].faults.join.append(InvalidRequestError("not a reason", "no"))
        await router.generate(text_request("a"))
        samples = [
            sample
            for metric in router.service.registry.collect()
            for sample in metric.samples
            if not sample.name.endswith("_created")
        ]
        assert {sample.labels.get("reason") for sample in samples if sample.value} == {None, "OTHER", "PROTOCOL"}
        reasons = {sample.labels["reason"] for sample in samples if "reason" in sample.labels}
        assert reasons == {label(reason) for reason in reasons}, "those counted at 0 are known ones"

    run_router(tmp_path, [remembering_worker("both")], test)


@pytest.mark.parametrize("leg", ["prefill", "join"])
def test_a_sequence_that_hangs_at_a_worker_whose_link_is_refused_is_made_elsewhere(tmp_path, leg):
    """Its channel is as good as ever: the sequence itself would wait for its deadline."""

    async def test(router):
        prefill, decode = router.workers
        bad = prefill if leg == "prefill" else decode
        gate = bad.faults.prefill_gate if leg == "prefill" else bad.faults.join_gate
        gate.clear()
        running = asyncio.create_task(router.generate(text_request("a", sampling={"max_tokens": 20}), timeout_s=10.0))
        await wait_until(lambda: bool(bad.prefills if leg == "prefill" else bad.starts))
        await router.add(remembering_worker("prefill" if leg == "prefill" else "decode"))
        await router.wait_states(["ready"] * 3)
        bad.garbler.rewrites["WatchLoad"] = no_message
        bad.on_change()
        (sample,) = await running
        assert sample.token_ids == remembered("a", 20)
        assert router.metric("headrace_retries_total", reason="PROTOCOL") == 1
        if leg == "prefill":
            assert len(decode.cancels) == 1
        await wait_until(lambda: not prefill.held)
        gate.set()

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)

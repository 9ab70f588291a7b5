"""Prompts at the router: what is refused before it costs anything, and who waits for whom."""

import asyncio
import json
import threading

import pytest
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.errors import DeadlineError
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_script import scripted
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.testing import (
    BOS,
    VOCAB_SIZE,
    RouterUnderTest,
    byte_ids,
    text_request,
    wait_until,
    write_tokenizer,
)
from headrace_router.text import chat_renderer

SHORT = {"max_tokens": 1}


def worker(**options):
    return FakeWorker("both", next_token=scripted(byte_ids("abc ")), vocab_size=VOCAB_SIZE, **options)


def run(folder, test, *workers, **settings):
    async def main():
        async with RouterUnderTest(folder, workers=list(workers), settings=settings) as router:
            await router.wait_states(["ready"] * len(workers))
            await test(router)
            await router.wait_empty()

    asyncio.run(main())


def tokens_request(token_ids):
    return pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=token_ids), sampling=types_pb2.SamplingParams(**SHORT))


def chat_request(*contents):
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=content) for content in contents])
    return pb.GenerateRequest(chat=chat, sampling=types_pb2.SamplingParams(**SHORT))


class Gate:
    """Stands before the router's tokenizer: counts the texts, and holds back those of `held_bytes` or more."""

    def __init__(self, router, held_bytes=1 << 40):
        self.sizes = []
        self.is_open = threading.Event()
        self._held_bytes = held_bytes
        tokenizer = router.service._router._tokenizer
        self._encode = tokenizer.encode
        tokenizer.encode = self.encode

    def encode(self, text, **options):
        self.sizes.append(len(text))
        if len(text) >= self._held_bytes:
            assert self.is_open.wait(WAIT_S), "nobody opened the gate"
        return self._encode(text, **options)


def test_a_conversation_of_very_many_messages_is_refused_by_their_number(tmp_path):
    async def test(router):
        gate = Gate(router)
        for num_messages, words in ((5000, "5000 messages; at most 4096 are taken"), (100_000, "than 16384 parts")):
            error = await router.refused(chat_request(*[""] * num_messages))
            assert error.reason == "PROMPT_TOO_LONG"
            assert words in str(error)
        assert gate.sizes == []

    run(tmp_path, test, worker())


def test_a_message_costs_more_than_its_words(tmp_path):
    async def test(router):
        error = await router.refused(chat_request(*[""] * 100))
        assert error.reason == "PROMPT_TOO_LONG"
        assert "6400 bytes; this router takes 4096" in str(error)
        (sample,) = await router.generate(chat_request(*[""] * 60))
        assert sample.last.usage.num_prompt_tokens == 1 + 60 * len("[user]") + len("[assistant]")

    run(tmp_path, test, worker(), max_prompt_bytes=4096)


def test_a_text_that_no_context_holds_is_refused_without_tokenizing_it(tmp_path):
    """The longest token of the tiny tokenizer is `<bos>`, five bytes."""

    async def test(router):
        gate = Gate(router)
        for request in (text_request("x" * 5 * 1024), text_request("é" * 1_000_000), chat_request("x" * 5 * 1024)):
            error = await router.refused(request)
            assert error.reason == "PROMPT_TOO_LONG"
            assert "at least" in str(error)
            assert "the model's context holds 1024" in str(error)
        assert gate.sizes == []
        error = await router.refused(text_request("x" * 5 * 1023))
        assert "the prompt has 5115 tokens" in str(error)
        assert gate.sizes == [5 * 1023]

    run(tmp_path, test, worker())


def test_a_small_prompt_does_not_wait_for_large_ones(tmp_path):
    async def test(router):
        gate = Gate(router, held_bytes=40_000)
        request = text_request("x" * 50_000, sampling=SHORT)
        large = [asyncio.create_task(router.generate(request)) for _ in range(12)]
        await wait_until(lambda: len(gate.sizes) == 1)
        for size in (10, 3000, 30_000):
            (sample,) = await router.generate(text_request("y" * size, sampling=SHORT))
            assert sample.last.usage.num_prompt_tokens == size + 1
        assert gate.sizes == [50_000, 10, 3000, 30_000], "of the large ones, one at a time"
        gate.is_open.set()
        await asyncio.gather(*large)

    run(tmp_path, test, worker(max_context_tokens=1 << 17, num_pages=1 << 15))


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_clients_prompt_does_not_wait_for_all_of_anothers(tmp_path, monkeypatch, kind):
    """Both are large; they take turns."""
    is_open, begun = threading.Event(), []
    render = chat_renderer._Process.render

    def held(process, request):
        begun.append(request.count(b"x"))
        assert is_open.wait(WAIT_S)
        return render(process, request)

    monkeypatch.setattr(chat_renderer._Process, "render", held)

    async def test(router):
        gate = Gate(router, held_bytes=40_000)
        gate.is_open = is_open
        sizes = gate.sizes if kind == "text" else begun

        def send(size, token):
            text = "x" * size
            request = text_request(text, sampling=SHORT) if kind == "text" else chat_request(text)
            return asyncio.create_task(router.generate(request, token=token))

        tasks = [send(50_000, "a") for _ in range(12)]
        await wait_until(lambda: len(sizes) == 1 and router.service._router.num_running == 12)
        tasks.append(send(41_000, "b"))
        await wait_until(lambda: router.service._router.num_running == 13)
        is_open.set()
        await asyncio.gather(*tasks)
        assert sizes.index(41_000) <= 2

    run(tmp_path, test, worker(max_context_tokens=1 << 17, num_pages=1 << 15))


def test_a_prompt_whose_deadline_passes_before_its_turn_is_not_tokenized(tmp_path):
    async def test(router):
        gate = Gate(router, held_bytes=40_000)
        first = asyncio.create_task(router.generate(text_request("x" * 40_000, sampling=SHORT)))
        await wait_until(lambda: len(gate.sizes) == 1)
        late = [asyncio.create_task(router.generate(text_request("y" * 41_000), timeout_s=0.2)) for _ in range(5)]
        for result in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(result, DeadlineError)
        await wait_until(lambda: router.service._router.num_running == 1)
        gate.is_open.set()
        await first
        await router.generate(text_request("z" * 42_000, sampling=SHORT))
        assert gate.sizes == [40_000, 42_000]

    run(tmp_path, test, worker(max_context_tokens=1 << 17, num_pages=1 << 15))


def test_the_routers_own_deadline_holds_for_a_prompt_that_waits_for_its_turn(tmp_path):
    async def test(router):
        gate = Gate(router, held_bytes=40_000)
        tasks = [asyncio.create_task(router.generate(text_request("x" * 40_000), timeout_s=None)) for _ in range(2)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [result.reason for result in results] == ["DEADLINE_EXCEEDED"] * 2
        assert router.metric("headrace_requests_total", outcome="deadline") == 2
        gate.is_open.set()

    run(tmp_path, test, worker(max_context_tokens=1 << 17, num_pages=1 << 15), request_timeout_s=0.2)


def test_many_token_ids_reach_the_worker_as_they_are(tmp_path):
    async def test(router):
        ids = [i % VOCAB_SIZE for i in range(50_000)]
        await router.generate(tokens_request(ids))
        assert list(router.workers[0].starts[0].token_ids) == ids
        for wrong in (0, 20_000, 49_999):
            error = await router.refused(tokens_request([*ids[:wrong], VOCAB_SIZE + wrong, *ids[wrong + 1 :]]))
            assert (error.reason, f"{VOCAB_SIZE + wrong} is outside" in str(error)) == ("BAD_TOKEN", True)

    run(tmp_path, test, worker(max_context_tokens=1 << 16, num_pages=1 << 13))


def test_more_token_ids_than_the_context_holds_are_refused_by_their_number(tmp_path):
    async def test(router):
        error = await router.refused(tokens_request([VOCAB_SIZE + 1] * 1_000_000))
        assert error.reason == "PROMPT_TOO_LONG"
        assert "1000000 tokens" in str(error)

    run(tmp_path, test, worker())


TEMPLATES = {
    "{% if %}": "this model's chat template does not compile: Expected an expression",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "more than 2 s of computing",
    "{{ 1 / (messages | length - 1) }}": "ZeroDivisionError: division by zero",
    "{{ 'x' * 10 ** 9 }}": "needs more than 256 MiB of memory",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_bad_template_costs_its_conversations_only(tmp_path, monkeypatch, template):
    # Two seconds of computing take as long as the machine lets them.
    monkeypatch.setattr(chat_renderer, "_SILENCE_S", WAIT_S)
    config = write_tokenizer(tmp_path / "tiny") / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))

    async def test(router):
        chat = asyncio.create_task(router.refused(chat_request("hi")))
        for _ in range(3):
            (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": 3}))
            assert sample.text == "abc"
        error = await chat
        assert error.reason == "BAD_REQUEST"
        assert TEMPLATES[template] in str(error)
        assert router.metric("headrace_requests_total", outcome="invalid") == 1

    run(tmp_path, test, worker())


@pytest.mark.parametrize(
    ("config", "template_file", "words"),
    [
        ({"chat_template": 3}, None, "neither text nor a list"),
        (
            {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default"}, "y", None]},
            None,
            "neither text nor a list",
        ),
        ({"chat_template": "x"}, b"\xff", "is not UTF-8: 'utf-8'"),
    ],
)
def test_a_template_that_can_not_be_read_costs_conversations_only(tmp_path, config, template_file, words):
    folder = write_tokenizer(tmp_path / "tiny")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template_file:
        (folder / "chat_template.jinja").write_bytes(template_file)

    async def test(router):
        error = await router.refused(chat_request("hi"))
        assert (error.reason, words in str(error)) == ("BAD_REQUEST", True)
        await router.generate(text_request("hi", sampling=SHORT))

    run(tmp_path, test, worker())


def test_a_template_with_generation_marks_serves(tmp_path):
    config = write_tokenizer(tmp_path / "tiny") / "tokenizer_config.json"
    template = (
        "{% for message in messages %}{% generation %}{{ message | tojson(indent=1, separators=(',', ':'), "
        "sort_keys=True, ensure_ascii=True) }}{% endgeneration %}{% endfor %}"
    )
    config.write_text(json.dumps({"chat_template": template}))

    async def test(router):
        await router.generate(chat_request("é"))
        assert list(router.workers[0].starts[0].token_ids) == byte_ids('{\n "content":"\\u00e9",\n "role":"user"\n}')
        await router.generate(text_request("é", sampling=SHORT))
        assert list(router.workers[0].starts[1].token_ids) == [BOS, *byte_ids("é")]

    run(tmp_path, test, worker())

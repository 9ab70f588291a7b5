"""The real router in this process, with fake workers and a tiny tokenizer: for tests. Ships with the product."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from headrace.v1 import generation_service_pb2, types_pb2
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace_core import rpc
from headrace_core.config import RouterSettings
from headrace_core.errors import HeadraceError
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_script import mixed, scripted
from headrace_core.testing.fake_worker import FakeRole, FakeWorker
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from headrace_router.service import RouterService

BOS, EOS = 256, 257
VOCAB_SIZE = 258
HELLO = "Hello, wörld! 👋 "
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_ids(text: str) -> list[int]:
    """Return the ids that the tiny tokenizer gives `text`, without special tokens."""
    return list(text.encode())


def write_tokenizer(folder: Path, *, with_template: bool = True) -> Path:
    """Write a byte-level tokenizer whose ids are the bytes, then <bos> and <eos>; return `folder`."""
    alphabet = _alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    if with_template:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Sampled:
    """What one sample of a request brought the client."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list[types_pb2.TokenLogprobs])
    last: generation_service_pb2.GenerateResponse | None = None


@dataclass
class RouterUnderTest:
    """Starts and stops with `async with`; workers are added before or while it runs."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    workers: list[FakeWorker] = field(default_factory=list[FakeWorker])
    address: str = ""
    _started: list[FakeWorker] = field(default_factory=list[FakeWorker])
    """Every worker there ever was: all are stopped, also when a test fails."""

    async def __aenter__(self) -> RouterUnderTest:
        model = self.folder / "tiny"
        if not (model / "tokenizer.json").exists():
            write_tokenizer(model)
        for worker in self.workers:
            await worker.start()
            self._started.append(worker)
        self.write_workers()
        settings: dict[str, Any] = {"listen": "127.0.0.1:0", "dns_refresh_s": 0.05, "no_workers_timeout_s": WAIT_S}
        self.service = RouterService(
            RouterSettings(model=model, workers_file=self.folder / "workers", **{**settings, **self.settings})
        )
        self.address = await self.service.start()
        self.channel = rpc.channel(self.address)
        self.stub: Any = GenerationServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.service.stop()
        for worker in self._started:
            await worker.stop()

    def write_workers(self) -> None:
        """Tell the router of the workers in the list."""
        (self.folder / "workers").write_text("".join(f"{worker.address}\n" for worker in self.workers))

    async def add(self, worker: FakeWorker, listen: str = "127.0.0.1:0") -> FakeWorker:
        """Start a worker and let the router know."""
        await worker.start(listen)
        self._started.append(worker)
        self.workers.append(worker)
        self.write_workers()
        return worker

    async def info(self) -> generation_service_pb2.GetServerInfoResponse:
        """Return what the router says of itself."""
        return await self.stub.GetServerInfo(generation_service_pb2.GetServerInfoRequest(), timeout=WAIT_S)

    async def wait_states(self, states: Sequence[str]) -> None:
        """Wait until the workers' states, sorted, are these."""
        found: list[str] | None = None
        async with asyncio.timeout(WAIT_S):
            while found != sorted(states):
                await asyncio.sleep(0.005)
                found = sorted(worker.state for worker in (await self.info()).workers)

    async def generate(
        self,
        request: generation_service_pb2.GenerateRequest,
        timeout_s: float | None = WAIT_S,
        *,
        token: str = "",
        traceparent: str = "",
    ) -> list[Sampled]:
        """Run a request to its end, with a bearer token and in a trace if there is one, and return its samples.

        Raises:
            HeadraceError: what the router answered.
        """
        samples = [Sampled() for _ in range(request.n or 1)]
        metadata = [("authorization", f"Bearer {token}")] if token else []
        if traceparent:
            metadata.append(("traceparent", traceparent))
        try:
            async for response in self.stub.Generate(request, timeout=timeout_s, metadata=metadata):
                sample = samples[response.sample_index]
                sample.text += response.text
                sample.token_ids.extend(response.token_ids)
                sample.logprobs.extend(response.logprobs)
                sample.last = response
        except grpc.aio.AioRpcError as error:
            raise rpc.raised_from(error) from error
        return samples

    async def refused(self, request: generation_service_pb2.GenerateRequest, *, token: str = "") -> HeadraceError:
        """Return the error that a request ends with."""
        try:
            await self.generate(request, token=token)
        except HeadraceError as error:
            return error
        raise AssertionError("the request was expected to fail")

    async def wait_empty(self) -> None:
        """Wait until no worker holds anything and the router has no request."""
        await wait_until(lambda: all(worker.is_empty for worker in self.workers))
        num_left = 1
        async with asyncio.timeout(WAIT_S):
            while num_left:  # the router may be the last to hear that a client left
                await asyncio.sleep(0.002)
                info = await self.info()
                num_left = info.num_queued + info.num_running

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample of the router's metrics; 0 if there is none."""
        return self.service.registry.get_sample_value(name, labels) or 0.0


async def wait_until(is_met: Callable[[], bool]) -> None:
    """Wait, bounded, until a condition holds."""
    async with asyncio.timeout(WAIT_S):
        while not is_met():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)


def text_request(text: str, **fields: Any) -> generation_service_pb2.GenerateRequest:
    """Return a request for a text prompt; `sampling` as a dict."""
    sampling = types_pb2.SamplingParams(**fields.pop("sampling", {}))
    prompt = generation_service_pb2.TextPrompt(text=text)
    return generation_service_pb2.GenerateRequest(text=prompt, sampling=sampling, **fields)


def tokens_request(*token_ids: int, **fields: Any) -> generation_service_pb2.GenerateRequest:
    """Return a request for a prompt of tokens."""
    return generation_service_pb2.GenerateRequest(
        tokens=generation_service_pb2.TokenPrompt(token_ids=token_ids), **fields
    )


def chat_request(*messages: tuple[str, str], **fields: Any) -> generation_service_pb2.GenerateRequest:
    """Return a request for a chat of (role, content)."""
    chat = generation_service_pb2.ChatPrompt(
        messages=[generation_service_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    )
    return generation_service_pb2.GenerateRequest(chat=chat, **fields)


def _alphabet() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def check_timings(message: generation_service_pb2.GenerateResponse) -> list[str]:
    """Check that the phases of a sample's last message sum to its times; return their names."""
    timings = message.timings
    assert sum(phase.duration_us for phase in timings.phases) == timings.total_us
    before = sum(phase.duration_us for phase in timings.phases if phase.is_before_first_token)
    assert before == timings.ttft_us > 0
    return [phase.name for phase in timings.phases]


def scripted_worker(role: FakeRole, text: str = HELLO, **options: Any) -> FakeWorker:
    """Return a worker that answers every prompt with `text`, again and again."""
    options = {"next_token": scripted(byte_ids(text)), "vocab_size": VOCAB_SIZE, **options}
    return FakeWorker(role, **options)


def remembering_worker(role: FakeRole, **options: Any) -> FakeWorker:
    """Return a worker whose tokens depend on every token before; `remembered` says which they are."""
    options = {"next_token": mixed(BOS), "vocab_size": VOCAB_SIZE, **options}
    return FakeWorker(role, **options)


def remembered(prompt: str, num_tokens: int) -> list[int]:
    """Return what workers that remember answer a text prompt with."""
    tokens = [BOS, *byte_ids(prompt)]
    num_prompt, step = len(tokens), mixed(BOS)
    for _ in range(num_tokens):
        tokens.append(step(tokens, num_prompt))
    return tokens[num_prompt:]


def run_router(
    folder: Path, workers: list[FakeWorker], test: Callable[[RouterUnderTest], Awaitable[None]], **settings: Any
) -> None:
    """Run `test(router)` when the workers are ready; afterwards the router still runs, and nothing is left anywhere."""

    async def main() -> None:
        async with RouterUnderTest(folder, workers=workers, settings=settings) as router:
            await router.wait_states(["ready"] * len(workers))
            await test(router)
            await router.wait_empty()
            assert not router.service.failed.done()

    asyncio.run(main())

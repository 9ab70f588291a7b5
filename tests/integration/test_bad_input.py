"""Nonsense in: one clear error each, and nothing dies or leaks."""

import asyncio

import grpc
import pytest
from headrace.v1 import generation_service_pb2 as pb
from headrace_client import AsyncClient
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core import rpc
from headrace_core.errors import HeadraceError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import all_pages_free

METHOD = "/headrace.v1.GenerationService/Generate"
TEXT = pb.TextPrompt(text="Once upon a time")


@pytest.fixture(scope="module")
def cluster(model_dir):
    with LocalCluster(model_dir, worker_options={"kv-pool-mib": 8, "max-context-tokens": 512}) as cluster:
        yield cluster


async def refused(address: str, raw: bytes) -> HeadraceError:
    """Send `raw` as a GenerateRequest and return the error it got."""
    async with rpc.channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in channel.unary_stream(METHOD)(raw, timeout=WAIT_S):
                pass
    return rpc.raised_from(caught.value)


def sampling(**fields) -> bytes:
    request = pb.GenerateRequest(text=TEXT)
    for name, value in fields.items():
        setattr(request.sampling, name, value)
    return request.SerializeToString()


def request(**fields) -> bytes:
    return pb.GenerateRequest(**fields).SerializeToString()


def chat(role: str, content: str) -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content=content)])


BAD = "INVALID_ARGUMENT"
CASES = {
    "an empty message": (b"", BAD, "EMPTY_PROMPT"),
    "an empty prompt": (request(text=pb.TextPrompt()), BAD, "EMPTY_PROMPT"),
    "no tokens": (request(tokens=pb.TokenPrompt()), BAD, "EMPTY_PROMPT"),
    "no messages": (request(chat=pb.ChatPrompt()), BAD, "EMPTY_PROMPT"),
    "a prompt beyond the context": (request(text=pb.TextPrompt(text="fox " * 5000)), BAD, "PROMPT_TOO_LONG"),
    "a token outside the vocabulary": (request(tokens=pb.TokenPrompt(token_ids=[5, 4_000_000_000])), BAD, "BAD_TOKEN"),
    "an unknown model": (request(model="gpt-9", text=TEXT), "NOT_FOUND", "UNKNOWN_MODEL"),
    "n of zero": (request(text=TEXT, n=0), BAD, "BAD_REQUEST"),
    "n of a million": (request(text=TEXT, n=1_000_000), BAD, "BAD_REQUEST"),
    "a negative temperature": (sampling(temperature=-1.0), BAD, "BAD_SAMPLING"),
    "a temperature that is no number": (sampling(temperature=float("nan")), BAD, "BAD_SAMPLING"),
    "no tokens asked for": (sampling(max_tokens=0), BAD, "BAD_SAMPLING"),
    "an unknown role": (request(chat=chat("wizard", "x")), BAD, "BAD_REQUEST"),
    "a bad request id": (request(request_id="a b", text=TEXT), BAD, "BAD_REQUEST"),
    # Field 3 (text), inside it field 1: two bytes that are not UTF-8.
    "text that is not UTF-8": (b"\x1a\x04\x0a\x02\xff\xfe", BAD, "BAD_REQUEST"),
    "bytes that are no message": (b"\xff\xff\xff\xff", BAD, "BAD_REQUEST"),
}


@pytest.mark.parametrize("case", CASES)
def test_nonsense_gets_one_clear_error(cluster, case):
    raw, code, reason = CASES[case]
    error = asyncio.run(refused(cluster.router_address, raw))
    assert (error.status, error.reason) == (code, reason), str(error)
    assert len(str(error)) > 15


def test_a_50_mb_prompt_is_refused_and_costs_nothing(cluster):
    raw = pb.GenerateRequest(text=pb.TextPrompt(text="a" * 50_000_000)).SerializeToString()

    async def send():
        async with grpc.aio.insecure_channel(
            cluster.router_address, options=[("grpc.max_send_message_length", -1)]
        ) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in channel.unary_stream(METHOD)(raw, timeout=WAIT_S):
                    pass
        return caught.value

    error = asyncio.run(send())
    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
    assert "larger" in error.details()


def test_afterwards_everything_still_works(cluster):
    async def main():
        async with AsyncClient(cluster.router_address) as client:
            result = await client.generate("Once upon a time", SamplingParams(max_tokens=8, ignore_eos=True))
            assert len(result.token_ids) == 8
            await all_pages_free(client.server_info)

    asyncio.run(main())
    assert [process.poll() for process in cluster.processes] == [None] * 3


def test_output_ends_at_the_context_limit(cluster):
    async def main():
        async with AsyncClient(cluster.router_address) as client:
            params = SamplingParams(max_tokens=5000, temperature=0.0, ignore_eos=True)
            result = await client.generate([5] * 500, params)
            assert result.usage.num_prompt_tokens + result.usage.num_output_tokens == 512
            assert result.finish_reason.name == "LENGTH"

    asyncio.run(main())


@pytest.mark.parametrize("damage", ["truncated", "no config", "no weights"])
def test_a_damaged_checkpoint_does_not_start_and_says_why(tmp_path, model_dir, damage):
    for source in model_dir.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    if damage == "truncated":
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        (tmp_path / {"no config": "config.json", "no weights": "model.safetensors"}[damage]).unlink()
    with pytest.raises(HeadraceError) as caught, LocalCluster(tmp_path):
        pass
    wanted = {"truncated": "model.safetensors", "no config": "config.json", "no weights": "model.safetensors"}[damage]
    assert wanted in str(caught.value)
    assert "Traceback" not in str(caught.value)

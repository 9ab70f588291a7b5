"""The wire of the last release, protos/headrace.v1.binpb: what breaks it is found, and who speaks it is served."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from headrace_core.config import PrefillSettings
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.worker_pair import running
from headrace_core.wire import encode_layout, encode_sampling
from headrace_prefill.service import PrefillService

PROTOS = Path(__file__).parents[2] / "protos"
IMAGE = PROTOS / "headrace.v1.binpb"
BUF = Path(sys.executable).with_name("buf")
PROMPT = list(range(1, 23))


def breaking(protos: Path) -> str:
    """Return what buf finds; empty if nothing breaks."""
    found = subprocess.run([BUF, "breaking", protos, "--against", IMAGE], capture_output=True, text=True, check=False)
    assert bool(found.returncode) == bool(found.stdout), found
    return found.stdout


def test_the_wire_is_that_of_its_image():
    assert not breaking(PROTOS)


CHANGES = {
    "a number": ("bytes tokens_sha256 = 8;", "bytes tokens_sha256 = 18;", "was deleted"),
    "a type": ("uint64 timeout_ms = 4;", "uint32 timeout_ms = 4;", "changed type"),
    "a name": ("string lease_key = 3;", "string lease = 3;", "changed name"),
    "a label": ("repeated uint32 token_ids = 6;", "uint32 token_ids = 6;", "changed cardinality"),
    "an rpc": ("returns (stream HoldResponse)", "returns (HoldResponse)", "streaming"),
    "nothing: a new field": ("  KvLayout layout = 12;", "  KvLayout layout = 12;\n  uint32 more = 99;", ""),
}


@pytest.mark.parametrize(("old", "new", "problem"), CHANGES.values(), ids=CHANGES)
def test_what_would_break_a_released_worker_is_found(tmp_path, old: str, new: str, problem: str):
    shutil.copytree(PROTOS / "headrace", tmp_path / "headrace")
    shutil.copy(PROTOS / "buf.yaml", tmp_path)
    changed = list((tmp_path / "headrace" / "v1").glob("*.proto"))
    for file in changed:
        file.write_text(file.read_text().replace(old, new))
    found = breaking(tmp_path)
    assert (problem in found) if problem else not found, found


class Released:
    """The messages of the image, apart from those that the workers use."""

    def __init__(self) -> None:
        files = descriptor_pb2.FileDescriptorSet.FromString(IMAGE.read_bytes())
        self._pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self._pool.Add(file)

    def message(self, name: str) -> Any:
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name))


@async_test
async def test_a_taker_of_the_last_release_is_served():
    """Its messages are those of the image: what it does not know it passes over, and what it says is understood."""
    released = Released()
    request, response = released.message("headrace.v1.HoldRequest"), released.message("headrace.v1.HoldResponse")
    loaded = loaded_fake_model()
    async with (
        running(PrefillService(PrefillSettings(model="."), loader=lambda _: loaded)) as (address,),
        grpc.aio.insecure_channel(address) as channel,
    ):
        opening = request()
        opening.open.router_id = opening.open.sequence_number = opening.open.attempt = 1
        opening.open.request_id, opening.open.timeout_ms = "r", 60_000
        opening.open.token_ids.extend(PROMPT)
        opening.open.num_prompt_tokens, opening.open.tokens_sha256 = len(PROMPT), hash_tokens(PROMPT)
        opening.open.sampling.MergeFromString(encode_sampling(SamplingParams(seed=1)).SerializeToString())
        opening.open.model_fingerprint = loaded.fingerprint
        opening.open.layout.MergeFromString(encode_layout(loaded.layout).SerializeToString())
        hold: Any = channel.stream_stream(
            "/headrace.v1.HoldService/Hold",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        call = hold(timeout=WAIT_S)
        await call.write(opening)
        kinds: list[str] = []
        num_pages = 0
        async with asyncio.timeout(WAIT_S):
            while "confirmed" not in kinds:
                event = await call.read()
                assert event is not grpc.aio.EOF, kinds
                kinds.append(event.WhichOneof("event") or "beat")
                num_pages += len(event.run.pages)
                if kinds[-1] in ("run", "last") and "last" in kinds and num_pages == 6:
                    await call.write(request(confirm={}))
        assert [kind for kind in kinds if kind not in ("run", "beat")] == ["admitted", "last", "confirmed"]

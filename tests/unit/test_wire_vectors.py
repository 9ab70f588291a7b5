"""The golden vectors of protos/conformance are what this code does, and what `vectors` writes."""

import json
from pathlib import Path

import grpc
import pytest
import torch
import xxhash
from google.protobuf import descriptor_pool, json_format, message_factory
from headrace.v1 import decode_service_pb2, hold_service_pb2, transfer_service_pb2, types_pb2
from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.kv.layout import LatentAttention
from headrace_core.model.kv_cache import KvCache
from headrace_core.reasons import REASONS
from headrace_core.request import hash_tokens
from headrace_core.testing import vectors
from headrace_core.transfer.frames import decode_frame, encode_frame
from headrace_core.wire import decode_layout

FILE = Path(__file__).parents[2] / "protos" / "conformance" / "v1.json"
VECTORS = json.loads(FILE.read_text())
KNOWN = (decode_service_pb2, hold_service_pb2, transfer_service_pb2)


def test_the_file_is_what_is_written():
    assert FILE.read_text() == vectors.text(), "python -m headrace_core.testing.vectors > protos/conformance/v1.json"


@pytest.mark.parametrize("vector", VECTORS["tokens_sha256"], ids=lambda vector: f"{len(vector['token_ids'])} tokens")
def test_a_hash_of_tokens(vector):
    assert hash_tokens(vector["token_ids"]).hex() == vector["sha256"]


@pytest.mark.parametrize("vector", VECTORS["pages"], ids=lambda vector: f"{len(vector['bytes']) // 2} bytes")
def test_bytes_and_checksum_of_a_page(vector):
    layout = decode_layout(json_format.ParseDict(vector["layout"], types_pb2.KvLayout()))
    cache = KvCache(layout, 1)
    page = cache.layers[0][0]
    if isinstance(layout.attention, LatentAttention):
        rows = torch.tensor(vector["rows"], dtype=TORCH_DTYPES[layout.dtype.element])
        page[: len(rows)] = rows
    else:
        for plane, name in zip(page, ("keys", "values"), strict=True):
            rows = torch.tensor(vector[name], dtype=TORCH_DTYPES[layout.dtype.element])
            plane[: len(rows)] = rows
    data = bytes(cache.page_bytes(0, 0))
    assert data.hex() == vector["bytes"]
    assert f"{xxhash.xxh3_64_intdigest(data):016x}" == vector["xxh3_64"]


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda vector: vector["type"])
def test_an_encoded_message(vector):
    kind = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(vector["type"]))
    message = kind.FromString(bytes.fromhex(vector["bytes"]))
    assert json_format.MessageToDict(message) == vector["json"]
    assert json_format.ParseDict(vector["json"], kind()).SerializeToString(deterministic=True).hex() == vector["bytes"]


def test_every_kind_of_message_that_a_hand_off_has_is_there():
    for kind, oneof in ((hold_service_pb2.HoldRequest, "word"), (hold_service_pb2.HoldResponse, "event")):
        seen = {next(iter(v["json"]), None) for v in VECTORS["messages"] if v["type"] == kind.DESCRIPTOR.full_name}
        assert seen == {None, *(field.name for field in kind.DESCRIPTOR.oneofs_by_name[oneof].fields)}


def test_a_frame_is_the_message_whose_bytes_are_there():
    (vector,) = (each for each in VECTORS["messages"] if each["type"].endswith("PullResponse"))
    frame = bytes.fromhex(vector["bytes"])
    payload = bytes(decode_frame(frame))
    assert payload == bytes(range(200))
    assert encode_frame([memoryview(payload)]) == frame


def test_statuses_and_reasons():
    for vector in VECTORS["refusals"]:
        assert grpc.StatusCode[vector["status"]].value[0] == vector["code"]
        statuses = {error.status for error, reasons in REASONS.items() if vector["reason"] in reasons}
        assert vector["status"] in statuses


def test_the_specification_names_each_refusal_with_its_own_status():
    specification = FILE.parents[2] / "docs" / "wire-spec.md"
    table = specification.read_text().partition("## Refusals")[2].partition("## Conformance")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    named: set[str] = set()
    for _, code, reasons, _ in rows[2:]:
        status, _, number = code.removesuffix(")").partition(" (")
        assert grpc.StatusCode[status].value[0] == int(number)
        for reason in reasons.split(", "):
            named.add(reason)
            assert status in {error.status for error, known in REASONS.items() if reason in known}, reason
    assert named >= {vector["reason"] for vector in VECTORS["refusals"]}

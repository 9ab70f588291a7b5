"""What goes on the wire comes back equal, and nonsense is refused by name."""

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from headrace.v1 import types_pb2
from headrace_core import rpc, wire
from headrace_core.errors import CheckpointError, HeadraceError, InvalidRequestError, ProtocolError, StartupError
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention
from headrace_core.request import FinishReason, SamplingParams, TokenLogprobs, check_request_id
from hypothesis import given
from hypothesis import strategies as st

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(5, 1000),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.3]),
    top_p=st.sampled_from([0.1, 0.95, 1.0]),
    top_k=st.integers(0, 100),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.1]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.3]),
    frequency_penalty=st.sampled_from([0.0, 2.0]),
    seed=st.none() | st.integers(0, 2**64 - 1),
    min_tokens=st.integers(0, 5),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, 100), max_size=3).map(tuple),
    stop_strings=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 100), st.sampled_from([-100.0, 0.5, 100.0]), max_size=3),
    top_logprobs=st.none() | st.integers(0, 20),
)


@given(PARAMS)
def test_sampling_survives_the_wire(params: SamplingParams):
    data = wire.encode_sampling(params).SerializeToString()
    assert wire.decode_sampling(types_pb2.SamplingParams.FromString(data)) == params


def test_unset_sampling_takes_the_defaults():
    assert wire.decode_sampling(types_pb2.SamplingParams()) == SamplingParams()


def test_every_sampling_field_of_the_wire_is_decoded():
    fields = {field.name for field in types_pb2.SamplingParams.DESCRIPTOR.fields}
    assert fields == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("top_logprobs", 21),
    ],
)
def test_bad_sampling_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError, match=field) as caught:
        wire.decode_sampling(types_pb2.SamplingParams(**{field: value}))
    assert caught.value.reason == "BAD_SAMPLING"


def test_token_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(InvalidRequestError, match="stop_token_ids: 100"):
        SamplingParams(stop_token_ids=(100,)).validate_tokens(100)
    with pytest.raises(InvalidRequestError, match="logit_bias: 7"):
        SamplingParams(logit_bias={7: 1.0}).validate_tokens(7)


@pytest.mark.parametrize("request_id", ["", "a b", "ä", "x" * 65, "a\n"])
def test_bad_request_ids_are_refused(request_id):
    with pytest.raises(InvalidRequestError):
        check_request_id(request_id)


@pytest.mark.parametrize("attention", [LatentAttention(512, 64), KeyValueAttention(8, 128)])
@pytest.mark.parametrize("dtype", list(CacheDtype))
def test_layout_survives_the_wire(attention, dtype):
    layout = KvLayout(61, 64, dtype, attention)
    assert wire.decode_layout(wire.encode_layout(layout)) == layout


def test_an_incomplete_layout_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        wire.decode_layout(types_pb2.KvLayout(num_layers=1, page_size=64))
    assert caught.value.reason == "BAD_HANDOFF"


def test_logprobs_and_finish_survive_the_wire():
    logprobs = TokenLogprobs(-0.5, ((3, -0.5), (1, -2.0)))
    assert wire.decode_logprobs(wire.encode_logprobs(logprobs)) == logprobs
    for reason in (None, *FinishReason):
        assert wire.decode_finish(wire.encode_finish(reason)) is reason
    with pytest.raises(HeadraceError, match="unknown finish reason"):
        wire.decode_finish(99)


def _subclasses(error):
    for child in error.__subclasses__():
        yield child
        yield from _subclasses(child)


# These never cross a process: two are for start-up only, one is what the receiver makes of what it got.
STAYING = (CheckpointError, StartupError, ProtocolError)
CROSSING = [e for e in (HeadraceError, *_subclasses(HeadraceError)) if e not in STAYING]


@pytest.mark.parametrize("error", CROSSING)
def test_errors_survive_the_wire(error):
    failure = wire.encode_failure(error("SOME_REASON", "what to do"))
    back = wire.decode_failure(failure)
    assert type(back) is error
    assert (back.reason, str(back)) == ("SOME_REASON", "what to do")


def test_unknown_codes_become_the_base_error():
    assert type(rpc.from_status(grpc.StatusCode.UNIMPLEMENTED, "X", "y")) is HeadraceError


def test_every_scalar_whose_zero_is_legal_has_presence():
    for field in types_pb2.SamplingParams.DESCRIPTOR.fields:
        if not field.is_repeated and field.type != FieldDescriptor.TYPE_MESSAGE:
            assert field.has_presence, field.name

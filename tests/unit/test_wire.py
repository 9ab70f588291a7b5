"""What goes on the wire comes back equal, and nonsense is refused by name."""

import math

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from headrace.v1 import decode_service_pb2, types_pb2
from headrace_core import rpc, wire
from headrace_core.errors import CheckpointError, HeadraceError, InvalidRequestError, ProtocolError, StartupError
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention
from headrace_core.request import FLOAT_RANGES, FinishReason, SamplingParams, TokenLogprobs, check_request_id
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
    stop_token_ids=st.lists(st.integers(0, 100), max_size=3, unique=True).map(tuple),
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
        ("temperature", 3.4e38),
        ("temperature", -1e-45),
        ("top_p", 1e-45),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 1e-45),
        ("repetition_penalty", 3.4e38),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("-inf")),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("min_tokens", 257),
        ("min_tokens", 2**32 - 1),
        ("top_logprobs", 21),
        ("stop_token_ids", [3] * 1025),
        ("stop_strings", ["a"] * 17),
        ("logit_bias", [types_pb2.LogitBias(token_id=1, bias=float("nan"))]),
        ("logit_bias", [types_pb2.LogitBias(token_id=1, bias=-100.5)]),
        ("logit_bias", [types_pb2.LogitBias(token_id=1, bias=1.0)] * 1025),
    ],
)
def test_bad_sampling_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError, match=field) as caught:
        wire.decode_sampling(types_pb2.SamplingParams(**{field: value}))
    assert caught.value.reason == "BAD_SAMPLING"


@pytest.mark.parametrize(("name", "ends"), FLOAT_RANGES.items())
def test_the_ends_of_every_range_are_in_it_and_the_next_numbers_are_not(name, ends):
    for end, outwards in zip(ends, (-math.inf, math.inf), strict=True):
        SamplingParams(**{name: end}).validate()
        wire.decode_sampling(types_pb2.SamplingParams(**{name: end}))
        with pytest.raises(InvalidRequestError, match=f"{name} is"):
            SamplingParams(**{name: math.nextafter(end, outwards)}).validate()


@pytest.mark.parametrize("params", [{"temperature": 1e-8}, {"top_p": 1e-8}, {"min_tokens": 8, "max_tokens": 8}])
def test_what_people_send_at_the_edges_is_taken(params):
    SamplingParams(**params).validate()


def test_of_a_token_named_twice_the_last_entry_counts():
    bias = [types_pb2.LogitBias(token_id=4, bias=value) for value in (1.0, 2.0)]
    params = wire.decode_sampling(types_pb2.SamplingParams(stop_token_ids=[5, 3, 5, 3], logit_bias=bias))
    assert params.stop_token_ids == (5, 3)
    assert params.logit_bias == {4: 2.0}


def test_lists_as_long_as_they_may_be_are_taken():
    bias = [types_pb2.LogitBias(token_id=token_id, bias=1.0) for token_id in range(1024)]
    params = wire.decode_sampling(types_pb2.SamplingParams(stop_token_ids=range(1024), logit_bias=bias))
    assert len(params.stop_token_ids) == len(params.logit_bias) == 1024


def test_min_tokens_may_not_forbid_the_whole_vocabulary():
    """Stop ids and the model's end tokens are what it forbids."""
    SamplingParams(min_tokens=1, stop_token_ids=tuple(range(8))).validate_tokens(10, (9,))
    SamplingParams(stop_token_ids=tuple(range(9))).validate_tokens(10, (9,))
    for ignore_eos in (False, True):
        params = SamplingParams(min_tokens=1, stop_token_ids=tuple(range(9)), ignore_eos=ignore_eos)
        with pytest.raises(InvalidRequestError, match="whole vocabulary of 10") as caught:
            params.validate_tokens(10, (9,))
        assert caught.value.reason == "BAD_SAMPLING"


def test_token_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(InvalidRequestError, match="stop_token_ids: 100"):
        SamplingParams(stop_token_ids=(100,)).validate_tokens(100, ())
    with pytest.raises(InvalidRequestError, match="logit_bias: 7"):
        SamplingParams(logit_bias={7: 1.0}).validate_tokens(7, ())


@pytest.mark.parametrize("request_id", ["", "a b", "ä", "x" * 65, "a\n"])
def test_bad_request_ids_are_refused(request_id):
    with pytest.raises(InvalidRequestError):
        check_request_id(request_id)


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [(LatentAttention(512, 64), dtype) for dtype in CacheDtype]
    + [(KeyValueAttention(8, 128), dtype) for dtype in CacheDtype if dtype is not CacheDtype.FP8_E4M3],
)
def test_layout_survives_the_wire(attention, dtype):
    layout = KvLayout(61, 64, dtype, attention)
    assert wire.decode_layout(wire.encode_layout(layout)) == layout


def test_an_incomplete_layout_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        wire.decode_layout(types_pb2.KvLayout(num_layers=1, page_size=64))
    assert caught.value.reason == "BAD_HANDOFF"


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        (types_pb2.CACHE_DTYPE_FP8_E4M3, {"key_value": types_pb2.KeyValueLayout(num_kv_heads=8, head_dim=128)}),
        (types_pb2.CACHE_DTYPE_FP8_E4M3, {"latent": types_pb2.LatentLayout(kv_lora_rank=66, rope_dim=8)}),
        (9, {"latent": types_pb2.LatentLayout(kv_lora_rank=64, rope_dim=8)}),
    ],
)
def test_a_layout_that_can_not_be_or_that_is_not_known_is_refused(dtype, attention):
    with pytest.raises(InvalidRequestError) as caught:
        wire.decode_layout(types_pb2.KvLayout(num_layers=1, page_size=64, dtype=dtype, **attention))
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
# A face of the router may have more of its own, which other processes do not know.
KNOWN = [e for e in (HeadraceError, *_subclasses(HeadraceError)) if e.__module__ == HeadraceError.__module__]
CROSSING = [e for e in KNOWN if e not in STAYING]


@pytest.mark.parametrize("error", CROSSING)
def test_errors_survive_the_wire(error):
    failure = wire.encode_failure(error("SOME_REASON", "what to do"), decode_service_pb2.FAILURE_SIDE_CHANNEL)
    back = wire.decode_failure(failure)
    assert type(back) is error
    assert (back.reason, str(back)) == ("SOME_REASON", "what to do")


def test_unknown_codes_become_the_base_error():
    assert type(rpc.from_status(grpc.StatusCode.UNIMPLEMENTED, "X", "y")) is HeadraceError


def test_every_scalar_whose_zero_is_legal_has_presence():
    for field in types_pb2.SamplingParams.DESCRIPTOR.fields:
        if not field.is_repeated and field.type != FieldDescriptor.TYPE_MESSAGE:
            assert field.has_presence, field.name

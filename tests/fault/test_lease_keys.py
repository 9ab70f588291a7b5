"""Pages are read by who was told their lease's key, which nobody can guess who knows all the rest: both ways."""

import grpc.aio
import pytest
from headrace.v1 import transfer_service_pb2 as pb
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.rpc import channel, raised_from
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import running
from headrace_core.transfer import lease
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=2, ignore_eos=True)
PROMPT = list(range(1, 23))
NUM_LEASES = 8


def holder(role: str):
    if role == "prefill":
        settings = PrefillSettings(model=".", transport="grpc")
        return PrefillService(settings, loader=lambda _: loaded_fake_model(num_pages=256))
    settings = DecodeSettings(model=".", transport="grpc", role="both")
    return DecodeService(settings, loader=lambda _: loaded_fake_model(num_pages=256))


async def held(role: str, address: str, taker: MiniTaker):
    """Have the prompt's pages held under some leases; return their admissions."""
    incarnation = None
    if role == "decode":
        async with MiniRouter(decode=address) as router:
            await router.generate_colocated("before", PROMPT, params=GREEDY)
        incarnation = taker.info.incarnation
    orders = [taker.order(f"r{i}", PROMPT, params=GREEDY, holder_incarnation=incarnation) for i in range(NUM_LEASES)]
    for order in orders:
        await order.wait_all()
    return [await order.wait_admitted() for order in orders]


async def pulled(stranger: grpc.aio.Channel, admission, key: str) -> str:
    """Return what a stranger gets who knows all but the key."""
    request = pb.PullRequest(
        lease_key=key,
        incarnation=admission.shards[0].incarnation,
        tokens_sha256=hash_tokens(PROMPT),
        num_layers=1,
        num_pages=1,
    )
    try:
        pull = stranger.unary_stream("/headrace.v1.TransferService/Pull")
        return "pages" if await pull(request.SerializeToString(), timeout=WAIT_S).read() else "nothing"
    except grpc.aio.AioRpcError as error:
        return raised_from(error).reason


def guesses(known: str):
    """Return what one would try: counters in every dress, and neighbours of a key that one has."""
    counters = [form.format(n) for n in range(NUM_LEASES + 2) for form in ("lease-{}", "{}", "{:032x}", "{:032d}")]
    value = int(known, 16)
    return [*counters, *(f"{value + step:032x}" for step in range(-4, 5) if step), known[:31], known.upper() + "0", ""]


@pytest.mark.parametrize("role", ["prefill", "decode"])
@async_test
async def test_who_knows_everything_but_the_key_reads_nothing(role):
    async with (
        running(holder(role)) as (address,),
        MiniTaker(address) as taker,
        channel(address) as stranger,
    ):
        admissions = await held(role, address, taker)
        keys = [admission.lease_key for admission in admissions]
        assert len({key[:16] for key in keys} | {key[16:] for key in keys}) == 2 * NUM_LEASES
        assert await pulled(stranger, admissions[0], keys[0]) == "pages", "the question itself is right"
        for guess in set(guesses(keys[0])) - set(keys):
            assert await pulled(stranger, admissions[0], guess) == "LEASE_ENDED", guess


@pytest.mark.parametrize("role", ["prefill", "decode"])
@async_test
async def test_with_keys_that_are_counted_a_stranger_reads(role, monkeypatch):
    """What the guard is for: the same question, where keys can be guessed."""
    counter = iter(range(1, 100))
    monkeypatch.setattr(lease.secrets, "token_hex", lambda _: f"lease-{next(counter)}")
    async with (
        running(holder(role)) as (address,),
        MiniTaker(address) as taker,
        channel(address) as stranger,
    ):
        admissions = await held(role, address, taker)
        assert await pulled(stranger, admissions[0], "lease-1") == "pages"

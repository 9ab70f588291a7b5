"""The router remembers who finished a sequence: the next turn goes there, and so does its prefill for the pages."""

from types import SimpleNamespace

from headrace_core.request import hash_tokens
from headrace_core.testing.async_test import async_test
from headrace_core.testing.worker_pair import running
from headrace_core.wire import encode_sampling
from headrace_router.requests.cached import Cached, Finished
from headrace_router.testing import BOS, RouterUnderTest, byte_ids, run_router, tokens_request

from tests.unit.test_router_samples import IDS, SAMPLED, At, counted, fleet, real_fleet


class StubWorker:
    def __init__(self):
        self.lost = SimpleNamespace(done=lambda: self.is_lost)
        self.is_lost = False


def remember(finished: Finished, token_ids: list[int], worker: StubWorker) -> Cached:
    cached = Cached(worker, len(token_ids))
    finished.remember(token_ids, hash_tokens(token_ids), cached)
    return cached


def find(finished: Finished, token_ids: list[int]) -> Cached | None:
    return finished.find(token_ids)


FIRST = list(range(16))
"""As many as decide what is looked at for a prompt."""


def test_the_longest_beginning_counts_and_the_tokens_must_be_the_same():
    finished, one, two = Finished(), StubWorker(), StubWorker()
    short, long = [*FIRST, *range(16)], [*FIRST, *range(48)]
    of_short, of_long = remember(finished, short, one), remember(finished, long, two)
    assert find(finished, [*long, 9, 9]) is of_long
    assert find(finished, [*long, 9]) is of_long
    assert find(finished, long) is of_short, "a token is left to compute"
    assert find(finished, [*long[:-1], 99, 9]) is of_short
    assert find(finished, [*FIRST, 99, *range(47), 9]) is None
    assert find(finished, [99, *long[1:], 9]) is None
    two.is_lost = True
    assert find(finished, [*long, 9]) is of_short
    assert len(finished) == 1, "of a worker that is lost nothing is known"
    of_again = remember(finished, short, two)
    two.is_lost = False
    assert find(finished, [*short, 9]) is of_again, "the last who had it"


def test_so_many_are_remembered_and_the_longest_unused_is_forgotten():
    finished, worker = Finished(most=3), StubWorker()
    conversations = [[*FIRST, number, *range(15)] for number in range(4)]
    for tokens in conversations[:3]:
        remember(finished, tokens, worker)
    assert find(finished, [*conversations[0], 9])
    remember(finished, conversations[3], worker)
    assert [bool(find(finished, [*tokens, 9])) for tokens in conversations] == [True, False, True, True]
    for tokens in conversations:
        remember(finished, [7, *tokens], worker)
    assert len(finished) == 3
    assert find(finished, [*conversations[0], 9]) is None
    assert len(finished._lengths) == 1, "nothing is left of what was forgotten"


PROMPT = "a prompt that is longer than a page of 16 tokens"


async def turn(router, prompt, **sampling):
    (sample,) = await router.generate(tokens_request(*prompt, sampling={"max_tokens": 40, **sampling}))
    return [*prompt, *sample.token_ids]


def test_the_next_turn_goes_where_the_answer_is_and_says_so_to_its_prefill_worker(tmp_path):
    async def test(router):
        prefill, *decodes = router.workers
        first = await turn(router, [BOS, *byte_ids(PROMPT)])
        await turn(router, [BOS, *byte_ids("another one, that takes pages of the first one's worker")])
        (maker,) = [
            worker for worker in decodes if any(list(it.token_ids) == [BOS, *byte_ids(PROMPT)] for it in worker.starts)
        ]
        assert not any(start.HasField("cached_prefix") for worker in decodes for start in worker.starts)
        for worker in decodes:
            worker.starts.clear()
        second = await turn(router, [*first, *byte_ids(" and then?")])
        (start,) = maker.starts
        cached = start.cached_prefix
        assert (cached.address, cached.incarnation) == (maker.address, maker.incarnation)
        assert cached.num_tokens == 80, "89 tokens, the last not computed: five pages"
        assert start.local_below == 16
        assert start.prefill_address == prefill.address
        await turn(router, [*second, *byte_ids(" go on")])
        assert maker.starts[1].cached_prefix.num_tokens == 128
        assert len(maker.starts) == 2

    run_router(tmp_path, fleet("prefill", "decode", "decode", "decode"), test)


def test_of_a_worker_that_is_lost_nobody_is_asked(tmp_path):
    async def test(router):
        _, one, other = router.workers
        first = await turn(router, [BOS, *byte_ids(PROMPT)])
        victim, survivor = (one, other) if one.starts else (other, one)
        await victim.stop()
        router.workers.remove(victim)
        await router.wait_states(["ready", "ready", "unreachable"])
        await turn(router, [*first, *byte_ids(" and then?")])
        assert not survivor.starts[0].HasField("cached_prefix")

    run_router(tmp_path, fleet("prefill", "decode", "decode"), test)


def test_answers_that_made_no_page_and_those_that_failed_are_not_remembered(tmp_path):
    async def test(router):
        prompt = [BOS, *byte_ids(PROMPT[:40])]
        short = await turn(router, prompt, max_tokens=2)
        (last,) = await router.generate(tokens_request(*range(48), sampling={"max_tokens": 1}))
        await turn(router, [*short, *byte_ids(" and then?")])
        await turn(router, [*range(48), *last.token_ids, 1, 2])
        assert not any(start.HasField("cached_prefix") for start in router.workers[1].starts)

    run_router(tmp_path, fleet("prefill", "decode"), test)


@async_test
async def test_a_conversation_computes_and_moves_each_token_once(tmp_path):
    """43 tokens, then answers of 12 and questions of 5, in pages of 4."""
    prefiller, decoder = real_fleet()
    async with running(prefiller, decoder) as (prefill, decode):
        async with RouterUnderTest(tmp_path) as router:
            router.workers = [At(prefill), At(decode)]
            router.write_workers()
            await router.wait_states(["ready", "ready"])
            tokens, num_pages, num_computed = list(IDS), 0, 0
            for _ in range(4):
                request = tokens_request(*tokens, sampling=encode_sampling(SAMPLED), include_timings=True)
                (sample,) = await router.generate(request)
                usage = sample.last.usage
                num_computed += usage.num_prompt_tokens - usage.num_cached_tokens
                num_pages += sample.last.timings.num_transfer_pages
                tokens += [*sample.token_ids, 31, 32, 33, 34, 35]
        assert counted(prefiller, "headrace_prefix_fetches_total", outcome="failed") == 0
        assert (
            counted(prefiller, "headrace_step_tokens_total") == num_computed == 43 + (60 - 52) + (77 - 68) + (94 - 88)
        )
        assert num_pages == 11 + (15 - 13) + (20 - 17) + (24 - 22)
        assert counted(prefiller, "headrace_prefix_fetched_tokens_total") == (52 - 40) + (68 - 60) + (88 - 76)

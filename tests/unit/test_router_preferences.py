"""Which prefill worker gets a prompt: the policies by name, on values and over the wire."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from headrace_core.config import RouterSettings
from headrace_core.kv.page_hash import NO_PAGES, page_hash, page_hashes
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.placement.capacity import Waiting, WorkerView
from headrace_router.placement.policy import plan
from headrace_router.placement.preferences import PREFERENCES, affinity, power_of_two, prefix_cache, session
from headrace_router.placement.prefix import Prefix
from headrace_router.testing import VOCAB_SIZE, byte_ids, run_router, text_request, wait_until

PAGE = 16


def worker(address, *, is_prefill=True, **fields):
    view = WorkerView(
        address=address, page_size=PAGE, num_pages=1000, num_usable_pages=1000, num_free_pages=1000, token_budget=512,
        num_tokens_in_flight=0, num_free_slots=100, can_prefill=is_prefill, can_decode=not is_prefill,
    )  # fmt: skip
    return replace(view, **fields)


def waiting(tokens, **fields):
    prefix = Prefix(tokens)
    return Waiting(len(tokens), len(tokens) + 8, prefix.key, prefix=prefix, **fields)


def tokens(*numbers):
    """So many pages, one of each number."""
    return [number for number in numbers for _ in range(PAGE)]


def placed(queue, fleet, name, **options):
    """Return the prefill worker of each that starts."""
    workers = [*fleet, worker("d", is_prefill=False)]
    return [each.prefill for each in plan(queue, workers, preference=PREFERENCES[name], **options)]


def test_names_are_the_settings():
    choices = RouterSettings.model_fields["placement"].annotation.__args__
    assert tuple(PREFERENCES) == choices


def test_a_page_s_hash_is_of_all_tokens_up_to_its_end():
    one, two = page_hashes(tokens(1, 2), PAGE)
    assert one == page_hash(NO_PAGES, tokens(1))
    assert two == page_hash(one, tokens(2))
    assert page_hashes(tokens(3, 2), PAGE)[1] != two
    assert page_hashes([*tokens(1, 2), 7], PAGE) == [one, two]
    assert page_hash(page_hash(NO_PAGES, [1, 2, 3]), [4, 5, 6]) == 0x6BFB0AB4AF8C9CA7, "as docs/wire-spec.md says"


@pytest.mark.parametrize("num_cached", range(5))
def test_a_prompt_is_found_in_a_cache_as_far_as_it_goes_but_for_its_last_token(num_cached):
    prompt = tokens(1, 2, 3, 4)
    cached = set(page_hashes(prompt, PAGE)[:num_cached])
    assert Prefix(prompt).num_cached_tokens(cached, PAGE) == min(num_cached, 3) * PAGE
    assert Prefix([*prompt, 5]).num_cached_tokens(cached, PAGE) == num_cached * PAGE
    assert Prefix(prompt).num_cached_tokens(cached, 2 * PAGE) == 0, "other pages have other hashes"


def test_a_prompt_goes_where_its_beginning_is_cached():
    prompt = tokens(1, 2, 3)
    fleet = [worker(f"p{i}") for i in range(8)]
    for index in range(8):
        fleet[index] = worker(f"p{index}", cached=set(page_hashes(prompt, PAGE)[:2]))
        assert placed([waiting(prompt)], fleet, "prefix-cache") == [f"p{index}"]
        fleet[index] = worker(f"p{index}", cached=set(page_hashes(tokens(9, 2), PAGE)))


def test_where_least_is_to_be_computed_counts_what_is_in_flight():
    prompt = tokens(*range(1, 21))
    cached = set(page_hashes(prompt, PAGE))
    busy = worker("busy", cached=cached, num_tokens_in_flight=128)
    assert prefix_cache(waiting(prompt), [busy, worker("idle")], 0) is busy, "320 tokens less, 128 before them"
    busier = worker("busy", cached=cached, num_tokens_in_flight=384)
    assert prefix_cache(waiting(prompt), [busier, worker("idle")], 0).address == "idle"


@pytest.mark.parametrize("policy", [prefix_cache, affinity])
def test_prompts_of_one_beginning_share_a_worker_before_any_cache_has_it(policy):
    fleet = [worker(f"p{i}", num_tokens_in_flight=i) for i in range(4)]
    same = {policy(waiting([*tokens(1, 2, 3, 4), i]), fleet, i).address for i in range(20)}
    others = {policy(waiting(tokens(i, 2)), fleet, i).address for i in range(20)}
    assert len(same) == 1
    assert len(others) > 1


def test_one_after_the_other():
    fleet = [worker("p2"), worker("p0"), worker("p1")]
    assert placed([waiting(tokens(1))] * 6, fleet, "round-robin") == ["p0", "p1", "p2"] * 2
    assert placed([waiting(tokens(1))], fleet, "round-robin", turn=4) == ["p1"]


def test_of_two_that_are_drawn_the_less_loaded_gets_it():
    fleet = [worker(f"p{i}", num_tokens_in_flight=100 * i) for i in range(4)]
    drawn = Counter(power_of_two(waiting(tokens(1)), fleet, turn).address for turn in range(400))
    assert drawn["p3"] == 0, "the most loaded is never the less loaded of two"
    assert drawn["p0"] > drawn["p1"] > drawn["p2"] > 0


def test_a_client_has_its_worker_and_others_keep_theirs_when_one_goes():
    fleet = [worker(f"p{i}") for i in range(5)]
    clients = [("host", f"key {i}") for i in range(40)]

    def places(workers):
        return {client: session(waiting(tokens(1), client=client), workers, 0).address for client in clients}

    before, after = places(fleet), places(fleet[1:])
    assert len(set(before.values())) == 5
    assert all(after[client] == place for client, place in before.items() if place != "p0")


def test_no_policy_puts_a_prompt_where_there_is_no_room():
    for name in PREFERENCES:
        fleet = [worker("full", num_free_pages=0, cached=set(page_hashes(tokens(1, 2), PAGE))), worker("free")]
        assert placed([waiting(tokens(1, 2))], fleet, name) == ["free"], name


def test_the_router_sends_a_prompt_to_the_worker_that_says_it_has_its_beginning(tmp_path):
    text = "a prompt that is longer than two pages of tokens"

    async def test(router):
        prefills = router.workers[:2]
        for knowing in prefills:
            other = prefills[knowing is prefills[0]]
            pages = page_hashes([256, *byte_ids(text)], PAGE)
            for each, cached in ((knowing, pages), (other, [])):
                each.cached_pages = cached
                each.on_change()
            links = {link.address: link for link in router.service._router.fleet.links}
            await wait_until(lambda k=knowing, o=other, links=links: (
                links[k.address].worker.cached and not links[o.address].worker.cached
            ))  # fmt: skip
            before = len(knowing.prefills)
            await router.generate(text_request(text, sampling={"max_tokens": 2}))
            assert len(knowing.prefills) == before + 1
            await asyncio.sleep(0)

    workers = [FakeWorker(role, vocab_size=VOCAB_SIZE) for role in ("prefill", "prefill", "decode")]
    run_router(tmp_path, workers, test)

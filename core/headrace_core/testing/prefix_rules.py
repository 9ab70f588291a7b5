"""What a holder of prefixes (decode worker) is held to, by one that plays its router and its taker.

The rules of a holder of pages that are about what is held, and those below. docs/wire-spec.md says each in full.
"""
# ruff: noqa: D103 - the name of a rule says it

from __future__ import annotations

import asyncio

from headrace_core.testing import holder_rules as held
from headrace_core.testing.holder_under_test import HolderUnderTest
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.rules import Rules, require


class PrefixHolderUnderTest(HolderUnderTest):
    """A holder of prefixes, and a taker that asks it for `prompt`, which it has cached: `prompt` is full pages."""

    def __init__(self, taker: MiniTaker, address: str, *, tokens: list[int]) -> None:
        """Args: `tokens` are those of a sequence that the holder has just brought to its end, but the last."""
        super().__init__(taker, address)
        self.prompt = tokens[: len(tokens) // self.layout.page_size * self.layout.page_size]
        self._more = {"holder_incarnation": self.info.incarnation}

    @property
    def num_pages(self) -> int:
        """Pages of `prompt`; two at least."""
        return self.layout.num_pages(len(self.prompt))


PREFIX_RULES: Rules[PrefixHolderUnderTest] = Rules()
rule = PREFIX_RULES.rule


@rule
async def what_is_cached_is_admitted_sealed_and_confirmed(holder: PrefixHolderUnderTest) -> None:
    ordered = holder.order()
    runs = await ordered.wait_all()
    num_cached = (await ordered.wait_admitted()).num_cached_tokens
    require(num_cached == len(holder.prompt), f"{num_cached} tokens are cached of an answer of {len(holder.prompt)}")
    cells = [
        (run.first_layer + layer, run.first_page + page)
        for run in runs
        for layer in range(run.num_layers)
        for page in range(run.num_pages)
    ]
    every = {(layer, page) for layer in range(holder.layout.num_layers) for page in range(holder.num_pages)}
    require(len(cells) == len(set(cells)) and set(cells) == every, "the runs are not every page of every layer, once")
    await ordered.confirm()
    await asyncio.wait([ordered.reading])
    require(ordered.error is None, f"the call ends with {ordered.error}")
    require(set(ordered.kinds) == {"admitted", "run", "confirmed"}, f"it says {ordered.kinds}")
    require(ordered.kinds[0] == "admitted", f"the first event is {ordered.kinds[0]}")


@rule
async def what_begins_otherwise_is_not_cached(holder: PrefixHolderUnderTest) -> None:
    """Of tokens that differ in a page neither that page comes nor one after it."""
    size = holder.layout.page_size
    for index in (0, 1, holder.num_pages - 1):
        other = list(holder.prompt)
        other[index * size] = other[index * size] % (holder.info.vocab_size - 1) + 1
        ordered = holder.order(token_ids=other)
        num_cached = (await ordered.wait_admitted()).num_cached_tokens
        require(num_cached == index * size, f"{num_cached} tokens are said to be cached, where {index * size} can be")
        await ordered.wait_all()
        await ordered.confirm()


@rule
async def no_more_is_given_than_was_asked_for(holder: PrefixHolderUnderTest) -> None:
    size = holder.layout.page_size
    for num_asked in {size, 2 * size - 1}:
        ordered = holder.order(token_ids=holder.prompt[:num_asked])
        num_cached = (await ordered.wait_admitted()).num_cached_tokens
        require(num_cached == size, f"{num_cached} tokens are said to be cached of {num_asked}")
        (run,) = await ordered.wait_all()
        require((run.first_page, run.num_pages) == (0, 1), "its run is not the page that is full")


@rule
async def who_has_it_all_is_told_so(holder: PrefixHolderUnderTest) -> None:
    ordered = holder.order(num_have_tokens=len(holder.prompt))
    await ordered.wait_all()
    await ordered.confirm()
    require(ordered.kinds == ["admitted", "confirmed"], f"it says {ordered.kinds}")


@rule
async def another_process_has_it_no_more(holder: PrefixHolderUnderTest) -> None:
    other = holder.info.incarnation ^ 1
    await holder.refused(lambda it: setattr(it, "holder_incarnation", other), "WORKER_RESTARTED")


@rule
async def nothing_is_computed_for_others(holder: PrefixHolderUnderTest) -> None:
    await holder.refused(lambda it: it.ClearField("holder_incarnation"), "BAD_REQUEST")


@rule
async def what_is_taken_is_there_for_the_next_one(holder: PrefixHolderUnderTest) -> None:
    first, second = holder.order(), holder.order()
    (run, *_) = await first.wait_all()
    await second.wait_all()
    await first.confirm()
    # A worker may let go of what was confirmed a moment later, but before it looks for another one's.
    third = holder.order()
    await third.wait_all()
    again = await holder.pull(await holder.request(second, run))
    require(bool(again), "who took it took it away from another one")
    await second.confirm()
    await third.confirm()


for _shared in (
    held.the_bytes_of_a_run_have_its_checksums, held.a_part_of_a_run_can_be_pulled,
    held.no_frame_is_longer_than_offered, held.what_the_taker_has_is_not_sealed,
    held.what_the_taker_has_are_pages_of_the_sequence, held.another_model_is_refused, held.another_layout_is_refused,
    held.a_hash_that_is_not_that_of_the_tokens_is_refused, held.an_order_names_its_router,
    held.an_order_says_how_long_it_has, held.attempts_count_from_1, held.pages_are_shown_to_who_has_the_key_alone,
    held.a_read_names_the_process, held.a_read_says_what_it_takes_the_pages_for, held.what_is_not_sealed_is_not_shown,
    held.a_confirmed_lease_is_over, held.a_taker_that_leaves_ends_its_lease,
    held.a_higher_attempt_takes_the_place_of_a_lower_one, held.lease_keys_are_not_used_twice,
    held.a_call_begins_with_an_order, held.a_call_is_for_one_sequence, held.nothing_is_held_past_its_time,
    held.it_beats_while_it_has_nothing_to_say, held.a_taker_that_falls_silent_ends_its_lease,
    held.every_page_is_free_at_the_end,
):  # fmt: skip
    rule(_shared)

"""A decode worker keeps every rule for what it has cached; made wrong in one way, it breaks the rule about it."""

import pytest
from headrace_core.errors import HeadraceError
from headrace_core.kv.prefix_cache import PrefixCache
from headrace_core.testing import conformance
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.prefix_rules import PREFIX_RULES
from headrace_core.testing.worker_pair import running
from headrace_core.transfer.holder import PageHolder
from headrace_decode import prefix_holder as prefix_module
from headrace_decode.held_prefixes import HeldPrefixes
from headrace_decode.prefix_holder import PrefixHolder

from tests.integration.test_conformance import (
    NOTHING_AT_HAND,
    SHORT_S,
    WRONG_HOLDERS,
    decode_service,
    patched,
    quick_beats,
)

__all__ = ["quick_beats"]


@async_test
async def test_a_decode_worker_keeps_every_rule_of_a_prefix():
    async with running(decode_service()) as (address,):
        verdicts = await conformance.check_prefix_holder(address, limit_s=WAIT_S)
    assert len(verdicts) == len(PREFIX_RULES.names)
    assert not [verdict for verdict in verdicts if verdict.problem]


def _finds_anything(*, num_more: int):
    """Let every prompt find what is cached, whatever its tokens, and so many pages more than it has itself."""

    def match(cache, token_ids, most):
        nodes, node = [], cache._root
        for _ in range(most + num_more):
            node = next(iter(node.children.values()), None)
            if node is None:
                break
            cache._pool.retain(node.page_id)
            nodes.append(node)
        return nodes

    return lambda patch: patch.setattr(PrefixCache, "match", match)


def _lets_all_go(patch):
    def let_go(held, number):
        for found in held.held:
            held._pages.free(found)
        held._held.clear()
        for cache in held._pages._caches:
            cache.evict(99)

    patch.setattr(HeldPrefixes, "let_go", let_go)


def _mute(name):
    return patched(prefix_module, name, lambda reason, text: HeadraceError("BUG", text))


WRONG_PREFIX_HOLDERS = WRONG_HOLDERS | {
    "what is cached is admitted sealed and confirmed": patched(PageHolder, "seal"),
    "what begins otherwise is not cached": _finds_anything(num_more=0),
    "no more is given than was asked for": _finds_anything(num_more=9),
    "who has it all is told so": NOTHING_AT_HAND,
    "another process has it no more": _mute("HandoffLostError"),
    "nothing is computed for others": _mute("InvalidRequestError"),
    "what is taken is there for the next one": _lets_all_go,
    "another model is refused": patched(prefix_module, "check_compatible"),
    "another layout is refused": patched(prefix_module, "check_compatible"),
    "every page is free at the end": patched(PrefixHolder, "_on_end"),
}


@pytest.mark.usefixtures("quick_beats")
@pytest.mark.parametrize("rule", PREFIX_RULES.names)
@async_test
async def test_a_decode_worker_whose_prefixes_are_wrong_breaks_the_rule(rule: str, monkeypatch):
    with monkeypatch.context() as patch:
        WRONG_PREFIX_HOLDERS[rule](patch)
        service = decode_service()
        address = await service.start()
        try:
            (verdict,) = await conformance.check_prefix_holder(address, limit_s=SHORT_S, only=rule)
        finally:
            await service.stop()
    assert verdict.problem

"""Holds a process to the rules of the wire, from outside.

    python -m headrace_core.testing.conformance --holder host:port

A holder of pages (prefill worker) hears from one that plays its taker; a taker (decode worker), with `--taker`, from
one that plays its router and its holder; the same worker, with `--prefix-holder`, from one that plays its router and
then takes what it has cached. Each rule is reported by its name, kept or broken and how; the exit status is
1 if one is broken. docs/wire-spec.md says the rules in full, protos/conformance has vectors that need no process.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import secrets
import sys
from collections.abc import Sequence
from typing import Any

from headrace.v1 import worker_service_pb2
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub

from headrace_core.rpc import channel
from headrace_core.testing.holder_rules import HOLDER_RULES
from headrace_core.testing.holder_under_test import GREEDY, HolderUnderTest
from headrace_core.testing.mini_holder import MiniHolder
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.prefix_rules import PREFIX_RULES, PrefixHolderUnderTest
from headrace_core.testing.rules import Verdict
from headrace_core.testing.taker_rules import TAKER_RULES, TakerUnderTest
from headrace_core.wire import decode_layout

LIMIT_S = 30.0
"""The longest that one rule may take."""


async def check_holder(address: str, *, limit_s: float = LIMIT_S, only: str = "") -> list[Verdict]:
    """Hold the process at `address` to what a holder of pages must do."""
    async with MiniTaker(address) as taker:
        holder = HolderUnderTest(taker, address)
        try:
            return await HOLDER_RULES.check(holder, limit_s=limit_s, only=only)
        finally:
            await holder.channel.close()


async def check_prefix_holder(address: str, *, limit_s: float = LIMIT_S, only: str = "") -> list[Verdict]:
    """Hold the process at `address` to what a holder of prefixes must do, after it has generated an answer."""
    async with MiniTaker(address) as taker, MiniRouter(decode=address) as router:
        size, vocab_size = taker.info.layout.page_size, taker.info.vocab_size
        prompt = [1 + secrets.randbelow(vocab_size - 1) for _ in range(2 * size + max(1, size // 2))]
        params = dataclasses.replace(GREEDY, max_tokens=size + 1)
        answer = await router.generate("answer", prompt, params=params)
        holder = PrefixHolderUnderTest(taker, address, tokens=[*prompt, *answer[:-1]])
        try:
            return await PREFIX_RULES.check(holder, limit_s=limit_s, only=only)
        finally:
            await holder.channel.close()


async def check_taker(address: str, *, limit_s: float = LIMIT_S, only: str = "") -> list[Verdict]:
    """Hold the process at `address` to what a taker must do; it must be able to reach this one on loopback."""
    async with channel(address) as asking:
        stub: Any = WorkerServiceStub(asking)
        info = await stub.GetInfo(worker_service_pb2.GetInfoRequest())
    async with (
        MiniHolder(decode_layout(info.layout), info.model_fingerprint) as holder,
        MiniRouter(decode=address, prefill=holder.address) as router,
    ):
        taker = TakerUnderTest(address, info, router, holder)
        return await TAKER_RULES.check(taker, limit_s=limit_s, only=only)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="conformance", description=(__doc__ or "").partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--holder", metavar="HOST:PORT", help="a process that serves HoldService and TransferService")
    which.add_argument("--taker", metavar="HOST:PORT", help="a process that serves DecodeService")
    which.add_argument(
        "--prefix-holder",
        metavar="HOST:PORT",
        help="one that serves DecodeService, and HoldService of what it has cached",
    )
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="most seconds for one rule (%(default)g)")
    parser.add_argument("--only", default="", metavar="RULE", help="one rule, by its name")
    given = parser.parse_args(arguments)
    checks = ((given.holder, check_holder), (given.taker, check_taker), (given.prefix_holder, check_prefix_holder))
    ((address, check),) = ((address, check) for address, check in checks if address)
    verdicts = asyncio.run(check(address, limit_s=given.limit, only=given.only))
    for verdict in verdicts:
        sys.stdout.write(f"{'BROKEN' if verdict.problem else 'kept  '} {verdict.name}\n")
        if verdict.problem:
            sys.stdout.write(f"       {verdict.problem}\n")
    num_broken = sum(bool(verdict.problem) for verdict in verdicts)
    sys.stdout.write(f"{len(verdicts) - num_broken} of {len(verdicts)} rules kept\n")
    return 1 if num_broken or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

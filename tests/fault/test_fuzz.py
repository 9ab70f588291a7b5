"""Spoilt messages on every rpc of real processes, a few hundred of each (`make fuzz` sends 20,000)."""

from collections import Counter

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from headrace_core.identity import Role
from headrace_core.rpc import blocking_channel
from headrace_core.testing.async_test import async_test

from tests.rogue.fuzz import every_target, fleet, fuzz

NUM_MESSAGES = 300


@async_test
async def test_spoilt_messages_on_every_rpc_get_a_reason_each_and_hurt_nobody(tmp_path):
    async with fleet(tmp_path) as it:
        covered = {(target.server, target.method) for target in await every_target(it)}
        for role in (Role.ROUTER, Role.PREFILL, Role.DECODE):
            assert served(it, role) == {method for server, method in covered if server is role}
        report = await fuzz(it, NUM_MESSAGES)
    # Memory is judged by the long run: until a few thousand messages came, a process still grows into its shape.
    assert not [problem for problem in report["problems"] if "MiB" not in problem]
    by_rpc = Counter[str]()
    for row in report["rows"]:
        by_rpc[row["rpc"]] += row["messages"]
    assert min(by_rpc.values()) >= NUM_MESSAGES


def served(it, role):
    """Return the full names of every rpc that a process serves, as it says itself."""
    with blocking_channel(it.process(role).address, tls=it.tls(Role.OPERATOR, role)) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        services = [pool.FindServiceByName(name) for name in database.get_services()]
        return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}

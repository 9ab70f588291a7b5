import asyncio
import sys

import pytest
from headrace_core import probe, rpc
from headrace_core.authority import ServerTls
from headrace_core.identity import Identity, Role


def test_the_probe_says_in_one_line_what_is_wrong_and_nothing_of_a_process_that_serves():
    async def main():
        server = rpc.Server(["headrace.v1.WorkerService"])
        address = server.bind("127.0.0.1:0")
        await server.start()
        said = [await asyncio.to_thread(probe.probe, address)]
        await server.set_ready(True)
        said.append(await asyncio.to_thread(probe.probe, address))
        await server.stop(0)
        said.append(await asyncio.to_thread(probe.probe, address))
        return address, said

    address, (starting, serving, gone) = asyncio.run(main())
    assert starting == f"{address} is NOT_SERVING"
    assert serving == ""
    assert gone.startswith(f"{address}: UNAVAILABLE: ")
    assert "\n" not in gone


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("a:1 is NOT_SERVING", "a:1 is NOT_SERVING")])
def test_the_exit_code_is_docker_s(monkeypatch, problem, code):
    monkeypatch.setattr(sys, "argv", ["probe", "a:1"])
    monkeypatch.setattr(probe, "probe", lambda address: problem)
    with pytest.raises(SystemExit) as exit_:
        probe.main()
    assert exit_.value.code == code


@pytest.mark.parametrize("role", [Role.ROUTER, Role.PREFILL, Role.DECODE])
def test_a_process_with_an_identity_is_asked_with_the_same_one(monkeypatch, identities, role):
    async def main():
        tls = ServerTls(Identity(identities / role.value, role), serves_as=role)
        server = rpc.Server(["headrace.v1.WorkerService"], tls=tls)
        address = server.bind("127.0.0.1:0")
        await server.start()
        await server.set_ready(True)
        said = [await asyncio.to_thread(probe.probe, address)]
        monkeypatch.setenv(f"HEADRACE_{role.name}_TLS", str(identities / role.value))
        said.append(await asyncio.to_thread(probe.probe, address))
        monkeypatch.setenv(f"HEADRACE_{role.name}_TLS", str(identities / "client"))
        said.append(await asyncio.to_thread(probe.probe, address))
        await server.stop(0)
        return said

    unknown, serving, other = asyncio.run(main())
    assert "UNAVAILABLE" in unknown
    assert serving == ""
    assert "is of role client" in other

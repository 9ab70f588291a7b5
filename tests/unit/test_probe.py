import asyncio
import sys

import pytest
from headrace_core import probe, rpc


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

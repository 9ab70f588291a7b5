"""A taker's end of any transport, held where its bytes have arrived, and spoiling them if the stage asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace_core.transfer.transport import Read, Source, TakerEnd, Transfer
from headrace_core.transfer.values import Run


class HeldTaker:
    """A `TakerEnd` whose transfers end at the gate `transferring`, whatever moves their bytes."""

    def __init__(self, end: TakerEnd, stage: Any, memory: Any) -> None:
        self._end, self._stage, self._memory = end, stage, memory

    async def prove(self, source: Source) -> None:
        await self._end.prove(source)

    def pull(self, source: Source, run: Run, page_ids: Sequence[int], *, timeout_s: float) -> Transfer:
        transfer = self._end.pull(source, run, page_ids, timeout_s=timeout_s)
        wait = transfer.wait

        async def gated() -> Read | None:
            read = await wait()
            await self._stage.gates["transferring"].passed()
            fault, self._stage.bytes_fault = self._stage.bytes_fault, ""
            if fault and read is None:
                _spoil(self._memory, run, page_ids, fault)
            return _spoiled(read, run, fault) if fault and read is not None else read

        transfer.wait = gated
        return transfer

    async def disconnect(self, endpoint: str) -> None:
        await self._end.disconnect(endpoint)

    async def close(self) -> None:
        await self._end.close()


def _spoiled(read: Read, run: Run, fault: str) -> Read:
    """Do to pages that are read in place what a transport could do to them that brings other ones."""
    last = run.num_pages - 1

    def spoiled(layer: int, index: int) -> memoryview:
        page = read(layer, index)
        if layer != run.first_layer:
            return page
        match fault:
            case "corrupted" if index == 0:
                return memoryview(bytes([page[0] ^ 1]) + bytes(page[1:]))
            case "truncated" if index == last:
                return memoryview(bytes(len(page)))
            case "duplicated" if index == last:
                return read(layer, 0)
            case "reordered" if index in (0, last):
                return read(layer, last - index)
            case _:
                return page

    return spoiled


def _spoil(memory: Any, run: Run, page_ids: Sequence[int], fault: str) -> None:
    """Do to pages that arrived what a transport without frames could do to them."""
    first, last = (memory.page_bytes(run.first_layer, page_id) for page_id in (page_ids[0], page_ids[-1]))
    match fault:
        case "corrupted":
            first[0] ^= 1
        case "truncated":
            last[:] = bytes(len(last))
        case "duplicated":
            last[:] = first
        case "reordered":
            first[:], last[:] = bytes(last), bytes(first)
        case _:
            raise AssertionError(f"no such fault: {fault}")

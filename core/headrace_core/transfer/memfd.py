"""Pool memory that other processes of this machine can be let read, and nobody but this one can ever write.

    layer 0 │ layer 1 │ ... │ proof
            each from a border of `ALIGNMENT` bytes on; the proof is the last `ALIGNMENT` bytes' beginning

It is memory without a name (memfd_create): who has a descriptor has it, and it is gone with the last of them, however
the processes end. Its size is sealed, since a reader of pages that were cut off would die of SIGBUS; and it is sealed
against every further way of writing (F_SEAL_FUTURE_WRITE: not by write(2), not by a new mapping, not by a descriptor
that a reader opens again), so that the mapping made here stays the only one that writes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import weakref

from headrace_core.errors import StartupError

ALIGNMENT = 4096
PROOF_BYTES = 16
_F_SEAL_FUTURE_WRITE = 0x10  # fcntl.h; Python names it from 3.13 on


class Memfd:
    """See the module. Allocated once; it lives as long as this object or a view of it."""

    def __init__(self) -> None:
        self.layer_stride = 0
        """Bytes from one layer's first to the next one's; 0: not allocated yet."""
        self.proof = secrets.token_bytes(PROOF_BYTES)
        """What is written at its end: who can say it has read there."""
        self._descriptor = -1

    def allocate(self, num_layers: int, layer_bytes: int) -> list[memoryview]:
        """Return a buffer of `layer_bytes` for each layer: writable, zero, taking real memory only when written.

        Raises:
            StartupError: NO_TRANSPORT, this system has no such memory, or not so much.
        """
        assert not self.layer_stride, "a pool is allocated once"
        self.layer_stride = -(-layer_bytes // ALIGNMENT) * ALIGNMENT
        size = num_layers * self.layer_stride + ALIGNMENT
        try:
            writing = os.memfd_create("headrace-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(writing, size)
                mapping = mmap.mmap(writing, size)
                mapping[size - ALIGNMENT : size - ALIGNMENT + PROOF_BYTES] = self.proof
                sealed_size = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
                fcntl.fcntl(writing, fcntl.F_ADD_SEALS, sealed_size | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
                self._descriptor = os.open(f"/proc/self/fd/{writing}", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(writing)
        except (OSError, AttributeError) as error:
            raise StartupError("NO_TRANSPORT", f"no memory can be shared here ({size} bytes): {error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        view = memoryview(mapping)
        starts = range(0, num_layers * self.layer_stride, self.layer_stride)
        return [view[start : start + layer_bytes] for start in starts]

    @property
    def descriptor(self) -> int:
        """The descriptor that may be passed on, opened for reading alone. It stays this object's."""
        assert self.layer_stride, "allocated"
        return self._descriptor


def map_sealed(descriptor: int) -> tuple[memoryview, bytes]:
    """Return the layers of somebody's `Memfd`, and its proof. The descriptor can be closed then.

    Raises:
        OSError: it is no such memory, or its size could still change.
    """
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise OSError("its size is not sealed")
    size = os.fstat(descriptor).st_size
    if size <= ALIGNMENT or size % ALIGNMENT:
        raise OSError(f"{size} bytes are no pool")
    view = memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))
    return view[: size - ALIGNMENT], bytes(view[size - ALIGNMENT :][:PROOF_BYTES])

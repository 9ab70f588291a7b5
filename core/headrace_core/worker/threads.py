"""CPU threads of a worker's compute; torch-free, because it must run before torch is imported."""

from __future__ import annotations

import os


def limit_threads(num_threads: int) -> None:
    """Let torch use `num_threads` CPU threads in this process (0: its own choice, all cores).

    Waiting threads sleep in either case: workers that share cores and spin slow each other down twentyfold.
    """
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)

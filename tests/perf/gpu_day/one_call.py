"""Call kernels a few times, for a profiler to look at: `python -m tests.perf.gpu_day.one_call FAMILY:SHAPE...`.

SHAPE is a part of a case's shape, the first such case is taken. `--dry-run` calls it interpreted on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.perf.kernels.bench_case import BenchCase

_CALLS = 3


def main() -> int:
    """Call what the arguments name; return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="+", metavar="FAMILY:SHAPE")
    parser.add_argument("--dry-run", action="store_true", help="interpreted on a CPU")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    # They import Triton: not before the interpreter is asked for.
    import torch

    from tests.perf.kernels.bench_case import buffers_at_most
    from tests.perf.kernels.measure import How, device

    with device(How(is_dry=options.dry_run)), buffers_at_most(_CALLS):
        for wanted in options.wanted:
            for call in case_of(wanted).calls():
                call()
    if not options.dry_run:
        torch.cuda.synchronize()
    return 0


def case_of(wanted: str) -> BenchCase:
    """Return the case that FAMILY:SHAPE names; ValueError if there is none."""
    from tests.perf.kernels.harness import families

    family, _, shape = wanted.partition(":")
    makers = families("cases")
    cases = [case for case in makers[family]() if shape in case.shape] if family in makers else []
    if not cases:
        raise ValueError(f"{wanted}: no case of a family {family!r} has {shape!r} in its shape")
    return cases[0]


if __name__ == "__main__":
    sys.exit(main())

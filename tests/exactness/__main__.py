"""Try exact numerics on many random cases of every family and type.

python -m tests.exactness --cases 10000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.progress import track

from tests.exactness.cases import DTYPES, FAMILIES, check, tiny_model


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each family and type")
    options = parser.parse_args()
    num_failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            for dtype in DTYPES:
                model = tiny_model(family, dtype, Path(folder) / f"{family}-{dtype}")
                seeds = track(range(options.cases), f"{family} {dtype}", disable=not sys.stderr.isatty())
                failed = [seed for seed in seeds if not check(model, seed)]
                print(f"{family} {dtype}: {options.cases} cases, {len(failed)} differ {failed[:5]}", flush=True)  # noqa: T201
                num_failed += len(failed)
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    _main()

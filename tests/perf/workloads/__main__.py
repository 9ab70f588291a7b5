"""`make bench-workloads`: the field's four workloads, served at a smaller size and simulated at their own.

    python -m tests.perf.workloads [--serve v3 mixtral] [--no-simulate] [--plot FILE]

Writes build/bench/workloads.json and the table of docs/benchmarks.md. What is not asked for stays as the report has it,
so that each part may be run when the machine is quiet: `chrt -r 50` before the command gives the serving peace.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from headrace_planner import plots
from headrace_planner.sim_workloads import MODELS, WORKLOADS, simulated, study_of

from tests.perf.workloads.served import FAMILIES, serve
from tests.perf.workloads.table import of_simulated, table, write

_log = logging.getLogger(__name__)
_REPORT = Path("build/bench/workloads.json")
_PLOT = Path("docs/plots/workloads.svg")


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--no-simulate", dest="simulate", action="store_false")
    options = parser.parse_args()
    report: dict[str, Any] = json.loads(_REPORT.read_text()) if _REPORT.is_file() else {}
    served: dict[str, Any] = report.setdefault("served", {})
    for name in options.serve:
        served[name] = serve(FAMILIES[name])
        _keep(report)
    if options.simulate:
        _log.info("simulating %d workloads of %d models, a minute or so", len(WORKLOADS), len(MODELS))
        cells = [simulated(model, workload) for model in MODELS for workload in WORKLOADS]
        report["simulated"] = [of_simulated(cell) for cell in cells]
        plots.save(study_of(cells).figures, _PLOT)
        _keep(report)
    rows = table(report.get("simulated", []), [cell for name in FAMILIES for cell in served.get(name, [])])
    write(rows)
    _log.info("%s\n\nwritten to %s and docs/benchmarks.md", rows, _REPORT)


def _keep(report: dict[str, Any]) -> None:
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    _REPORT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    _main()

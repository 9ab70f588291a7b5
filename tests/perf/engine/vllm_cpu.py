"""vLLM for CPUs as a peer: its engine's own steps (`vllm_steps`), scheduling and sampling in them, in its own process.

Looked for as vllm/bin/python in the folder of peers: a virtual environment that has it. Its cache of compiled graphs is
what makes its first start take minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.perf.engine.asked_process import AskedProcess
from tests.perf.engine.peer import CONTEXT, STEPS, NoPeerError, Samples, Task, peers_dtype, threads_of

_SCRIPT = Path(__file__).with_name("vllm_steps.py")
_START_S = 900.0
_ANSWER_S = 600.0


class VllmCpu:
    """Its engine, in a process that lives as long as this."""

    def __init__(self, peers: Path, task: Task) -> None:
        python = peers / "vllm" / "bin" / "python"
        if not python.exists():
            raise NoPeerError(f"{python} is not there: a virtual environment with vLLM for CPUs")
        words = [python, _SCRIPT, task.checkpoint, str(max([*task.batches, 1])), str(task.most_tokens), peers_dtype()]
        cores = f"0-{task.threads - 1}" if task.threads > 1 else "0"
        # It keeps one core for itself unless told which it may have.
        own = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2"}
        self._process = AskedProcess(words, threads_of(task.threads) | own, start_s=_START_S)
        self.command = self._process.command

    def one_round(self, task: Task) -> Samples:
        """See `peer.Engine`."""
        found: Samples = {}
        for batch in task.batches:
            # One step more: the first after prompts is not measured, as with other engines.
            found[f"decode {batch}"] = self._ask(task.prompts(batch, CONTEXT), STEPS + 1)["decode_s"][1:]
        for length in task.lengths:
            found[f"prefill {length}"] = [sum(self._ask(task.prompts(1, length), 0)["prefill_s"])]
        return found

    def close(self) -> None:
        """See `peer.Engine`."""
        self._process.close()

    def _ask(self, prompts: list[list[int]], steps: int) -> Any:
        return self._process.ask({"prompts": prompts, "steps": steps}, most_s=_ANSWER_S)

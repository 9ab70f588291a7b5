"""llama.cpp as a peer: its own `llama-batched-bench`, on the same weights as a bfloat16 GGUF file.

Looked for in llama.cpp/ in the folder of peers: the program, and NAME.gguf, made of the checkpoint NAME by the
project's converter.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.perf.engine.peer import CONTEXT, NoPeerError, Samples, Task, threads_of

_NEW_TOKENS = 12
# A row of its table: PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | ...
_ROW = re.compile(
    r"^\|" + r"\s*(\d+)\s*\|" * 3 + r"\s*\d+\s*\|" + r"\s*([\d.]+)\s*\|\s*[\d.]+\s*\|\s*([\d.]+)\s*\|", re.M
)


class LlamaCpp:
    """The program, and the weights."""

    def __init__(self, peers: Path, task: Task) -> None:
        folder = peers / "llama.cpp"
        program, weights = folder / "llama-batched-bench", folder / f"{task.checkpoint.name}.gguf"
        for path in (program, weights):
            if not path.is_file():
                raise NoPeerError(f"{path} is not there")
        threads = task.threads
        self._words = [str(program), "-m", str(weights), "-t", str(threads), "-tb", str(threads)]
        self._words += ["-fa", "on", "-b", "2048", "-ub", "512"]
        self.command = " ".join(self._words)

    def one_round(self, task: Task) -> Samples:
        """See `peer.Engine`; a decode step is the mean of twelve, as the program prints it."""
        found: Samples = {}
        if task.batches:
            for _, num_new, batch, _, decode_s in self._rows(CONTEXT, _NEW_TOKENS, task.batches, task.threads):
                found[f"decode {batch}"] = [decode_s / num_new]
        for length in task.lengths:
            ((_, _, _, prefill_s, _),) = self._rows(length, 1, [1], task.threads)
            found[f"prefill {length}"] = [prefill_s]
        return found

    def close(self) -> None:
        """See `peer.Engine`."""

    def _rows(
        self, prompt: int, new: int, batches: Sequence[int], threads: int
    ) -> list[tuple[int, int, int, float, float]]:
        room = max(batches) * (prompt + new) + 64
        words = ["-c", room, "-npp", prompt, "-ntg", new, "-npl", ",".join(map(str, batches))]
        # Unless told to wait without spinning (`threads_of`), a busy moment makes it look ten times slower.
        output = subprocess.run(
            [*self._words, *map(str, words)], check=True, capture_output=True, text=True, env=threads_of(threads)
        ).stdout
        rows = [(int(p), int(n), int(b), float(t), float(d)) for p, n, b, t, d in _ROW.findall(output)]
        if len(rows) != len(batches):
            raise RuntimeError(f"{self.command} printed no table of {len(batches)} rows:\n{output}")
        return rows

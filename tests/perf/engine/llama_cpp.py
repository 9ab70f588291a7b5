"""llama.cpp as a peer: its own `llama-batched-bench`, on the same weights as a bfloat16 GGUF file.

Looked for in .peers/llama.cpp, which is never committed: the program, and NAME.gguf, made of the checkpoint NAME by the
project's converter.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(".peers/llama.cpp")
_NEW_TOKENS = 12
# A row of its table: PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | ...
_ROW = re.compile(
    r"^\|" + r"\s*(\d+)\s*\|" * 3 + r"\s*\d+\s*\|" + r"\s*([\d.]+)\s*\|\s*[\d.]+\s*\|\s*([\d.]+)\s*\|", re.M
)


@dataclass(frozen=True)
class LlamaCpp:
    """The program, and the weights."""

    program: Path
    weights: Path
    threads: int

    @staticmethod
    def find(checkpoint: Path, threads: int) -> LlamaCpp | None:
        """Return it if it is there."""
        program, weights = _FOLDER / "llama-batched-bench", _FOLDER / f"{checkpoint.name}.gguf"
        return LlamaCpp(program, weights, threads) if program.is_file() and weights.is_file() else None

    def one_round(self, batches: Sequence[int], lengths: Sequence[int], context: int) -> dict[str, float]:
        """Return seconds of a decode step behind `context` tokens by batch, and of a prompt by its length."""
        found: dict[str, float] = {}
        for _, num_new, batch, _, decode_s in self._rows(context, _NEW_TOKENS, batches):
            found[f"decode {batch}"] = decode_s / num_new
        for length in lengths:
            ((_, _, _, prefill_s, _),) = self._rows(length, 1, [1])
            found[f"prefill {length}"] = prefill_s
        return found

    def _rows(self, prompt: int, new: int, batches: Sequence[int]) -> list[tuple[int, int, int, float, float]]:
        room = max(batches) * (prompt + new) + 64
        command = [self.program, "-m", self.weights, "-t", self.threads, "-tb", self.threads, "-c", room, "-fa", "on"]
        command += ["-b", 2048, "-ub", 512, "-npp", prompt, "-ntg", new, "-npl", ",".join(map(str, batches))]
        # Its threads spin at every barrier otherwise: a busy moment makes it look ten times slower than it is.
        patient = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        words = [str(part) for part in command]
        output = subprocess.run(words, check=True, capture_output=True, text=True, env=patient).stdout
        rows = [(int(p), int(n), int(b), float(t), float(d)) for p, n, b, t, d in _ROW.findall(output)]
        if len(rows) != len(batches):
            raise RuntimeError(f"{self.program} printed no table of {len(batches)} rows:\n{output}")
        return rows

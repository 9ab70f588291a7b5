"""A script that another Python runs, with packages of its own: asked and answering in lines of JSON."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.perf.engine.peer import NoPeerError

_LAST_WORDS = 4


class AskedProcess:
    """Started at once; what it writes to standard error is kept, as far as its last words.

    Raises:
        NoPeerError: it ends, or takes longer than `start_s` to say that it is ready.
    """

    def __init__(self, words: Sequence[str | Path], env: Mapping[str, str], *, start_s: float) -> None:
        self.command = " ".join(map(str, words))
        self._said: deque[str] = deque(maxlen=_LAST_WORDS)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [str(word) for word in words], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **env}
        )
        self._readers = [threading.Thread(target=each, daemon=True) for each in (self._read_answers, self._read_words)]
        for reader in self._readers:
            reader.start()
        self._answer(start_s)

    def ask(self, question: object, *, most_s: float) -> Any:
        """Return what it answers to `question`. Raises as the constructor does."""
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer(most_s)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._end()

    def _end(self) -> int:
        """Wait for its end and for all that it said; return its exit code."""
        code = self._process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None, "all are pipes"
            pipe.close()
        return code

    def _answer(self, most_s: float) -> Any:
        try:
            line = self._lines.get(timeout=most_s)
        except queue.Empty:
            self.close()
            raise NoPeerError(f"{self.command}: no answer after {most_s:.0f} s") from None
        if not line:
            raise NoPeerError(f"{self.command} ended with {self._end()}: {' '.join(self._said)}")
        return json.loads(line)

    def _read_answers(self) -> None:
        assert self._process.stdout is not None, "a pipe"
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _read_words(self) -> None:
        assert self._process.stderr is not None, "a pipe"
        for line in self._process.stderr:
            self._said.append(line.strip())

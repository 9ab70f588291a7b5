"""Holds an answer to a grammar: which tokens may come next, given those that came.

By llguidance, which makes a mask over the vocabulary for each token. A sequence's state is a function of its grammar
and its output tokens and of nothing else, so any worker that is given both goes on where another was: after a hand-off,
a preemption, a worker's end. Without the library, or with a tokenizer that it can't read, grammars are refused, never
ignored.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace_core.errors import InvalidRequestError
from headrace_core.request import Grammar, GrammarKind

_TOKENIZER = "tokenizer.json"
_WHITE_SPACE = {"whitespace_pattern": r"[ \n\r\t]{0,40}"}
"""Between the parts of a JSON text. Bounded: a model that likes white space would write nothing else."""
_MOST_KEPT = 64
"""Grammars compiled and kept, so that many sequences of one cost little more than one."""
_MAX_PROBLEM_CHARS = 200


class Grammars:
    """Grammars over one model's tokens. Its states are one thread's."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Read the tokenizer of a model's folder; 30 ms for 1,500 tokens, a second or so for 130,000.

        What is wrong with it, or with the library, is `problem`: a worker without grammars serves all else.
        """
        self.problem = ""
        """Why no answer can be held to a grammar here; empty if it can."""
        self._vocab_size = vocab_size
        self._tokenizer: Any = None
        path = folder / _TOKENIZER
        if not eos_token_ids:
            self.problem = "the model has no token that ends a text"
        elif not path.is_file():
            self.problem = f"{path.name} is missing from the model's folder"
        else:
            try:
                library = _library()
                self._tokenizer = library.LLTokenizer(str(path), n_vocab=vocab_size, eos_token=list(eos_token_ids))
            except InvalidRequestError as error:
                self.problem = str(error)
            except Exception as error:  # noqa: BLE001 - the library's own errors have no class
                self.problem = f"{path.name} can't be read for grammars: {_shown(error)}"
        self._compiled = functools.lru_cache(_MOST_KEPT)(self._compile)

    def state(self, grammar: Grammar) -> GrammarState:
        """Return the state of a sequence without output.

        Raises:
            InvalidRequestError: BAD_GRAMMAR.
        """
        return GrammarState(self._compiled(grammar).deep_copy(), self._vocab_size)

    def _compile(self, grammar: Grammar) -> Any:
        if self._tokenizer is None:
            raise InvalidRequestError("BAD_GRAMMAR", f"this worker can't hold answers to a grammar: {self.problem}")
        library = _library()
        matcher = library.LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=_limits())
        if matcher.is_error():
            raise _bad(matcher.get_error())
        return matcher


class GrammarState:
    """One sequence's."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_output = 0

    def mask(self, output_token_ids: Sequence[int]) -> NDArray[np.bool_]:
        """Return [V] bool, which tokens may follow the output, of which those that are new are taken in.

        Raises:
            InvalidRequestError: BAD_GRAMMAR: the output does not fit it, or going on takes too much.
        """
        new = list(output_token_ids[self._num_output :])
        self._num_output = len(output_token_ids)
        if not new or self._matcher.consume_tokens(new):
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if not self._matcher.is_error() and bits.any():
                return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        problem = self._matcher.get_error() or "no token fits it"
        raise InvalidRequestError("BAD_GRAMMAR", f"the answer can't be held to its grammar any more: {_shown(problem)}")


def check_grammar(grammar: Grammar) -> None:
    """Check that a grammar can be read, and is no larger than can be held to. Some ms at most.

    Raises:
        InvalidRequestError: BAD_GRAMMAR.
    """
    problem = _library().LLMatcher.validate_grammar(_source(grammar), None, limits=_limits())
    if problem:
        raise _bad(problem)


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        problem = f"the package llguidance is missing ({error}): pip install llguidance"
        raise InvalidRequestError("BAD_GRAMMAR", problem) from error


def _limits() -> Any:
    """Return the library's own, which bound what compiling and each mask may take; errors don't quote the answer."""
    return _library().LLParserLimits(verbose_errors=False)


def _source(grammar: Grammar) -> str:
    matcher = _library().LLMatcher
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            try:
                return matcher.grammar_from_json_schema(grammar.text, defaults=_WHITE_SPACE)
            except ValueError as error:
                raise _bad(str(error)) from None
        case GrammarKind.REGEX:
            return matcher.grammar_from_regex(grammar.text)
        case GrammarKind.LARK:
            return matcher.grammar_from_lark(grammar.text)


def _bad(problem: object) -> InvalidRequestError:
    return InvalidRequestError("BAD_GRAMMAR", f"the grammar can't be used: {_shown(problem)}")


def _shown(problem: object) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= _MAX_PROBLEM_CHARS else f"{text[:_MAX_PROBLEM_CHARS]} ..."

"""How a model calls functions of itself, by the marks that its chat template has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace_router.face.openai import calls_by_keys
from headrace_router.face.openai.calls_by_keys import KeyedCalls, Texts
from headrace_router.face.openai.calls_in_sections import DEEPSEEK, KIMI, MISTRAL, SectionForm
from headrace_router.face.openai.said import Reader, TaggedCalls

_OTHERS = ("<function=", "<parameter=", "\uff5cDSML\uff5c")
"""Of templates whose calls are marked in ways that are not read."""


@dataclass(frozen=True, slots=True)
class KnownForm:
    """A form that is read: of `marks` a template has those of `tells`, all of them; `make` makes a choice's reader."""

    tells: tuple[str, ...]
    marks: tuple[str, ...]
    make: Callable[[Texts], Reader]


def _sections(form: SectionForm) -> KnownForm:
    marks = tuple(mark for mark in (form.begin, form.end, *form.tokens) if mark)
    return KnownForm((form.begin,), marks, lambda texts: form.reader())


def _tagged(texts: Texts) -> Reader:
    del texts
    return TaggedCalls()


_TAGS = (TaggedCalls.BEGIN, TaggedCalls.END)
FORMS = (
    _sections(KIMI),
    _sections(DEEPSEEK),
    _sections(MISTRAL),
    KnownForm((calls_by_keys.BEGIN, "<arg_key>", "<arg_value>"), (*_TAGS, *calls_by_keys.TOKENS), KeyedCalls),
    KnownForm((*_TAGS, "arguments"), _TAGS, _tagged),
)
"""The first whose marks a template has is its model's."""


def form_of(knows: Callable[[str], bool]) -> KnownForm | None:
    """Return the form of a model; None: it has none that is read. `knows` says whether its template has a text."""
    if any(map(knows, _OTHERS)):
        return None
    return next((form for form in FORMS if all(map(knows, form.tells))), None)

"""Fields of a config.json, with their types and ranges, and the refusals that name them."""

from __future__ import annotations

from typing import Any, NoReturn

from headrace_core.errors import CheckpointError
from headrace_core.request import MAX_COUNT

CONFIG = "config.json"
_MAX_FLOAT = (2 - 2**-23) * 2.0**127
"""The largest of float32, in which every such number meets the network's."""
_MAX_SHOWN = 200
"""Characters of a value that a message repeats."""


def unsupported(name: str, value: object, supported: str) -> NoReturn:
    """Refuse a config that asks for something that is not implemented."""
    raise CheckpointError("UNSUPPORTED_MODEL", f"{CONFIG}: {name} is {_shown(value)}; Headrace supports {supported}")


def bad(name: str, value: object, expected: str, *, file: str = CONFIG) -> NoReturn:
    """Refuse a config that makes no sense."""
    raise CheckpointError("BAD_CONFIG", f"{file}: {name} is {_shown(value)}; it must be {expected}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


class Fields:
    """Typed access to the fields of a JSON object; a wrong type or range is refused by name.

    What returns a value raises CheckpointError: BAD_CONFIG where it is missing without a `default`, or can't be.
    """

    def __init__(self, values: dict[str, Any], prefix: str = "", *, file: str = CONFIG) -> None:
        self.file = file
        self._values = values
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Return whether the field is there, and null."""
        return name in self._values and self._values[name] is None

    def raw(self, name: str) -> Any:
        """Return the value as it is; None where it is null or missing."""
        return self._values.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._value(name, default)
        return value if isinstance(value, str) else self._bad(name, value, "a string")

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number from `least` to what a request may count."""
        value = self._value(name, default)
        if type(value) is not int or not least <= value <= MAX_COUNT:
            self._bad(name, value, f"a whole number, {least} to {MAX_COUNT}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number that float32 can hold."""
        value = self._value(name, default)
        # Whole numbers are compared as they are: one of 400 digits is no float. NaN is in no range.
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_FLOAT <= value <= _MAX_FLOAT:
            self._bad(name, value, f"a number in the range of float32, {-_MAX_FLOAT:g} to {_MAX_FLOAT:g}")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """Return a number above 0 that float32 can hold."""
        value = self.number(name, default)
        return value if value > 0 else self._bad(name, value, "greater than 0")

    def flag(self, name: str, default: bool) -> bool:
        """Return a field of true and false; null is false whatever the default, as where Python asks if it is true."""
        if self.is_null(name):
            return False
        value = self._value(name, default)
        return value if isinstance(value, bool) else self._bad(name, value, "true or false")

    def only(self, name: str, supported: object, default: object) -> None:
        """Refuse any value but `supported`: UNSUPPORTED_MODEL."""
        value = self._value(name, default)
        if value != supported:
            unsupported(self._prefix + name, value, repr(supported))

    def object(self, name: str) -> Fields | None:
        """Return the fields of an object; None where it is null, empty or missing."""
        value = self.raw(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            self._bad(name, value, "an object or null")
        return Fields(value, f"{self._prefix}{name}.")

    def _bad(self, name: str, value: object, expected: str) -> NoReturn:
        bad(self._prefix + name, value, expected, file=self.file)

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            what = "is null" if name in self._values else "is missing"
            raise CheckpointError("BAD_CONFIG", f"{self.file}: {self._prefix}{name} {what} and has no default")
        return value

"""Read what a folder somebody gave us has under a name: a JSON object, or whatever was put there in its place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast


class UnreadableError(ValueError):
    """The system does not let a file be read that is there: nothing is known of its content. The message says why."""

    def __init__(self, path: Path, error: OSError) -> None:
        why = error.strerror or str(error)
        super().__init__(f"{path} can't be read: {why}; see that this user may read it and that its disk is well")


def is_there(path: Path) -> bool:
    """True if the folder has such a name: a link to nothing, too, is a file that can't be read and not one left out."""
    return os.path.lexists(path)


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UnreadableError: the system refuses.
        ValueError: it is no regular file (from a pipe nothing may ever come), or is not UTF-8; says why.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no regular file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnreadableError(path, error) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: as `read_text`; or it is no JSON, nested too deep, or not one object.
    """
    return parse_object(read_text(path), str(path))


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in `text`, which messages call `name`.

    Raises:
        ValueError: it is no JSON, nested too deep, or not one object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold one JSON object")
    return cast("dict[str, Any]", content)

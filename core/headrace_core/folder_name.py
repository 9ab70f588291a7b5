"""What a folder is called: by the path that was typed, so that a link has its own name, not its target's."""

from __future__ import annotations

from pathlib import Path


def folder_name(folder: Path) -> str:
    """Return the last part of the path; where that is no name, as of `.` and `..`, the folder's own name."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name

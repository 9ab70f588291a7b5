"""A model by its name on the Hugging Face hub: the folder that it is here, downloaded if need be.

    MODEL ──a path that exists──────────────────────────────────────► that folder
      └─────owner/name──► config, tokenizer ──► checks ──► weights ──► the snapshot in the hub's cache

The library does what it documents: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, locks between processes; within a
download it goes on where a connection broke. A download that was ended keeps whole files; those it was at begin again.
What is downloaded before the checks are a few megabytes: a model that can't be served costs no more than these.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any, NoReturn, Self, TypeVar

from headrace_core.config import RouterSettings, WorkerSettings
from headrace_core.errors import CheckpointError, HeadraceError, InvalidRequestError, StartupError, UnavailableError
from headrace_core.families.config_json import parse_config
from headrace_core.folder_name import folder_name
from headrace_core.json_file import read_object

_S = TypeVar("_S", RouterSettings, WorkerSettings)

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; from any thread, one at a time."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tiktoken.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILES_AT_A_TIME = 4
_MOST_WORDS = 300
"""Characters of the library's own message that ours repeats."""


def is_hub_name(model: str | Path) -> bool:
    """Return whether `model` is owner/name, and nothing here has that path."""
    return bool(_NAME.fullmatch(str(model))) and not os.path.lexists(model)


def name_of(model: str | Path, given: str = "") -> str:
    """Return what clients call `model`: as is `given`, else by its name on the hub, or as its folder is called."""
    return given or (str(model) if is_hub_name(model) else folder_name(Path(model)))


def find_model(
    model: str | Path,
    *,
    revision: str = "",
    with_weights: bool = True,
    most_bytes: int = 0,
    on_progress: OnProgress | None = None,
) -> Path:
    """Return the folder of `model`: the path itself if it exists, else the hub's snapshot of that name.

    Blocking, for as long as a download takes; call it off an event loop.

    Args:
        model: a folder, or a name on the hub, such as deepseek-ai/DeepSeek-V2-Lite.
        revision: of a name: branch, tag or commit; empty: the hub's main branch.
        with_weights: False: config, tokenizer and chat template alone.
        most_bytes: of weights, that are of any use; 0: any number.
        on_progress: told of the weights' download, if there is one.

    Raises:
        InvalidRequestError: NO_MODEL, there is neither; or the hub does not give it to us.
        UnavailableError: NO_HUB, what is missing can't be downloaded now.
        StartupError: DISK_FULL.
        CheckpointError: what `parse_config` refuses, before weights are fetched; UNSUPPORTED_MODEL, it has none that
            are read; MODEL_TOO_LARGE, more than `most_bytes`.
    """
    if os.path.lexists(model):
        return Path(model)
    if not is_hub_name(model):
        raise InvalidRequestError(
            "NO_MODEL",
            f"{model} is no folder; give that of a Hugging Face checkpoint, or a name as on the hub, such as "
            "deepseek-ai/DeepSeek-V2-Lite",
        )
    hub = _Hub(str(model), revision)
    folder = hub.get_texts()
    parse_config(folder)
    if with_weights:
        hub.get_weights(folder, most_bytes, on_progress)
    return folder


def with_folder(
    settings: _S, with_weights: bool = True, most_bytes: int = 0, on_progress: OnProgress | None = None
) -> _S:
    """Return `settings` with a folder for their model, called as it was asked for; the rest is as in `find_model`."""
    if not is_hub_name(settings.model):
        return settings
    folder = find_model(
        settings.model,
        revision=settings.revision,
        with_weights=with_weights,
        most_bytes=most_bytes,
        on_progress=on_progress,
    )
    return settings.model_copy(update={"model": folder, "model_name": settings.model_name or str(settings.model)})


def machine_bytes() -> int:
    """Return this machine's memory, used or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Hub:
    def __init__(self, name: str, revision: str) -> None:
        self._name = name
        self._revision = revision

    def get_texts(self) -> Path:
        """Return the snapshot's folder with all that is small; its name is the commit's, of which the rest must be."""
        import huggingface_hub

        try:
            found = huggingface_hub.snapshot_download(
                self._name, revision=self._revision or None, allow_patterns=[*_TEXT_FILES, _INDEX], tqdm_class=_NO_BAR
            )
        except Exception as error:  # noqa: BLE001 - the boundary to a library whose client's errors have no common class
            self._refuse(error)
        folder = Path(found)
        if not (folder / "config.json").exists():
            raise InvalidRequestError("NO_MODEL", f"{self._name} on the hub is no model: it has no config.json")
        return folder

    def get_weights(self, folder: Path, most_bytes: int, on_progress: OnProgress | None) -> None:
        import huggingface_hub

        names = _weight_files(folder)
        if all((folder / name).exists() for name in names):
            return
        try:
            plan = huggingface_hub.snapshot_download(
                self._name, revision=folder.name, allow_patterns=names, tqdm_class=_NO_BAR, dry_run=True
            )
        except Exception as error:  # noqa: BLE001 - as above
            self._refuse(error)
        if missing := sorted(set(names) - {file.filename for file in plan}):
            raise CheckpointError(
                "UNSUPPORTED_MODEL", f"{self._name} on the hub has no {missing[0]}; Headrace reads safetensors"
            )
        total = sum(file.file_size or 0 for file in plan)
        left = sum(file.file_size or 0 for file in plan if file.will_download)
        if most_bytes and total > most_bytes:
            raise CheckpointError(
                "MODEL_TOO_LARGE",
                f"{self._name} has {_size(total)} of weights and this machine {_size(most_bytes)} of memory; "
                "none were downloaded",
            )
        cache = folder.parents[1]
        if (free := shutil.disk_usage(cache).free) < left:
            self._refuse_full(f"{_size(left)} are to be downloaded and {_size(free)} are free")
        names = sorted(file.filename for file in plan if file.will_download)
        self._download(names, folder.name, _Count(total, total - left, on_progress))

    def _download(self, names: Sequence[str], commit: str, count: _Count) -> None:
        import huggingface_hub

        bar = _bar(count)
        with ThreadPoolExecutor(_FILES_AT_A_TIME, thread_name_prefix="hub") as threads:
            downloads = [
                threads.submit(huggingface_hub.hf_hub_download, self._name, name, revision=commit, tqdm_class=bar)
                for name in names
            ]
            try:
                for download in downloads:
                    download.result()
            except BaseException as error:
                count.stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, Exception):
                    self._refuse(error)
                raise

    def _refuse(self, error: Exception) -> NoReturn:
        """Say in a line what the library raised; always raises."""
        from huggingface_hub import constants, errors

        if isinstance(error, HeadraceError):
            raise error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._refuse_full("it is full")
        if isinstance(error, errors.GatedRepoError):
            raise InvalidRequestError(
                "NO_MODEL",
                f"the hub gives {self._name} only to whom its authors let have it: ask for it at "
                f"{constants.ENDPOINT}/{self._name}, and set HF_TOKEN",
            ) from None
        if isinstance(error, errors.RevisionNotFoundError):
            raise InvalidRequestError(
                "NO_MODEL", f"{self._name} on the hub has no revision {self._revision!r}"
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError):
            raise InvalidRequestError(
                "NO_MODEL",
                f"{self._name} is no folder here, and the hub at {constants.ENDPOINT} has no such model, or not for "
                "everybody: then set HF_TOKEN",
            ) from None
        if constants.is_offline_mode():
            raise UnavailableError(
                "NO_HUB",
                f"{self._name} is no folder here and was not downloaded whole before, and HF_HUB_OFFLINE forbids to "
                "ask the hub",
            ) from None
        cause = error.__cause__ or error
        words = " ".join(str(cause).split())[:_MOST_WORDS]
        raise UnavailableError(
            "NO_HUB",
            f"{self._name} is no folder here, and can't be downloaded from {constants.ENDPOINT} "
            f"({type(cause).__name__}: {words}); whole files are kept: try again, or give a folder",
        ) from None

    def _refuse_full(self, problem: str) -> NoReturn:
        from huggingface_hub import constants

        raise StartupError(
            "DISK_FULL",
            f"no room for {self._name} on the disk of {constants.HF_HUB_CACHE}: {problem}; make room, or name a folder "
            "on another disk in HF_HOME",
        ) from None


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files with weights, as `safetensors_file.read_headers` looks for them.

    Raises:
        CheckpointError: DAMAGED_FILE.
    """
    index = folder / _INDEX
    if not index.exists():
        return [_WEIGHTS]
    try:
        names = {str(name) for name in read_object(index)["weight_map"].values()}
        if any(Path(name).name != name or name.startswith("*") for name in names):
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError("DAMAGED_FILE", f"{index}: it is no index of weights ({error!r})") from None
    return sorted(names)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


class _Count:
    """Bytes done, of several files at once; any thread."""

    def __init__(self, total: int, done: int, on_progress: OnProgress | None) -> None:
        self.stop = Event()
        self._total = total
        self._done = done
        self._on_progress = on_progress
        self._lock = Lock()

    def add(self, count: int) -> None:
        if self.stop.is_set():
            raise InterruptedError("the download was ended")
        with self._lock:
            self._done += count
            if self._on_progress is not None:
                self._on_progress(min(self._done, self._total), self._total)


class _NoBar:
    """What the library asks of a tqdm, and shows nothing."""

    total: int | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        """Count nothing."""

    def update_transfer(self, n: float | None = 1) -> None:
        """Count nothing: bytes on the wire may be fewer than the file's."""

    def refresh(self) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Free nothing."""

    def set_description(self, *_: Any, **__: Any) -> None:
        """Show nothing."""

    set_description_str = set_postfix_str = set_transfer_postfix_str = set_description


_NO_BAR: Any = _NoBar  # no tqdm, which the library's types ask for; it says that a class that behaves as one will do


def _bar(count: _Count) -> Any:
    """Return a class of bars, one for each file, that add to `count`."""

    class Bar(_NoBar):
        def update(self, n: float | None = 1) -> None:
            count.add(int(n or 0))

    return Bar

"""What goes wrong on the way back, and how it must look at the end whatever did."""

from collections.abc import Callable
from typing import Any

from .explore import Wrong
from .prefix_taker import leaves
from .prefix_world import PrefixState, PrefixWorld
from .world import CACHED, FREE, put

W, S = PrefixWorld, PrefixState


def _happens(w: W, s: S, fault: str) -> bool:
    if not s.holder.num_faults or fault not in w.faults:
        return False
    s.holder.num_faults -= 1
    s.holder.happened = tuple(sorted({*s.holder.happened, fault}))
    return True


def cancel(w: W, s: S, k: int) -> str | None:
    """Its lease at the prefill worker ends: the engine is told, then the fetch."""
    f = s.fetches[k]
    if not f.is_live or f.seq != "fetching" or not _happens(w, s, "cancel"):
        return None
    f.is_live = False
    f.commands += ("free",)
    leaves(w, f)
    return f"PROMPT {k + 1} IS CANCELLED"


def holder_restarts(w: W, s: S, _: int) -> str | None:
    if not _happens(w, s, "holder restarts"):
        return None
    h = s.holder
    h.pages = tuple((FREE, generation + 1, "", 0) for _, generation, _, _ in h.pages)
    h.commands = h.news = h.sealing = ()
    for f in s.fetches:
        f.lease, f.runs, f.held_ids = "freed" if f.lease else "", (), ()
        f.holder_end = "closed"
        f.up, f.down = (), (("end",),) if f.taker_end != "closed" else ()
    return "THE DECODE WORKER DIES, ANOTHER ONE STARTS"


def bytes_flip(w: W, s: S, k: int) -> str | None:
    f = s.fetches[k]
    index = next((i for i, each in enumerate(f.transfers) if each and each[0] == "landed"), None)
    if index is None or not _happens(w, s, "bytes flip"):
        return None
    f.pages = put(f.pages, index, "damaged")
    return "BYTES FLIP"


def freed_behind(w: W, s: S, k: int) -> str | None:
    f, h = s.fetches[k], s.holder
    held = [page_id for page_id in f.held_ids if page_id >= 0]
    if not held or h.pages[held[-1]][3] != 1 or not _happens(w, s, "freed behind"):
        return None
    h.pages = put(h.pages, held[-1], (FREE, h.pages[held[-1]][1] + 1, h.pages[held[-1]][2], 0))
    f.held_ids = (*f.held_ids[:-1], -1)
    return "A PAGE IS FREED BEHIND"


def check_end(w: W) -> Callable[[Any], None]:
    """Return what judges a state in which nothing can happen any more."""

    def check(key: Any) -> None:
        s = S(key)
        for page_id, (owner, _, _, references) in enumerate(s.holder.pages):
            _require(owner in (FREE, CACHED) and not references, f"page {page_id} of the holder is never free again")
        for k, f in enumerate(s.fetches):
            _require(f.seq == "gone", f"the pages of prompt {k + 1} are never free again")
            _require(f.lease in ("", "freed") and f.take in ("", "drained"), f"the fetch of prompt {k + 1} never ends")
            if not s.holder.happened:
                _require(f.is_taken, "a fetch failed though nothing went wrong")

    return check


def _require(is_met: bool, problem: str) -> None:
    if not is_met:
        raise Wrong(problem)


ACTIONS = [(cancel, range(2)), (holder_restarts, range(1)), (bytes_flip, range(2)), (freed_behind, range(2))]

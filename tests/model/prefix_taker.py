"""The prefill worker, as far as it fetches: its event loop (takings, transfers) and its engine (pages)."""

from headrace_core.transfer.states import TakeEvent

from .explore import Wrong
from .prefix_world import PREFIX, Fetch, PrefixState, PrefixWorld
from .world import TAKE, move, put

W, S = PrefixWorld, PrefixState


def reserves(w: W, s: S, k: int) -> str | None:
    """Its engine gives the prompt its pages, and says that some may be had."""
    f = s.fetches[k]
    if f.seq != "waiting" or (k and s.fetches[0].seq == "waiting"):
        return None  # the two are alike: the first one is the first
    f.seq, f.news = "fetching", ("ready",)
    return f"prompt {k + 1} has pages"


def asks(w: W, s: S, k: int) -> str | None:
    """Its loop hears that, and opens the call."""
    f = s.fetches[k]
    if not f.news:
        return None
    f.news = ()
    if not f.is_live:
        f.commands += ("drained",) if w.has("never begun") else ()
        return f"prompt {k + 1} is over, nobody is asked"
    f.take, f.taker_end, f.up = "opened", "open", ("open",)
    return f"prompt {k + 1} asks"


def hears_the_holder(w: W, s: S, k: int) -> str | None:
    f = s.fetches[k]
    if not f.down or f.taker_end != "open":
        return None
    (kind, *what), f.down = f.down[0], f.down[1:]
    if kind == "admitted":
        f.take, f.num_wanted = move(TAKE, f.take, TakeEvent.HELD), what[0]
    elif kind == "run":
        f.take = move(TAKE, f.take, TakeEvent.RUN)
        index, *page = what
        f.transfers = put(f.transfers, index, ("posted", *page))
    elif kind == "confirmed":
        f.take, f.taker_end, f.is_taken = move(TAKE, f.take, TakeEvent.CONFIRMED), "closed", True
    else:
        leaves(w, f)
    _confirms_if_complete(f)
    return f"prompt {k + 1} hears {kind} {what[0] if what else ''}".rstrip()


def _confirms_if_complete(f: Fetch) -> None:
    done = [transfer for transfer in f.transfers if transfer and transfer[0] == "done"]
    if f.take == "finishing" and len(done) == f.num_wanted:
        f.take = move(TAKE, f.take, TakeEvent.VERIFIED)
        f.up += ("confirm",)


def leaves(w: W, f: Fetch) -> None:
    """End the taking: the call, and its transfers as far as the transport can."""
    if f.take in ("", "taken", "failed", "drained"):
        return
    f.take, f.taker_end = move(TAKE, f.take, TakeEvent.FAIL), "closed"
    f.transfers = tuple(_cancelled(w, transfer) for transfer in f.transfers)


def _cancelled(w: W, transfer: tuple) -> tuple:
    if not transfer or transfer[0] in ("done", "lost", "landed"):
        return transfer
    return ("leaving" if w.is_one_sided else "lost", *transfer[1:])


def reads(w: W, s: S, k: int) -> str | None:
    """The next page moves: the holder shows it, or is not asked."""
    f, h = s.fetches[k], s.holder
    index = next((i for i, each in enumerate(f.transfers) if each and each[0] in ("posted", "leaving")), None)
    if index is None:
        return None
    state, page_id, generation, _ = transfer = f.transfers[index]
    word = f"page {index} of prompt {k + 1} is read"
    has_changed = h.pages[page_id][1] != generation
    if not w.is_one_sided and (f.lease != "sealed" or (has_changed and w.has("generation"))):
        f.transfers = put(f.transfers, index, ("lost", *transfer[1:]))
        leaves(w, f)
        return f"{word}: it is not shown"
    if f.seq not in ("fetching", "quarantined"):
        raise Wrong("bytes land in a page that is another's, or free", word)
    f.pages = put(f.pages, index, h.pages[page_id][2])
    f.transfers = put(f.transfers, index, ("landed" if state == "posted" else "lost", *transfer[1:]))
    return f"{word} and holds {f.pages[index]}"


def drains(w: W, s: S, k: int) -> str | None:
    """A one-sided transport says that no byte of a transfer can land any more."""
    f = s.fetches[k]
    index = next((i for i, each in enumerate(f.transfers) if each and each[0] == "leaving"), None)
    if index is None:
        return None
    f.transfers = put(f.transfers, index, ("lost", *f.transfers[index][1:]))
    return f"the transfer of page {index} of prompt {k + 1} is drained"


def verifies(w: W, s: S, k: int) -> str | None:
    """A thread compares what arrived with its sum; it can't be stopped."""
    f = s.fetches[k]
    index = next((i for i, each in enumerate(f.transfers) if each and each[0] == "landed"), None)
    if index is None:
        return None
    word = f"page {index} of prompt {k + 1} is verified"
    if f.seq not in ("fetching", "quarantined"):
        raise Wrong("a page is written that is another's, or free", word)
    transfer = f.transfers[index]
    if f.pages[index] != transfer[3] and w.has("checksum"):
        f.transfers = put(f.transfers, index, ("lost", *transfer[1:]))
        leaves(w, f)
        return f"{word}: it has another checksum"
    f.transfers = put(f.transfers, index, ("done", *transfer[1:]))
    _confirms_if_complete(f)
    return word


def is_drained(w: W, s: S, k: int) -> str | None:
    """The taking is over: the engine is told what came."""
    f = s.fetches[k]
    is_moving = any(transfer and transfer[0] in ("posted", "leaving", "landed") for transfer in f.transfers)
    if f.take not in ("taken", "failed") or (is_moving and w.has("drain")):
        return None
    num_fetched = max(f.num_wanted, 0) if f.take == "taken" else 0
    f.take = move(TAKE, f.take, TakeEvent.DRAINED)
    f.commands += (("fetched", num_fetched), "drained")
    return f"the taking of prompt {k + 1} is over: {num_fetched} pages"


def prefill_command(w: W, s: S, k: int) -> str | None:
    """The engine does what the loop told it."""
    f = s.fetches[k]
    if not f.commands:
        return None
    command, f.commands = f.commands[0], f.commands[1:]
    if command == "free":
        is_aside = f.seq == "fetching" and w.has("quarantine")
        f.seq = "quarantined" if is_aside else "gone"
    elif command == "drained":
        f.seq = "gone" if f.seq == "quarantined" else f.seq
    elif f.seq == "fetching":
        num_fetched = command[1]
        if f.pages[:num_fetched] != PREFIX[:num_fetched]:
            raise Wrong(f"a prompt is computed on {' and '.join(f.pages)}", f"prompt {k + 1} is computed")
        f.seq = "gone"
        return f"prompt {k + 1} is computed, {num_fetched} pages of it came"
    return f"the engine hears of prompt {k + 1}: {command if isinstance(command, str) else command[0]}"


ACTIONS = [
    (reserves, range(2)), (asks, range(2)), (hears_the_holder, range(2)), (reads, range(2)), (drains, range(2)),
    (verifies, range(2)), (is_drained, range(2)), (prefill_command, range(2)),
]  # fmt: skip

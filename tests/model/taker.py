"""A taker's process: its event loop (sequences, takings, transfers) and its engine's thread (pages, steps)."""

from headrace_core.transfer.states import TakeEvent

from .explore import Wrong
from .world import FREE, NUM_PAGES, NUM_TOKENS, TAKE, Attempt, State, Taker, World, content, move, put

OVER = ("", "done", "lost", "drained")
"""A transfer of which no byte can land."""


def taker_of(w: World, s: State, k: int) -> Taker:
    return s.takers[w.takers[k]]


def hears_the_router(w: World, s: State, t: int) -> str | None:
    """The loop hears a command of the router's session."""
    taker = s.takers[t]
    if not taker.orders or taker.state != "alive" or taker.is_session_lost:
        return None
    (what, k, *more), taker.orders = taker.orders[0], taker.orders[1:]
    a = s.attempts[k]
    if what == "cancel":
        ends(w, s, k)
        return f"the taker hears that attempt {k + 1} is cancelled"
    other = s.attempts[1 - k]
    if other.life == "live" and w.takers[1 - k] == t:
        ends(w, s, 1 - k, "STALE_ATTEMPT")
    a.life, a.num_known = "live", more[0]
    taker.commands += (("add", k),)
    return f"the taker hears of attempt {k + 1}"


def loses_its_router(w: World, s: State, t: int) -> str | None:
    """The loop hears that the router's session is over: so are its sequences."""
    taker = s.takers[t]
    if not taker.is_session_lost or taker.state != "alive":
        return None
    taker.is_session_lost = False
    for k in range(2):
        if w.takers[k] == t:
            ends(w, s, k)
    return "the taker hears that its router is gone"


def is_late(w: World, s: State, k: int) -> str | None:
    a = s.attempts[k]
    if "deadline" not in s.others.happened or a.life != "live" or taker_of(w, s, k).state != "alive":
        return None
    ends(w, s, k, "DEADLINE_EXCEEDED")
    return f"the taker ends attempt {k + 1}: its time is up"


def ends(w: World, s: State, k: int, problem: str = "") -> None:
    """End a sequence, whatever its phase. With `problem` the router is told."""
    a, taker = s.attempts[k], taker_of(w, s, k)
    if a.life != "live":
        return
    a.life = "over"
    taker.commands += (("abort", k),)
    if a.take:
        _leave(w, s, k)
    elif w.has("never begun"):
        taker.commands += (("drained", k),)
    if problem:
        _tell(a, "failure")


def _leave(w: World, s: State, k: int) -> None:
    """End a taking: the call, and its transfers as far as the transport can."""
    a = s.attempts[k]
    if a.take in ("drained", "taken", "failed"):
        if not w.has("drain to the end"):
            a.transfers = tuple(_cut_short(transfer) for transfer in a.transfers)
        return
    a.take = move(TAKE, a.take, TakeEvent.FAIL)
    a.taker_end = "closed"
    a.transfers = tuple(_cancelled(w, k, transfer) for transfer in a.transfers)


def _cancelled(w: World, k: int, transfer: tuple) -> tuple:
    if not transfer or transfer[0] in OVER:
        return transfer
    if transfer[0] == "landed" or w.is_one_sided[k]:
        # Its bytes are on their way, or a thread is at them; one that failed before is being drained already.
        if transfer[0] == "failed" and not w.has("drain to the end"):
            return _cut_short(transfer)
        return transfer if transfer[0] in ("landed", "failed") else ("leaving", *transfer[1:])
    return ("drained", *transfer[1:])


def _cut_short(transfer: tuple) -> tuple:
    """The task that drained it is gone: nobody waits any more, the bytes still come."""
    return ("forgotten", *transfer[1:]) if transfer and transfer[0] in ("failed", "leaving") else transfer


def is_drained(w: World, s: State, k: int) -> str | None:
    """The taking is over: no byte can land any more."""
    a, taker = s.attempts[k], taker_of(w, s, k)
    if a.take not in ("taken", "failed") or taker.state != "alive":
        return None
    waits = any(transfer and transfer[0] not in (*OVER, "forgotten") for transfer in a.transfers)
    if waits and w.has("drain"):
        return None
    is_taken = a.take == "taken" and all(transfer[0] == "done" for transfer in a.transfers)
    a.take = move(TAKE, a.take, TakeEvent.DRAINED)
    if is_taken and a.life == "live":
        taker.commands += (("arrived", k),)
        return f"the taker has taken attempt {k + 1}"
    ends(w, s, k, a.problem)
    taker.commands += (("drained", k),)
    return f"the taking of attempt {k + 1} is drained"


def hears_news(w: World, s: State, t: int) -> str | None:
    """The loop hears what the engine's thread did."""
    taker = s.takers[t]
    if not taker.news or taker.state != "alive":
        return None
    (kind, k, *what), taker.news = taker.news[0], taker.news[1:]
    a = s.attempts[k]
    if a.life != "live":
        return f"the taker's loop drops news of attempt {k + 1}"
    if kind == "ready":
        a.take, a.taker_end = "opened", "open"
        a.up += (("open", str(a.num_known)),)
        return f"the taker orders attempt {k + 1}"
    token, is_end = what
    _tell(a, "token", token, is_end)
    if is_end:
        ends(w, s, k)
    return f"the taker tells a token of attempt {k + 1}"


def hears_the_holder(w: World, s: State, k: int) -> str | None:
    """The loop hears what the holder said in the call."""
    a, taker = s.attempts[k], taker_of(w, s, k)
    if not a.down or a.taker_end != "open" or taker.state != "alive":
        return None
    (kind, *what), a.down = a.down[0], a.down[1:]
    if kind == "end":
        _fails(w, s, k, what[0] or "PROTOCOL")
        return f"the taker hears that the holder ended attempt {k + 1}: {what[0] or 'all is said'}"
    if kind == "admitted":
        a.take = move(TAKE, a.take, TakeEvent.ADMITTED)
        a.transfers = tuple(("", 0, 0, "", *what) for _ in range(NUM_PAGES))
    elif kind == "run":
        a.take = move(TAKE, a.take, TakeEvent.RUN)
        index, *page = what
        a.transfers = put(a.transfers, index, ("posted", *page, *a.transfers[index][4:]))
    elif kind == "last":
        _hears_first(w, s, k, *what)
    else:
        a.take = move(TAKE, a.take, TakeEvent.CONFIRMED)
        held = tuple(taker.pages[page_id][1] for page_id in a.page_ids)
        if a.life == "live" and held != content(a.num_known):
            raise Wrong(f"pages are accepted that hold {' and '.join(held)}", "the taker has all it asked for")
        a.taker_end = "closed"
    return f"the taker hears of attempt {k + 1}: {kind}"


def _hears_first(w: World, s: State, k: int, token: str, tokens: str, is_end: bool) -> None:
    a = s.attempts[k]
    a.take = move(TAKE, a.take, TakeEvent.END if is_end else TakeEvent.LAST)
    if tokens != str(a.num_known) and w.has("token hash"):
        a.take = "pulling"
        _fails(w, s, k, "TOKENS_MISMATCH")
        return
    if a.life == "live":
        _tell(a, "token", token, is_end)
    if is_end:
        a.taker_end = "closed"
        a.transfers = tuple(_cancelled(w, k, transfer) for transfer in a.transfers)
    _confirms_if_complete(a)


def _tell(a: Attempt, kind: str, token: str = "", is_end: bool = False) -> None:
    if not a.is_cut:
        a.entries += ((kind, a.num_known + a.num_told, token, is_end),)
    a.num_told += kind == "token"


def _confirms_if_complete(a: Attempt) -> None:
    if a.take == "finishing" and all(transfer[0] == "done" for transfer in a.transfers):
        a.take = move(TAKE, a.take, TakeEvent.VERIFIED)
        a.up += (("confirm",),)


def _fails(w: World, s: State, k: int, problem: str) -> None:
    """A taking fails; its router is told when it is drained."""
    a = s.attempts[k]
    if a.take in ("opened", "pulling", "finishing", "confirming"):
        a.problem = problem
        _leave(w, s, k)


def reads(w: World, s: State, k: int) -> str | None:
    """The next page of attempt `k` moves: the holder shows it, or is not asked, and it lands at the taker."""
    a = s.attempts[k]
    index = next((i for i, each in enumerate(a.transfers) if each and each[0] in _MOVING), None)
    if index is None or taker_of(w, s, k).state != "alive":
        return None
    return _reads(w, s, k, index)


def reads_second(w: World, s: State, k: int) -> str | None:
    """As `reads`, but the second page goes first."""
    a = s.attempts[k]
    moving = [i for i, each in enumerate(a.transfers) if each and each[0] in _MOVING]
    if len(moving) < NUM_PAGES or taker_of(w, s, k).state != "alive":
        return None
    return _reads(w, s, k, moving[1])


_MOVING = ("posted", "leaving", "failed", "forgotten")


def _reads(w: World, s: State, k: int, index: int) -> str:
    a, h, taker = s.attempts[k], s.holder, taker_of(w, s, k)
    state, page_id, _, _, _, incarnation = transfer = a.transfers[index]
    word = f"page {index} of attempt {k + 1} is read"

    def refused(reason: str) -> str:
        a.transfers = put(a.transfers, index, ("lost", *transfer[1:]))
        _fails(w, s, k, reason)
        return f"{word}: {reason}"

    if incarnation != h.incarnation and w.has("incarnation"):
        return refused("WORKER_RESTARTED")
    if not w.is_one_sided[k]:
        problem = _look(w, s, k, index, word)
        if problem:
            return refused(problem)
    if taker.pages[a.page_ids[index]][0] != k + 1:
        raise Wrong("bytes land in a page that is another's, or free", word)
    what = h.pages[page_id][2]
    taker.pages = put(taker.pages, a.page_ids[index], (k + 1, what))
    a.transfers = put(a.transfers, index, ("landed" if state == "posted" else "drained", *transfer[1:]))
    if state == "failed":
        _fails(w, s, k, "HOLDER_LOST")
    return f"{word} and holds {what}"


def _look(w: World, s: State, k: int, index: int, word: str) -> str:
    """Return why the holder does not show a page; it is asked by the lease's name alone, as a process counts them."""
    h = s.holder
    lease = s.attempts[k].transfers[index][4]
    named = [i for i, each in enumerate(s.attempts) if each.lease_name == lease and each.lease not in ("", "freed")]
    if not named:
        if w.has("lease"):
            return "LEASE_ENDED"
        raise Wrong("a page is shown that is under no lease", word)
    holding = s.attempts[named[0]]
    if holding.lease_tokens != str(s.attempts[k].num_known) and w.has("token hash"):
        return "TOKENS_MISMATCH"
    runs = [run for run in holding.runs if run[0] == index]
    if not runs:
        return "BAD_HANDOFF"
    if w.has("generation") and h.pages[runs[0][1]][1] != runs[0][2]:
        return "STALE_PAGE"
    if named[0] != k:
        raise Wrong("a page of another lease is shown", word)
    return ""


def drains(w: World, s: State, k: int) -> str | None:
    """A one-sided transport says that no byte of a transfer can land any more."""
    a = s.attempts[k]
    index = next((i for i, each in enumerate(a.transfers) if each and each[0] in ("leaving", "failed")), None)
    if index is None or taker_of(w, s, k).state != "alive":
        return None
    transfer = a.transfers[index]
    a.transfers = put(a.transfers, index, ("drained", *transfer[1:]))
    if transfer[0] == "failed":
        _fails(w, s, k, "HOLDER_LOST")
    return f"the transfer of page {index} of attempt {k + 1} is drained"


def verifies(w: World, s: State, k: int) -> str | None:
    """A thread compares what arrived with its sum and writes it where it is computed with; it can't be stopped."""
    a, taker = s.attempts[k], taker_of(w, s, k)
    index = next((i for i, each in enumerate(a.transfers) if each and each[0] == "landed"), None)
    if index is None or taker.state != "alive":
        return None
    word = f"page {index} of attempt {k + 1} is verified"
    owner, what = taker.pages[a.page_ids[index]]
    if owner != k + 1:
        raise Wrong("a page is written that is another's, or free", word)
    transfer = a.transfers[index]
    if what != transfer[3] and w.has("checksum"):
        a.transfers = put(a.transfers, index, ("drained", *transfer[1:]))
        _fails(w, s, k, "CHECKSUM")
        return f"page {index} of attempt {k + 1} has another checksum"
    a.transfers = put(a.transfers, index, ("done", *transfer[1:]))
    _confirms_if_complete(a)
    return word


def commands(w: World, s: State, t: int) -> str | None:
    """The engine's thread does what the loop told it."""
    taker = s.takers[t]
    if not taker.commands or taker.state != "alive":
        return None
    (what, k), taker.commands = taker.commands[0], taker.commands[1:]
    a = s.attempts[k]
    if what == "add":
        a.seq = "waiting"
    elif what == "arrived" and a.seq == "transferring":
        a.seq = "running"
    elif what == "abort" and a.seq == "transferring" and w.has("quarantine"):
        a.seq = "quarantined"
    elif (what == "abort" and a.seq not in ("", "quarantined")) or (what == "drained" and a.seq == "quarantined"):
        _free(s, t, k)
    return f"the taker's engine does: {what} attempt {k + 1}"


def _free(s: State, t: int, k: int) -> None:
    a, taker = s.attempts[k], s.takers[t]
    for page_id in a.page_ids if a.seq != "waiting" else ():
        owner, what = taker.pages[page_id]
        if owner != k + 1:
            raise Wrong("a page is freed that is somebody else's", "the taker frees it")
        taker.pages = put(taker.pages, page_id, (FREE, what))
    a.seq = ""


def admits(w: World, s: State, k: int) -> str | None:
    """The engine's thread gives a waiting sequence its pages."""
    a, taker = s.attempts[k], taker_of(w, s, k)
    free = [page_id for page_id, (owner, _) in enumerate(taker.pages) if owner == FREE]
    if a.seq != "waiting" or taker.state != "alive" or len(free) < NUM_PAGES:
        return None
    a.seq, a.page_ids = "transferring", tuple(free)
    for page_id in free:
        taker.pages = put(taker.pages, page_id, (k + 1, taker.pages[page_id][1]))
    taker.news += (("ready", k),)
    return f"attempt {k + 1} has pages at the taker"


def computes(w: World, s: State, k: int) -> str | None:
    """A step of the taker: the next token."""
    a, taker = s.attempts[k], taker_of(w, s, k)
    if a.seq != "running" or taker.state != "alive":
        return None
    held = tuple(taker.pages[page_id][1] for page_id in a.page_ids)
    token = a.num_known + 1
    taker.news += (("token", k, str(token) if held == content(a.num_known) else "wrong", token + 1 == NUM_TOKENS),)
    _free(s, w.takers[k], k)
    return f"the taker computes a token of attempt {k + 1}"


ACTIONS = [
    (hears_the_router, range(2)), (loses_its_router, range(2)), (is_late, range(2)), (is_drained, range(2)),
    (hears_news, range(2)), (hears_the_holder, range(2)), (reads, range(2)), (reads_second, range(2)),
    (drains, range(2)), (verifies, range(2)), (commands, range(2)), (admits, range(2)), (computes, range(2)),
]  # fmt: skip

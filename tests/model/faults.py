"""What goes wrong from outside, and what must hold at the end whatever did."""

from collections.abc import Callable
from typing import Any

from .explore import Wrong
from .holder import fails
from .router import cancels, loses
from .world import CACHED, FAULTS, FREE, NUM_TOKENS, Action, Holder, State, Taker, World, put


def _fault(name: str) -> Callable[[Callable[[World, State, int], bool]], Action]:
    """Let the decorated function make the fault happen; it returns False if it can't."""

    def decorate(happen: Callable[[World, State, int], bool]) -> Action:
        def action(w: World, s: State, index: int) -> str | None:
            o = s.others
            if not o.num_faults or name not in w.faults or not happen(w, s, index):
                return None
            o.num_faults -= 1
            o.happened = tuple(sorted({*o.happened, name}))
            return FAULTS[name].upper()

        return action

    return decorate


@_fault("cancel")
def cancel(w: World, s: State, _: int) -> bool:
    if s.router.state != "running" or not s.router.attempt:
        return False
    cancels(w, s)
    s.router.state = "cancelled"
    return True


@_fault("deadline")
def deadline(w: World, s: State, _: int) -> bool:
    if s.router.state != "running" or not s.router.attempt:
        return False
    cancels(w, s)
    s.router.state = "failed"
    return True


@_fault("session lost")
def session_lost(w: World, s: State, _: int) -> bool:
    if s.router.attempt != 1:
        return False
    loses(w, s, 0)
    s.takers[0].is_session_lost = True
    return True


@_fault("taker dies")
def taker_dies(w: World, s: State, _: int) -> bool:
    if s.router.attempt != 1:
        return False
    s.takers[0] = Taker()
    for a in s.attempts[: s.router.attempt]:
        a.life, a.take, a.transfers, a.seq, a.page_ids = "over", "drained", ((), ()), "", ()
        a.taker_end, a.down = "closed" if a.taker_end else "", ()
    loses(w, s, 0)
    return True


@_fault("taker hangs")
def taker_hangs(w: World, s: State, _: int) -> bool:
    if s.router.attempt != 1:
        return False
    s.takers[0].state = "hung"
    return True


@_fault("holder restarts")
def holder_restarts(w: World, s: State, _: int) -> bool:
    s.holder = Holder(incarnation=s.holder.incarnation + 1)
    s.others.page_id = s.others.shared_id = -1
    for a in s.attempts:
        a.lease, a.lease_name, a.lease_tokens, a.runs = "", 0, "", ()
        a.held_seq, a.held_ids, a.num_shared, a.num_computed, a.is_finished = "", (), 0, 0, False
        if a.holder_end == "open":
            a.holder_end = "closed"
        if a.taker_end == "open":
            a.up, a.down, a.holder_end = (), (("end", "HOLDER_LOST"),), "closed"
    return True


@_fault("bytes flip")
def bytes_flip(w: World, s: State, k: int) -> bool:
    a, taker = s.attempts[k], s.takers[w.takers[k]]
    for index, transfer in enumerate(a.transfers):
        if transfer and transfer[0] == "landed":
            taker.pages = put(taker.pages, a.page_ids[index], (k + 1, "damaged"))
            return True
    return False


@_fault("transfer times out")
def times_out(w: World, s: State, k: int) -> bool:
    a = s.attempts[k]
    for index, transfer in enumerate(a.transfers):
        if w.is_one_sided[k] and transfer and transfer[0] == "posted":
            a.transfers = put(a.transfers, index, ("failed", *transfer[1:]))
            return True
    return False


@_fault("other order")
def other_order(w: World, s: State, k: int) -> bool:
    a = s.attempts[k]
    if not a.up or a.up[0][0] != "open":
        return False
    a.up = (("open", "other"), *a.up[1:])
    return True


@_fault("freed behind")
def freed_behind(w: World, s: State, k: int) -> bool:
    a, h = s.attempts[k], s.holder
    if a.held_seq != "published" or a.num_shared == len(a.held_ids) or a.held_ids[-1] < 0:
        return False
    page_id = a.held_ids[-1]
    _, generation, what, _ = h.pages[page_id]
    h.pages = put(h.pages, page_id, (FREE, generation + 1, what, 0))
    a.held_ids = (*a.held_ids[:-1], -1)
    return True


@_fault("entry twice")
def entry_twice(w: World, s: State, k: int) -> bool:
    a = s.attempts[k]
    if not a.entries or a.entries[0][0] != "token":
        return False
    a.entries = (a.entries[0], *a.entries)
    return True


@_fault("entry lost")
def entry_lost(w: World, s: State, k: int) -> bool:
    a = s.attempts[k]
    if len(a.entries) < 2 or a.entries[0][0] != "token":
        return False
    a.entries = a.entries[1:]
    return True


@_fault("entry garbled")
def entry_garbled(w: World, s: State, k: int) -> bool:
    a = s.attempts[k]
    if not a.entries or a.entries[0][0] != "token":
        return False
    a.entries = (("nonsense", *a.entries[0][1:]), *a.entries[1:])
    return True


def check_end(w: World) -> Callable[[Any], None]:
    """Return what judges a state in which nothing can happen any more."""

    def check(key: Any) -> None:
        s = State(key)
        for page_id, (owner, _, _, references) in enumerate(s.holder.pages):
            _require(owner in (FREE, CACHED) and not references, f"page {page_id} of the holder is never free again")
        for t, taker in enumerate(s.takers):
            is_free = all(owner == FREE for owner, _ in taker.pages)
            _require(is_free or taker.state == "hung", f"pages of taker {t + 1} are never free again")
        for k, a in enumerate(s.attempts):
            _require(a.lease in ("", "freed"), f"the lease of attempt {k + 1} never ends")
            is_hung = s.takers[w.takers[k]].state == "hung"
            _require(a.take in ("", "drained") or is_hung, f"the taking of attempt {k + 1} never ends")
        _require(s.router.state != "running", "the client never hears the end")
        is_wanted = not {"cancel", "deadline"}.intersection(s.others.happened)
        if is_wanted and w.num_faults - s.others.num_faults <= 1:
            _require(s.router.state == "done", "one fault, or none, cost both attempts")
            _require(s.router.num_known == NUM_TOKENS, "a token is lost")

    return check


def _require(is_met: bool, problem: str) -> None:
    if not is_met:
        raise Wrong(problem)


ACTIONS = [
    (cancel, range(1)), (deadline, range(1)), (session_lost, range(1)), (taker_dies, range(1)), (taker_hangs, range(1)),
    (holder_restarts, range(1)), (bytes_flip, range(2)), (times_out, range(2)), (other_order, range(2)),
    (freed_behind, range(2)), (entry_twice, range(2)), (entry_lost, range(2)), (entry_garbled, range(2)),
    (fails, range(2)),
]  # fmt: skip

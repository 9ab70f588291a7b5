"""What needs no choice of its own: done at once after each step, so that there are fewer states to visit.

Each of these takes the head of a queue that nobody else takes from, and only lets something happen that may be put off
for as long as one likes; or forgets what nothing looks at any more. So it makes no difference when it is done.
"""

from .world import Attempt, State, World


def settle(w: World, s: State) -> None:
    _at_the_holder(w, s)
    for t in range(2):
        _at_a_taker(w, s, t)
    r = s.router
    for k, a in enumerate(s.attempts):
        if a.entries and (r.state != "running" or (r.attempt > k + 1 and w.has("attempt at the router"))):
            a.entries = ()
        _forget(a)


def _at_the_holder(w: World, s: State) -> None:
    h = s.holder
    while h.commands and h.commands[0][0] == "add":
        s.attempts[h.commands[0][1]].held_seq = "waiting"
        h.commands = h.commands[1:]
    while h.news and (_is_ended(s, h.news[0][1]) or h.news[0][0] == "sealed"):
        (_, k, *what), h.news = h.news[0], h.news[1:]
        if not _is_ended(s, k):
            h.sealing += ((k, *what),)
    while h.sealing and _is_ended(s, h.sealing[0][0]) and w.has("sealed in time"):
        h.sealing = h.sealing[1:]


def _is_ended(s: State, k: int) -> bool:
    return s.attempts[k].lease in ("", "freed")


def _at_a_taker(w: World, s: State, t: int) -> None:
    taker = s.takers[t]
    if taker.state != "alive":
        return
    while taker.commands:
        what, k = taker.commands[0]
        a = s.attempts[k]
        if what == "add":
            a.seq = "waiting"
        elif a.seq and (what, a.seq) not in _NOTHING:
            break
        taker.commands = taker.commands[1:]
    while taker.news and s.attempts[taker.news[0][1]].life != "live":
        taker.news = taker.news[1:]


_NOTHING = {("abort", "quarantined"), ("drained", "waiting"), ("drained", "transferring"), ("drained", "running")}
"""Commands that do nothing to a sequence in that state."""


def _forget(a: Attempt) -> None:
    if a.taker_end == "closed":
        a.down = ()
    if a.holder_end == "closed":
        a.up = ()
    if a.lease == "freed":
        a.runs, a.lease_name, a.lease_tokens, a.is_finished = (), 0, "", False
    if a.take == "drained" and all(not each or each[0] in ("done", "lost", "drained", "") for each in a.transfers):
        a.transfers, a.problem = ((), ()), ""
    if not a.seq and a.transfers == ((), ()):
        a.page_ids = ()

"""The router, as far as it has to do with one sequence: attempts, positions, what the client has."""

from .explore import Wrong
from .world import NUM_TOKENS, State, World


def begins(w: World, s: State, _: int) -> str | None:
    """Make the first attempt."""
    if s.router.attempt:
        return None
    _attempt(w, s)
    return "the router starts attempt 1"


def _attempt(w: World, s: State) -> None:
    k = s.router.attempt
    s.router.attempt += 1
    s.takers[w.takers[k]].orders += (("start", k, s.router.num_known),)


def tries_again(w: World, s: State) -> None:
    """An attempt is over without the sequence's end: make the second, or give up."""
    r = s.router
    if r.state != "running":
        return
    if r.attempt < 2:
        _attempt(w, s)
    else:
        r.state = "failed"


def cancels(w: World, s: State) -> None:
    """Tell the taker that the attempt is over: it does not know."""
    k = s.router.attempt - 1
    if k >= 0 and not s.attempts[k].is_cut:
        s.takers[w.takers[k]].orders += (("cancel", k),)


def hears(w: World, s: State, k: int) -> str | None:
    """Take an entry of attempt `k`."""
    a, r = s.attempts[k], s.router
    if not a.entries:
        return None
    (kind, position, token, is_end), a.entries = a.entries[0], a.entries[1:]
    word = f"the router hears of attempt {k + 1}: {kind} {token}".rstrip()
    if r.state != "running" or (r.attempt != k + 1 and w.has("attempt at the router")):
        return word + ", and drops it"
    if kind != "token":
        if kind == "nonsense":
            cancels(w, s)
        tries_again(w, s)
        return word
    if w.has("position") and position != r.num_known:
        if position > r.num_known:
            cancels(w, s)
            tries_again(w, s)
            return word + ": it is ahead, the attempt ends"
        return word + ": it is behind, and dropped"
    if token != str(r.num_known):
        problem = "a token comes twice" if token < str(r.num_known) else "a token is lost"
        raise Wrong("a wrong token reaches the client" if not token.isdigit() else problem, word)
    r.num_known += 1
    if is_end:
        if r.num_known != NUM_TOKENS:
            raise Wrong("a token is lost", word)
        r.state = "done"
    return word


def hears_nothing(w: World, s: State, t: int) -> str | None:
    """Ten seconds of silence."""
    k = s.router.attempt - 1
    if s.takers[t].state != "hung" or not w.has("silence") or k < 0 or w.takers[k] != t or s.attempts[k].is_cut:
        return None
    loses(w, s, t)
    return "the router has heard nothing from the first taker for ten seconds"


def loses(w: World, s: State, t: int) -> None:
    """The session with a taker is over; what was on its way in it is gone."""
    k = s.router.attempt - 1
    s.takers[t].orders = ()
    for index in range(s.router.attempt):
        if w.takers[index] == t:
            s.attempts[index].is_cut, s.attempts[index].entries = True, ()
    if k >= 0 and w.takers[k] == t:
        tries_again(w, s)


ACTIONS = [(begins, range(1)), (hears, range(2)), (hears_nothing, range(2))]

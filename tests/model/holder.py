"""The holder's process: its event loop (leases, runs) and its engine's thread (pages, steps)."""

from headrace_core.transfer.states import LeaseEvent

from .explore import Wrong
from .world import CACHED, FREE, LEASE, NUM_PAGES, NUM_TOKENS, STRANGER, State, World, content, move, put


def hears(w: World, s: State, k: int) -> str | None:
    """The event loop hears what the taker said in its call."""
    a, h = s.attempts[k], s.holder
    if not a.up or a.holder_end == "closed":
        return None
    word, a.up = a.up[0], a.up[1:]
    if word[0] == "open":
        return _opens(w, s, k, word[1])
    if a.lease != "sealed":
        refuse(s, k, "BAD_REQUEST")
        return f"the holder refuses to confirm attempt {k + 1}"
    is_looking = w.has("generation") and w.has("last look")
    if is_looking and any(h.pages[page_id][1] != generation for _, page_id, generation, _ in a.runs):
        refuse(s, k, "STALE_PAGE")
        return f"the holder sees that a page of attempt {k + 1} was reused"
    end(s, k, LeaseEvent.TAKE)
    a.down, a.holder_end = (*a.down, ("confirmed",), ("end", "")), "closed"
    return f"the holder confirms attempt {k + 1}"


def _opens(w: World, s: State, k: int, tokens: str) -> str:
    a = s.attempts[k]
    a.holder_end = "open"
    other = s.attempts[1 - k]
    if other.lease and other.lease != "freed":
        if k == 0 and w.has("attempt at the holder"):
            refuse(s, k, "STALE_ATTEMPT")
            return "the holder refuses attempt 1: attempt 2 is here"
        refuse(s, 1 - k, "STALE_ATTEMPT")
        if k == 0:
            raise Wrong("an older attempt ended a newer one", "the holder takes the order of attempt 1")
    s.holder.num_leases += 1
    a.lease, a.lease_name, a.lease_tokens, a.runs = "queued", s.holder.num_leases, tokens, ()
    s.holder.commands += (("add", k),)
    return f"the holder takes the order of attempt {k + 1}"


def refuse(s: State, k: int, reason: str) -> None:
    """End the call with an error, and with it the lease."""
    a = s.attempts[k]
    if a.lease and a.lease != "freed":
        end(s, k, LeaseEvent.ABORT)
    if a.holder_end == "open":
        a.down, a.holder_end = (*a.down, ("end", reason)), "closed"


def end(s: State, k: int, event: LeaseEvent) -> None:
    a = s.attempts[k]
    a.lease = move(LEASE, move(LEASE, a.lease, event), LeaseEvent.FREE)
    s.holder.commands += (("free", k),)


def hears_the_end(w: World, s: State, k: int) -> str | None:
    """The event loop hears that the taker ended its call, or died."""
    a = s.attempts[k]
    if a.taker_end != "closed" or a.holder_end != "open":
        return None
    if a.is_finished and a.lease != "freed":
        end(s, k, LeaseEvent.TAKE)
    refuse(s, k, "TAKER_LOST")
    a.up = a.down = ()
    return f"the holder hears that the taker of attempt {k + 1} left"


def hears_nothing(w: World, s: State, k: int) -> str | None:
    """Ten seconds of silence."""
    a = s.attempts[k]
    if not w.has("silence") or s.takers[w.takers[k]].state != "hung" or a.holder_end != "open":
        return None
    refuse(s, k, "TAKER_LOST")
    return f"the holder has heard nothing from the taker of attempt {k + 1} for ten seconds"


def is_late(w: World, s: State, k: int) -> str | None:
    """The deadline of the call."""
    a = s.attempts[k]
    if "deadline" not in s.others.happened or a.holder_end != "open":
        return None
    refuse(s, k, "DEADLINE_EXCEEDED")
    return f"the holder ends attempt {k + 1}: its time is up"


def hears_news(w: World, s: State, _: int) -> str | None:
    """The event loop hears what the engine's thread did."""
    h = s.holder
    if not h.news:
        return None
    (kind, k, *what), h.news = h.news[0], h.news[1:]
    a = s.attempts[k]
    if not a.lease or a.lease == "freed":
        return f"the holder's loop drops news of attempt {k + 1}"
    if kind == "admitted":
        a.lease = move(LEASE, a.lease, LeaseEvent.ADMIT)
        a.down += (("admitted", a.lease_name, h.incarnation),)
    elif kind == "sealed":
        h.sealing += ((k, *what),)
    elif kind == "failed":
        refuse(s, k, "ENGINE_FAILED")
    else:
        a.lease = move(LEASE, a.lease, LeaseEvent.COMPLETE)
        token, is_end = what
        a.down += (("last", token, a.lease_tokens, is_end),)
        a.is_finished = is_end
        if is_end and not w.has("last heard"):
            end(s, k, LeaseEvent.TAKE)
            a.down, a.holder_end = (*a.down, ("end", "")), "closed"
    return f"the holder's loop hears that attempt {k + 1} is {kind}"


def seals(w: World, s: State, _: int) -> str | None:
    """A thread sums a page that nothing should write any more, the loop publishes it."""
    h = s.holder
    if not h.sealing:
        return None
    (k, index, page_id, generation), h.sealing = h.sealing[0], h.sealing[1:]
    a = s.attempts[k]
    if a.lease == "freed" and w.has("sealed in time"):
        return f"page {index} of attempt {k + 1} is summed for nobody"
    a.lease = move(LEASE, a.lease, LeaseEvent.SEAL)
    run = (index, page_id, generation, h.pages[page_id][2])
    a.runs += (run,)
    a.down += (("run", *run),)
    if not w.has("confirm") and a.lease == "sealed" and len(a.runs) == NUM_PAGES:
        end(s, k, LeaseEvent.TAKE)
    return f"page {index} of attempt {k + 1} is summed and published"


def commands(w: World, s: State, _: int) -> str | None:
    """The engine's thread does what the loop told it."""
    h = s.holder
    if not h.commands:
        return None
    (what, k), h.commands = h.commands[0], h.commands[1:]
    a = s.attempts[k]
    if what == "add":
        a.held_seq = "waiting"
        return f"the holder's engine queues attempt {k + 1}"
    _give_back(w, s, k)
    return f"the holder's engine frees attempt {k + 1}"


def _give_back(w: World, s: State, k: int, *, is_damaged: bool = False) -> None:
    a, h = s.attempts[k], s.holder
    for index, page_id in enumerate(a.held_ids):
        if index < a.num_shared:
            owner, generation, what, references = h.pages[page_id]
            if owner != CACHED or not references:
                raise Wrong("a page is given back that is free already", f"the holder frees attempt {k + 1}")
            if is_damaged and references == 1:
                h.pages = put(h.pages, page_id, (FREE, generation + 1, what, 0))
            else:
                h.pages = put(h.pages, page_id, (CACHED, generation, what, references - 1))
        elif page_id >= 0:
            _free(s, page_id, k + 1)
    a.held_seq, a.held_ids, a.num_shared, a.num_computed = "", (), 0, 0


def _free(s: State, page_id: int, owner: int) -> None:
    had, generation, what, _ = s.holder.pages[page_id]
    if had != owner:
        raise Wrong("a page is freed that is somebody else's", "the holder frees it")
    s.holder.pages = put(s.holder.pages, page_id, (FREE, generation + 1, what, 0))


def _take_page(w: World, s: State, owner: int) -> int | None:
    """Return a page that is free, or a cached one that nobody uses, for `owner`."""
    h = s.holder
    for wanted in (FREE, CACHED):
        for page_id, (had, generation, what, references) in enumerate(h.pages):
            if had != wanted or (references and w.has("references")):
                continue
            if references:
                raise Wrong("a page is taken that somebody reads", "the holder's engine evicts a cached page")
            h.pages = put(h.pages, page_id, (owner, generation + (had == CACHED), what, 0))
            return page_id
    return None


def admits(w: World, s: State, k: int) -> str | None:
    """The engine's thread gives a waiting sequence all its pages, those of the prefix cache first."""
    a, h = s.attempts[k], s.holder
    if a.held_seq != "waiting":
        return None
    before = h.pages
    prefix = content(a.num_known, _tag(a.lease_tokens))[0]
    cached = [page_id for page_id, (owner, _, what, _) in enumerate(h.pages) if owner == CACHED and what == prefix]
    ids: list[int] = []
    for page_id in cached:
        owner, generation, what, references = h.pages[page_id]
        h.pages = put(h.pages, page_id, (owner, generation, what, references + 1))
        ids.append(page_id)
    while len(ids) < NUM_PAGES:
        page_id = _take_page(w, s, k + 1)
        if page_id is None:
            h.pages = before
            return None
        ids.append(page_id)
    a.held_seq, a.held_ids, a.num_shared, a.num_computed = "running", tuple(ids), len(cached), len(cached)
    h.news += (("admitted", k),)
    if cached:
        h.news += (("sealed", k, 0, ids[0], h.pages[ids[0]][1]),)
    return f"attempt {k + 1} has pages at the holder" + (", one of them shared" if cached else "")


def computes(w: World, s: State, k: int) -> str | None:
    """A step: the next page is written, and with the last one the first token is known."""
    a, h = s.attempts[k], s.holder
    if a.held_seq != "running":
        return None
    index, tokens = a.num_computed, _tag(a.lease_tokens)
    page_id = a.held_ids[index]
    owner, generation, _, references = h.pages[page_id]
    if owner != k + 1:
        raise Wrong("a page is written that is somebody else's", f"the holder computes page {index}")
    what = content(a.num_known, tokens)[index]
    h.pages = put(h.pages, page_id, (owner, generation, what, references))
    a.num_computed += 1
    if index == 0:
        if not any(owner == CACHED and held == what for owner, _, held, _ in h.pages):
            h.pages = put(h.pages, page_id, (CACHED, generation, what, 1))
            a.num_shared = 1
        h.news += (("sealed", k, 0, page_id, generation),)
        return f"the holder computes page 0 of attempt {k + 1}"
    is_end = a.num_known + 1 == NUM_TOKENS
    a.held_seq = "published"
    h.news += (("prefilled", k, f"{a.num_known}{tokens}", is_end),)
    if not is_end:
        h.news += (("sealed", k, 1, page_id, generation),)
    return f"the holder computes page 1 of attempt {k + 1}, and the first token"


def fails(w: World, s: State, k: int) -> str | None:
    """A step fails: the engine's thread frees the pages at once; the loop has yet to hear of it."""
    a = s.attempts[k]
    if a.held_seq != "running" or not s.others.num_faults or "step fails" not in w.faults:
        return None
    s.others.num_faults -= 1
    _give_back(w, s, k, is_damaged=True)
    s.holder.news += (("failed", k),)
    return f"the holder's step of attempt {k + 1} fails, and its pages are free"


def reuse_begins(w: World, s: State, _: int) -> str | None:
    """Another sequence takes a page and writes it."""
    o = s.others
    if not o.num_reuses:
        return None
    page_id = _take_page(w, s, STRANGER)
    if page_id is None:
        return None
    o.num_reuses, o.page_id = 0, page_id
    owner, generation, _, references = s.holder.pages[page_id]
    s.holder.pages = put(s.holder.pages, page_id, (owner, generation, "foreign", references))
    return f"another sequence takes page {page_id} of the holder's pool and writes it"


def reuse_ends(w: World, s: State, _: int) -> str | None:
    o = s.others
    if o.page_id < 0:
        return None
    _free(s, o.page_id, STRANGER)
    o.page_id = -1
    return "the other sequence frees its page"


def share_begins(w: World, s: State, _: int) -> str | None:
    """Another sequence uses the cached page."""
    o, pages = s.others, s.holder.pages
    cached = [page_id for page_id, (owner, *_) in enumerate(pages) if owner == CACHED]
    if not o.num_shares or not cached:
        return None
    o.num_shares, o.shared_id = 0, cached[0]
    owner, generation, what, references = pages[cached[0]]
    s.holder.pages = put(pages, cached[0], (owner, generation, what, references + 1))
    return "another sequence shares the cached page"


def share_ends(w: World, s: State, _: int) -> str | None:
    o, pages = s.others, s.holder.pages
    if o.shared_id < 0:
        return None
    owner, generation, what, references = pages[o.shared_id]
    if owner != CACHED or not references:
        raise Wrong("a page is given back that is free already", "the other sequence leaves the cached page")
    s.holder.pages = put(pages, o.shared_id, (owner, generation, what, references - 1))
    o.shared_id = -1
    return "the other sequence leaves the cached page"


def _tag(tokens: str) -> str:
    return " of others" if tokens == "other" else ""


ACTIONS = [
    (hears, range(2)), (hears_the_end, range(2)), (hears_nothing, range(2)), (is_late, range(2)),
    (hears_news, range(1)), (seals, range(1)), (commands, range(1)), (admits, range(2)), (computes, range(2)),
    (reuse_begins, range(1)), (reuse_ends, range(1)), (share_begins, range(1)), (share_ends, range(1)),
]  # fmt: skip

"""The decode worker, as far as it gives what it has cached: its event loop (leases, runs) and its engine (pages)."""

from headrace_core.transfer.states import LeaseEvent

from .prefix_world import PREFIX, Holder, PrefixState, PrefixWorld
from .world import CACHED, FREE, LEASE, STRANGER, move, put

W, S = PrefixWorld, PrefixState


def hears(w: W, s: S, k: int) -> str | None:
    """Its loop hears what was said in the call."""
    f, h = s.fetches[k], s.holder
    if not f.up or f.holder_end == "closed":
        return None
    word, f.up = f.up[0], f.up[1:]
    if word == "open":
        f.holder_end, f.lease = "open", "queued"
        h.commands += (("hold", k),)
        return f"the holder is asked for prompt {k + 1}"
    is_looking = w.has("generation") and w.has("last look")
    if is_looking and any(h.pages[page_id][1] != generation for _, page_id, generation, _ in f.runs):
        refuses(s, k)
        return f"the holder sees that a page of prompt {k + 1} was reused"
    ends(s, k, LeaseEvent.TAKE)
    f.down, f.holder_end = (*f.down, ("confirmed",)), "closed"
    return f"the holder confirms prompt {k + 1}"


def refuses(s: S, k: int) -> None:
    f = s.fetches[k]
    if f.lease not in ("", "freed"):
        ends(s, k, LeaseEvent.ABORT)
    if f.holder_end == "open":
        f.down, f.holder_end = (*f.down, ("end",)), "closed"


def ends(s: S, k: int, event: LeaseEvent) -> None:
    f = s.fetches[k]
    f.lease = move(LEASE, move(LEASE, f.lease, event), LeaseEvent.FREE)
    s.holder.commands += (("let go", k),)


def hears_the_end(w: W, s: S, k: int) -> str | None:
    f = s.fetches[k]
    if f.taker_end != "closed" or f.holder_end != "open":
        return None
    refuses(s, k)
    f.up = f.down = ()
    return f"the holder hears that who asked for prompt {k + 1} left"


def holder_command(w: W, s: S, _: int) -> str | None:
    """Its engine refers to what is cached, or lets it go."""
    h = s.holder
    if not h.commands:
        return None
    (what, k), h.commands = h.commands[0], h.commands[1:]
    f = s.fetches[k]
    if what == "hold":
        f.held_ids = _cached(h)
        for page_id in f.held_ids:
            _refer(s, page_id, 1)
        h.news += ((k, tuple((page_id, h.pages[page_id][1]) for page_id in f.held_ids)),)
        return f"{len(f.held_ids)} pages are kept for prompt {k + 1}"
    for page_id in f.held_ids:
        if page_id >= 0:
            _refer(s, page_id, -1)
        if page_id >= 0 and not w.has("own reference"):
            h.pages = put(h.pages, page_id, (FREE, h.pages[page_id][1] + 1, h.pages[page_id][2], 0))
    f.held_ids = ()
    return f"the pages of prompt {k + 1} are let go"


def _cached(h: Holder) -> tuple[int, ...]:
    """Return the pages of the longest prefix."""
    found: list[int] = []
    for page in PREFIX:
        ids = [i for i, (owner, _, what, _) in enumerate(h.pages) if owner == CACHED and what == page]
        if not ids:
            break
        found += ids
    return tuple(found)


def _refer(s: S, page_id: int, change: int) -> None:
    owner, generation, what, references = s.holder.pages[page_id]
    s.holder.pages = put(s.holder.pages, page_id, (owner, generation, what, max(0, references + change)))


def hears_news(w: W, s: S, _: int) -> str | None:
    """Its loop hears what there is: all of it is computed."""
    h = s.holder
    if not h.news:
        return None
    (k, pages), h.news = h.news[0], h.news[1:]
    f = s.fetches[k]
    if f.lease != "queued":
        return f"nobody wants to hear what there is of prompt {k + 1}"
    f.lease = move(LEASE, move(LEASE, f.lease, LeaseEvent.ADMIT), LeaseEvent.COMPLETE)
    f.down += (("admitted", len(pages)),)
    h.sealing += tuple((k, index, *page) for index, page in enumerate(pages))
    return f"prompt {k + 1} is admitted with {len(pages)} pages"


def seals(w: W, s: S, _: int) -> str | None:
    """A thread sums a page, the loop publishes it."""
    h = s.holder
    if not h.sealing:
        return None
    (k, index, page_id, generation), h.sealing = h.sealing[0], h.sealing[1:]
    f = s.fetches[k]
    if f.lease == "freed":
        return f"page {index} of prompt {k + 1} is summed for nobody"
    f.lease = move(LEASE, f.lease, LeaseEvent.SEAL)
    run = (index, page_id, generation, h.pages[page_id][2])
    f.runs, f.down = (*f.runs, run), (*f.down, ("run", *run))
    return f"page {index} of prompt {k + 1} is summed and published"


def reuse_begins(w: W, s: S, _: int) -> str | None:
    """Another sequence takes a page, a cached one that nobody uses if it must, and writes it."""
    h = s.holder
    free = [i for i, (owner, *_) in enumerate(h.pages) if owner == FREE]
    leaf = [i for i in _cached(h)[-1:] if not h.pages[i][3] or not w.has("references")]
    if not h.num_reuses or not free + leaf:
        return None
    page_id = (free + leaf)[0]
    owner, generation, _, _ = h.pages[page_id]
    h.num_reuses -= 1
    h.pages = put(h.pages, page_id, (STRANGER, generation + (owner == CACHED), "foreign", 0))
    return f"another sequence takes page {page_id} of the holder's pool and writes it"


def reuse_ends(w: W, s: S, _: int) -> str | None:
    h = s.holder
    page_id = next((i for i, (owner, *_) in enumerate(h.pages) if owner == STRANGER), None)
    if page_id is None:
        return None
    h.pages = put(h.pages, page_id, (FREE, h.pages[page_id][1] + 1, "foreign", 0))
    return f"the other sequence frees page {page_id}"


ACTIONS = [
    (hears, range(2)), (hears_the_end, range(2)), (holder_command, range(1)), (hears_news, range(1)), (seals, range(1)),
    (reuse_begins, range(1)), (reuse_ends, range(1)),
]  # fmt: skip

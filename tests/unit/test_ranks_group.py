"""What ranks ask of one another, between real processes over gloo."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from headrace_core.errors import UnavailableError
from headrace_core.ranks.group import ALONE, OneRank, RankGroup, join_ranks
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.rank_processes import run_ranks

_SIZE = 3
_SHAPES = [(1,), (5, 7), (300, 200)]
"""The last is summed in pieces, 180 kB and more in float32 and 117 kB in bfloat16."""


def _values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _meet(world: RankGroup) -> dict[str, object]:
    rank, size = world.rank, world.size
    seen: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in _SHAPES:
            onto = _values(99, shape, dtype)
            part = _values(rank, shape, dtype)
            seen[f"sum {dtype} {shape}"] = (world.all_sum(part), world.all_sum(part, onto))
    seen["gather"] = world.all_gather(torch.full((2, 2), float(rank)))
    # Rank r gives rank s the number r * 10 + s, as many times as r * s: rank 0 gives and gets none.
    rows = [[rank * 10 + to] * 4 for to in range(size) for _ in range(rank * to)]
    counts = [rank * to for to in range(size)]
    seen["exchange"] = world.exchange(torch.tensor(rows, dtype=torch.bfloat16).view(-1, 4), counts, counts)
    late = [world.begin_exchange(torch.tensor([[rank, to] for to in range(size)]), *[[1] * size] * 2) for _ in "ab"]
    seen["begun"] = [coming.wait() for coming in late]
    seen["nothing"] = world.exchange(torch.empty(0, 4), [0] * size, [0] * size)
    for length in (0, 8184, 8185, 40_000):
        data = bytes(i % 251 for i in range(length))
        seen[f"broadcast {length}"] = world.broadcast_bytes(data if rank == 0 else None) == data
    seen["bytes"] = world.gather_bytes(b"x" * (5 * rank))
    before = world.sent_bytes
    world.all_sum(torch.zeros(300_000))
    seen["sent"] = world.sent_bytes - before
    seen["waits"] = _waits(world)
    part = world.part([[0], [1, 2]])
    seen["part"] = (part.size, part.rank, part.gather_bytes(bytes([rank])))
    return seen


def _waits(world: RankGroup) -> dict[str, int]:
    """Return how often each meeting of a part that says so waited."""
    waits: list[None] = []
    part = world.part([range(world.size)], lambda: waits.append(None))
    counts = [1] * world.size
    found: dict[str, int] = {}
    for name, meet in {
        "gather": lambda: part.all_gather(torch.zeros(2)),
        "small sum": lambda: part.all_sum(torch.zeros(2)),
        "large sum": lambda: part.all_sum(torch.zeros(30_000)),
        "exchange": lambda: part.exchange(torch.zeros(world.size, 2), counts, counts),
    }.items():
        waits.clear()
        meet()
        found[name] = len(waits)
    waits.clear()
    coming = part.begin_exchange(torch.zeros(world.size, 2), counts, counts)
    found["begun"] = len(waits)
    coming.wait()
    found["begun, then waited for"] = len(waits)
    world.all_gather(torch.zeros(2))
    found["then the whole group"] = len(waits)
    return found


@pytest.fixture(scope="module")
def seen() -> list[dict[str, object]]:
    return run_ranks(_SIZE, _meet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", _SHAPES)
def test_sums_are_added_in_the_order_of_ranks_with_the_same_bits_everywhere(seen, shape, dtype):
    parts = [_values(rank, shape, dtype) for rank in range(_SIZE)]
    onto = _values(99, shape, dtype)
    plain = ((parts[0].float() + parts[1].float()) + parts[2].float()).to(dtype)
    joined = (((onto.float() + parts[0].float()) + parts[1].float()) + parts[2].float()).to(dtype)
    for of_rank in seen:
        sums = of_rank[f"sum {dtype} {shape}"]
        assert torch.equal(sums[0], plain)
        assert torch.equal(sums[1], joined)


def test_rows_reach_whom_they_are_for_in_the_order_of_ranks(seen):
    for rank, of_rank in enumerate(seen):
        expected = [[source * 10 + rank] * 4 for source in range(_SIZE) for _ in range(source * rank)]
        assert of_rank["exchange"].tolist() == expected
        assert of_rank["nothing"].shape == (0, 4)
        assert of_rank["gather"].tolist() == [[[float(r)] * 2] * 2 for r in range(_SIZE)]


def test_rows_that_were_begun_come_to_whoever_waits(seen):
    for rank, of_rank in enumerate(seen):
        expected = [[source, rank] for source in range(_SIZE)]
        assert [rows.tolist() for rows in of_rank["begun"]] == [expected] * 2


def test_bytes_of_any_length_reach_all(seen):
    for of_rank in seen:
        assert all(of_rank[f"broadcast {length}"] for length in (0, 8184, 8185, 40_000))
        assert of_rank["bytes"] == [b"", b"xxxxx", b"xxxxxxxxxx"]


def test_a_large_sum_sends_two_thirds_of_it_twice(seen):
    assert [of_rank["sent"] for of_rank in seen] == [2 * 2 * 100_000 * 4] * _SIZE


def test_a_part_says_when_it_waits(seen):
    """Once in each meeting; a large sum is two."""
    expected = {"gather": 1, "small sum": 1, "large sum": 2, "exchange": 1}
    expected |= {"begun": 0, "begun, then waited for": 1, "then the whole group": 1}
    assert [of_rank["waits"] for of_rank in seen] == [expected] * _SIZE


def test_a_part_of_the_ranks_meets_apart(seen):
    assert [of_rank["part"] for of_rank in seen] == [
        (1, 0, [b"\x00"]),
        (2, 0, [b"\x01", b"\x02"]),
        (2, 1, [b"\x01", b"\x02"]),
    ]


def _wait_for_the_dead(world: RankGroup) -> tuple[str, str, float]:
    world.gather_bytes(b"")
    if world.rank == 1:
        # The answer comes first, since the parent waits for one of each rank.
        _die_soon()
        return "", "", 0.0
    started = time.monotonic()
    try:
        while True:
            world.all_sum(torch.zeros(8))
            time.sleep(0.01)
    except UnavailableError as error:
        return error.reason, str(error), time.monotonic() - started


def _die_soon() -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, 0.2)


def test_a_rank_that_dies_is_one_clear_error_on_the_others():
    reason, message, _ = run_ranks(2, _wait_for_the_dead)[0]
    assert reason == "RANK_LOST"
    assert message.startswith("rank 0 of 2: gather: another rank is gone, or did not come in time: ")


def test_a_rank_that_never_comes_is_one_clear_error(tmp_path):
    layout = ParallelLayout.parse("tp2", "tp2")
    with pytest.raises(UnavailableError, match="rank 0 of 2: joining at file") as caught:
        join_ranks(layout, rank=0, init_method=f"file://{tmp_path}/meeting", timeout_s=1.0)
    assert caught.value.reason == "RANK_LOST"


def test_a_group_of_one_gives_back_what_it_is_given():
    assert join_ranks(ParallelLayout()) is ALONE
    one, x = OneRank(), torch.randn(3, 2)
    assert one.all_sum(x) is x
    assert torch.equal(one.all_sum(x, x), x + x)
    assert one.exchange(x, [3], [3]) is x
    assert one.begin_exchange(x, [3], [3]).wait() is x
    assert one.all_gather(x).data_ptr() == x.data_ptr()
    assert (one.broadcast_bytes(b"ab"), one.gather_bytes(b"c"), one.sent_bytes) == (b"ab", [b"c"], 0)
    with pytest.raises(ValueError, match="sent as"):
        one.exchange(x, [2], [3])

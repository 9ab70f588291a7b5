"""Tokens drawn without sorting the vocabulary: the same as the specification's, to the token."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.counter_random import uniform, uniforms
from headrace_kernels.draws import NO_TOKEN, Draws
from headrace_kernels.gpu.configs import use_config
from headrace_kernels.gpu.sampling import DEFAULT_CONFIG
from headrace_kernels.reference.sampling import filter_logits
from headrace_kernels.sampling import filter_logits_ref, sample_tokens, sample_tokens_ref

# What the interpreter takes 129,280 logits in is too much for a compiler, which unrolls it: minutes, and no end.
WIDE_TILES = {**DEFAULT_CONFIG, "BLOCK_V": 16384, "BLOCK_PIVOTS": 16384, "num_warps": 4, "num_stages": 1}
SMALL_TILES = {**DEFAULT_CONFIG, "BLOCK_V": 128, "BLOCK_PIVOTS": 256, "num_warps": 4, "num_stages": 1}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def small_tiles():
    with use_config("sampling", SMALL_TILES):
        yield


@pytest.fixture(params=[512, 16, 0], ids=["all fit the list", "few fit the list", "no list"])
def capacity(request):
    with use_config("sampling", {**SMALL_TILES, "CAPACITY": request.param}):
        yield


def draws(num_rows, device, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The same for each row but for where the number comes from."""

    def real(value):
        return torch.full((num_rows,), value, dtype=torch.float64, device=device)

    def whole(value):
        return torch.full((num_rows,), value, dtype=torch.int64, device=device)

    positions = torch.arange(num_rows, device=device)
    return Draws(real(temperature), whole(top_k), real(top_p), real(min_p), whole(-5), whole(3), positions)


def select(columns, index):
    return Draws(*(getattr(columns, name)[index] for name in Draws.__slots__))


def check(logits, columns):
    found = sample_tokens(logits, columns)
    assert found.dtype == torch.int64
    assert found.tolist() == sample_tokens_ref(logits, columns).tolist()
    with use_backend("reference"):
        assert sample_tokens(logits, columns).tolist() == found.tolist()


@pytest.mark.usefixtures("capacity")
@pytest.mark.parametrize("vocab_size", [300, 128, 1])
def test_random_rows_with_all_filters(vocab_size, device):
    rows = 10 if vocab_size > 1 else 3
    logits = 3 * torch.randn(rows, vocab_size, device=device)
    columns = Draws(
        torch.rand(rows, dtype=torch.float64).mul(2).masked_fill(torch.arange(rows) % 7 == 0, 0.0).to(device),
        torch.randint(-1, vocab_size + 20, (rows,)).clamp(0).to(device),
        torch.rand(rows, dtype=torch.float64).mul(1.3).clamp(1e-9, 1.0).to(device),
        torch.rand(rows, dtype=torch.float64).sub(0.7).clamp(0.0).to(device),
        torch.randint(-(2**63), 2**63 - 1, (rows,)).to(device),
        torch.randint(0, 2**32, (rows,)).to(device),
        torch.randint(0, 2**32, (rows,)).to(device),
    )
    check(logits, columns)


@pytest.mark.usefixtures("capacity")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": 150},
        {"top_k": 149, "top_p": 0.9, "min_p": 0.01},
        {"top_p": 1e-12},
        {"top_p": 0.3},
        {"min_p": 1.0},
        {"temperature": 1e-300},
        {"temperature": 1e6, "top_p": 0.77},
        {"temperature": 0.0, "top_k": 5},
    ],
)
def test_equal_logits_stay_or_go_together(options, device):
    """Few distinct values, both zeros among them, and tokens that are banned."""
    logits = torch.randn(4, 150, device=device).round()
    logits[:, 5:9] = torch.tensor([0.0, -0.0, -INF, 0.0], device=device)
    logits[1] = 0.0
    logits[2, :147] = -INF
    check(logits, draws(4, device, **options))


@pytest.mark.usefixtures("capacity")
def test_logits_of_extreme_size(device):
    tiny = torch.finfo(torch.float32).smallest_normal / 8
    logits = torch.tensor([[3e38, -3e38, 2.9e38, 0.0], [tiny, -tiny, 0.0, 2 * tiny], [-1e30, -1e-30, 1e-30, -2.0]])
    logits = logits.to(device)
    for options in ({}, {"top_k": 2}, {"top_k": 3, "top_p": 0.6}):
        check(logits, draws(3, device, **options))


@pytest.mark.usefixtures("capacity")
@pytest.mark.parametrize("temperature", [1.0, 1e-5])
def test_neighbours_in_float32_are_told_apart(temperature, device):
    """Thresholds between values one rounding apart, shuffled, and a mass that neighbours reach almost alike."""
    neighbours = torch.tensor([2.0]).view(torch.int32) + torch.arange(-20, 20, dtype=torch.int32)
    logits = torch.cat((neighbours.view(torch.float32), torch.randn(100)))
    logits = torch.stack([logits[torch.randperm(140)] for _ in range(4)]).to(device)
    for options in ({"top_k": 1}, {"top_k": 20}, {"top_k": 39, "top_p": 0.5}, {"top_p": 0.25}, {"top_p": 1 - 1e-15}):
        check(logits, draws(4, device, temperature=temperature, **options))


def test_the_first_of_the_best_is_greedy(device):
    logits = torch.randn(3, 300, device=device).clamp(max=2.0)
    logits[0, [7, 130, 299]] = 9.0
    logits[1, [255, 256]] = 9.0
    logits[2] = -4.0
    assert sample_tokens(logits, draws(3, device, temperature=0.0)).tolist() == [7, 255, 0]


def test_nothing_outside_a_row_is_read(device):
    """Columns of a wider tensor, NaN beside them; greedy rows do not look at what only draws need."""
    wide = torch.full((3, 320), NAN, device=device)
    wide[:, 10:310] = torch.randn(3, 300, device=device)
    check(wide[:, 10:310], draws(3, device, top_k=40, top_p=0.8))
    poisoned = draws(3, device, temperature=0.0, top_p=NAN, min_p=NAN)
    assert torch.equal(sample_tokens(wide[:, 10:310], poisoned), wide[:, 10:310].argmax(dim=-1))


def test_a_row_does_not_depend_on_the_batch(device):
    logits = torch.randn(3, 200, device=device)
    columns = draws(3, device, top_k=60, top_p=0.9, min_p=0.02)
    whole = sample_tokens(logits, columns)
    alone = [sample_tokens(logits[i : i + 1], select(columns, slice(i, i + 1))) for i in range(3)]
    assert torch.equal(torch.cat(alone), whole)


def tiles_of_a_real_vocabulary(device):
    return WIDE_TILES if device == "cpu" else DEFAULT_CONFIG


def test_compiled_tiles_are_no_larger_than_what_is_compiled_ahead_of_time():
    compiled = tiles_of_a_real_vocabulary("cuda")
    assert all(compiled[size] <= DEFAULT_CONFIG[size] for size in ("BLOCK_V", "BLOCK_PIVOTS"))


def test_a_real_vocabulary(device):
    logits = 3 * torch.randn(1, 129_280, device=device)
    with use_config("sampling", tiles_of_a_real_vocabulary(device)):
        check(logits, draws(1, device, top_k=5000, top_p=0.95))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_without_a_choice_gets_no_token_and_the_others_theirs(temperature, device):
    """Wherever in the row, whatever the filters; and never the id after the last, nor a token that is ruled out."""
    logits = torch.randn(9, 300, device=device)
    logits[0, 299] = NAN
    logits[1] = NAN
    logits[2, 17] = INF
    logits[3] = -INF
    logits[4, :299] = -INF
    logits[5, [0, 150]] = torch.tensor([INF, -INF], device=device)
    logits[6, [0, 150]] = torch.tensor([NAN, -INF], device=device)
    for options in ({}, {"top_k": 20}, {"top_p": 0.9, "min_p": 0.01}):
        columns = draws(9, device, temperature=temperature, **options)
        check(logits, columns)
        tokens = sample_tokens(logits, columns).tolist()
        assert tokens[:4] + tokens[5:7] == [NO_TOKEN] * 6
        assert tokens[4] == 299
        assert tokens[7:] == sample_tokens(logits[7:], select(columns, slice(7, 9))).tolist()


@pytest.mark.usefixtures("capacity")
@pytest.mark.parametrize("asking", [{"top_k": 250}, {"top_p": 0.999, "temperature": 1e5}, {"top_k": 2, "top_p": 1e-45}])
def test_what_one_row_asks_changes_no_other(asking, device):
    """Filters work on the rows that have them on."""
    logits = torch.randn(3, 1500, device=device)
    columns = draws(3, device, top_k=5, top_p=0.6)
    one = draws(3, device, **asking)
    mixed = Draws(
        *(torch.cat((getattr(columns, n)[:2], getattr(one, n)[2:])) for n in Draws.__slots__[:4]),
        *(getattr(columns, n) for n in Draws.__slots__[4:]),
    )
    check(logits, mixed)
    assert sample_tokens(logits, mixed).tolist()[:2] == sample_tokens(logits, columns).tolist()[:2]


def test_no_rows(device):
    assert sample_tokens(torch.empty(0, 9, device=device), draws(0, device)).shape == (0,)


def test_numbers_are_those_of_the_sampler():
    places = [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (0x0123456789ABCDEF, 7, 90_000), (2**63, 1, 2)]
    seeds = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed, _, _ in places])
    samples, positions = torch.tensor([p[1] for p in places]), torch.tensor([p[2] for p in places])
    assert uniforms(seeds, samples, positions).tolist() == [uniform(*place) for place in places]


def test_the_kernel_draws_the_same_numbers(device):
    """Of 2,048 equal logits each holds 11 bits of the number, so the token is its first 11 bits; then the next ones."""
    columns = draws(16, device)
    columns = Draws(*(getattr(columns, name) for name in Draws.__slots__[:4]), *random_places(16, device))
    numbers = uniforms(columns.seeds, columns.sample_indices, columns.positions)
    with use_config("sampling", {**SMALL_TILES, "BLOCK_V": 2048}):
        tokens = sample_tokens(torch.zeros(16, 2048, device=device), columns)
    assert torch.equal(tokens, (numbers * 2048).long())


def random_places(num_rows, device):
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,))
    return (x.to(device) for x in (seeds, torch.randint(0, 2**32, (num_rows,)), torch.randint(0, 2**32, (num_rows,))))


def test_min_p_does_not_shrink_what_top_p_counts(device):
    """It comes after top-p, whatever other rows ask for."""
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.05]], dtype=torch.float64).log().repeat(2, 1)
    arguments = (torch.tensor([0, 4]), torch.tensor([0.85, 1.0]).double(), torch.tensor([0.15, 0.0]).double())
    found = filter_logits(logits, *arguments)
    assert torch.equal(found, filter_logits_ref(logits, *arguments))
    assert found[0].isfinite().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("top_k", torch.zeros(2, dtype=torch.int32), "top_k is"),
        ("top_p", torch.zeros(3, dtype=torch.float64), "top_p is"),
        ("seeds", torch.zeros(2, dtype=torch.int64, device="meta"), "on meta"),
    ],
)
def test_what_does_not_fit_is_refused(name, column, message, device):
    columns = {n: getattr(draws(2, device), n) for n in Draws.__slots__}
    with pytest.raises(ValueError, match=message):
        sample_tokens(torch.zeros(2, 4, device=device), Draws(**{**columns, name: column}))
    with pytest.raises(ValueError, match="not \\[L, V\\] float32"):
        sample_tokens(torch.zeros(2, 4, device=device).double(), draws(2, device))

"""`--dispatch-dtype fp8_e4m3`: what tokens are when they reach their experts, what says so, where it is refused."""

from __future__ import annotations

import pytest
import torch
from headrace_core.errors import StartupError
from headrace_core.families.config_json import parse_config
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.model.travelling_tokens import RoundedTokens, check_fp8_dispatch, from_bytes, to_bytes
from headrace_core.ranks.dispatch_dtype import GROUP, DispatchDtype
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint, write_config
from headrace_kernels import backend, fp8_groups
from headrace_kernels.routing_rule import RoutedTokens

FP8 = DispatchDtype.FP8
TOKENS = list(range(3, 40))
needs_library = pytest.mark.skipif(backend(torch.empty(0)) != "cpu", reason="no compiled CPU kernels: make setup")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 127, 128, 129, 512])
def test_a_token_takes_its_bytes_and_comes_back_near(dtype, width):
    x = (torch.randn(17, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 17)[:, None]).to(
        dtype
    )
    assert GROUP == fp8_groups.GROUP
    for kind in DispatchDtype:
        sent = to_bytes(x, kind)
        assert sent.shape == (17, kind.token_bytes(width, dtype.itemsize))
        back = from_bytes(sent, x, kind)
        assert back.dtype == dtype
        if kind is DispatchDtype.AUTO:
            assert torch.equal(back, x)
        else:
            # e4m3 has three bits of mantissa: half a step is a sixteenth; what is small beside its group's largest
            # value has fewer, down to half of the least number, 2^-9 of it being 448.
            largest = x.float().abs().amax(dim=1, keepdim=True)
            assert ((back - x).float().abs() <= x.float().abs() * (1 / 15) + largest * 2**-10 / 448).all()
            assert width == 1 or not torch.equal(back, x)


def test_a_tokens_bytes_do_not_depend_on_its_company():
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(1))
    together = to_bytes(x, FP8)
    assert all(torch.equal(to_bytes(row[None], FP8)[0], sent) for row, sent in zip(x, together, strict=True))


def test_a_token_that_is_not_finite_stays_so():
    x = torch.ones(2, 256)
    x[0, 130] = float("nan")
    back = from_bytes(to_bytes(x, FP8), x, FP8)
    assert back[0, :128].isfinite().all()
    assert not back[0, 128:].isfinite().all()
    assert torch.equal(back[1], x[1])


class _Seen:
    """Experts that keep what they are given."""

    def __call__(self, routed, residual):
        self.x = routed.x
        return residual


def test_experts_that_are_here_are_given_what_would_have_travelled():
    x, seen = torch.randn(5, 200, generator=torch.Generator().manual_seed(2)), _Seen()
    nobody = torch.full((5, 1), -1)
    out = RoundedTokens(seen)(RoutedTokens(x, nobody, nobody.float(), None), x)
    assert out is x
    assert torch.equal(seen.x, from_bytes(to_bytes(x, FP8), x, FP8))


def _logits(model, pieces=(TOKENS,)):
    sequences = PagedSequences(model, page_size=8, num_pages=8)
    return torch.cat([model.all_logits([sequences.chunk(0, piece)], sequences.cache)[0] for piece in pieces])


@pytest.mark.parametrize("name", ["v3", "v2-groups", "mixtral", "qwen3-moe"])
def test_a_network_whose_tokens_are_in_fp8_says_about_the_same(name, tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS[name])
    wide, narrow = (load_model(tmp_path, dispatch_dtype=each) for each in DispatchDtype)
    expected, found = _logits(wide), _logits(narrow)
    assert not torch.equal(found, expected)
    # A router may choose others: so the middle of all logits, not the worst.
    assert (found - expected).abs().median() < 0.05 * expected.abs().median()
    assert narrow.fingerprint != wide.fingerprint
    assert narrow.weight_bytes == wide.weight_bytes


@needs_library
def test_exact_numerics_hold_with_it(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    exact = load_model(tmp_path, dispatch_dtype=FP8, numerics=Numerics.EXACT)
    assert torch.equal(_logits(exact), _logits(exact, [TOKENS[:5], TOKENS[5:6], TOKENS[6:]]))
    others = [
        load_model(tmp_path, dispatch_dtype=dtype, numerics=numerics).fingerprint
        for dtype in DispatchDtype
        for numerics in Numerics
    ]
    assert len(set(others)) == 4
    assert exact.fingerprint in others


def _refused(folder, layout):
    with pytest.raises(StartupError) as told:
        check_fp8_dispatch(parse_config(folder), layout)
    assert told.value.reason == "NO_FP8_DISPATCH"
    return str(told.value).removeprefix("--dispatch-dtype fp8_e4m3: ")


def test_where_no_token_can_travel_so_it_is_refused(tmp_path):
    write_config(tmp_path, TINY_CONFIGS["v3"])
    for attention in ("tp2", "dp2"):
        columns = ParallelLayout.parse(attention, "tp2")
        assert _refused(tmp_path, columns).endswith("use --experts ep, or auto")
    check_fp8_dispatch(parse_config(tmp_path), ParallelLayout.parse("dp2", "ep2"))
    check_fp8_dispatch(parse_config(tmp_path), ParallelLayout())

"""No specification mixes a GPU's tensors with the host's: parity on a GPU would fail, whatever a kernel does."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.draws import Draws
from headrace_kernels.moe_sort import sort_blocks_ref
from headrace_kernels.page_copy import scatter_pages_ref
from headrace_kernels.sampling import sample_tokens_ref
from headrace_kernels.split_plan import plan_splits_ref

from tests.parity.kernels import test_non_finite
from tests.parity.kernels.pretend_device import DEVICE, DevicesMixedError, pretend_device


@pytest.fixture(autouse=True)
def pretended():
    with pretend_device(), use_backend("reference"):
        yield


def required(function):
    return {name for name, each in inspect.signature(function).parameters.items() if each.default is each.empty}


def specified_by(reference):
    """As the entry is called: some take more than what they compute depends on."""
    known = inspect.signature(reference).parameters
    return lambda *args, **kwargs: reference(*args, **{k: v for k, v in kwargs.items() if k in known})


@pytest.fixture
def specifications(monkeypatch):
    """In the cases' calls, the specification in place of every entry that has one for the same arguments."""
    replaced = []
    for name, entry in list(vars(test_non_finite).items()):
        module = getattr(entry, "__module__", "")
        reference = getattr(sys.modules.get(module), f"{name}_ref", None)
        if reference is not None and module.startswith("headrace_kernels.") and required(reference) <= required(entry):
            monkeypatch.setattr(test_non_finite, name, specified_by(reference))
            replaced.append(name)
    return replaced


@pytest.mark.parametrize("name", test_non_finite.CASES)
def test_a_specification_stays_on_its_device(name, specifications):
    assert {"causal_attention", "mla_prefill", "gqa_prefill", "mla_decode", "moe_experts"} <= set(specifications)
    case = test_non_finite.CASES[name]
    assert case.run(test_non_finite.inputs(case, name, DEVICE)).device.type == DEVICE


@pytest.mark.parametrize("name", test_non_finite.CASES)
def test_plain_torch_stays_on_its_device(name):
    """What a worker compares its kernels with, on the GPU, before it serves."""
    case = test_non_finite.CASES[name]
    assert case.run(test_non_finite.inputs(case, name, DEVICE)).device.type == DEVICE


def test_the_specifications_without_a_case_stay_on_their_device():
    reals = [torch.ones(2, dtype=torch.float64, device=DEVICE) for _ in range(3)]
    wholes = [torch.ones(2, dtype=torch.int64, device=DEVICE) for _ in range(4)]
    columns = Draws(reals[0], wholes[0], reals[1], reals[2], *wholes[1:])
    assert sample_tokens_ref(torch.rand(2, 9, device=DEVICE), columns).device.type == DEVICE
    experts = torch.tensor([[0, 2], [1, 0]], device=DEVICE)
    assert sort_blocks_ref(experts, 3, 16, first_local=0, num_local=3).assignment.device.type == DEVICE
    lengths = torch.tensor([3, 40], dtype=torch.int32, device=DEVICE)
    assert plan_splits_ref(lengths, 16, num_programs=4).row_starts.device.type == DEVICE
    cache = torch.zeros(3, 4, 5, device=DEVICE)
    scatter_pages_ref(torch.ones(2, 4, 5, device=DEVICE), cache, torch.tensor([2, 0], device=DEVICE))
    assert cache[:, 0, 0].tolist() == [1, 0, 1]


def test_what_mixes_devices_is_told():
    on_host, on_device = torch.ones(2), torch.ones(2, device=DEVICE)
    for mix in (lambda: on_device + on_host, lambda: on_host.add_(on_device), lambda: on_host[on_device.long()]):
        with pytest.raises(DevicesMixedError, match="two devices"):
            mix()
    assert (on_device + torch.tensor(1.0)).tolist() == [2.0, 2.0]
    assert on_host.copy_(on_device).device.type == "cpu"

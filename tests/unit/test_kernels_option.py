"""`--kernels`: what a worker computes with, and what it refuses to start with."""

import importlib
import logging

import pytest
from headrace_core.batch.step import Chunk
from headrace_core.command_line import parse
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import StartupError
from headrace_core.model.step_inputs import prepare_step
from headrace_core.testing.pretend_gpu import pretend_gpu, recording
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_core.worker.loading import load_worker_model
from headrace_kernels import choose_backend
from headrace_kernels.dispatch import TABLE


@pytest.fixture(autouse=True)
def nothing_chosen():
    yield
    choose_backend(None)


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    return tmp_path


@pytest.mark.parametrize(
    ("kernels", "device", "says"),
    [
        ("triton", "cpu", "--kernels triton with --device cpu: they run on cuda; use auto"),
        ("cpu", "cuda", "--kernels cpu with --device cuda: they run on cpu; use auto"),
        ("aiter", "cpu", "--kernels aiter with --device cpu: they run on cuda; use auto"),
        ("aiter", "cuda", "--kernels aiter with --device cuda: the package aiter is not installed; use auto"),
    ],
)
def test_kernels_that_can_t_be_had_are_refused_before_anything_is_read(kernels, device, says, tmp_path):
    settings = DecodeSettings(model=tmp_path / "none", kernels=kernels, device=device)
    with pytest.raises(StartupError) as caught:
        load_worker_model(settings)
    assert caught.value.reason == "NO_BACKEND"
    assert says in str(caught.value)


def test_compiled_kernels_are_refused_where_none_are(monkeypatch, tmp_path):
    monkeypatch.setattr("headrace_kernels.dispatch.what_is_missing", lambda _: "the library is not there")
    with pytest.raises(StartupError, match=r"--kernels cpu .*library is not there"):
        load_worker_model(PrefillSettings(model=tmp_path / "none", kernels="cpu"))


def test_plain_torch_is_had_and_named_in_the_log(folder, caplog):
    with caplog.at_level(logging.INFO):
        load_worker_model(PrefillSettings(model=folder, kv_pool_mib=1, kernels="reference"))
    assert [record.kernels for record in caplog.records if record.message == "model loaded"] == ["reference"]


def test_the_log_names_the_instruction_set(folder, caplog, monkeypatch):
    monkeypatch.setattr("headrace_core.worker.loading.backend", lambda _: "cpu")
    monkeypatch.setattr("headrace_core.worker.loading.instruction_set", lambda: "avx2")
    with caplog.at_level(logging.INFO):
        load_worker_model(PrefillSettings(model=folder, kv_pool_mib=1))
    (record,) = [record for record in caplog.records if record.message == "model loaded"]
    assert (record.kernels, record.isa) == ("cpu", "avx2")


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_log_says_why_nothing_is_compiled_unless_that_was_chosen(kernels, folder, caplog, monkeypatch):
    monkeypatch.setattr(importlib.import_module("headrace_kernels.backend"), "cpu_problem", lambda: "no library")
    with caplog.at_level(logging.INFO):
        load_worker_model(PrefillSettings(model=folder, kv_pool_mib=1, kernels=kernels))
    (record,) = [record for record in caplog.records if record.message == "model loaded"]
    assert (record.kernels, getattr(record, "not_compiled", None)) == (
        "reference",
        "no library" if kernels == "auto" else None,
    )


def test_plain_torch_may_be_chosen_on_a_gpu(folder, caplog):
    with pretend_gpu(), recording() as journal, caplog.at_level(logging.INFO):
        load_worker_model(DecodeSettings(model=folder, kv_pool_mib=1, device="cuda", kernels="reference"))
    assert [name for name in journal.launches if not name.startswith("aten::")] == []
    assert [record.kernels for record in caplog.records if record.message == "model loaded"] == ["reference"]


def test_a_name_that_is_none_is_refused_by_the_command_line(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse(DecodeSettings, ["--model", str(tmp_path), "--kernels", "cuda"])
    assert "--kernels" in capsys.readouterr().err


def decode_slots():
    return prepare_step([Chunk(0, [7], 3, [5], False)], page_size=4, max_decode_chunk=1).decode.slots


@pytest.mark.parametrize("lacking", [None, "mla_decode", "gqa_decode"])
def test_slots_are_planned_where_a_family_of_decoding_gathers(lacking, monkeypatch):
    choose_backend("reference")
    assert decode_slots() is not None
    choose_backend(None)
    monkeypatch.setattr(importlib.import_module("headrace_kernels.backend"), "cpu_problem", lambda: None)
    if lacking:
        monkeypatch.setitem(TABLE, lacking, ("reference",))
    assert (decode_slots() is None) == (lacking is None)

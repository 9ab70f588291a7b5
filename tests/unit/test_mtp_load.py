"""What is read of a checkpoint's MTP module, and when it is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from headrace_core.checkpoint.mtp_tensors import mtp_names, with_mtp
from headrace_core.errors import CheckpointError, LayoutMismatchError, StartupError
from headrace_core.families.config_json import parse_config
from headrace_core.model.load import load_model
from headrace_core.testing.tiny_checkpoints import (
    TINY_CONFIGS,
    Variation,
    random_tensors,
    write_checkpoint,
    write_config,
    write_tensors,
)
from headrace_core.transfer.verify import check_compatible


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"], Variation(num_mtp_layers=1))
    return tmp_path


def test_the_module_is_read_only_where_it_is_asked_for(folder):
    plain, guessing = load_model(folder), load_model(folder, has_mtp=True)
    assert (plain.has_mtp, guessing.has_mtp) == (False, True)
    tensors = random_tensors(parse_config(folder), Variation(num_mtp_layers=1))
    names = mtp_names(with_mtp(parse_config(folder), 1))
    own = sum(tensor.nbytes for name, tensor in tensors.items() if name in names)
    assert own > 0
    assert guessing.weight_bytes - plain.weight_bytes == own, "and its memory is counted"


def test_it_chooses_no_token_so_the_model_is_the_same_one_and_its_pages_are_not(folder):
    plain, guessing = load_model(folder), load_model(folder, has_mtp=True)
    assert plain.fingerprint == guessing.fingerprint
    layouts = plain.kv_layout(16), guessing.kv_layout(16)
    assert replace(layouts[0], num_layers=layouts[0].num_layers + 1) == layouts[1]
    with pytest.raises(LayoutMismatchError, match=r"num_layers 3, not 4 \(--speculate mtp has one more\)") as told:
        check_compatible(plain.fingerprint, layouts[0], ours=(guessing.fingerprint, layouts[1]), who="prefill")
    assert told.value.reason == "LAYOUT_MISMATCH"


def test_copies_of_embedding_and_head_and_further_modules_are_left_out(tmp_path):
    config = {**TINY_CONFIGS["v3"], "num_nextn_predict_layers": 2}
    write_config(tmp_path, config)
    tensors = random_tensors(parse_config(tmp_path), Variation(num_mtp_layers=2))
    copies = {
        "model.layers.3.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.3.shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    write_tensors(tmp_path, tensors | copies)
    assert load_model(tmp_path, has_mtp=True).kv_layout(4).num_layers == 4


def test_a_checkpoint_whose_config_speaks_of_none_is_refused(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    with pytest.raises(StartupError, match="num_nextn_predict_layers") as told:
        load_model(tmp_path, has_mtp=True)
    assert told.value.reason == "NO_MTP"


def test_a_module_of_sparse_attention_is_refused(tmp_path):
    write_config(tmp_path, {**TINY_CONFIGS["v32"], "num_nextn_predict_layers": 1})
    with pytest.raises(StartupError, match="not there for sparse attention, of deepseek_v32") as told:
        with_mtp(parse_config(tmp_path), 1)
    assert told.value.reason == "NO_MTP"


def test_a_checkpoint_that_was_saved_without_it_is_refused(tmp_path):
    write_config(tmp_path, {**TINY_CONFIGS["v3"], "num_nextn_predict_layers": 1})
    write_tensors(tmp_path, random_tensors(parse_config(tmp_path), Variation()))
    load_model(tmp_path)
    with pytest.raises(StartupError, match=re.escape("model.layers.3.input_layernorm.weight is missing")) as told:
        load_model(tmp_path, has_mtp=True)
    assert told.value.reason == "NO_MTP"


def test_a_tensor_of_another_shape_is_refused(folder):
    tensors = random_tensors(parse_config(folder), Variation(num_mtp_layers=1))
    tensors["model.layers.3.eh_proj.weight"] = tensors["model.layers.3.eh_proj.weight"][:, :32].contiguous()
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=re.escape("model.layers.3.eh_proj.weight is [32, 32]")):
        load_model(folder, has_mtp=True)


def test_a_group_of_ranks_is_refused(folder):
    with pytest.raises(StartupError, match="not for a group of 2 ranks") as told:
        with_mtp(parse_config(folder), 2)
    assert told.value.reason == "NO_MTP"

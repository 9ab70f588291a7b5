"""A checkpoint that tests spoil, and the refusal that they expect of it; a config.json, read."""

from __future__ import annotations

import pytest
from headrace_core.checkpoint.safetensors_file import StoredTensor
from headrace_core.errors import CheckpointError
from headrace_core.families.config_json import parse_config
from headrace_core.model.load import load_model
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint, write_config

CONFIG = {**TINY_CONFIGS["v3"], "num_hidden_layers": 2}


@pytest.fixture
def written(tmp_path):
    return write_checkpoint(tmp_path, CONFIG)


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Load, expecting a refusal that came before any tensor was read."""

    def refuse(reason, match):
        def read(self):
            pytest.fail(f"{self.name} was read")

        monkeypatch.setattr(StoredTensor, "read", read)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_model(tmp_path)
        assert caught.value.reason == reason
        assert len(str(caught.value)) > 40, "the message says what to do"

    return refuse


@pytest.fixture
def read_config(tmp_path):
    def read_config(config, **changes):
        write_config(tmp_path, {**config, **changes})
        return parse_config(tmp_path)

    return read_config

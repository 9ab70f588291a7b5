"""A model by its name: from a stand-in of the hub, by the library that asks the real one."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from headrace_core.hub import find_model, is_hub_name, name_of
from headrace_core.testing.local_hub import Got, LocalHub, commit_of

NAME = "someone/Tiny-Model"
FIND = """
import sys
from headrace_core.errors import HeadraceError
from headrace_core.hub import find_model
PRELUDE
done = []
try:
    folder = find_model(sys.argv[1], revision=sys.argv[2], most_bytes=int(sys.argv[3]),
                        with_weights=sys.argv[4] == "weights", on_progress=lambda *it: done.append(it))
except HeadraceError as error:
    print(f"{type(error).__name__} {error.reason}: {error}")
else:
    print(folder, *done[-1:])
"""
FULL_DISK = """
import errno, pathlib
plain = pathlib.Path.open

class Full:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")
    def __getattr__(self, name):
        return getattr(self.file, name)

def full(path, mode="r", *rest, **more):
    file = plain(path, mode, *rest, **more)
    return Full(file) if mode == "wb" and path.suffix == ".incomplete" else file

pathlib.Path.open = full
"""
SMALL_DISK = """
import shutil
plain_usage = shutil.disk_usage
shutil.disk_usage = lambda path: plain_usage(path)._replace(free=1000)
"""


@pytest.fixture
def model(tmp_path, model_dir) -> Path:
    """A folder as published: two shards with their index, what belongs to them, and what nobody needs."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_dir / name).read_bytes())
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (*index["weight_map"].values(), "consolidated.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(name.encode() * 5000)
    return folder


def find(hub, home, *, name=NAME, revision="", most_bytes=0, what="weights", prelude="", **env):
    """Return what `find_model` of a process of its own says."""
    code = FIND.replace("PRELUDE", textwrap.dedent(prelude))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    child = subprocess.run(
        [sys.executable, "-c", code, name, revision, str(most_bytes), what],
        env={**kept, **hub.environment(home), **env},
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return child.stdout.strip()


def test_a_name_is_downloaded_once_and_only_what_is_needed(tmp_path, model):
    home = tmp_path / "home"
    with LocalHub({NAME: model}) as hub:
        folder, _, progress = find(hub, home).partition(" ")
        wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
        wanted |= {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
        assert {path.name for path in Path(folder).iterdir()} == wanted
        assert all((Path(folder) / name).read_bytes() == (model / name).read_bytes() for name in wanted)
        assert progress == "(320000, 320000)"
        assert folder.startswith(str(home / "hub"))
        hub.got.clear()
        assert find(hub, home) == folder
        assert hub.got == []


def test_a_router_gets_no_weights(tmp_path, model):
    with LocalHub({NAME: model}) as hub:
        folder = Path(find(hub, tmp_path / "home", what="text"))
    assert not [path for path in folder.iterdir() if path.suffix == ".safetensors"]


def test_a_download_goes_on_where_its_connection_broke(tmp_path, model):
    with LocalHub({NAME: model}, cut_bytes=100_000, num_cuts=2) as hub:
        # The library keeps what came in whole chunks.
        chunks = "import huggingface_hub.constants; huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000"
        folder = Path(find(hub, tmp_path / "home", prelude=chunks).partition(" ")[0])
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in shards)
        # What was there already is not asked for again.
        assert sorted((got.path, got.begin) for got in hub.got if got.begin) == [(name, 100_000) for name in shards]
        assert all(Got(name, 0) in hub.got for name in shards)


def test_whole_files_of_a_download_that_failed_are_kept(tmp_path, model):
    home, whole = tmp_path / "home", "model-00001-of-00002.safetensors"
    (model / whole).write_bytes(b"short")
    with LocalHub({NAME: model}, cut_bytes=1000, num_cuts=1000) as hub:
        said = find(hub, home, prelude="import time; time.sleep = lambda seconds: None")
        assert said.startswith(f"UnavailableError NO_HUB: {NAME} is no folder here, and can't be downloaded from ")
    with LocalHub({NAME: model}) as hub:
        assert find(hub, home).endswith("(160005, 160005)")
        assert [got.path for got in hub.got if got.path.startswith("model-")] == ["model-00002-of-00002.safetensors"]


def test_what_was_downloaded_is_served_without_a_network(tmp_path, model):
    home = tmp_path / "home"
    with LocalHub({NAME: model}) as hub:
        folder = find(hub, home).partition(" ")[0]
    assert find(hub, home) == folder
    assert find(hub, home, HF_HUB_OFFLINE="1") == folder
    assert find(hub, home, HF_HUB_OFFLINE="1", revision=commit_of(NAME)) == folder


def test_without_a_network_one_line_says_so(tmp_path, model):
    with LocalHub({NAME: model}) as hub:
        pass
    said = find(hub, tmp_path / "home")
    assert said.startswith(
        f"UnavailableError NO_HUB: {NAME} is no folder here, and can't be downloaded from {hub.endpoint} (ConnectError"
    )
    assert said.endswith("whole files are kept: try again, or give a folder")
    assert "\n" not in said
    said = find(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert said == (
        f"UnavailableError NO_HUB: {NAME} is no folder here and was not downloaded whole before, and HF_HUB_OFFLINE "
        "forbids to ask the hub"
    )


@pytest.mark.parametrize(("prelude", "problem"), [(FULL_DISK, "it is full"), (SMALL_DISK, "and 0.0 MB are free")])
def test_a_full_disk_is_called_one(tmp_path, model, prelude, problem):
    with LocalHub({NAME: model}) as hub:
        said = find(hub, tmp_path / "home", prelude=prelude)
    assert said.startswith(f"StartupError DISK_FULL: no room for {NAME} on the disk of {tmp_path / 'home' / 'hub'}: ")
    assert f"{problem}; make room, or name a folder on another disk in HF_HOME" in said
    assert "\n" not in said


def test_what_the_hub_refuses_is_said_in_words(tmp_path, model):
    home = tmp_path / "home"
    with LocalHub({NAME: model}, gated=("meta/Gated",)) as hub:
        said = find(hub, home, name="someone/Else")
        assert said == (
            f"InvalidRequestError NO_MODEL: someone/Else is no folder here, and the hub at {hub.endpoint} has no such "
            "model, or not for everybody: then set HF_TOKEN"
        )
        assert find(hub, home, revision="v9").endswith(f"NO_MODEL: {NAME} on the hub has no revision 'v9'")
        assert f"ask for it at {hub.endpoint}/meta/Gated, and set HF_TOKEN" in find(hub, home, name="meta/Gated")


def test_a_token_is_shown_and_a_commit_pinned(tmp_path, model):
    home = tmp_path / "home"
    with LocalHub({NAME: model}, token="hf_secret") as hub:
        assert "then set HF_TOKEN" in find(hub, home)
        folder = find(hub, home, HF_TOKEN="hf_secret", revision=commit_of(NAME)).partition(" ")[0]
        assert Path(folder).name == commit_of(NAME)


def test_weights_of_a_model_that_cannot_be_served_are_not_downloaded(tmp_path, model):
    home = tmp_path / "home"
    with LocalHub({NAME: model}) as hub:
        assert find(hub, home, most_bytes=200_000) == (
            f"CheckpointError MODEL_TOO_LARGE: {NAME} has 0.3 MB of weights and this machine 0.2 MB of memory; none "
            "were downloaded"
        )
        (model / "config.json").write_text('{"model_type": "gpt2"}')
        assert "CheckpointError UNSUPPORTED_MODEL" in find(hub, tmp_path / "other")
        assert not [got for got in hub.got if got.path.endswith(".safetensors")]


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path, model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with LocalHub({NAME: model}) as hub:
        assert "CheckpointError DAMAGED_FILE" in find(hub, tmp_path / "home")


def test_a_folder_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_name("owner/name")
    assert find_model("owner/name") == Path("owner/name")
    assert is_hub_name("owner/other")
    assert not any(map(is_hub_name, ("plain", "/absolute/path", "./owner/other", "a/b/c", "../up", "owner/-x")))


@pytest.mark.parametrize(
    ("model", "given", "called"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", "", "deepseek-ai/DeepSeek-V2-Lite"),
        ("deepseek-ai/DeepSeek-V2-Lite", "mine", "mine"),
        ("stories/checkpoint-9000", "", "checkpoint-9000"),
        ("stories/latest", "", "latest"),
        ("stories/latest/", "", "latest"),
        ("stories/latest/.", "", "latest"),
        ("stories/latest/..", "", "stories"),
        ("stories/latest", "mine", "mine"),
        (".", "", "HERE"),
    ],
)
def test_a_model_is_called_as_it_was_asked_for(tmp_path, monkeypatch, model, given, called):
    """A link has its own name: clients know it by what was typed, whatever it points at today."""
    (tmp_path / "stories/checkpoint-9000").mkdir(parents=True)
    (tmp_path / "stories/latest").symlink_to("checkpoint-9000")
    monkeypatch.chdir(tmp_path)
    assert name_of(Path(model), given) == called.replace("HERE", tmp_path.name)

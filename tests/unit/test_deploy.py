"""What deploy/ says twice is the same in both places; `make test-compose` runs it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from headrace_core import __version__
from headrace_core.config import DecodeSettings, PrefillSettings, RouterSettings
from headrace_core.worker import run_worker

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHEEL = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
COMPOSE = sorted((ROOT / "deploy").glob("compose*.yaml"))
SETTINGS = {"router": RouterSettings, "prefill": PrefillSettings, "decode": DecodeSettings}


def services(file):
    """Return a compose file's services; what it says of merging (`!override`) is compose's alone."""
    return yaml.safe_load((ROOT / "deploy" / file).read_text().replace("!override ", ""))["services"]


def test_images_and_the_files_that_name_them_have_this_version():
    assert re.findall(r"^ARG VERSION=(.+)$", DOCKERFILE, re.M) == [__version__]
    for file in COMPOSE:
        assert set(re.findall(r"\$\{HEADRACE_VERSION:-([^}]+)\}", file.read_text())) <= {__version__}, file.name


@pytest.mark.parametrize("package", WHEEL)
def test_every_package_of_the_wheel_reaches_the_images(package):
    folder = str(Path(package).parent)
    assert f"COPY {folder} {folder}\n" in DOCKERFILE
    assert f"!{folder}\n" in (ROOT / ".dockerignore").read_text()


def test_the_wheel_of_the_images_carries_the_compiled_kernels():
    hook = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["path"]
    assert (ROOT / hook).is_file()
    assert f"COPY {Path(hook).parent} " in DOCKERFILE
    (stage,) = re.findall(r"^FROM build AS wheel$(.*?)^FROM", DOCKERFILE, re.M | re.S)
    assert "install -y --no-install-recommends g++" in stage
    assert "HEADRACE_REQUIRE_CPU_KERNELS=1 /opt/tool/bin/pip wheel" in stage
    assert "**/headrace_cpu.so\n" in (ROOT / ".dockerignore").read_text(), "none of another machine's"


def test_every_image_can_send_traces():
    command = [sys.executable, "deploy/docker/needs.py", "router"]
    needs = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(needs) >= {
        *PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"]["tracing"],
    }


def test_every_request_is_traced_where_a_collector_is_and_none_where_none_is():
    with_one, without = services("compose.yaml"), services("compose.own-images.yaml")
    assert without["collector"]["profiles"] == ["left-out"]
    for service in SETTINGS:
        share = f"HEADRACE_{service.upper()}_TRACE_SAMPLE"
        assert with_one[service]["environment"][share] == "${HEADRACE_TRACE_SAMPLE:-1}"
        assert without[service]["environment"][share] == "0"


@pytest.mark.parametrize("service", SETTINGS)
def test_a_process_with_an_identity_sees_its_own_alone(service):
    it = services("compose.tls.yaml")[service]
    (mount,) = it["volumes"]
    assert it["environment"] == {f"HEADRACE_{service.upper()}_TLS": mount["target"]}
    assert mount["source"].endswith(f"}}/{service}")
    assert mount["read_only"]
    assert not mount["bind"]["create_host_path"]


@pytest.mark.parametrize("service", SETTINGS)
@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_a_compose_file_sets_settings_that_exist(file, service):
    ours = [
        name for name in services(file.name).get(service, {}).get("environment", {}) if name.startswith("HEADRACE_")
    ]
    assert {*ours} <= {f"HEADRACE_{service.upper()}_{field.upper()}" for field in SETTINGS[service].model_fields}


def test_the_legacy_builder_can_read_the_dockerfile():
    assert "# syntax=" not in DOCKERFILE
    assert "--mount" not in DOCKERFILE


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_a_compose_file_is_named_in_the_documentation(file):
    assert file.name in (ROOT / "docs" / "deploy.md").read_text()


@pytest.mark.parametrize(("file", "service"), [("compose.ranks.yaml", "decode"), ("compose.gpu-ranks.yaml", "prefill")])
def test_a_group_s_container_runs_the_image_s_program_by_torchrun(file, service):
    it = services(file)[service]
    (images,) = re.findall(rf"^ENTRYPOINT (\[.*headrace_{service}.*\])$", DOCKERFILE, re.M)
    *before, module, name = it["entrypoint"]
    assert [*before[:4], name] == yaml.safe_load(images)
    assert (before[4], module) == ("torch.distributed.run", "--module")
    (wait_s,) = [int(option.partition("=")[2]) for option in before if option.startswith("--shutdown-timeout=")]
    drain_s = SETTINGS[service].model_fields["drain_s"].default
    assert 2 * (drain_s + run_worker._LATER_S) < wait_s + 1 < int(it["stop_grace_period"].removesuffix("s"))

"""What deploy/ says twice is the same in both places; `make test-compose` runs it."""

import re
import tomllib
from pathlib import Path

import pytest
from headrace_core import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
COMPOSE = sorted((ROOT / "deploy").glob("compose*.yaml"))


def test_images_and_the_files_that_name_them_have_this_version():
    assert re.findall(r"^ARG VERSION=(.+)$", DOCKERFILE, re.M) == [__version__]
    for file in COMPOSE:
        assert set(re.findall(r"\$\{HEADRACE_VERSION:-([^}]+)\}", file.read_text())) <= {__version__}, file.name


@pytest.mark.parametrize("package", WHEEL)
def test_every_package_of_the_wheel_reaches_the_images(package):
    folder = str(Path(package).parent)
    assert f"COPY {folder} {folder}\n" in DOCKERFILE
    assert f"!{folder}\n" in (ROOT / ".dockerignore").read_text()


def test_the_legacy_builder_can_read_the_dockerfile():
    assert "# syntax=" not in DOCKERFILE
    assert "--mount" not in DOCKERFILE


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_a_compose_file_is_named_in_the_documentation(file):
    assert file.name in (ROOT / "docs" / "deploy.md").read_text()

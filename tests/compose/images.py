"""Our images: built by the engine, and held to what they promise."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from typing import Any

from tests.compose.stack import ROOT, SERVICES, Stack

VERSION = re.search(r"^ARG VERSION=(.+)$", (ROOT / "deploy/docker/Dockerfile").read_text(), re.M)[1]
PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
"""What of the environment a build is told."""
_BILL = "/opt/headrace/sbom.cdx.json"


def tag(service: str) -> str:
    """Return the name that deploy/compose.yaml gives an image."""
    return f"headrace/{service}:{VERSION}"


def build(stack: Stack, *, no_index: bool) -> dict[str, Any]:
    """Build all and return what `look` does; with `no_index` of the wheels in build/wheels alone."""
    arguments = {name: os.environ[name] for name in PIP if os.environ.get(name)}
    if no_index:
        arguments["PIP_NO_INDEX"] = "1"
    for service in SERVICES:
        stack.engine.images.build(
            path=str(ROOT),
            dockerfile="deploy/docker/Dockerfile",
            target=service,
            tag=tag(service),
            buildargs=arguments,
            rm=True,
        )
    return look(stack)


def look(stack: Stack) -> dict[str, Any]:
    """Return the size of each image and the number of Python packages in it; raise as `check` does."""
    return {service: check(stack, service, stack.engine.images.get(tag(service))) for service in SERVICES}


def check(stack: Stack, service: str, image: Any) -> dict[str, Any]:
    """Return an image's size, and what is in it by its own bill; raise AssertionError where it is not as promised."""
    config = image.attrs["Config"]
    assert config["User"] == "10001:10001", config["User"]
    assert config["Entrypoint"] == ["tini", "--", "python", "-m", f"headrace_{service}"], config["Entrypoint"]
    assert config["Healthcheck"]["Test"][:4] == ["CMD", "python", "-m", "headrace_core.probe"], config["Healthcheck"]
    assert config["Labels"]["org.opencontainers.image.title"] == f"headrace-{service}"
    assert config["Labels"]["org.opencontainers.image.version"] == VERSION
    bill = json.loads(read(stack, service, _BILL))
    packages = {component["name"]: component["version"] for component in bill["components"]}
    assert packages.pop("headrace") == VERSION
    unpinned = {_pin(name, version) for name, version in packages.items()} - pinned()
    assert not unpinned, f"not pinned: {unpinned}"
    assert ("torch" in packages) == (service != "router"), "torch is for workers alone"
    assert "opentelemetry-sdk" in packages, "compose.yaml has every process send traces"
    return {"bytes": image.attrs["Size"], "packages": len(packages)}


def pinned() -> set[str]:
    """Return what the lock file and the images' constraints pin."""
    return {
        _pin(*line.partition(";")[0].strip().split("=="))
        for file in ("requirements.lock", "deploy/docker/constraints.txt")
        for line in (ROOT / file).read_text().splitlines()
        if "==" in line
    }


def _pin(name: str, version: str) -> str:
    """Return `name==version` in one spelling of names, and without the build, as in torch 2.13.0+cpu."""
    return f"{re.sub('[-_.]+', '-', name).lower()}=={version.partition('+')[0]}"


def read(stack: Stack, service: str, path: str) -> bytes:
    """Return a file of an image."""
    container = stack.engine.containers.create(tag(service))
    try:
        chunks, _ = container.get_archive(path)
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            file = archive.extractfile(archive.next())
            return file.read()
    finally:
        container.remove()

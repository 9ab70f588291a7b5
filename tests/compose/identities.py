"""The stack with certificates and API keys: healthy throughout, and open to who shows both alone.

Every request is the command line's own, sent from outside the containers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace_client.commands.certs import make
from headrace_core.testing.api_keys import make_keys

from tests.compose.stack import BASE, HERE, ROOT, SERVICES, Stack

FILES = [ROOT / "deploy" / name for name in ("compose.tls.yaml", "compose.keys.yaml", "compose.shm.yaml")]
FOLDER = ROOT / "build" / "compose" / "identities"
PROMPT = "Once upon a time"
_NOT_ROOT = 12345
"""Whose the keys are where root runs this: nobody whom the images know."""
_CLOSED, _KEY = "it closed the connection", "send a key of this router"


def check(without: Sequence[Path]) -> dict[str, Any]:
    """Start the stack, ask as those who may and as those who may not; return what was seen.

    Raises:
        AssertionError: a process is not healthy, somebody is refused who may ask, or answered who may not.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    certs, keys_file = FOLDER / "certs", FOLDER / "keys" / "keys.toml"
    make(certs)
    keys, entries = make_keys("alice")
    keys_file.parent.mkdir()
    keys_file.write_text(entries)
    keys_file.chmod(0o600)
    user = os.getuid() or _NOT_ROOT
    for path in (*certs.rglob("*"), keys_file):
        os.chown(path, user, user)
    environment = {
        "HEADRACE_CERTS": str(certs),
        "HEADRACE_KEYS": str(keys_file.parent),
        "HEADRACE_USER": f"{user}:{user}",
    }
    stack = Stack([BASE, *FILES, *without], environment)
    try:
        stack.up()
        for service, count in zip(SERVICES, (1, 2, 2), strict=True):
            stack.wait_healthy(service, count)
        return _ask_everywhere(stack, keys["alice"])
    except BaseException:
        sys.stderr.write(stack.compose("logs", "--tail", "40", *SERVICES))
        raise
    finally:
        stack.down()


def _ask_everywhere(stack: Stack, key: str) -> dict[str, Any]:
    client = ["--identity", str(FOLDER / "certs" / "client")]
    authority = ["--tls-roots", str(FOLDER / "certs" / "ca.crt")]
    answer = _ask(client, key)
    assert answer.returncode == 0, answer.stderr
    (sample,) = json.loads(answer.stdout)["samples"]
    refused = {
        "plaintext": _refusal([], key, _CLOSED),
        "TLS without a certificate": _refusal(authority, key, _CLOSED),
        "a client's certificate without a key": _refusal(client, "", _KEY),
        "a client's certificate with a key of nobody": _refusal(client, key[:-4] + "0000", _KEY),
    }
    inside = {service: _probe_without_identity(stack, service) for service in SERVICES}
    return {"pages moved by": sample["timings"]["transport"], "refused": refused, "refused inside": inside}


def _ask(options: list[str], key: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "headrace"), "generate", PROMPT, "--json", "--timings"]
    command += ["--max-tokens", "16", "--timeout", "60", "--server", f"{HERE}:50050", *options]
    environment = {**os.environ, "HEADRACE_API_KEY": key}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _refusal(options: list[str], key: str, why: str) -> str:
    """Return what somebody is told who is to be refused for `why`, a part of it."""
    answer = _ask(options, key)
    assert answer.returncode, f"{options} was answered: {answer.stdout}"
    assert why in answer.stderr, f"{options} failed, but not for that: {answer.stderr}"
    return answer.stderr.strip()


def _probe_without_identity(stack: Stack, service: str) -> str:
    """Return what a process inside a container is told that asks for health without a certificate."""
    port = 50050 + SERVICES.index(service)
    command = ["env", "-u", f"HEADRACE_{service.upper()}_TLS", "python", "-m", "headrace_core.probe", f"{HERE}:{port}"]
    exit_code, output = stack.containers(service)[0].exec_run(command)
    assert exit_code, f"{service} answered without a certificate"
    return output.decode().strip()

"""A stand-in for the Hugging Face hub: folders of this machine under names, over HTTP, as far as a download asks.

It is none: no accounts, no git, no Xet, one revision of each model. Its Server header says so. What it can do that the
hub should not: break connections in the middle of a file, and let nobody in without a token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/?]+)")
_FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True, slots=True)
class Got:
    """One request for a file's content: from which byte on."""

    path: str
    begin: int


class LocalHub:
    """Serves `models`, folder by name, while it is open. A context manager; any thread.

    The first `num_cuts` answers with weights break after `cut_bytes`. `token`: what a caller must show; empty: nothing.
    `gated`: names that are there for nobody.
    """

    def __init__(
        self,
        models: Mapping[str, Path],
        *,
        cut_bytes: int = 0,
        num_cuts: int = 0,
        token: str = "",
        gated: tuple[str, ...] = (),
    ) -> None:
        self.models = models
        self.cut_bytes = cut_bytes
        self.num_cuts = num_cuts
        self.token = token
        self.gated = gated
        self.got: list[Got] = []
        """Contents of files that were asked for, in order."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables with which a process asks this hub, and keeps what it gets in `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


def commit_of(name: str) -> str:
    """Return the one commit that this hub has of a model."""
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    server_version = "headrace-local-hub (a stand-in for tests)"
    timeout = 60

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, *, with_body: bool) -> None:
        hub = self.hub
        match = _API.match(self.path) or _FILE.match(self.path)
        name = match["name"] if match else ""
        if hub.token and self.headers.get("authorization") != f"Bearer {hub.token}":
            return self._refuse(401, "RepoNotFound")
        if name in hub.gated:
            return self._refuse(403, "GatedRepo")
        if match is None or name not in hub.models:
            return self._refuse(404, "RepoNotFound")
        if match["revision"] not in ("main", commit_of(name)):
            return self._refuse(404, "RevisionNotFound")
        if "path" in match.groupdict():
            return self._send_file(name, match["path"], with_body=with_body)
        files = sorted(path for path in hub.models[name].rglob("*") if path.is_file())
        if match["what"] == "tree":
            return self._send_json([_entry(hub.models[name], path) for path in files])
        return self._send_json({"id": name, "sha": commit_of(name), "siblings": []})

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, name: str, path: str, *, with_body: bool) -> None:
        file = self.hub.models[name] / path
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        begin = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit_of(name))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if with_body:
            self.hub.got.append(Got(path, begin))
            self._send_content(content[begin:], is_weights=path.endswith(".safetensors"))

    def _send_content(self, content: bytes, *, is_weights: bool) -> None:
        hub = self.hub
        if is_weights and hub.num_cuts and len(content) > hub.cut_bytes:
            hub.num_cuts -= 1
            self.wfile.write(content[: hub.cut_bytes])
            self.close_connection = True
        else:
            self.wfile.write(content)


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    oid = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    return {"type": "file", "path": str(path.relative_to(folder)), "size": len(content), "oid": oid}

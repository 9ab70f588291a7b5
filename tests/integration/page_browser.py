"""Headless Chromium, driven over chromedriver's W3C WebDriver protocol: what tests of the roofline page share."""

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
from headrace_core.testing.async_test import WAIT_S

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1440,1500",
    # Whatever the page might ask of a network fails at once: it must not need one.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip

skip_without_browser = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER), reason="no browser; to get one: apt-get install chromium chromium-driver"
)


class Browser:
    """A WebDriver session: the few commands that these tests use."""

    def __init__(self, driver: str, profile: Path) -> None:
        self._url = driver
        options = {"binary": _CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._url += "/session/" + self._call("POST", "/session", {"capabilities": wanted})["sessionId"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str) -> object:
        """Return what the body of a function returns; a promise is awaited."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def resize(self, width: int, height: int) -> None:
        """Give the page as many pixels; a phone's are fewer than a window's least."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 620}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})

    def prefer(self, scheme: str) -> None:
        """Choose `light` or `dark` colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def click(self, selector: str) -> None:
        """Click as a person does: the browser lets a page copy after that."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{next(iter(found.values()))}/click", {})

    def errors(self) -> list[str]:
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close(self) -> None:
        self._call("DELETE", "")

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return json.load(answer)["value"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chromium")
    environment = {**os.environ, "HOME": str(folder)}
    process = subprocess.Popen([_DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True, env=environment)
    # chromedriver says which port the kernel gave it in the line that says it is ready.
    ready = next(line for line in process.stdout if "started successfully on port" in line)
    try:
        session = Browser(f"http://127.0.0.1:{ready.rstrip().rstrip('.').rsplit(' ', 1)[1]}", folder / "profile")
        yield session
        session.close()
    finally:
        process.terminate()
        process.wait(WAIT_S)
        process.stdout.close()


def open_page(browser, page, fragment=""):
    browser.open("about:blank")
    browser.open((page.as_uri() if isinstance(page, Path) else page) + fragment)
    assert browser.errors() == []

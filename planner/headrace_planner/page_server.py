"""Serve the roofline page, which is one file, to this machine or to others."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def serve_page(html: str, host: str, port: int, *, on_ready: Callable[[str], object]) -> None:
    """Serve `html` at / until interrupted; `on_ready` is called once with the address.

    Raises:
        OSError: The address is in use.
    """
    with page_server(html, host, port) as server:
        on_ready(f"http://{host}:{server.server_port}/")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def page_server(html: str, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of `html` that listens but does not answer before `serve_forever`."""
    body = html.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer / with the page, anything else with 404."""
            if self.path.split("?")[0] not in ("/", "/index.html"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of each request: this is a page for one reader."""

    return ThreadingHTTPServer((host, port), Handler)

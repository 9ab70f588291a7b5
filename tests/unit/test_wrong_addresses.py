"""What a user is told who gives the address of something else: one line that says what is there."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from headrace_client.commands.app import app
from headrace_client.top.samples import scrape
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_router import FakeRouter
from typer.testing import CliRunner


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def other_grpc() -> Iterator[str]:
    """A gRPC server without Headrace's service for clients, as a worker is."""
    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def http_server() -> Iterator[str]:
    """A web server without metrics."""

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tls_router(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=headrace"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{folder}/key", "-out", f"{folder}/cert"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=WAIT_S)
    pair = ((folder / "key").read_bytes(), (folder / "cert").read_bytes())
    with FakeRouter(credentials=grpc.ssl_server_credentials([pair])) as router:
        yield router.address


@pytest.fixture(scope="module")
def router() -> Iterator[str]:
    with FakeRouter() as fake:
        yield fake.address


@pytest.mark.parametrize("command", [["status"], ["generate", "Tell"], ["top"], ["chat"]])
def test_a_worker_is_no_router(other_grpc, command):
    result = run(*command, "--server", other_grpc)
    said = (
        f"error: {other_grpc} is no router: a worker answers there, or another gRPC server; give the router's address\n"
    )
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", said)


@pytest.mark.parametrize(
    ("there", "more", "says"),
    [
        ("http_server", [], "what answers there is no gRPC server: is it the port of metrics, or another program's?"),
        ("http_server", ["--tls"], "it does not speak TLS; if it is the router, leave out --tls"),
        ("router", ["--tls"], "it does not speak TLS; if it is the router, leave out --tls"),
        ("tls_router", [], "it closed the connection; does it ask for TLS"),
        ("tls_router", ["--tls"], "its certificate is not of an authority that is trusted here (--tls-roots)"),
    ],
)
def test_what_is_at_the_address_is_said_in_one_line(there, more, says, request):
    result = run("status", "--server", request.getfixturevalue(there), *more)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert says in result.stderr


@pytest.mark.parametrize("address", ["", "router", "http://127.0.0.1:50050", "127.0.0.1:99999", "127.0.0.1:0", "::1:5"])
def test_what_is_no_address_is_refused_before_it_is_asked(address):
    result = run("status", "--server", address)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: --server: ")


def test_a_host_that_does_not_resolve_is_named():
    result = run("status", "--server", "no-such-host.invalid:50050")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "no-such-host.invalid:50050: the name of the host can't be resolved" in result.stderr


@pytest.mark.parametrize(
    ("there", "code", "says"),
    [
        ("router", 1, "what answers there does not speak HTTP: is it the port that the worker serves on"),
        ("http_server", 1, "HTTP Error 501"),
        ("tls_router", 1, "no metrics at"),
        ("127.0.0.1:1", 1, "Connection refused"),
        ("no-such-host.invalid:1", 1, "no metrics at no-such-host.invalid:1"),
        ("metrics", 2, "'metrics' is not host:port"),
        ("http://127.0.0.1:1/metrics", 2, "is not host:port"),
    ],
)
def test_metrics_that_are_none_are_one_line(there, code, says, request):
    address = there if "1" in there or there == "metrics" else request.getfixturevalue(there)
    result = run("roofline", "--live", "--metrics", address)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert says in result.stderr
    assert "the worker's log line `serving` names its metrics" in result.stderr


def test_top_goes_without_metrics_that_are_no_http():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x00\x00\x12\x04\x00\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert scrape(f"127.0.0.1:{server.getsockname()[1]}", 0.0) is None
        thread.join()

"""Commands that `headrace up` gives to be pasted, and the ports that it looks for."""

import socket
from pathlib import Path

import pytest
from headrace_client.cluster.ports import is_free, next_free
from headrace_client.commands.hints import client_options, curl_line, reachable
from headrace_core.telemetry import level_of


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("0.0.0.0:8000", "127.0.0.1:8000"),
        ("[::]:8000", "[::1]:8000"),
        ("127.0.0.1:50050", "127.0.0.1:50050"),
        ("host.example:1", "host.example:1"),
    ],
)
def test_a_hint_names_what_can_be_reached(address, found):
    assert reachable(address) == found
    assert f"http://{found}/v1/completions" in curl_line(address)


def test_the_default_address_needs_no_option():
    assert client_options("0.0.0.0:50050", None) == ""
    assert client_options("0.0.0.0:50051", Path("certs")) == " --server 127.0.0.1:50051 --identity certs/client"


def test_a_key_is_no_argument_of_curl():
    line = curl_line("127.0.0.1:8000", has_keys=True)
    assert '-H @<(echo "authorization: Bearer $HEADRACE_API_KEY")' in line


def test_the_next_free_port_is_found_in_rows():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not is_free(port)
        assert next_free(port) != port
        assert port not in range(next_free(port - 1, 3), next_free(port - 1, 3) + 3)
    assert next_free(70_000) == 0


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("12:34:56.789 I serving role=router", "INFO"),
        ("12:34:56.789 W few files may be opened", "WARNING"),
        ('{"time": 1.5, "level": "ERROR", "event": "failed"}', "ERROR"),
        ('{"time": cut short', ""),
        ("Traceback (most recent call last):", ""),
        ("", ""),
    ],
)
def test_the_level_of_a_line_is_read_back(line, level):
    assert level_of(line) == level

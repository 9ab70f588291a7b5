"""What clients say, their keys and private keys are in no log, in no command line and in no metric."""

import asyncio
import urllib.request
from pathlib import Path

import pytest
from headrace_client import AsyncClient, ChatMessage, ConnectionOptions
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.errors import HeadraceError, UnauthenticatedError
from headrace_core.request import SamplingParams
from headrace_core.testing.api_keys import make_keys
from headrace_core.testing.async_test import WAIT_S

MARK = "Xylophonous"
"""Is in every prompt; no word of the demo model's."""
IDS = [1111, 1113, 1117, 1123, 1129]
"""A prompt of token ids; in this order they are nowhere by chance."""


@pytest.fixture(scope="module")
def served(model_dir, identities, tmp_path_factory):
    """A cluster that tells as much as it can, after requests that were answered, refused and failed."""
    keys, entries = make_keys("alice")
    keys_file = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys_file.write_text(entries)
    lines = []
    told = {"log-level": "DEBUG"}
    cluster = LocalCluster(
        model_dir,
        worker_options={**told, "kv-pool-mib": 8, "max-context-tokens": 512, "dtype": "float32"},
        router_options={**told, "keys-file": keys_file},
        tls=identities,
        api_key=keys["alice"],
        log_sink=lambda _, line: lines.append(line),
    )
    with cluster:
        asyncio.run(_talk(cluster, identities / "client", keys["alice"]))
        arguments = [Path(f"/proc/{process.pid}/cmdline").read_text() for process in cluster.processes]
        pages = [_read(f"http://{process.metrics_address}/metrics") for process in cluster.processes]
    secrets = [*keys.values(), "PRIVATE KEY", *_key_lines(identities)]
    return {"logs": "\n".join(lines), "arguments": "\n".join(arguments), "metrics": "\n".join(pages)}, secrets


async def _talk(cluster, identity, key):
    options = ConnectionOptions(identity=identity, api_key=key)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, stop_strings=(MARK,))
    async with AsyncClient(cluster.router_address, options) as client:
        await client.generate(f"Once {MARK} upon a time", sampling, timeout_s=WAIT_S)
        await client.generate(IDS, SamplingParams(max_tokens=4, logit_bias={5: 1.0}), timeout_s=WAIT_S)
        await client.generate([ChatMessage("user", MARK)], sampling, timeout_s=WAIT_S)
        for prompt in (f"{MARK} " * 5000, [*IDS, 4_000_000_000], [ChatMessage("wizard", MARK)]):
            with pytest.raises(HeadraceError):
                await client.generate(prompt, sampling, timeout_s=WAIT_S)
    wrong = ConnectionOptions(identity=identity, api_key=f"{key}wrong")
    async with AsyncClient(cluster.router_address, wrong) as client:
        with pytest.raises(UnauthenticatedError):
            await client.generate(MARK, sampling, timeout_s=WAIT_S)


def _read(url):
    with urllib.request.urlopen(url, timeout=WAIT_S) as response:
        return response.read().decode()


def _key_lines(identities):
    """A line from within each private key."""
    return [path.read_text().splitlines()[1] for path in identities.glob("**/*.key")]


@pytest.mark.parametrize("where", ["logs", "arguments", "metrics"])
def test_nothing_secret_is_there(served, where):
    places, secrets = served
    assert len(places[where]) > 100
    for secret in [*secrets, MARK]:
        assert secret not in places[where]


def test_token_ids_are_in_no_log(served):
    places, _ = served
    for text in (", ".join(map(str, IDS[:3])), " ".join(map(str, IDS[:3]))):
        assert text not in places["logs"]


def test_the_logs_were_those_of_debugging(served):
    places, _ = served
    assert "request ended" in places["logs"]
    assert " D " in places["logs"]

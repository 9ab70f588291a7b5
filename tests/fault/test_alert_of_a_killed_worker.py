"""A worker is killed, and a live Prometheus says so by the alerts of deploy/prometheus/rules.yml, until it is back."""

import re
from pathlib import Path

import pytest
from headrace_client import Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams

from tests.load.prometheus import Prometheus, needs_prometheus, targets

ROOT = Path(__file__).parents[2]
RULES = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
PARAMS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)

pytestmark = needs_prometheus


@pytest.fixture
def cluster(model_dir):
    with LocalCluster(model_dir, num_decode=2) as cluster:
        yield cluster


@pytest.fixture
def prometheus(cluster, tmp_path):
    # The rules as they are, but for how long a thing must be so: a minute there, a second here.
    hasty, count = re.subn(r"\bfor: 1m\b", "for: 1s", RULES)
    assert count == 2
    prometheus = Prometheus(tmp_path, targets([each.metrics_address for each in cluster.processes]), hasty)
    try:
        prometheus.wait_scraped()
        yield prometheus
    finally:
        prometheus.close()


def firing(alert, **labels):
    wanted = "".join(f', {name}="{value}"' for name, value in labels.items())
    return f'ALERTS{{alertname="{alert}", alertstate="firing"{wanted}}}'


def advice(alert):
    """Return what the runbook says to do about an alert."""
    return re.search(rf"\| `{alert}` \| (.+) \|", (ROOT / "docs" / "operations.md").read_text())[1]


def test_a_killed_worker_fires_and_what_the_runbook_says_finds_it(cluster, prometheus):
    killed = cluster.workers[-1]
    assert killed.role == "decode"
    prometheus.wait_evaluated()
    assert prometheus.query("ALERTS") == []

    killed.kill()
    (alert,) = prometheus.wait_for(firing("HeadraceWorkerDown"))
    assert alert["metric"]["worker_role"] == "decode"
    assert alert["metric"]["severity"] == "page"
    (alert,) = prometheus.wait_for(firing("HeadraceProcessNotScraped"))
    assert alert["metric"]["instance"] == killed.metrics_address
    (fired,) = [rule for rule in prometheus.rules() if rule["name"] == "HeadraceWorkerDown"]
    said = fired["alerts"][0]["annotations"]["summary"]
    assert said == "1 of the decode workers are not there for the router, or are refused"

    assert "`headrace status` says which" in advice("HeadraceWorkerDown")
    assert "is it there" in advice("HeadraceProcessNotScraped")
    with Client(cluster.router_address) as client:
        lost = [each.address for each in client.server_info().workers if each.state == "unreachable"]
        assert lost == [killed.address]
        assert len(client.generate("Once upon a time", PARAMS).token_ids) == 16

    cluster.restart(killed)
    prometheus.wait_for(f"absent({firing('HeadraceWorkerDown')})")

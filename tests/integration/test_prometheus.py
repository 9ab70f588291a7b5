"""docs/metrics.md and the dashboards against a live Prometheus that scrapes a cluster: names, labels, every query."""

from __future__ import annotations

import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from headrace_client import Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S
from prometheus_client.parser import text_string_to_metric_families

from tests.load.prometheus import Prometheus, needs_prometheus, targets
from tests.load.queries import QUERIES, ROWS, assert_numbers

PROMPT = "Once upon a time there was a little fox named Zorvim. " * 4


def scraped(cluster: LocalCluster) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Return the labels of each metric's samples, by role and by name."""
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for process in cluster.processes:
        if not process.metrics_address:  # a rank that does not lead
            continue
        with urllib.request.urlopen(f"http://{process.metrics_address}/metrics", timeout=WAIT_S) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                name = family.name + "_total" * (family.type == "counter")
                found.setdefault(process.role, {})[name] = [sample.labels for sample in family.samples]
    return found


@pytest.fixture(scope="module")
def cluster(model_dir):
    slo = {"slo-ttft-ms": 1000, "slo-itl-ms": 50}
    # A decode group that may move experts shows its ranks; prefill, one process, its operations.
    options = {"roofline-every-steps": 1, "rebalance": "auto:1", "redundant-experts": 2}
    with LocalCluster(model_dir, decode_ranks=2, worker_options=options, router_options=slo) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def prometheus(cluster, tmp_path_factory):
    addresses = [each.metrics_address for each in cluster.processes if each.metrics_address]
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), targets(addresses))
    try:
        prometheus.wait_scraped()
        yield prometheus
    finally:
        prometheus.close()


@needs_prometheus
def test_at_rest_every_query_is_understood_and_gives_numbers(prometheus):
    for query in QUERIES:
        assert_numbers(query, prometheus.query(query))


@needs_prometheus
def test_under_load_every_query_shows_what_its_metric_counts(cluster, prometheus):
    with Client(cluster.router_address) as client, ThreadPoolExecutor(4) as threads:
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        for first_words in ("One day. ", "One night. "):  # what is new in the first is counted on in the second
            list(threads.map(lambda _, words=first_words: client.generate(words + PROMPT, params), range(8)))
            prometheus.wait_scraped()
    counted = "sum(headrace_op_sampled_steps_total) > 0"  # once the worker has measured its machine, beside its steps
    deadline_s = time.monotonic() + 4 * WAIT_S
    while not prometheus.query(counted):
        assert time.monotonic() < deadline_s, "no step is predicted"
        time.sleep(0.05)
    prometheus.wait_scraped()
    absent = {row.name for row in ROWS if not prometheus.query(f'{{__name__=~"{row.name}(_count)?"}}')}
    assert len(ROWS) - len(absent) > 50, " ".join(sorted(absent))
    assert not {"headrace_expert_rank_tokens", "headrace_rank_seconds_total"} & absent
    for query in QUERIES:
        found = prometheus.query(query)
        assert_numbers(query, found)
        assert found or absent & set(re.findall(r"\w+", query)), query


def test_names_labels_and_owners_are_as_documented(cluster):
    found = scraped(cluster)
    for role in ("router", "prefill", "decode"):
        # A group's operations are not timed.
        of_role = [row.name for row in ROWS if role in row.roles]
        expected = [
            name for name in of_role if role != "decode" or not name.startswith(("headrace_op_", "headrace_roofline_"))
        ]
        assert sorted(found[role]) == sorted(expected), role
    for row in ROWS:
        for role in row.roles:
            for labels in found[role].get(row.name, []):
                assert labels["role"] == role
                assert set(labels) - {"le", "role"} == row.labels, row.name

"""Load generators as their authors ship them, unchanged, against a cluster: each request ends well.

They are no dependency: 0.6 GB and more. Installed in environments of their own, they are found on the path:

    python -m venv build/clients/aiperf && build/clients/aiperf/bin/pip install aiperf
    PATH=$PATH:$PWD/build/clients/aiperf/bin pytest tests/integration/test_load_generators.py
"""

import json
import shutil
import subprocess

import pytest
from headrace_client.cluster.local_cluster import LocalCluster

LIMIT_S = 600


def needs(command):
    return pytest.mark.skipif(shutil.which(command) is None, reason=f"{command} is not on the path")


@pytest.fixture(scope="module")
def cluster(model_dir):
    options = {"kv-pool-mib": 64, "threads": 1}
    router = {"http-listen": "127.0.0.1:0", "model-name": "demo"}
    with LocalCluster(model_dir, num_prefill=1, num_decode=1, worker_options=options, router_options=router) as cluster:
        yield cluster


def run(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@needs("aiperf")
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_aiperf(cluster, model_dir, tmp_path, endpoint):
    run(
        tmp_path,
        "aiperf", "profile", "--url", f"http://{cluster.router.http_address}", "--model", "demo",
        "--tokenizer", str(model_dir), "--endpoint-type", endpoint, "--streaming", "--concurrency", "2",
        "--request-count", "6", "--synthetic-input-tokens-mean", "48", "--output-tokens-mean", "12", "--ui", "none",
    )  # fmt: skip
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    found = json.loads(report.read_text())
    assert found["request_count"]["avg"] == 6
    assert found.get("error_request_count", {"avg": 0})["avg"] == 0
    assert found["output_sequence_length"]["avg"] > 1


@needs("guidellm")
def test_guidellm(cluster, model_dir, tmp_path):
    run(
        tmp_path,
        "guidellm", "run", "--backend", f"kind=openai_http,target=http://{cluster.router.http_address},model=demo",
        "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6",
        "--tokenizer", f"kind=huggingface_auto,model={model_dir}",
        "--data", "kind=synthetic_text,prompt_tokens=48,output_tokens=12",
        "--output", "kind=json,path=out.json", "--disable-console-interactive",
    )  # fmt: skip
    (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"]["successful"] == 6
    assert benchmark["metrics"]["request_totals"]["errored"] == 0

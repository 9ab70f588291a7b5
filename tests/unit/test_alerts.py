"""The alerts: tested by Prometheus' own tool, and each with a word on what to do."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
ALERTS = re.findall(r"- alert: (\w+)", (FOLDER / "rules.yml").read_text())


@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]],
)
def test_promtool_passes(command):
    if not shutil.which("promtool"):
        pytest.skip("there is no promtool here; apt-get install prometheus brings it")
    result = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tested_and_says_what_to_do(alert):
    assert re.search(rf"alertname: {alert}\n[^-]*\n? *exp_alerts", (FOLDER / "rules_test.yml").read_text()), "fires"
    assert f"| `{alert}` |" in (ROOT / "docs" / "operations.md").read_text(), "a line of the runbook"

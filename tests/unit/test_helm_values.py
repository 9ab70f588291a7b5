"""The chart's schema of options is the processes' settings, without a Helm to say so."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "chart_options.py"))
DEFINITIONS = json.loads((ROOT / "deploy" / "helm" / "headrace" / "values.schema.json").read_text())["definitions"]


@pytest.mark.parametrize("role", TOOL["ROLES"])
def test_options_are_those_of_the_settings(role):
    assert DEFINITIONS[f"{role}Options"] == TOOL["options"](TOOL["ROLES"][role]), "make helm-values"


@pytest.mark.parametrize("role", TOOL["ROLES"])
def test_what_the_chart_sets_and_what_is_secret_is_no_option(role):
    given = DEFINITIONS[f"{role}Options"]["properties"]
    assert not {
        "listen",
        "model",
        "tls",
        "tls-key",
        "keys-file",
        "trace-sample",
        "workers",
        "advertise",
        "peers",
    } & set(given)
    assert {"drain-s", "log-format"} <= set(given)

"""Write what a process' settings may be into the Helm chart's values.schema.json: `python tools/chart_options.py`.

The rest of that file is written by hand. An option that the chart gives a value itself is left out, and so are files
and secrets, which it mounts: to set one of them twice is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace_core.config import DecodeSettings, PrefillSettings, ProcessSettings, RouterSettings

SCHEMA = Path(__file__).parents[1] / "deploy" / "helm" / "headrace" / "values.schema.json"
ROLES: dict[str, type[ProcessSettings]] = {
    "router": RouterSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
}
_OF_THE_CHART = {"listen", "http_listen", "metrics_listen", "model", "advertise", "workers", "peers", "trace_sample"}


def options(settings: type[ProcessSettings]) -> dict[str, Any]:
    """Return the schema of a role's `options` in the chart's values, by option name without dashes in front."""
    found = {
        name.replace("_", "-"): {key: value for key, value in field.items() if key not in ("title", "format")}
        for name, field in settings.model_json_schema()["properties"].items()
        if name not in _OF_THE_CHART and '"format": "path"' not in json.dumps(field)
    }
    text = (
        f"Options of python -m headrace_{settings.__name__.removesuffix('Settings').lower()}, without dashes in front."
    )
    return {"type": "object", "description": text, "additionalProperties": False, "properties": found}


def main() -> None:
    """Renew the definitions of the options; the rest of the file stays as it is."""
    schema = json.loads(SCHEMA.read_text())
    schema["definitions"] |= {f"{role}Options": options(settings) for role, settings in ROLES.items()}
    SCHEMA.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

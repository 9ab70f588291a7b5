"""Print what is wrong with the objects on standard input, a JSON list, for a version of Kubernetes; its own program.

    python helm_validate.py 1.35 < objects.json

Run with the packages of `make helm-tools` on the path, which no test process should get.
"""

import functools
import json
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate

# Read once, and not for each object: megabytes.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

CUSTOM = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "helm_schemas").glob("*.json")}


def problem(resource, version):
    try:
        if resource["kind"].lower() in CUSTOM:
            jsonschema.validate(resource, CUSTOM[resource["kind"].lower()])
        else:
            kubernetes_validate.validate(resource, version, strict=True)
        if resource["kind"] == "LeaderWorkerSet":
            for name in ("leaderTemplate", "workerTemplate"):
                template = resource["spec"]["leaderWorkerTemplate"][name]
                whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
                kubernetes_validate.validate(whole, version, strict=True)
    except jsonschema.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return error.message
    return ""


for resource in json.load(sys.stdin):
    if found := problem(resource, sys.argv[1]):
        sys.stdout.write(f"{resource['kind']} {resource['metadata']['name']}: {found}\n")

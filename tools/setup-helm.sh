#!/usr/bin/env bash
# Helm and the schemas of Kubernetes' API, for the chart's tests: tools/setup-helm.sh VENV FOLDER. Safe to run again.
set -euo pipefail
venv=$1
folder=$2
rm -rf "$folder"
mkdir -p "$folder/bin"
echo "installing Helm and Kubernetes' schemas into $folder: 60 MB to fetch, 170 MB on disk"
"$venv/bin/pip" install --disable-pip-version-check --progress-bar on -q --no-deps --no-compile \
    --target "$folder/python" -r "$(dirname "$0")/helm-requirements.txt"
"$venv/bin/python" - "$folder" <<'PYTHON'
"""Take helm out of the wheel, where it is in a zip in an archive of npm's."""
import io, pathlib, shutil, sys, tarfile, zipfile

folder = pathlib.Path(sys.argv[1])
(archive,) = (folder / "python" / "aws_cdk").glob("*/_jsii/*.tgz")
with tarfile.open(archive) as outer:
    inner = outer.extractfile("package/lib/layer.zip").read()
program = folder / "bin" / "helm"
with zipfile.ZipFile(io.BytesIO(inner)) as layer:
    program.write_bytes(layer.read("helm/helm"))
program.chmod(0o755)
shutil.rmtree(folder / "python" / "aws_cdk")
PYTHON
"$folder/bin/helm" version --short

#!/usr/bin/env bash
# Stand-ins for two public images, made of Debian's packages, for a machine that reaches no image registry:
#     tools/stand-in-images.sh [MIRROR]
# debian:bookworm-slim, the base of our images, is Debian's own minimal system less what the slim image leaves out, too;
# prom/prometheus is Debian's build of Prometheus behind the entry point of the official image. Both are labelled as stand-ins.
# Needs root, mmdebstrap and a Docker engine; a few minutes. There is no honest stand-in for Grafana, the OpenTelemetry
# collector and Jaeger: deploy/compose.own-images.yaml leaves them out.
set -euo pipefail
mirror=${1:-}
label=io.headrace.stand-in
image=debian:bookworm-slim
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# As in Debian's image: apt keeps neither packages nor caches.
cat > "$work/docker-clean" <<'EOF'
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
EOF

mmdebstrap --variant=minbase \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin' \
    --customize-hook='copy-in '"$work"'/docker-clean /etc/apt/apt.conf.d' \
    bookworm - ${mirror:+"$mirror"} |
    docker import --change 'CMD ["bash"]' --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' --change "LABEL $label=mmdebstrap" - "$image"

docker build --network=host --tag prom/prometheus:building - <<EOF
FROM $image
LABEL $label=debian-package
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/* /etc/prometheus/* \\
    && mkdir -p /prometheus && chown nobody /prometheus
USER nobody
VOLUME /prometheus
WORKDIR /prometheus
EXPOSE 9090
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
EOF
version=$(docker run --rm --entrypoint dpkg-query prom/prometheus:building -W -f '${Version}' prometheus | sed 's/[+-].*//')
docker tag prom/prometheus:building "prom/prometheus:v$version"
docker rmi prom/prometheus:building >/dev/null
echo "made $image and prom/prometheus:v$version"

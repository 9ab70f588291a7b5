#!/usr/bin/env bash
# A Docker engine of one's own, apart from the machine's network, for a machine that has none:
#     tools/docker-engine.sh start            # as root; Debian's docker.io, iptables and slirp4netns are needed
#     tools/docker-engine.sh run COMMAND ...  # where its published ports are 127.0.0.1's, with DOCKER_HOST set
#     tools/docker-engine.sh stop             # with all its containers; images stay in build/docker
# dockerd changes the packet filter and the routes of its network. Here that is a namespace whose only way out is slirp4netns.
set -euo pipefail
cd "$(dirname "$0")/.."
home=$PWD/build/docker
export DOCKER_HOST=unix://$home/docker.sock
export DOCKER_BUILDKIT=0  # BuildKit asks a registry for the names of images that are here

inside() { nsenter --target "$(<"$home/namespace.pid")" --net --mount "$@"; }

start() {
    mkdir -p "$home"
    unshare --net --mount sleep infinity &
    echo $! > "$home/namespace.pid"
    until [ "$(readlink "/proc/$!/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    slirp4netns --configure --mtu=65520 --disable-host-loopback "$(<"$home/namespace.pid")" tap0 > "$home/slirp.log" 2>&1 &
    echo $! > "$home/slirp.pid"
    echo "nameserver 10.0.2.3" > "$home/resolv.conf"
    inside sh -c "
        mount --make-rprivate /
        mount --bind '$home/resolv.conf' /etc/resolv.conf
        ip link set lo up
        echo 1 > /proc/sys/net/ipv4/ip_forward
        exec dockerd --data-root '$home/data' --exec-root '$home/run' --pidfile '$home/dockerd.pid' --host $DOCKER_HOST
    " > "$home/dockerd.log" 2>&1 &
    for _ in {1..300}; do
        if docker info > /dev/null 2>&1; then
            echo "$DOCKER_HOST"
            return
        fi
        sleep 0.2
    done
    tail "$home/dockerd.log"
    exit 1
}

stop() {
    local containers
    containers=$(docker ps --quiet) && [ -n "$containers" ] && docker kill $containers > /dev/null
    for file in dockerd slirp namespace; do
        [ -e "$home/$file.pid" ] && kill "$(<"$home/$file.pid")" 2> /dev/null
        while [ -e "$home/dockerd.pid" ]; do sleep 0.1; done
        rm -f "$home/$file.pid"
    done
}

case ${1:-} in
    start) start ;;
    run) shift; inside --wd="$PWD" "$@" ;;
    stop) stop || true ;;
    *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac

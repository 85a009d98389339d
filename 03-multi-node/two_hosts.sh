#!/usr/bin/env bash
# Two hosts on one Linux machine, to practise on without a cluster. Each has its own address, host
# name, process table and /etc/hosts; they share the disk, as the nodes of a cluster do.
#
#   ./two_hosts.sh up                    start node1 (10.77.0.1) and node2 (10.77.0.2)
#   ./two_hosts.sh run node1 COMMAND     run a command on a host; without COMMAND: open a shell
#   ./two_hosts.sh cut                   pull out the network cable of node2
#   ./two_hosts.sh heal                  put it back
#   ./two_hosts.sh limit 100mbit         limit the link in both directions; `limit off` ends that
#   ./two_hosts.sh off node2             cut a host's power; `up` starts it again
#   ./two_hosts.sh down                  end both hosts and all that runs on them
#
# A host is a few kernel namespaces, and each of them has a cable to a third one, the switch:
#
#     node1 eth0 ----- node1 [switch] node2 ----- eth0 node2
#
# Root is not needed where the kernel lets users make namespaces. TWO_HOSTS names the folder of its
# state; with another folder you get another pair of hosts.
set -euo pipefail

state=${TWO_HOSTS:-${TMPDIR:-/tmp}/two_hosts-${SUDO_UID:-$(id -u)}}
declare -A address=([node1]=10.77.0.1 [node2]=10.77.0.2)

if [ "$(id -u)" = 0 ]; then
    new_user=() enter_user=()
else # root inside a namespace of users is this user outside
    new_user=(--user --map-root-user) enter_user=(--user --preserve-credentials)
fi

fail() {
    echo "error: $*" >&2
    exit 1
}

# The process that holds the namespaces of the switch or of a host; false when it is not running, or
# when its number now belongs to a process that is not in a network namespace of its own.
pid_of() {
    local pid net
    pid=$(cat "$state/$1" 2> /dev/null) && net=$(readlink "/proc/$pid/ns/net") &&
        [ "$net" != "$(readlink /proc/self/ns/net)" ] && echo "$pid"
}

on_switch() {
    local pid
    pid=$(pid_of switch) || fail "the hosts are not running: $0 up"
    nsenter --target "$pid" "${enter_user[@]}" --net "$@"
}

on_host() {
    local host=$1 pid
    shift
    [ -n "${address[$host]:-}" ] || fail "$host: there are node1 and node2"
    pid=$(pid_of "$host") || fail "$host is not running: $0 up"
    nsenter --target "$pid" "${enter_user[@]}" --net --uts --mount --pid \
        env --chdir="$PWD" "$@"
}

start_switch() {
    unshare "${new_user[@]}" --net sleep infinity < /dev/null > /dev/null 2> "$state/log" &
    echo $! > "$state/switch"
    until [ "$(cat "/proc/$!/comm" 2> /dev/null)" = sleep ]; do
        kill -0 $! 2> /dev/null || fail "$(cat "$state/log"). Does the kernel ask for root? Then first: sudo -s"
        sleep 0.01
    done
    on_switch ip link add bridge type bridge
    on_switch ip link set bridge up
}

start_host() {
    local host=$1 switch parent child
    switch=$(pid_of switch)
    rm -f "$state/$host"
    printf '127.0.0.1 localhost\n%s node1\n%s node2\n' "${address[node1]}" "${address[node2]}" \
        > "$state/hosts-$host"
    # Look-ups end at /etc/hosts: no name server can be reached from here, and asking takes seconds.
    sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf > "$state/nsswitch.conf"

    # The host's first process: the kernel ends all others with it. bash, because it also takes in
    # the processes whose parents have died.
    nsenter --target "$switch" "${enter_user[@]}" --net \
        unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
        bash -c 'sleep infinity & wait' < /dev/null > /dev/null 2> "$state/log" &
    parent=$!
    until [ -s "$state/$host" ]; do
        kill -0 $parent 2> /dev/null || fail "$(cat "$state/log")"
        child=$(<"/proc/$parent/task/$parent/children")
        [ -z "$child" ] || echo "${child% }" > "$state/$host"
        sleep 0.01
    done
    until on_host "$host" test "$(on_host "$host" cat /proc/1/comm 2> /dev/null)" = bash; do
        sleep 0.01 # until then it still is unshare, which has to mount /proc first
    done

    on_switch ip link add "$host" type veth peer name eth0 netns "$(pid_of "$host")"
    on_switch ip link set "$host" master bridge up
    on_host "$host" ip link set lo up
    on_host "$host" ip address add "${address[$host]}/24" dev eth0
    on_host "$host" ip link set eth0 up
    on_host "$host" hostname "$host"
    on_host "$host" mount --bind "$state/hosts-$host" /etc/hosts
    on_host "$host" mount --bind "$state/nsswitch.conf" /etc/nsswitch.conf
}

stop_host() {
    local pid
    if pid=$(pid_of "$1"); then
        # The cable first, so that no connection says goodbye.
        on_switch ip link set "$1" down 2> /dev/null || true
        kill -KILL "$pid"
        while kill -0 "$pid" 2> /dev/null; do sleep 0.01; done
        on_switch ip link delete "$1" 2> /dev/null || true # it may live on, or be gone with the host
    fi
    rm -f "$state/$1"
}

case "${1:-}" in
up)
    [ "$(uname)" = Linux ] || fail "namespaces need Linux"
    for tool in unshare nsenter hostname ip tc; do
        command -v $tool > /dev/null || fail "$tool is missing: install util-linux, hostname and iproute2"
    done
    mkdir -p "$state"
    trap '[ $? = 0 ] || bash "$0" down' EXIT # rather no hosts than half a host
    pid_of switch > /dev/null || start_switch
    for host in node1 node2; do
        pid_of $host > /dev/null || start_host $host
    done
    ;;
run)
    host=${2:-}
    shift 2 || fail "usage: $0 run node1 COMMAND"
    [ $# -gt 0 ] || set -- "${SHELL:-bash}"
    on_host "$host" "$@"
    ;;
cut) on_switch ip link set node2 down ;;
heal) on_switch ip link set node2 up ;;
limit)
    rate=${2:-}
    [ -n "$rate" ] || fail "usage: $0 limit 100mbit (or: limit off)"
    for host in node1 node2; do
        if [ "$rate" = off ]; then
            on_host $host tc qdisc delete dev eth0 root 2> /dev/null || true # there may be none
        else
            on_host $host tc qdisc replace dev eth0 root tbf rate "$rate" burst 128kb latency 50ms
        fi
    done
    ;;
off)
    [ -n "${address[${2:-none}]:-}" ] || fail "usage: $0 off node1 (or node2)"
    stop_host "$2"
    ;;
down)
    for host in node1 node2; do stop_host $host; done
    if pid=$(pid_of switch); then kill -KILL "$pid"; fi
    rm -rf "$state"
    ;;
*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac

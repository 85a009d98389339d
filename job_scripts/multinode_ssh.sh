#!/usr/bin/env bash
# Stage 03 over ssh, for hosts without a scheduler: first the preflight, then one torchrun on each.
# Type it on one of them. It must reach all of them, itself too, by `ssh HOST` without a password.
#
#   HOSTS=hosts.txt job_scripts/multinode_ssh.sh                  hosts.txt: a host's name per line
#   HOSTS=hosts.txt ARGS="-e gpt2 -b 16" job_scripts/multinode_ssh.sh
# Ctrl-C or SIGTERM: the ranks save, and all hosts end. The same line again goes on from there.
# Logs: outputs/jobs/JOBID/. The exit status is not 0 if any rank on any host fails.

# ---- your site: change these; what is given from outside wins ------------------------------------
on_each_host_first() {
    : # module load python cuda
    # export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
    # export HF_HOME=/scratch/$USER/huggingface HF_HUB_OFFLINE=1
}
HOSTS=${HOSTS:-hosts.txt}                       # names by which the hosts know each other
SSH=${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15} # and, say, -i KEY -p PORT
VENV=${VENV:-}                                  # folder of a virtual environment; empty: PATH's
SCRIPT=${SCRIPT:-03-multi-node/train_llm.py}    # relative to the repository's root
SAVE_DIR=${SAVE_DIR:-outputs}                   # runs and logs, on a disk that all hosts share
ARGS=${ARGS:--e ssh --max-steps 400}            # the same name continues the same run
PREFLIGHT=${PREFLIGHT:-1}                       # 0: no preflight
NPROC=${NPROC:-}                                # processes per host; empty: its GPUs, or 1
# --------------------------------------------------------------------------------------------------

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

# Which hosts, which port? Two runs may share a host, so the port is drawn.
[ -f "$HOSTS" ] || fail "HOSTS=$HOSTS: no such file: write one with a host per line"
mapfile -t hosts < <(grep -Ev '^[[:space:]]*(#|$)' "$HOSTS")
[ ${#hosts[@]} -gt 0 ] || fail "HOSTS=$HOSTS: there is no host in it"
nnodes=${#hosts[@]} endpoint=${hosts[0]#*@}:$((20000 + RANDOM % 10000))
cd "$(dirname "$0")/.."
root=$PWD
[ -f "$SCRIPT" ] || fail "SCRIPT=$SCRIPT: not in $root"
[[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC: must be a whole number above 0"
job=$(date +%Y%m%d-%H%M%S)-$$
logs=$SAVE_DIR/jobs/$job
mkdir -p "$logs"
read -ra ssh <<< "$SSH"
read -ra words <<< "--save-dir $SAVE_DIR $ARGS"
echo "job $job on ${hosts[*]}, logs in $logs: $SCRIPT ${words[*]}"

# What each host does. ssh passes no signal on; what it does pass on is the end of standard input.
# That comes when the script below closes its end, when it dies, and when the connection is lost.
on_this_host() { # NODE_RANK NAME, and the words to run
    local node_rank=$1 name=$2 gpus share torchrun status=0
    shift 2
    cd "$root" 2> /dev/null || fail "there is no $root on $HOSTNAME: put the repository there"
    on_each_host_first
    [ -z "$VENV" ] || [ -x "$VENV/bin/torchrun" ] || fail "VENV=$VENV: no bin/torchrun in it"
    [ -z "$VENV" ] || PATH=$VENV/bin:$PATH
    command -v torchrun > /dev/null || fail "no torchrun on PATH: set VENV, or load a module"
    gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU') || gpus=1
    NPROC=${NPROC:-$gpus}
    share=$(($(nproc) / NPROC))
    export OMP_NUM_THREADS=$((share > 0 ? share : 1))
    torchrun --nnodes "$nnodes" --nproc-per-node "$NPROC" --rdzv-id "$job.$name" \
        --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-conf is_host=$((node_rank == 0)) \
        --log-dir "$logs/$HOSTNAME.$name" --redirects 3 --tee 3 "$@" < /dev/null &
    torchrun=$!
    { read -r || kill -TERM $torchrun; } <&3 > /dev/null 2>&1 &
    wait $torchrun || status=$?
    kill $! 2> /dev/null || true
    exit $status
}

# Run words on all hosts, and wait for them. If one fails, the others are ended.
on_all_hosts() { # NAME, and the words to run
    local i pid pids=() status=0 program
    [ -z "$stopped" ] || exit 1
    program="set -euo pipefail; $(declare -f fail on_each_host_first on_this_host)
        $(declare -p root nnodes endpoint job logs VENV NPROC "${!GLOO_@}" "${!NCCL_@}")"
    for i in "${!hosts[@]}"; do
        line="$program; on_this_host $i ${*@Q} 3<&0"
        { "${ssh[@]}" "${hosts[i]}" "bash -c ${line@Q}" <&8 2>&1 |
            tee "$logs/${hosts[i]}.$1.log" | sed -u "s/^/${hosts[i]}: /" ||
            { echo "error: $1 on ${hosts[i]}: exit status $?" && kill -TERM $$ && exit 1; }; } 9>&- &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        while kill -0 "$pid" 2> /dev/null; do wait "$pid" || true; done # signals end a wait early
        wait "$pid" || status=1
    done
    return $status
}

# The lifeline of all hosts. This script holds its other end as long as they are to go on.
folder=$(mktemp -d)
mkfifo "$folder/lifeline"
exec 9<> "$folder/lifeline"
exec 8< "$folder/lifeline"
rm -r "$folder"
stopped=
trap 'stopped=yes; exec 9>&-' INT TERM

[ "$PREFLIGHT" = 0 ] ||
    on_all_hosts preflight 03-multi-node/check_cluster.py --save-dir "$SAVE_DIR" \
        --json "$logs/preflight.json"
on_all_hosts training "$SCRIPT" "${words[@]}"

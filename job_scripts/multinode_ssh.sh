#!/usr/bin/env bash
# Stage 03 over ssh, for hosts without a scheduler: first the preflight, then one torchrun on each.
# Type it on one of them. It must reach all of them, itself too, by `ssh HOST` without a password.
#
#   HOSTS=hosts.txt ARGS="-e big -b 16" job_scripts/multinode_ssh.sh    hosts.txt: a name per line
#
# Ctrl-C or SIGTERM: the ranks save, and all hosts end. The same line again goes on from there.

# ---- your site: change these; what is given from outside wins ------------------------------------
on_each_host_first() {
    : # module load python/3.11
    # export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
    # export HF_HOME=/scratch/$USER/huggingface HF_HUB_OFFLINE=1
}
HOSTS=${HOSTS:-hosts.txt}                       # names by which the hosts know each other
SSH=${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15} # and, say, -i KEY -p PORT
VENV=${VENV:-}                                  # folder of a virtual environment; empty: PATH's
NPROC=${NPROC:-}                                # processes per host; empty: one per GPU, or 1
SCRIPT=${SCRIPT:-03-multi-node/train_llm.py}    # relative to the repository's root
SAVE_DIR=${SAVE_DIR:-outputs}                   # runs and logs, on a disk that all hosts share
ARGS=${ARGS:--e ssh --max-steps 400}            # the same name continues the same run
PREFLIGHT=${PREFLIGHT:-1}                       # 0: no preflight
# --------------------------------------------------------------------------------------------------

on_each_host_first
set -euo pipefail # here, because modules may use variables that are not set

fail() { echo "error: $*" >&2 && exit 1; }

[ -f "$HOSTS" ] || fail "there is no file $HOSTS (HOSTS): write one, with a host per line"
mapfile -t hosts < <(grep -Ev '^[[:space:]]*(#|$)' "$HOSTS")
cd "$(dirname "$0")/.."
[ -f "$SCRIPT" ] || fail "there is no $SCRIPT in $PWD"
[ -z "$VENV" ] || PATH=$VENV/bin:$PATH
command -v "${VENV:+$VENV/bin/}torchrun" > /dev/null || fail "there is no torchrun: VENV is '$VENV'"
NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
[[ $ARGS =~ --save-dir[=\ ]+([^ ]+) ]] && SAVE_DIR=${BASH_REMATCH[1]} # the preflight's too
read -ra args <<< "$ARGS --save-dir $SAVE_DIR"
read -ra ssh <<< "$SSH"
job=$(date +%Y%m%d-%H%M%S)-$$ logs=$SAVE_DIR/jobs/$job
mkdir -p "$logs"
echo "$SCRIPT on ${hosts[*]}, logs: $logs"

# ssh passes no signal on, but it does pass on the end of its input. So all hosts have this lifeline
# for their input. It ends when it is killed, with this script, and with the connection.
exec 8< <(exec tail -f --pid=$$ /dev/null)
lifeline=$! stopped=
trap 'stopped=yes; kill $lifeline 2> /dev/null || true' INT TERM

on_this_host() { # LOGS/HOST IS_HOST WORDS...; torchrun takes flags from PET_ variables too
    export PET_LOG_DIR=$1 PET_RDZV_CONF=is_host=$2 # the first host serves the store
    export OMP_NUM_THREADS=$(($(nproc) > NPROC ? $(nproc) / NPROC : 1)) # a process's share
    export TORCH_CPP_LOG_LEVEL=ERROR # no C++ frames when one host leaves before another
    "${@:3}" < /dev/null &
    local command=$! status=0
    { read -r || kill $command; } <&3 &> /dev/null & # at the end of the lifeline
    wait $command || status=$?
    kill $! 2> /dev/null || true
    return $status
}

on_every_host() { # WORDS...
    local i line program
    program="cd ${PWD@Q} || exit; $(declare -f on_each_host_first on_this_host); on_each_host_first
        $(declare -p PATH NPROC "${!GLOO_@}" "${!NCCL_@}"); set -euo pipefail"
    for i in "${!hosts[@]}"; do
        line="$program; on_this_host $logs/${hosts[i]} $((i == 0)) ${*@Q} 3<&0"
        {
            trap '' INT # or Ctrl-C would end ssh itself
            "${ssh[@]}" "${hosts[i]}" "bash -c ${line@Q}" <&8 2>&1 |
                tee -a "$logs/${hosts[i]}.log" | sed -u "s/^/${hosts[i]}: /" ||
                { echo "error: ${hosts[i]}: exit status $?" && kill $$; } # if one fails, all end
        } &
    done
    while [ "$(jobs -rp)" ]; do sleep 1 || true; done # a signal ends it too
    [ -z "$stopped" ]
}

# The same line on every host: they meet at the first one. Each rank writes to a file of its own
# under $logs; here we see the first rank of each host.
torchrun=(torchrun --nnodes ${#hosts[@]} --nproc-per-node "$NPROC" --rdzv-id "$job"
    --rdzv-backend c10d --rdzv-endpoint "${hosts[0]#*@}:$((20000 + RANDOM % 10000))"
    --tee 3 --local-ranks-filter 0)

[ "$PREFLIGHT" = 0 ] ||
    on_every_host "${torchrun[@]}" 03-multi-node/check_cluster.py --save-dir "$SAVE_DIR"
on_every_host "${torchrun[@]}" "$SCRIPT" "${args[@]}"

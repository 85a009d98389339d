# shellcheck shell=bash disable=SC2034
# What PBS jobs have in common. A job script reads this after its settings, in the root of the
# repository. It settles HEAD, PORT and LOGS, and brings one command:
#
#   on_every_host WORDS...    run WORDS on all hosts at once and wait; fails if one host has failed
#
# In WORDS, NODE_RANK becomes 0 on the first host, 1 on the second, and so on. PBS runs a job script
# on the first host only. What it has for the other hosts is pbsdsh, which
#
#   starts a command in $HOME, without exports    each host first reads LOGS/host.sh
#   starts it once per line of the node file      on_every_host names one line per host, with -n
#   ends with 0, whatever became of it            the host writes its status: LOGS/HOST.status
#   loses what it prints after qdel               the host writes its output: LOGS/HOST.log

fail() { echo "error: $*" >&2 && exit 1; }

[ -f "$SCRIPT" ] || fail "there is no $SCRIPT in $PWD"
[ -z "$VENV" ] || PATH=$VENV/bin:$PATH
command -v "${VENV:+$VENV/bin/}torchrun" > /dev/null || fail "there is no torchrun: VENV is '$VENV'"
mapfile -t HOSTS < <(awk '!seen[$0]++' "$PBS_NODEFILE") # the file has a line per MPI process
[ ${#HOSTS[@]} = "$NODES" ] || fail "NODES is $NODES, and this job got ${#HOSTS[@]}: ${HOSTS[*]}." \
    "Ask for them with -l select=$NODES:... and -l place=scatter"
[ "$NODES" = 1 ] || command -v pbsdsh > /dev/null || fail "there is no pbsdsh in PATH: $PATH"
HEAD=$(hostname)                                                      # the first host is this one
PORT=$((20000 + $(cksum <<< "$PBS_JOBID" | cut -d ' ' -f 1) % 10000)) # jobs may share a host

# The preflight has to look where the run will be saved, and the logs go there too.
[[ $ARGS =~ --save-dir[=\ ]+([^ ]+) ]] && SAVE_DIR=${BASH_REMATCH[1]}
LOGS=$(realpath -ms "$SAVE_DIR/jobs/$PBS_JOBID/$(date +%Y%m%d-%H%M%S)") # a rerun keeps the job's id
mkdir -p "$LOGS"
printf '%s\n' "${HOSTS[@]}" > "$LOGS/hosts"

# The job's output is what the hosts write, as they write it, while this script runs.
echo "$SCRIPT on ${HOSTS[*]}, logs: $LOGS"
for host in "${HOSTS[@]}"; do : > "$LOGS/$host.log"; done
(cd "$LOGS" && trap '' TERM && exec tail --pid=$$ -F -n +1 -- *.log &)
trap 'sleep 2' EXIT # until tail has caught up

# PBS ends a job by KILL to its sessions, but each of torchrun's ranks has its own session and would
# live on. So the kernel is to end a rank with its torchrun. torchrun starts this as its Python:
export PYTHON_EXEC=$LOGS/python
cat > "$PYTHON_EXEC" << 'END'
#!/usr/bin/env python
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.execvp("python", ["python", *sys.argv[1:]])
END
chmod +x "$PYTHON_EXEC"

# What a host does with WORDS.
on_this_host() { # LOGS/HOST WORDS...
    trap : TERM  # qdel and the walltime send it to torchrun too, which lets the ranks save: wait
    trap '' USR1 # is for ranks that listen; torchrun, and who does not listen yet, would die of it
    export PET_LOG_DIR=$1 # torchrun's --log-dir
    local status=0
    "${@:2}" >> "$1.log" 2>&1 || status=$?
    echo $status > "$1.status"
}

stopping=
trap 'stopping=yes' TERM # PBS and pbsdsh send it to the hosts as well: wait for them

on_every_host() { # WORDS...
    local ended first host i line running status words patience=30 warn_at=$STOP_AFTER
    {
        ( # What differs by host stays as it is there. So do the GPUs, unless the settings chose.
            unset "${!PBS_@}" TMPDIR HOSTNAME
            grep -qzxF "CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-}" /proc/$$/environ &&
                unset CUDA_VISIBLE_DEVICES
            export -p
        )
        declare -f on_this_host
        printf 'cd %q && PBS_NODEFILE=%q on_this_host "$@"\n' "$PWD" "$LOGS/hosts"
    } > "$LOGS/host.sh"
    for i in "${!HOSTS[@]}"; do
        host=$LOGS/${HOSTS[i]}
        : > "$host.status" # now, because a disk may hide a new file for a while
        words=(/bin/bash "$LOGS/host.sh" "$host" "${@//NODE_RANK/$i}")
        if [ "$i" = 0 ]; then
            "${words[@]}" &
            first=$!
        else
            line=$(grep -nxFm 1 -- "${HOSTS[i]}" "$PBS_NODEFILE") # pbsdsh counts from 0
            pbsdsh -n $((${line%%:*} - 1)) -- "${words[@]}" &
        fi
    done
    while [ $patience -gt 0 ]; do
        sleep 1 || true                            # TERM ends it too
        mapfile -t ended < <(cat "$LOGS"/*.status) # a line from each host that has ended
        [ ${#ended[@]} -lt "$NODES" ] || break
        # Before the walltime: tell this host's ranks, the children of its torchrun, to save and
        # stop. They tell the others. Again later, for they may not have listened yet.
        if [ $SECONDS -ge "$warn_at" ]; then
            warn_at=$((SECONDS + 30))
            pgrep -P "$first" | xargs -r pkill -USR1 -P || true
        fi
        # If a host has failed, or a pbsdsh has left before its host, the others mostly end by
        # themselves within seconds. Those that do not, PBS ends with the job.
        mapfile -t running < <(jobs -rp)
        [[ $stopping || ${ended[*]} != *[1-9]* && ${#running[@]} -ge $((NODES - ${#ended[@]})) ]] ||
            patience=$((patience - 1))
    done
    for host in "${HOSTS[@]}"; do
        read -r status < "$LOGS/$host.status" ||
            status="none: it still runs, or sees no $LOGS, or has the host died?"
        echo "$host: exit status $status"
    done
    [ "${ended[*]}" = "${HOSTS[*]/*/0}" ] # one 0 from each
}

#!/usr/bin/env bash
# DeepSpeed's launcher: launch/deepspeed.sh CONFIG [key=value …] on the first of HOSTS, with the variables of env.sh.
#
# On several nodes it needs pdsh here, ssh without a password to all, and the clone at the same path on each.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

deepspeed=$(dirname "$(command -v "$PYTHON")")/deepspeed
[[ -x $deepspeed ]] || { echo "launch: $deepspeed is not there: pip install 'nlm[deepspeed]'" >&2; exit 2; }
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT

if ((${#hosts[@]} > 1)); then
    printf "%s slots=$RANKS_PER_NODE\n" "${hosts[@]}" >"$files/hostfile"
    # What nodes get of this environment: an absolute name overrides where DeepSpeed looks for the file.
    for name in $(exported); do printf '%s=%q\n' "$name" "${!name}"; done >"$files/environment"
    export DS_ENV_FILE=$files/environment
    where=(--hostfile="$files/hostfile" --master_addr="$MASTER_ADDR")
    # The ranks, children of the launcher that DeepSpeed starts on each node. DeepSpeed itself would cut the connections
    # first: ranks could print no more, which ends them without a checkpoint.
    launcher="^[^ ]+ -u -m deepspeed.launcher.launch .*--master_port=$MASTER_PORT "
    printf -v list ',%s' "${hosts[@]}"
    ask() {
        PDSH_RCMD_TYPE=ssh pdsh -S -w "${list:1}" "pkill -USR1 -P \"\$(pgrep -d, -f '$launcher')\"" ||
            kill -TERM "$1" || : # while there are none, DeepSpeed
    }
else
    where=(--hostfile=/dev/null --num_gpus="$RANKS_PER_NODE")
    trap '' USR1 # DeepSpeed's two processes are to survive what makes nlm's ranks save and stop
    ask() { kill -USR1 -- "-$1"; }
fi
stoppable ask "$deepspeed" "${where[@]}" --master_port="$MASTER_PORT" --module nlm train "$@"

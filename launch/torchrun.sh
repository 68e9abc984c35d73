#!/usr/bin/env bash
# torchrun on this node: launch/torchrun.sh CONFIG [key=value …], with the variables of env.sh.
#
# The same command on every node, in any order; they meet at MASTER_ADDR:MASTER_PORT. If a node is lost, the others wait
# half an hour for it: give the command there again. Each return counts as one of MAX_RESTARTS.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

at=$MASTER_ADDR here=()
if ((NNODES == 1)); then
    MASTER_PORT=0 # any free one
elif read -r found address < <("$PYTHON" "${0%/*}/here.py" "$MASTER_ADDR"); then
    at=$found here=(--local-addr="$address")
fi
# Where ranks (rank.sh) read that they were asked to stop, and say that they did.
NLM_AGENT=$(mktemp -d)
export NLM_AGENT
trap 'rm -rf "$NLM_AGENT"' EXIT

# Not the agent, but its ranks, each of which leads a process group: an agent that is told leaves at once, maybe with the
# store at which those of other nodes still have to meet, or wait for it there (torch 2.13: 300 s).
# shellcheck disable=SC2317 # stoppable calls it
ask() {
    touch "$NLM_AGENT/asked"
    local ranks=()
    read -ra ranks <"/proc/$1/task/$1/children" || : # no end of line
    ranks=("${ranks[@]/#/-}")
    kill -TERM -- "${ranks[@]:-$1}" || : # while there are none, the agent
}

# Named by what they run, so that the nodes of two runs never mix.
code=0
stoppable ask "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="$RANKS_PER_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$at:$MASTER_PORT" --rdzv-id="nlm-$(cksum <<<"$*" | cut -d' ' -f1)" \
    "${here[@]}" --rdzv-conf=join_timeout=1800 --max-restarts="$MAX_RESTARTS" --no-python "${0%/*}/rank.sh" "$@" || code=$?
if [[ -e $NLM_AGENT/stopped ]]; then code=75; fi
if ((code == 75)); then code=${EXIT_STOPPED:-75}; fi # where 75 is taken for a failure, as by Kubeflow
exit "$code"

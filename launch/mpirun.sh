#!/usr/bin/env bash
# Open MPI starts all ranks: launch/mpirun.sh CONFIG [key=value …] on the first of HOSTS, with the variables of env.sh.
#
# The clone lies at the same path on all nodes. MPIRUN_OPTIONS go to mpirun before everything else. MPI itself carries
# nothing: ranks talk by NCCL or gloo.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

printf -v list ",%s:$RANKS_PER_NODE" "${hosts[@]:-localhost}"
export=()
for name in $(exported); do export+=(-x "$name"); done
read -ra options <<<"${MPIRUN_OPTIONS:-}"

# mpirun passes SIGUSR1 on, and kills the ranks for any other. It binds each rank to one core; nlm's threads need more.
stoppable 'kill -USR1' mpirun "${options[@]}" --host "${list:1}" --map-by "ppr:$RANKS_PER_NODE:node" --bind-to none \
    "${export[@]}" launch/rank.sh "$@"

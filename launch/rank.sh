#!/usr/bin/env bash
# One rank of `nlm train CONFIG [key=value …]`, started by torchrun, srun or mpirun from the scripts beside it.
set -uo pipefail

if [[ -n ${TORCHELASTIC_RUN_ID:-} ]]; then
    # To torchrun every exit code but 0 is a failure, after which it starts ranks again: 75 is told by a file, and where
    # ranks that were asked to stop could not yet, the agent has to end. Its signals come to the whole process group;
    # here they are left to nlm.
    trap : TERM INT USR1 HUP QUIT
    rm -f "$NLM_AGENT/stopped"
    code=1
    if [[ ! -e $NLM_AGENT/asked ]]; then
        "$PYTHON" -m nlm train "$@"
        code=$?
    fi
    if ((code == 75)); then
        touch "$NLM_AGENT/stopped"
        code=0
    elif ((code != 0)) && [[ -e $NLM_AGENT/asked ]]; then
        kill -TERM "$PPID"
    fi
    exit "$code"
fi

export RANK=${OMPI_COMM_WORLD_RANK:-${SLURM_PROCID:-}}
export WORLD_SIZE=${OMPI_COMM_WORLD_SIZE:-${SLURM_NTASKS:-}}
export LOCAL_RANK=${OMPI_COMM_WORLD_LOCAL_RANK:-${SLURM_LOCALID:-}}
exec "$PYTHON" -m nlm train "$@"

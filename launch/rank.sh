#!/usr/bin/env bash
# One rank of `nlm train CONFIG [key=value …]`, started by torchrun, srun or mpirun from the scripts beside it.
set -uo pipefail

if [[ -n ${TORCHELASTIC_RUN_ID:-} ]]; then
    # To torchrun every exit code but 0 is a failure, after which it starts ranks again: 75 is told by a file. Its
    # signals come to the whole process group; here they are left to nlm.
    trap : TERM INT USR1 HUP QUIT
    rm -f "$NLM_STOPPED"
    "$PYTHON" -m nlm train "$@"
    code=$?
    if ((code == 75)); then
        touch "$NLM_STOPPED"
        code=0
    fi
    exit "$code"
fi

export RANK=${OMPI_COMM_WORLD_RANK:-${SLURM_PROCID:-}}
export WORLD_SIZE=${OMPI_COMM_WORLD_SIZE:-${SLURM_NTASKS:-}}
export LOCAL_RANK=${OMPI_COMM_WORLD_LOCAL_RANK:-${SLURM_LOCALID:-}}
exec "$PYTHON" -m nlm train "$@"

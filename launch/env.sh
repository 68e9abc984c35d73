# shellcheck shell=bash
# Sourced by the scripts beside it, which all run `nlm train CONFIG [key=value …]` from the root of a clone:
#
#   HOSTS="node1 node2" RANKS_PER_NODE=8 launch/torchrun.sh CONFIG [key=value …]
#
# `nlm launch` takes these variables from a cluster file (docs/cluster.md); set by hand they mean the same:
#
#   HOSTS           the nodes, the first of which holds the rendezvous; or instead of their names
#   NNODES          how many there are (1), and
#   MASTER_ADDR     which of them holds the rendezvous
#   MASTER_PORT     its port there (29400)
#   RANKS_PER_NODE  ranks of a node, one for each GPU (1)
#   INTERFACE       the network interface between nodes, such as eth0 (what NCCL and gloo choose)
#   MAX_RESTARTS    how often ranks that failed are started again, from the last checkpoint (0)
#   EXPORT          names of further variables for ranks on other nodes (mpirun, deepspeed; all others pass them)
#   PYTHON          the interpreter that has torch (.venv/bin/python, or else python3)
#
# Exit code 0: the run is done. 75: it was asked to stop, or its time is up; the same command goes on. Others: it failed.

read -ra hosts <<<"${HOSTS:-}"
: "${NNODES:=$((${#hosts[@]} > 1 ? ${#hosts[@]} : 1))}" "${MASTER_ADDR:=${hosts[0]:-localhost}}"
: "${MASTER_PORT:=29400}" "${RANKS_PER_NODE:=1}" "${MAX_RESTARTS:=0}" "${EXPORT:=}"
: "${PYTHON:=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export MASTER_ADDR MASTER_PORT PYTHON
[[ -f nlm/__main__.py ]] || { echo "launch: start it in the root of nlm's clone, not in $PWD" >&2; exit 2; }

# Threads of a rank on the CPU. Left out, torchrun says 1, which starves tokenizing and gloo's sums, and srun and mpirun
# say nothing, so that every rank takes all cores.
threads=$(($(nproc) / RANKS_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}

# Which network: else NCCL may take one that does not lead to the other nodes (docker0), and gloo the address that the
# node's own name has in /etc/hosts, on Debian 127.0.1.1. "=" since NCCL takes every interface that begins so.
if [[ -n ${INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME="=$INTERFACE" GLOO_SOCKET_IFNAME=$INTERFACE
fi

# NCCL by itself keeps to itself why a connection failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# What a rank prints is seen at once, though stdout is a pipe.
export PYTHONUNBUFFERED=1

# How long torchrun waits for the checkpoint of ranks that it was told to end before it kills them: by itself 30 s. Who
# gave the notice has a limit of their own.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# torchrun's agents keep a store for the ranks of all its restarts, and tell nobody again where it is: a host that comes
# back, or in place of another, waits for that until it fails (torch 2.13). Rank 0 opens a new one each time instead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Not set, because it is so in torch 2.11 and later, or nlm sees to it:
#   TORCH_NCCL_ASYNC_ERROR_HANDLING  a failed or late collective ends the process
#   TORCH_FR_BUFFER_SIZE             the flight recorder keeps 2,000 collectives; nlm dumps them (docs/faults.md)
#   TORCH_NCCL_DUMP_ON_TIMEOUT, TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC   faults.hang_minutes comes first
#   TORCHELASTIC_SIGNALS_TO_HANDLE   torchrun 2.13 overwrites it; `stoppable` passes signals on
#   CUDA_DEVICE_MAX_CONNECTIONS      1 orders the kernels of Megatron's overlap; FSDP's suffer from it
#   NCCL_IB_*, NCCL_ALGO, NCCL_NVLS_ENABLE …   are the fabric's, not nlm's: put them under [environment] of the cluster

# The names of what ranks on other nodes need of this environment.
exported() {
    compgen -e | grep -E "^(MASTER_|PYTHON|OMP_|NCCL_|GLOO_|TORCH_)|^(${EXPORT// /|})$"
}

# stoppable ASK COMMAND…: runs it in a process group of its own. SIGTERM, SIGINT, SIGUSR1 or SIGHUP (the connection or
# terminal is gone) become one call of ASK, which is given its process. What fails then was stopped: exit code 75.
stoppable() {
    local ask=$1 asked='' code
    shift
    set -m
    "$@" <&0 &
    local pid=$!
    set +m
    trap '[[ $asked ]] || { asked=yes; $ask "$pid"; }' TERM INT USR1 HUP
    while wait "$pid" && code=0 || code=$?; kill -0 "$pid" 2>/dev/null; do :; done
    trap - TERM INT USR1 HUP
    if [[ $asked && $code != 0 ]]; then return 75; fi
    return "$code"
}

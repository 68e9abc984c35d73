#!/bin/sh
# Unhealthy when runs have logged since the container started, and none of them in the last NLM_HEALTH_MINUTES.
# What does not train, and a run before its first logged step, is healthy.
set -eu
started=${NLM_STARTED:-/tmp/nlm-started}
minutes=${NLM_HEALTH_MINUTES:-30}
[ -e "$started" ] || exit 0
logged() { find "${NLM_RUNS:-.}" -name metrics.jsonl -newer "$started" "$@" 2>/dev/null | head -n 1; }
if [ -n "$(logged)" ] && [ -z "$(logged -mmin "-$minutes")" ]; then
    echo "no run under ${NLM_RUNS:-$PWD} has logged a step for $minutes minutes"
    exit 1
fi

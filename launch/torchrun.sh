#!/usr/bin/env bash
# One node's share of a run; start it on every node at about the same time:
#
#     NODES=4 HEAD=10.0.0.1 launch/torchrun.sh
#
# HEAD is one of the nodes, which all of them can reach. Further arguments go to daybreak train. The
# run folder must be the same for all nodes. SIGTERM, SIGINT or SIGUSR1 to one node saves and ends
# all of them. Leaves with daybreak's exit code (docs/cluster.md), which torchrun would turn into 1.
# The networks that the recipe names have to be in the caches already: nothing is asked of the hub.
set -u
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
: "${RECIPE:=prx_24h}" "${RUN:=runs/prx_24h}"
: "${NODES:=1}" "${HEAD:=localhost}" "${PORT:=29400}" "${GPUS:=gpu}" "${RESTARTS:=0}"

# Compiled kernels outlive a container beside the run, each node's in a folder of its own.
kernels=$(dirname "$(realpath -m "$RUN")")/kernels/$(hostname)
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$kernels}"
# Each of a node's processes compiles in as many of its own; torch's 32 would be in each other's way.
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-8}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

version() { stat -c %i-%y "$RUN/status.json" 2>/dev/null; }
before=$(version)

torchrun= stopped=
trap 'if [ -n "$torchrun" ]; then kill -TERM "$torchrun"; else stopped=1; fi' TERM INT USR1

# In a session of its own, so that a signal for everybody reaches torchrun once: a second one would
# not let it wait for the checkpoint.
setsid torchrun \
    --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$RESTARTS" --shutdown-timeout 600 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN" \
    -m daybreak train "$RECIPE" --out "$RUN" --set parallel.dp_replicate="$NODES" "$@" &
torchrun=$!
[ -z "$stopped" ] || kill -TERM "$torchrun"
code=0
while kill -0 "$torchrun" 2>/dev/null; do
    wait "$torchrun"
    code=$?
done

if [ $code -ne 0 ] && [ "$(version)" != "$before" ]; then
    code=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["code"] or 1)' \
        "$RUN/status.json")
fi
exit "$code"

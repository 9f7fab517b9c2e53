#!/usr/bin/env bash
# One rank of a SLURM step: names its place as torch.distributed and DeepSpeed read it, then becomes the command.
set -euo pipefail
export RANK="$SLURM_PROCID"
export LOCAL_RANK="$SLURM_LOCALID"
export WORLD_SIZE="$SLURM_NTASKS"
# SLURM_STEP_TASKS_PER_NODE reads 2(x2),1: ranks on each node, repeated.
tasks=()
IFS=, read -r -a parts <<<"$SLURM_STEP_TASKS_PER_NODE"
for part in "${parts[@]}"; do
    count="${part%%(*}" times=1
    if [[ "$part" == *"(x"* ]]; then times="${part##*x}" times="${times%)}"; fi
    for ((i = 0; i < times; i++)); do tasks+=("$count"); done
done
export LOCAL_SIZE="${tasks[$SLURM_NODEID]}"
export LOCAL_WORLD_SIZE="$LOCAL_SIZE"
exec "$@"

#!/usr/bin/env bash
# Sourced by the batch scripts: gives every rank its share of the node's cores that SLURM allocated to the job.
#
# Without --cpus-per-task SLURM allocates one core for each task, or with --exclusive all of a node. A GPU needs more
# than one: its rank also loads batches, writes checkpoints and launches kernels at the same time.

expand() { # 8(x2),4 -> 8 8 4, one a line
    local part count times
    for part in ${1//,/ }; do
        count="${part%%(*}" times=1
        if [[ "$part" == *"(x"* ]]; then times="${part##*x}" times="${times%)}"; fi
        for ((; times > 0; times--)); do echo "$count"; done
    done
}

mapfile -t cpus < <(expand "$SLURM_JOB_CPUS_PER_NODE")
mapfile -t tasks < <(expand "$SLURM_TASKS_PER_NODE")
share="${SLURM_CPUS_PER_TASK:-}"
if [[ -z "$share" ]]; then
    for i in "${!tasks[@]}"; do
        each="$((cpus[i] / tasks[i]))"
        if [[ -z "$share" || "$each" -lt "$share" ]]; then share="$each"; fi
    done
fi
threads="$(scontrol --oneliner show node "$SLURMD_NODENAME" | grep -o 'ThreadsPerCore=[0-9]*' | cut -d = -f 2 || true)"
if [[ -n "${SLURM_GPUS_ON_NODE:-}" && "$share" -le "${threads:-1}" ]]; then
    echo "error: each rank has one CPU core, which starves its GPU; add --cpus-per-task N or --exclusive to sbatch." >&2
    exit 2
fi
# srun takes the number of cores of a task from this variable only.
export SRUN_CPUS_PER_TASK="$share"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$share}"

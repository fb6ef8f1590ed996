#!/usr/bin/env bash
# Trains on any number of machines. The same line on each:
#
#   NNODES=4 MASTER_ADDR=first-node examples/torchrun/n_nodes.sh RECIPE.yaml [section.key=value ...]
#
# Inside a SLURM job both are known, so it can be a step's command, which runs once per node:
#
#   megatron-vlm launch -J llava -N 4 -t 2-00:00:00 -- examples/torchrun/n_nodes.sh RECIPE.yaml
set -euo pipefail

if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  NNODES="${NNODES:-$SLURM_NNODES}"
  MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}"
  MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
fi

# No restarts here: who started this on every node starts it on every node again.
exec torchrun --nnodes "${NNODES:?how many nodes}" --nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:?name the first node}:${MASTER_PORT:-29500}" \
  --rdzv-id "${SLURM_JOB_ID:-megatron_vlm}" -m megatron_vlm train "$@"

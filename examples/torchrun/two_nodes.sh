#!/usr/bin/env bash
# Trains on two machines. The same line on both, with the name of the first:
#
#   MASTER_ADDR=first-node examples/torchrun/two_nodes.sh RECIPE.yaml [section.key=value ...]
#
# Recipe, data and checkpoints lie under the same paths on both (a shared file system).
#
# NNODES=1:2 goes on with one machine when the other is lost, and with both when it is back: from the newest checkpoint,
# with the same samples in the same order, because the global batch does not depend on the number of ranks. The first
# node is the one that must live: the meeting point is its process. JOIN_SECONDS is how long a lone machine waits.
set -euo pipefail

# A store of its own for each attempt: in torchrun's shared one, a node that comes back and the others miss each other.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Here torchrun restarts, not the launcher: its agents agree on a new meeting. The launcher passes SIGTERM, Ctrl-C and
# SIGUSR1 on to the ranks, which save.
exec megatron-vlm launch --local --max-restarts 0 -- \
  torchrun --nnodes "${NNODES:-2}" --nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:?name the first node}:${MASTER_PORT:-29500}" \
  --rdzv-id "${RUN_NAME:-megatron_vlm}" --rdzv-conf "last_call_timeout=${JOIN_SECONDS:-30}" \
  -m megatron_vlm train "$@"

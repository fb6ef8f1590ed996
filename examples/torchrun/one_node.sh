#!/usr/bin/env bash
# Trains on one machine, with all its GPUs. Not by torchrun, which gives ranks 30 s to save at SIGTERM, but by our own
# launcher, which gives them the time they need and ends with their exit code:
#
#   examples/torchrun/one_node.sh RECIPE.yaml [section.key=value ...]
#
# NPROC_PER_NODE: ranks; `auto` is one per GPU, or one per core where there is no GPU.
# MAX_RESTARTS:   a rank that is lost costs a restart from the newest checkpoint (checkpoint.every_steps).
set -euo pipefail

exec megatron-vlm launch --local --max-restarts "${MAX_RESTARTS:-3}" --ranks "${NPROC_PER_NODE:-auto}" -- train "$@"

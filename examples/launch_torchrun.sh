#!/usr/bin/env bash
# Train on all GPUs of one machine or several, by torchrun. On each machine, with the same arguments:
#
#   NODES=2 HEAD=node-a examples/launch_torchrun.sh segmentation --config recipe.yaml --data DIR --out runs/wide
#
# One machine alone needs no launcher: backbones fit ... --trainer.devices 8
# --out must be a folder that all machines share. An interrupted run goes on with --out DIR --ckpt_path last.
set -euo pipefail
NODES=${NODES:-1}                   # how many machines
HEAD=${HEAD:-localhost}             # the first of them, and a port that is free there
PORT=${PORT:-29500}
PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)} # on each machine: one per GPU

exec torchrun --nnodes "$NODES" --nproc_per_node "$PROCESSES" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id backbones \
    -m backbones fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$PROCESSES" \
    --trainer.strategy "${STRATEGY:-ddp}" # or fsdp, for what one GPU's memory cannot hold

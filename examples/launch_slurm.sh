#!/usr/bin/env bash
# Train on two machines of eight GPUs, by SLURM:
#
#   RUN=runs/wide sbatch examples/launch_slurm.sh segmentation --config recipe.yaml --data DIR
#
# The job may be stopped and queued again as often as it takes; it goes on from its last epoch.
#SBATCH --job-name=backbones
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8      # a process per GPU, and what --trainer.devices says
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8        # for the workers that read images
#SBATCH --time=24:00:00
#SBATCH --requeue                # when a machine fails
#SBATCH --signal=SIGUSR1@180     # when the time is nearly over, Lightning queues the job again
#SBATCH --open-mode=append
set -euo pipefail
: "${RUN:?the run folder, on a disk that all machines share}"

resume=()
if [[ -e "$RUN/config.yaml" ]]; then
    resume=(--ckpt_path last)
fi
srun --kill-on-bad-exit=1 python -m backbones fit "$@" --out "$RUN" "${resume[@]}" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --trainer.strategy "${STRATEGY:-ddp}" # or fsdp, for what one GPU's memory cannot hold

#!/usr/bin/env bash
# Train on two machines with eight GPUs each; stopped by the time limit, the run is queued again and goes on.
#   sbatch examples/slurm.sh cub200 --data.root /data/CUB_200_2011 --optim.batch_size 512
#SBATCH --job-name=fastcr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastcr-%j.log
# --signal: two minutes before the limit torchrun gets SIGTERM and hands it on; the run saves and says "stopped at step"
set -uo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # seconds from SIGTERM to SIGKILL; torch 2.11 may not know it and waits 30
run="${RUN:-$PWD/runs/slurm-$SLURM_JOB_ID}" # on storage that all machines share: any of them may get the first process
mkdir -p "$(dirname "$run")"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$first:29500" \
    -m fastcr.train "$@" --run.dir "$run" --resume auto | tee "$run.last"
status=${PIPESTATUS[0]}

# only a run that was stopped goes on: one that failed would fail again
if grep -q "^stopped at step" "$run.last"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

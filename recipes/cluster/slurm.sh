#!/bin/bash
# Any recipe on many machines: sbatch recipes/cluster/slurm.sh RECIPE [--STAGE.KEY VALUE ...]
#
# One torchrun on each machine; they meet at the first one. A process that dies is started again with all others, and the
# run goes on from its newest checkpoint (--max-restarts). Slurm sends SIGTERM 5 minutes before the time is over: the run
# saves and stops; submit the same line again and it goes on. After a machine's failure --requeue does that by itself.
#SBATCH --job-name=chatwright
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log

set -euo pipefail
recipe=${1:?"usage: sbatch recipes/cluster/slurm.sh RECIPE [--STAGE.KEY VALUE ...]"}
shift
meeting=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

export OMP_NUM_THREADS=8            # CPU threads of each of the 8 processes of a machine
export NCCL_DEBUG=WARN
# export NCCL_SOCKET_IFNAME=ib0     # where the machines have several networks: the fast one

exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$meeting:29500" \
  -m chatwright run "$recipe" "$@"

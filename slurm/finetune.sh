#!/bin/bash
# Finetunes on a Slurm cluster. Everything after the script's name are Hydra overrides:
#
#   sbatch slurm/finetune.sh experiment=demo
#   sbatch --nodes=4 slurm/finetune.sh experiment=nemotron_nano_12b_v2_vl data.train=/data/mix.yaml
#
# Submit from the checkout's root; options of sbatch given on the command line win over those below.

#SBATCH --job-name=finetune
#SBATCH --nodes=1
# One task a GPU: srun starts the ranks, nothing else does.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
# Killed by a time limit or a preemption, the job goes back into the queue and on from its last complete checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
# USR1 reaches this script (B:) five minutes before the time limit; see below.
#SBATCH --signal=B:USR1@300

set -euo pipefail

# ---- the environment of the ranks ---------------------------------------------------------------------------------
# The checkout's virtual environment; inside a container set PYTHON=python.
PYTHON="${PYTHON:-.venv/bin/python}"

# Rendezvous. Without these two, the ranks take the first node and a port made from the job's number
# (hybridprune_megatron/engine/launch.py), which suits most clusters.
# export MASTER_ADDR=... MASTER_PORT=...

# Megatron overlaps communication with computation only if kernels are queued in order. Leave it out on Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# A rank that dies must not leave the others waiting for it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# NCCL. These depend on the fabric; the defaults of NCCL are right on most machines. Uncomment what yours needs.
# export NCCL_DEBUG=WARN            # INFO shows rings, interfaces and why something is slow
# export NCCL_SOCKET_IFNAME=eth0    # the interface for the rendezvous, if NCCL picks the wrong one
# export NCCL_IB_HCA=mlx5           # the InfiniBand adapters to use
# export NCCL_NVLS_ENABLE=0         # if NVLink SHARP runs out of memory
# --------------------------------------------------------------------------------------------------------------------

# The job ends itself before the time limit and queues itself again. What is lost are the steps since the last checkpoint
# (trainer.save_every_n_steps); exp_manager.max_time_per_run makes it save at a time of its own instead.
again() {
  echo "time limit near: queueing job ${SLURM_JOB_ID} again"
  scontrol requeue "${SLURM_JOB_ID}"
}
trap again USR1

echo "job ${SLURM_JOB_ID}: ${SLURM_JOB_NUM_NODES} nodes, ${SLURM_NTASKS} ranks, restart ${SLURM_RESTART_COUNT:-0}, $*"

# In the background, so that the trap runs when the signal comes and not when srun ends. A failing rank ends the job.
srun --kill-on-bad-exit=1 --cpu-bind=none "${PYTHON}" recipes/finetune.py "$@" &
ranks=$!
status=0
wait "${ranks}" || status=$?
# wait also ends when a signal arrives; while srun still runs, wait for it again.
while kill -0 "${ranks}" 2>/dev/null; do
  status=0
  wait "${ranks}" || status=$?
done
exit "${status}"

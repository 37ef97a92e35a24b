# What is particular to a site; an example. Copy it to slurm/site.sh, which slurm/finetune.sh takes by itself, or name a
# file: SITE=/shared/site.sh sbatch slurm/finetune.sh ... It is sourced by the batch script on the first node,
# before anything else; srun passes on what it exports.

# Account, partition and quality of service are read when the job is submitted, so they belong into the shell that
# submits: export SBATCH_ACCOUNT=... SBATCH_PARTITION=... SBATCH_QOS=...

# Environment modules. In a script `module` may have to be defined first.
# source /etc/profile.d/modules.sh
# module purge
# module load cuda

# A shared virtual environment, or words before a container's Python.
# export PYTHON=/shared/hybridprune/.venv/bin/python
# export PYTHON=python SRUN_OPTIONS="--container-image=/shared/hybridprune.sqsh --container-mounts=$PWD:$PWD"

# The fabric, where NCCL's own choice is wrong.
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# Where temporary files go: a local disk of the node.
# export TMPDIR=/local/$SLURM_JOB_ID

# How carefully nodes are looked at before the ranks start, and how often a job comes back without a node that failed.
# export PREFLIGHT=nccl MAX_RESTARTS=3

#!/bin/bash
# Finetunes on a Slurm cluster. Everything after the script's name are Hydra overrides:
#
#   sbatch slurm/finetune.sh experiment=demo
#   sbatch --nodes=4 slurm/finetune.sh experiment=nemotron_nano_12b_v2_vl data.train=/data/mix.yaml
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=0 slurm/finetune.sh experiment=demo    # no GPUs
#
# Submit from the checkout's root; options of sbatch given on the command line win over those below. docs/cluster.md has
# more.

#SBATCH --job-name=finetune
#SBATCH --nodes=1
# One task per GPU: srun starts the ranks, nothing else does. Change both together.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
# USR1 reaches this script (B:) this many seconds before the time limit. It must be enough for one step and one save.
#SBATCH --signal=B:USR1@300
# Stopped for whatever reason but its own failure, the job is requeued and resumes from its newest checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -euo pipefail
shopt -s extglob

# What is particular to this site: environment modules, a container's words, NCCL's settings. slurm/site.example.sh has
# examples. SITE names the file; without it, slurm/site.sh is taken if it is there.
SITE="${SITE:-slurm/site.sh}"
if [[ -e "${SITE}" || "${SITE}" != slurm/site.sh ]]; then
  [[ -r "${SITE}" ]] || {
    echo "job ${SLURM_JOB_ID}: SITE=${SITE} cannot be read; give a file of shell commands" >&2
    exit 2
  }
  # Commands of modules use variables that are not set.
  set +u
  # shellcheck disable=SC1090
  source "${SITE}"
  set -u
fi

# ---- the environment of the ranks ---------------------------------------------------------------------------------
# What runs the recipe: the checkout's virtual environment, or words before a container's Python, as in
# PYTHON="apptainer exec --nv image.sif python".
read -ra python <<< "${PYTHON:-.venv/bin/python}"
# More options for srun, e.g. SRUN_OPTIONS="--container-image=... --container-mounts=..." where Pyxis is installed.
read -ra srun_options <<< "${SRUN_OPTIONS:-}"
# srun does not take this over from sbatch by itself (since Slurm 22.05); without it a rank may get one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# Rendezvous. Without these two, the ranks take the first node and a port made from the job's number
# (hybridprune_megatron/engine/launch.py), which suits most clusters.
# export MASTER_ADDR=... MASTER_PORT=...

# Megatron overlaps communication with computation only if kernels are queued in order. Leave it out on Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Packed sequences differ in length: without this, memory of one length is lost to the others.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# A rank that dies must not leave the others waiting for it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# NCCL. These depend on the fabric; the defaults of NCCL are right on most machines. Uncomment what yours needs.
# export NCCL_DEBUG=WARN            # INFO shows rings, interfaces and why something is slow
# export NCCL_SOCKET_IFNAME=eth0    # the interface for the rendezvous, if NCCL picks the wrong one
# export NCCL_IB_HCA=mlx5           # the InfiniBand adapters to use
# export NCCL_NVLS_ENABLE=0         # if NVLink SHARP runs out of memory
# --------------------------------------------------------------------------------------------------------------------

# What is looked at on every node before the ranks start: off, quick, or nccl (an all-reduce over all ranks, too).
preflight="${PREFLIGHT:-quick}"
# How often a job comes back by itself without a node that failed.
most_restarts="${MAX_RESTARTS:-3}"
[[ "${preflight}" == @(off|quick|nccl) ]] || {
  echo "job ${SLURM_JOB_ID}: PREFLIGHT=${preflight}: allowed are off, quick, nccl" >&2
  exit 2
}
[[ "${most_restarts}" == +([0-9]) ]] || {
  echo "job ${SLURM_JOB_ID}: MAX_RESTARTS=${most_restarts}: must be a whole number from 0 on" >&2
  exit 2
}
# Who finds a node at fault writes it here (hybridprune_megatron/engine/bad_node.py). The other file has a line for
# every node that was left out. Both lie where the log does.
export BAD_NODE_FILE="${PWD}/slurm-bad-node-${SLURM_JOB_ID}"
left_out="${PWD}/slurm-left-out-${SLURM_JOB_ID}"
rm -f "${BAD_NODE_FILE}"

# Asked to stop, the ranks finish their step, save, and exit with this status (hybridprune_megatron/engine/preemption.py).
stopped=75
# What a user or a file has caused is never tried again.
user_error=2
warned=""
ranks=""

# Slurm signals this script only; srun passes USR1 on to the ranks. (TERM would make srun kill them.)
warn() {
  warned=yes
  echo "job ${SLURM_JOB_ID}: told to end soon; the ranks save and stop"
  [[ -z "${ranks}" ]] || kill -USR1 "${ranks}" 2> /dev/null || true
}
trap warn USR1
# No trap on TERM, on purpose: Slurm sends it here only when it ends the whole job, by scancel or by its own requeue. Where
# a preemption signals the ranks alone (TERM), they save and stop as well.

# An array starts the same command many times: every task gets a folder of its own, unless the overrides use its number.
# In a sweep (-m) every run has one already.
overrides=("$@")
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" && " $* " != *" -m "* && " $* " != *" --multirun "* ]]; then
  folder='runs/${name}' name=""
  overrides=()
  for override in "$@"; do
    case "${override}" in
      *([+])output_dir=*) folder="${override#*=}" ;;
      *([+])name=*) name="${override#*=}" overrides+=("${override}") ;;
      *) overrides+=("${override}") ;;
    esac
  done
  if [[ "${folder}${name}" != *SLURM_ARRAY_TASK_ID* ]]; then
    quote="${folder##*[^\"\']}"
    folder="${folder%"${quote}"}/task_${SLURM_ARRAY_TASK_ID}${quote}"
  fi
  overrides+=("output_dir=${folder}")
fi
# srun starts the first group of a heterogeneous job only, unless it is told which.
if [[ "${SLURM_HET_SIZE:-1}" -gt 1 && "${SRUN_OPTIONS:-}" != *--het-group* ]]; then
  srun_options+=("--het-group=0-$((SLURM_HET_SIZE - 1))")
fi

echo "job ${SLURM_JOB_ID}: ${SLURM_JOB_NUM_NODES:-several groups of} nodes, ${SLURM_NTASKS:-?} ranks, \
restart ${SLURM_RESTART_COUNT:-0}, ${overrides[*]-}"

# Runs a step in the background, so that the trap runs when the signal comes and not when srun ends; sets status.
step() {
  srun "$@" &
  ranks=$!
  status=0
  wait "${ranks}" || status=$?
  # wait also ends when a signal arrives; while srun still runs, wait for it again.
  while kill -0 "${ranks}" 2> /dev/null; do
    status=0
    wait "${ranks}" || status=$?
  done
  ranks=""
}

# Whether a step ended because a node is at fault; sets node and why. A process that went without a word is the node's
# fault only if Slurm has lost the node, too.
node_at_fault() {
  local kind state
  [[ -s "${BAD_NODE_FILE}" ]] || return 1
  read -r node kind why < "${BAD_NODE_FILE}"
  [[ "${kind}" == hardware ]] && return 0
  state="$(sinfo --noheader --nodes="${node}" --format=%T 2> /dev/null | head -n 1)" || return 1
  [[ "${state}" == @(down|drain|fail|unknown|*[*])* ]] || return 1
  why="${why} (Slurm: ${state})"
}

# Queues the job again without the node. Slurm changes the list of a job that waits, and not of one that runs.
restart_without() {
  local count=0 excluded
  [[ ! -e "${left_out}" ]] || count="$(wc -l < "${left_out}")"
  if ((count >= most_restarts)); then
    echo "job ${SLURM_JOB_ID}: ${node}: ${why}; not queued again, MAX_RESTARTS=${most_restarts} are used up"
    return
  fi
  excluded="$(scontrol show job --oneliner "${SLURM_JOB_ID}" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')" || excluded=""
  [[ -n "${excluded}" && "${excluded}" != "(null)" ]] && excluded+=",${node}" || excluded="${node}"
  echo "${node} ${why}" >> "${left_out}"
  echo "job ${SLURM_JOB_ID}: ${node}: ${why}; queued again without it (restart $((count + 1)) of ${most_restarts})"
  # A requeue ends this script, and the node must be off the list before the job starts again.
  trap '' TERM
  scontrol requeue "${SLURM_JOB_ID}"
  scontrol update "JobId=${SLURM_JOB_ID}" "ExcNodeList=${excluded}" ||
    echo "job ${SLURM_JOB_ID}: Slurm did not take ExcNodeList=${excluded}; it may come back to the same nodes"
}

# A heterogeneous job's nodes differ; nothing is compared there.
[[ "${SLURM_HET_SIZE:-1}" -le 1 ]] || preflight=off
status=0
if [[ "${preflight}" != off ]]; then
  step --cpu-bind=none --ntasks="${SLURM_JOB_NUM_NODES}" --ntasks-per-node=1 \
    ${srun_options[@]+"${srun_options[@]}"} "${python[@]}" \
    -m hybridprune_megatron.engine.preflight ${overrides[@]+"${overrides[@]}"}
fi
if [[ "${preflight}" == nccl && -z "${warned}" && "${status}" == 0 ]]; then
  step --kill-on-bad-exit=1 --cpu-bind=none ${srun_options[@]+"${srun_options[@]}"} "${python[@]}" \
    -m hybridprune_megatron.engine.preflight --all-reduce
fi
if [[ -n "${warned}" ]]; then
  # Nothing has begun, so nothing is lost.
  echo "job ${SLURM_JOB_ID}: stopped before its ranks started; queued again"
  scontrol requeue "${SLURM_JOB_ID}"
  exit "${stopped}"
fi
if [[ "${status}" != 0 ]]; then
  # The reason is printed, a line each; whatever srun says, this is not the status of a job that wants to continue.
  [[ "${status}" != "${stopped}" ]] || status=1
  echo "job ${SLURM_JOB_ID}: ended before its ranks started (PREFLIGHT=off leaves the look out)"
  if [[ "${status}" != "${user_error}" ]] && node_at_fault; then restart_without; fi
  rm -f "${BAD_NODE_FILE}"
  exit "${status}"
fi

# A failing rank ends the job.
step --kill-on-bad-exit=1 --cpu-bind=none ${srun_options[@]+"${srun_options[@]}"} "${python[@]}" recipes/finetune.py \
  ${overrides[@]+"${overrides[@]}"}

# Warned before they could listen, the ranks die of the signal: no failure either.
if [[ "${status}" == "${stopped}" || (-n "${warned}" && "${status}" != 0) ]]; then
  echo "job ${SLURM_JOB_ID}: stopped with status ${status}; queued again"
  scontrol requeue "${SLURM_JOB_ID}"
elif [[ "${status}" == 0 ]]; then
  rm -f "${left_out}"
elif [[ "${status}" != "${user_error}" ]] && node_at_fault; then
  restart_without
fi
rm -f "${BAD_NODE_FILE}"
exit "${status}"

#!/bin/bash
# A Slurm cluster of two nodes on this one machine, to try slurm/finetune.sh and to test it:
#
#   scripts/dev_cluster.sh install    # Debian's slurm-wlm and munge where they are missing (root); or says why not
#   scripts/dev_cluster.sh up         # start it, after `install`
#   scripts/dev_cluster.sh status     # what runs, the nodes, the queue
#   scripts/dev_cluster.sh down       # end every job and every daemon that `up` started
#
# Everything lies in DEV_CLUSTER_DIR (default runs/dev_cluster): configuration, munge's key, spool folders, logs. No
# systemd, nothing below /etc. Slurm's commands find the cluster by SLURM_CONF, which `up` prints. A job in the partition
# `urgent` preempts those in the default partition, which are warned first and queued again.

set -euo pipefail
cd "$(dirname "$0")/.."
DIR="$(realpath -m "${DEV_CLUSTER_DIR:-runs/dev_cluster}")"
export SLURM_CONF="${DIR}/slurm.conf"
PACKAGES=(slurm-wlm munge)
CONTROLLER_PORT=27817
NODE_PORTS=(27818 27819)
DAEMONS=(munged slurmctld n1 n2)
PATH="${PATH}:/usr/sbin:/sbin"

fail() {
  echo "dev_cluster: $*" >&2
  exit 1
}

missing() {
  local command
  for command in munged mungekey slurmctld slurmd sbatch srun scontrol; do
    command -v "${command}" > /dev/null || echo "${command}"
  done
}

install() {
  local lacking by_hand="as root on Debian or Ubuntu: apt-get install ${PACKAGES[*]}" quickly="-oAcquire::http::Timeout=20"
  lacking="$(missing | paste -sd ' ')"
  [[ -n "${lacking}" ]] || return 0
  command -v apt-get > /dev/null && [[ "$(id -u)" == 0 ]] || fail "no ${lacking} here; ${by_hand}"
  # There the packages start daemons of their own, which is for the machine's owner to decide.
  [[ ! -d /run/systemd/system ]] || fail "no ${lacking} here, and systemd would start what is installed; ${by_hand}"
  echo "installing ${PACKAGES[*]}"
  mkdir -p "${DIR}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get "${quickly}" update && apt-get "${quickly}" install -y --no-install-recommends "${PACKAGES[@]}"; } \
    > "${DIR}/apt.log" 2>&1 || fail "apt-get failed: $(tail -1 "${DIR}/apt.log"); all of it: ${DIR}/apt.log"
}

pid_of() { cat "${DIR}/$1.pid" 2> /dev/null || true; }

# A daemon's pid file may outlive it, and its number may be another process's by now.
running() {
  local pid
  pid="$(pid_of "$1")"
  [[ -n "${pid}" ]] && grep -qaF "${DIR}" "/proc/${pid}/cmdline" 2> /dev/null
}

write_configuration() {
  local cpus memory
  cpus="$(nproc)"
  memory="$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)"
  cat > "${SLURM_CONF}" << END
ClusterName=dev
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${CONTROLLER_PORT}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=${DIR}/state
SlurmdSpoolDir=${DIR}/spool_%n
SlurmctldPidFile=${DIR}/slurmctld.pid
SlurmdPidFile=${DIR}/%n.pid
SlurmctldLogFile=${DIR}/slurmctld.log
SlurmdLogFile=${DIR}/%n.log
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits, in seconds; Slurm's own value is 120.
AuthInfo=socket=${DIR}/munge.socket,cred_expire=15
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
# For a machine that is busy with other things.
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=100
# Seconds that a finished job can still be asked about.
MinJobAge=86400
# Seconds between two looks at the queue, on events as well as without; Slurm's own values are meant for large clusters.
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# The warning of a preemption is the job's own --signal.
SlurmctldParameters=preempt_send_user_signal
# Both nodes claim all cores of this machine.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=${NODE_PORTS[0]} CPUs=${cpus} RealMemory=${memory}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=${NODE_PORTS[1]} CPUs=${cpus} RealMemory=${memory}
PartitionName=dev Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=600
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
END
}

# Nodes whose daemon has registered and that are free.
idle_nodes() { sinfo --noheader --Node --partition=dev --states=idle --format=%N 2> /dev/null | wc -l; }

up() {
  local daemon node
  for daemon in "${DAEMONS[@]}"; do
    ! running "${daemon}" || fail "${daemon} runs already in ${DIR}; stop it with: scripts/dev_cluster.sh down"
  done
  install
  # Nothing of an earlier cluster: its jobs would come back.
  rm -rf "${DIR}"/{state,spool_n1,spool_n2}
  mkdir -p "${DIR}"/{state,spool_n1,spool_n2}
  write_configuration
  [[ -f "${DIR}/munge.key" ]] || mungekey --create --keyfile "${DIR}/munge.key"
  # What does not come up as a whole goes down again.
  trap down EXIT
  # --force: a folder that others can write to, as /tmp is, is none of its business here.
  munged --force --socket "${DIR}/munge.socket" --key-file "${DIR}/munge.key" --pid-file "${DIR}/munged.pid" \
    --log-file "${DIR}/munged.log" --seed-file "${DIR}/munge.seed" 2> /dev/null ||
    fail "munged did not start: $(tail -1 "${DIR}/munged.log")"
  slurmctld -f "${SLURM_CONF}"
  for node in n1 n2; do
    slurmd -N "${node}" -f "${SLURM_CONF}"
  done
  local deadline=$((SECONDS + 120))
  until [[ "$(idle_nodes)" == 2 ]]; do
    ((SECONDS < deadline)) || fail "the nodes are not ready after two minutes; see ${DIR}/*.log"
    sleep 0.5
  done
  trap - EXIT
  echo "two nodes, n1 and n2. In the shell that submits:"
  echo "  export SLURM_CONF=${SLURM_CONF} MASTER_ADDR=127.0.0.1"
}

status() {
  local daemon
  for daemon in "${DAEMONS[@]}"; do
    if running "${daemon}"; then echo "${daemon}: pid $(pid_of "${daemon}")"; else echo "${daemon}: does not run"; fi
  done
  ! running slurmctld || { sinfo --Node --long; squeue; }
}

down() {
  local daemon pid
  if running slurmctld; then
    # Jobs first, while somebody can still end their processes.
    scancel --quiet --user="$(id -un)" || true
    for _ in {1..80}; do
      [[ -n "$(squeue --noheader 2> /dev/null)" ]] || break
      sleep 0.5
    done
  fi
  for daemon in n2 n1 slurmctld munged; do
    running "${daemon}" || continue
    pid="$(pid_of "${daemon}")"
    kill "${pid}"
    for _ in {1..40}; do
      kill -0 "${pid}" 2> /dev/null || break
      sleep 0.25
    done
    ! running "${daemon}" || kill -9 "${pid}"
  done
}

case "${1:-}" in
  install | up | status | down) "$1" ;;
  *) fail "usage: scripts/dev_cluster.sh install|up|status|down" ;;
esac

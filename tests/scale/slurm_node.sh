#!/usr/bin/env bash
# A Slurm of one node, this machine, for as long as a command runs:
#
#   tests/scale/slurm_node.sh FOLDER COMMAND [ARGUMENT...]
#
# Debian's packages slurmctld, slurmd, slurm-client and munge; settings, keys, states and logs lie in
# FOLDER, and nothing of a Slurm that is set up here is read. Slurm's daemon of a node wants root.
# Ends with COMMAND's exit code, and with its own 70 where the node does not come up.
set -euo pipefail
if [ -z "${GRATH_SLURM_NODE:-}" ]; then
  # Processes of its own, which all end with the first, however that ends; and mounts of its own,
  # because Snakemake's executor forgets SLURM_CONF: /etc/slurm is what is read.
  GRATH_SLURM_NODE=1 exec unshare --mount --pid --fork --kill-child --mount-proc "$0" "$@"
fi
mkdir -p "$1" /etc/slurm
folder="$(realpath "$1")"
shift
PATH="$PATH:/usr/sbin:/sbin"
cpus="$(nproc)"
node="$(hostname -s)"
socket="$folder/munge.socket"
mkdir -p "$folder/spool" "$folder/state"
chmod 700 "$folder"

free_port() {
  python3 -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
}

cat > "$folder/slurm.conf" <<CONF
ClusterName=grath
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# No control groups: containers often have none to give.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
MinJobAge=600
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$(free -m | awk '/^Mem:/ { print $2 }')
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
mount --bind "$folder" /etc/slurm
unset SLURM_CONF

start() {
  "$@" >> "$folder/daemons.log" 2>&1 &
}

(umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
start munged --foreground --force --key-file="$folder/munge.key" --socket="$socket" \
  --pid-file="$folder/munged.pid" --seed-file="$folder/munge.seed"
for _ in {1..50}; do [ -S "$socket" ] && break; sleep 0.1; done
start slurmctld -D
start slurmd -D -N "$node"
for _ in {1..60}; do
  [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && up=yes && break
  sleep 0.5
done
if [ -z "${up:-}" ]; then
  echo "Slurm's node did not come up:" >&2
  tail -n 15 "$folder"/*.log >&2
  exit 70
fi
"$@"

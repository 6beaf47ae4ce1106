#!/bin/sh
# Starts a Slurm of this one machine, as root, in a folder of its own; leaves one that runs alone.
#   tests/one_node_slurm.sh FOLDER
# Needs Debian's slurm-wlm and munge: apt-get install slurm-wlm munge
set -eu
if scontrol ping 2>/dev/null | grep -q UP; then
  exit 0
fi
folder=$(mkdir -p "$1" && cd "$1" && pwd)
name=$(hostname -s)
mkdir -p "$folder/state" "$folder/spool" /etc/slurm /run/munge /var/log/munge
cat > /etc/slurm/slurm.conf <<END
ClusterName=one
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
MinJobAge=300
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$name Default=YES MaxTime=INFINITE State=UP
END
pgrep -x munged > /dev/null || { chown munge: /run/munge /var/log/munge; runuser -u munge -- munged; }
slurmctld
slurmd
for _ in $(seq 30); do
  sinfo -h -o %T | grep -q idle && exit 0
  sleep 1
done
echo "Slurm did not start; see $folder/*.log" >&2
exit 1

"""A real Slurm for tests: one machine that is two nodes, each with two pretend GPUs and a /tmp of its own.

It runs in a machine with systemd (`machine.py`): what it leaves goes with it, and jobs are those of ordinary users.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import machine as machines
from conftest import wait_for
from machine import Machine

NODES = ("n1", "n2")
CONF = """\
ClusterName=test
SlurmctldHost=ctl(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=0
ReturnToService=2
StateSaveLocation=/var/lib/slurm/state
SlurmdSpoolDir=/var/lib/slurm/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd-%n.log
KillWait=8
Prolog=/etc/slurm/prolog
Epilog=/etc/slurm/epilog
PrologFlags=Alloc
GresTypes=gpu
NodeName=n1 NodeHostname=HOST NodeAddr=10.99.0.1 Port=17001 CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname=HOST NodeAddr=10.99.0.1 Port=17002 CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=1:00:00 DefMemPerCPU=1000 State=UP
"""

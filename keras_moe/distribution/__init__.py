"""Experts on several devices, of one process or of many."""

from keras_moe.distribution.backup import ShardedBackup
from keras_moe.distribution.cluster import barrier, initialize, num_processes, process_id
from keras_moe.distribution.parallel import ExpertParallel

__all__ = [
    "ExpertParallel",
    "ShardedBackup",
    "barrier",
    "initialize",
    "num_processes",
    "process_id",
]

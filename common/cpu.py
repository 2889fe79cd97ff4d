"""The cores that this process may use. Does not import torch, as device.py does."""
import math
import os
from pathlib import Path


def cpu_count():
    """Return the number of cores this process may use: its affinity and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # not Linux, or "max": no quota
        pass
    return max(1, cores or 1)

"""A function over many batches, in several processes, in order."""
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from config import UserError


def cpu_count():
    """Cores that this process may use: of its affinity, and of its container's quota (cgroup)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no Linux; "max": no quota
        pass
    return max(1, cores or 1)


def map_batches(function, batches, job, n_workers):
    """Yields function(batch, job) of each batch, in their order, a bounded number under way.

    job is sent to each process once. UserError: a process was killed.
    """
    if n_workers == 1:
        yield from (function(batch, job) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
    with ProcessPoolExecutor(n_workers, context, _start, (function, job)) as pool:
        pending = deque()
        try:
            for batch in batches:
                with _ctrl_c_waits():  # submit() may start a process
                    pending.append(pool.submit(_work, batch))
                if len(pending) > 3 * n_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as e:
            raise UserError("a worker was killed, perhaps for memory. Try --workers=1") from e
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_waits():
    """Ctrl-C comes when this ends; processes started inside never get it: the parent answers."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(function, job):
    global _task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it can't be blocked
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _task = function, job


def _end_with_parent():
    """A parent that is killed can't end its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(batch):
    function, job = _task
    return function(batch, job)

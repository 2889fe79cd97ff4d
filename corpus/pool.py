"""Map a function over batches in several processes, results in input order."""
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from common.command_line import UserError


def map_batches(function, batches, shared, n_workers):
    """Yield function(batch, shared) for each batch, in order.

    shared is sent to each process once. At most 3 * n_workers + 1 batches wait at a time. UserError
    if a process was killed.
    """
    if n_workers == 1:
        yield from (function(batch, shared) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
    with ProcessPoolExecutor(n_workers, context, _start, (function, shared)) as pool:
        pending = deque()
        try:
            for batch in batches:
                with _delayed_sigint():
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
def _delayed_sigint():
    """Delay Ctrl-C to the end of the block; processes started inside it never receive it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(function, shared):
    global _task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows, where it is not inherited
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _task = function, shared


def _exit_with_parent():
    """Exit when the parent is gone: killed, it could not stop its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(batch):
    function, shared = _task
    return function(batch, shared)

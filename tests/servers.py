"""Start a server for a test, and wait for it."""
import socket
import subprocess
import time
from contextlib import contextmanager

READY_WITHIN = 240  # seconds; importing torch and transformers or gradio takes 10 on a slow core


def until(condition, seconds=60, ignored=()):
    """Return condition() as soon as it is true; ignored: exceptions that count as false."""
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if last := condition():
                return last
        except ignored as e:
            last = e
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {last!r}")


def free_port():
    """Return a port that no program uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command, folder, env, is_ready):
    """Run a server in folder; provide the path of its log once is_ready(log) is true."""
    log = folder / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen([str(word) for word in command], cwd=folder, env=env,
                                   stdout=file, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None or is_ready(log), READY_WITHIN, OSError)
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")[-3000:]
        yield log
    finally:
        process.kill()
        process.wait()

"""Atomic writes and locks: every file and folder appears whole or not at all."""
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from common.command_line import UserError


@contextmanager
def atomic_file(path):
    """Open a new binary file for writing; when the block ends, fsync it and rename it to path."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        replace(part, path)
    except OSError as e:  # the error of a full disk names no file
        e.filename = e.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_file(path, content):
    """Write str or bytes atomically."""
    with atomic_file(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)


def write_json(path, value):
    """Write a value as indented JSON, atomically."""
    write_file(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path):
    """Return the object in a JSON file; {} if there is none or it can't be read."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}


def exists(path):
    """Return whether there is such a path; PermissionError if a folder above hides it."""
    try:
        return bool(os.stat(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def replace(source, target):
    """os.replace; on Windows, which refuses while a program reads target, retry for a second."""
    for delay in (0.05, 0.15, 0.3, 0.5, None):
        try:
            return os.replace(source, target)
        except PermissionError as e:
            if sys.platform != "win32":
                raise
            if delay is None:
                e.strerror = f"{e.strerror}; does another program have it open?"
                raise
            time.sleep(delay)


def replace_folder(part, folder):
    """Rename the finished folder `part` to `folder`. An old one is renamed to `folder`.replaced
    first and removed last; readers take it while the new one is missing (see current_folder)."""
    for file in Path(part).iterdir():
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
    old = Path(f"{folder}.replaced")
    if Path(folder).exists():
        shutil.rmtree(old, ignore_errors=True)
        replace(folder, old)
    replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def current_folder(folder):
    """Return `folder`, or `folder`.replaced if a killed replace_folder left only that."""
    old = Path(f"{folder}.replaced")
    return old if old.is_dir() and not Path(folder).exists() else Path(folder)


def lock(path, message):
    """Open and lock a file for as long as it stays open; UserError(message) if it is taken."""
    file = open(path, "wb")
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # POSIX; Windows
        file.close()
        raise UserError(message) from e
    except OSError:  # a network file system without locks
        pass
    return file

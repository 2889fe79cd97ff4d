"""Errors for the user: one line on the terminal instead of a traceback."""
import errno
import os
import sys
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """An error that the user can correct; run_main prints it as one line and exits with code 2."""


def run_main(main, script):
    """Call main(); a UserError becomes `script: message` and exit code 2, Ctrl-C becomes 130."""
    name = Path(script).name
    set_up_streams()
    try:
        main()
    except UserError as e:
        sys.exit(fail(name, e, 2))
    except KeyboardInterrupt:
        sys.exit(fail(name, "interrupted", 130))
    except BrokenPipeError:  # `python sample.py | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:
        if e.errno is None:
            raise
        where = f"{e.filename}: " if e.filename else ""
        advice = ". Free some space and start again" if e.errno == errno.ENOSPC else ""
        sys.exit(fail(name, f"{where}{e.strerror}{advice}", 2))
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        sys.exit(fail(name, "out of memory; use smaller settings", 2))


def report_interrupt(kind, error, trace):
    """sys.excepthook of a script whose imports, which take seconds, are interrupted by Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        fail(Path(sys.argv[0]).name, "interrupted", 130)
    else:
        sys.__excepthook__(kind, error, trace)


def set_up_streams():
    """Make the standard streams usable: open where the shell closed them, strict input, and
    output that never fails on a character that the terminal lacks."""
    for stream, mode, errors in (("stdin", "r", "strict"), ("stdout", "w", "replace"),
                                 ("stderr", "w", "replace")):
        if getattr(sys, stream) is None:  # closed by the shell: `>&-`
            setattr(sys, stream, open(os.devnull, mode, encoding="utf-8"))
        if hasattr(getattr(sys, stream), "reconfigure"):  # a notebook's streams lack it
            getattr(sys, stream).reconfigure(errors=errors)


def fail(name, message, code):
    """Print `name: message` as one line; return the exit code."""
    print(f"{name}: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return code


def first_line(error):
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def optional_package(feature, package):
    """Report as a UserError that a feature needs a package which is not installed."""
    try:
        yield
    except ImportError as e:
        raise UserError(f"{feature} needs {package}: pip install {package}") from e


def is_out_of_memory(error):
    """Return whether numpy, torch or a device could not allocate the memory it asked for."""
    phrases = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


sys.excepthook = report_interrupt

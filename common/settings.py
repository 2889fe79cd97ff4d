"""Settings: a script's plain assignments, overridden by config files, overridden by --name=value.

    cfg, words = configure(__file__)

reads the commented block of assignments at the top of the script. That block is its interface: it
gives the names, the defaults, the types and, for --help, the comments.
"""
import ast
import difflib
import os
import re
import reprlib
import runpy
import sys
import types
from pathlib import Path

from common.command_line import UserError

HOME = re.compile(rf"^(FILE:)?~(?=[/{re.escape(os.sep)}])")  # FILE: is in front of a path


class Settings(types.SimpleNamespace):
    """The settings of a run. .given: names of those that a config file or the command line set; it
    is not among vars()."""
    __slots__ = ("given",)


def read_settings(script):
    """Return a script's settings, which stand before its first import, in order:
    {name: (default, comment, section)}."""
    source = Path(script).read_text(encoding="utf-8")
    lines, settings = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            break
        if isinstance(node, ast.Assign):
            above = reversed(lines[:node.lineno])
            section = next((line.strip("#- ") for line in above if line.startswith("# ----")), "")
            value = ast.literal_eval(node.value)
            comment = lines[node.end_lineno - 1].partition("  # ")[2]
            for line in lines[node.end_lineno:]:  # a comment may continue below
                if not line.startswith("#  "):
                    break
                comment += " " + line.strip("# ")
            settings[node.targets[0].id] = (value, comment, section)
    return settings


def configure(script, argv=None, base=None, fixed=(), files=True):
    """Return (Settings, the other words of argv).

    The defaults of `script` override those of `base`; config files among argv (words ending in .py;
    none with files=False) override these, then --name=value or --name value. -h or --help prints
    every setting and exits. A value or word that begins with ~/ is in the home folder.
    fixed: names of `base` that can't be set here, because a trained model decides them.
    """
    if argv is None:  # in a notebook, sys.argv holds the arguments of its kernel
        argv = [] if Path(sys.argv[0]).stem == "ipykernel_launcher" else sys.argv[1:]
    settings = read_settings(base) if base else {}
    settings |= read_settings(script)
    settings = {name: value for name, value in settings.items() if name not in fixed}
    cfg = {name: value for name, (value, _, _) in settings.items()}
    words, texts = _split_arguments([a for a in argv if a not in ("-h", "--help")], cfg, fixed)
    given = {}
    for path in [w for w in words if files and w.endswith(".py")]:
        words.remove(path)
        given |= _read_file(cfg, fixed, path)
    given |= {name: _parse(name, text, cfg[name]) for name, text in texts}
    if "-h" in argv or "--help" in argv:
        _print_help(script, settings, cfg | given)
        sys.exit(0)
    result = Settings(**cfg | given)
    result.given = frozenset(given)
    return result, words


def _split_arguments(argv, cfg, fixed):
    """Return (words, [(name, text)]) of words, --name=text, --name text, and --name of a bool."""
    words, texts, rest = [], [], iter(argv)
    for arg in rest:
        if not arg.startswith("--"):
            words.append(_expand_home(arg))
            continue
        name, given, text = arg[2:].partition("=")
        _check_name(cfg, fixed, name, "")
        if not given:
            text = "true" if isinstance(cfg[name], bool) else next(rest, "--")
            if text.startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=...")
        texts.append((name, text))
    return words, texts


def _expand_home(text):
    return HOME.sub(lambda m: (m[1] or "") + os.path.expanduser("~"), text)


def _read_file(cfg, fixed, path):
    if not Path(path).is_file():
        raise UserError(f"no config file {path}")
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:  # the config file is the user's code
        raise UserError(f"{path}: {type(e).__name__}: {e}") from e
    given = {}
    for name, value in values.items():
        if name.startswith("_") or callable(value) or isinstance(value, types.ModuleType):
            continue
        _check_name(cfg, fixed, name, f"{path}: ")
        given[name] = _typed(name, value, cfg[name], f"{path}: ")
    return given


def _check_name(cfg, fixed, name, where):
    if name in fixed:
        raise UserError(f"{where}{name} comes from the base model and can't be set here")
    if name not in cfg:
        near = difflib.get_close_matches(name, cfg, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists all"
        raise UserError(f"{where}unknown setting '{name}'. {hint}")


def _typed(name, value, default, where=""):
    kind = type(default)
    if isinstance(value, (int, float)) and not abs(value) < 2**63:  # also refuses nan
        raise UserError(f"{where}{name} is not a number below 2**63")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}{name}={reprlib.repr(value)} is not of type {kind.__name__}")
    if kind is str and any("\ud800" <= c <= "\udfff" for c in value):  # bytes that are not UTF-8
        raise UserError(f"{where}{name}={reprlib.repr(value)} is not Unicode text")
    return _expand_home(value) if kind is str else value


def _parse(name, text, default):
    parsers = {bool: lambda t: {"true": True, "false": False}[t.lower()], int: lambda t: int(t, 0)}
    try:
        value = parsers.get(type(default), type(default))(text)
    except (KeyError, ValueError):
        value = text
    return _typed(name, value, default)


def _print_help(script, settings, cfg):
    doc = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8")), clean=False)
    print(doc.rstrip() + "\n\nSettings, as --name=value:")
    last = None
    for name, (_, comment, section) in settings.items():
        if section != last:
            print(f"\n{section}")
            last = section
        print(f"  --{name}={cfg[name]}".ljust(40) + f"  {comment}")


def check_range(name, value, low, high, where=""):
    """Raise a UserError unless low <= value <= high."""
    if not low <= value <= high:  # also refuses nan
        raise UserError(f"{where}{name}={value} is not from {low:,} to {high:,}")


def check_ranges(cfg, ranges):
    """Check every setting that is in ranges, {name: (low, high)}."""
    for name, (low, high) in ranges.items():
        if hasattr(cfg, name):
            check_range(name, getattr(cfg, name), low, high)

"""Settings: a script's plain assignments, overridden by config files, overridden by --name=value.

    cfg, words = configure(__file__)

reads the commented block of assignments at the top of the script. That block is its interface: it
gives the names, the defaults, the types and, for --help, the comments.
"""
import ast
import difflib
import runpy
import sys
import types
from pathlib import Path

from common.command_line import UserError


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
    """Return (namespace of the settings, the other words of argv).

    The defaults of `script` override those of `base`; config files among argv (words ending in .py;
    none with files=False) override these, then --name=value. --help prints every setting and exits.
    fixed: names of `base` that can't be set here, because a trained model decides them.
    """
    if argv is None:  # in a notebook, sys.argv holds the arguments of its kernel
        argv = [] if Path(sys.argv[0]).stem == "ipykernel_launcher" else sys.argv[1:]
    settings = read_settings(base) if base else {}
    settings |= read_settings(script)
    settings = {name: value for name, value in settings.items() if name not in fixed}
    cfg = {name: value for name, (value, _, _) in settings.items()}
    words = [a for a in argv if not a.startswith("--")]
    for path in [w for w in words if files and w.endswith(".py")]:
        words.remove(path)
        _apply_file(cfg, fixed, path)
    for arg in [a for a in argv if a.startswith("--") and a != "--help"]:
        name, given, text = arg[2:].partition("=")
        _check_name(cfg, fixed, name, "")
        if not given and not isinstance(cfg[name], bool):
            raise UserError(f"--{name} needs a value: --{name}=...")
        cfg[name] = _parse(name, text, cfg[name]) if given else True
    if "--help" in argv:
        _print_help(script, settings, cfg)
        sys.exit(0)
    return types.SimpleNamespace(**cfg), words


def _apply_file(cfg, fixed, path):
    if not Path(path).is_file():
        raise UserError(f"no config file {path}")
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:  # the config file is the user's code
        raise UserError(f"{path}: {type(e).__name__}: {e}") from e
    for name, value in values.items():
        if name.startswith("_") or callable(value) or isinstance(value, types.ModuleType):
            continue
        _check_name(cfg, fixed, name, f"{path}: ")
        cfg[name] = _typed(name, value, cfg[name], f"{path}: ")


def _check_name(cfg, fixed, name, where):
    if name in fixed:
        raise UserError(f"{where}{name} comes from the base model and can't be set here")
    if name not in cfg:
        near = difflib.get_close_matches(name, cfg, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists all"
        raise UserError(f"{where}unknown setting '{name}'. {hint}")


def _typed(name, value, default, where=""):
    if isinstance(default, float) and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else value  # a larger int has no float
    if isinstance(value, str) and not value.isprintable() and not _encodes(value):
        raise UserError(f"{where}{name}={value!r} is not Unicode text")
    if type(value) is not type(default):
        raise UserError(f"{where}{name}={value!r} is not of type {type(default).__name__}")
    return value


def _encodes(text):
    try:
        return bool(text.encode())
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False


def _parse(name, text, default):
    if isinstance(default, str):
        return _typed(name, text, default)
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text.lower(), text)
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

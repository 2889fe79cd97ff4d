"""Settings: a script's plain assignments, overridden by config files, overridden by --name=value.

    cfg, words = configure(__file__)

reads the commented block of assignments at the top of that script, so the block IS the interface:
its names, defaults, types and, for --help, its comments.
"""
import ast
import difflib
import errno
import json
import os
import runpy
import sys
import types
from pathlib import Path


class UserError(Exception):
    """Something the person at the keyboard can put right; run_main prints it as one line."""


def run_main(main, script):
    """Call main(); a UserError becomes `script: message` and exit code 2, Ctrl-C becomes 130."""
    name = Path(script).name
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by the shell: `>&-`
            setattr(sys, stream, open(os.devnull, mode, encoding="utf-8"))
    # stdin: else the locale decides whether bad bytes are seen; a Windows console may not know
    # every character; a notebook's streams have no encoding to set
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        main()
    except UserError as e:
        sys.exit(_fail(name, e, 2))
    except KeyboardInterrupt:
        sys.exit(_fail(name, "interrupted", 130))
    except BrokenPipeError:  # `python sample.py | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:
        if e.errno is None:
            raise
        where = f"{e.filename}: " if e.filename else ""
        advice = ". Free some space and start again" if e.errno == errno.ENOSPC else ""
        sys.exit(_fail(name, f"{where}{e.strerror}{advice}", 2))
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        sys.exit(_fail(name, "out of memory; something smaller is needed", 2))


def is_out_of_memory(error):
    """Whether numpy, torch or one of its devices could not get the memory it asked for."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _fail(name, message, code):
    print(f"{name}: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return code


def newest_model(kind="", root="out"):
    """Folder of the newest run under out/ that has a model, best/ before final/; None if none has.

    kind: "base" or "chat" looks only for such runs.
    """
    runs = []
    for file in Path(root).glob("**/run.json"):
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            models = [file.parent / m for m in ("best", "final")]
            models = [m for m in models if (m / "config.json").is_file()]
            if models and (not kind or run["kind"] == kind):
                runs.append((max((m / "config.json").stat().st_mtime for m in models), models[0]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # half a run is no run
    return max(runs)[1] if runs else None


def read_settings(script):
    """A script's block, up to its first import: {name: (default, comment, section)} in order."""
    source = Path(script).read_text(encoding="utf-8")
    lines, settings = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            break
        if isinstance(node, ast.Assign):
            above = reversed(lines[:node.lineno])
            section = next((line.strip("#- ") for line in above if line.startswith("# ----")), "")
            value = eval(compile(ast.Expression(node.value), script, "eval"), {"__builtins__": {}})
            comment = lines[node.end_lineno - 1].partition("  # ")[2]
            for line in lines[node.end_lineno:]:  # a comment may go on below
                if not line.startswith("#  "):
                    break
                comment += " " + line.strip("# ")
            settings[node.targets[0].id] = (value, comment, section)
    return settings


def configure(script, argv=None, base=None, fixed=(), files=True):
    """Settings of `script` on top of those of `base` -> (namespace, the other words of argv).

    fixed: names of `base` that are no settings here, since a trained model decides them.

    Order: the blocks, the config files among argv (words ending in .py; with files=False none are
    looked for), then --name=value. --help prints every setting with these values and exits.
    """
    if argv is None:  # in a notebook, sys.argv holds the words of its kernel
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
    except (Exception, SystemExit) as e:  # the user's own code: what it raises is theirs to mend
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
        value = float(value)
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
    doc = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8")))
    print(doc + "\n\nSettings, as --name=value:")
    last = None
    for name, (_, comment, section) in settings.items():
        if section != last:
            print(f"\n{section}")
            last = section
        print(f"  --{name}={cfg[name]}".ljust(40) + f"  {comment}")

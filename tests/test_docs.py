"""The laws of the documentation: its commands run, its edits apply, the code that it names exists.

Fences tagged bash and python are run here, cut down to seconds. Those tagged sh and py are not:
they need a network, a GPU, another package or hours. The diffs in docs/change.md are applied to a
copy of the code, and the commands there run in it.
"""
import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT, run, succeed

from common.settings import read_settings

DOCS = [ROOT / "README.md", ROOT / "README.en.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = ["--n_layer=1", "--n_embd=32", "--max_iters=2", "--eval_interval=2", "--eval_tokens=512"]
SHORT = {"pretrain.py": TINY, "sft.py": ["--max_iters=2", "--eval_interval=2"],
         "sample.py": ["--max_new_tokens=8"], "eval.py": ["--num_samples=2", "--max_new_tokens=8"]}
OTHERS = set("""help nproc_per_node max-restarts nnodes rdzv_backend rdzv_endpoint index-url model
             chat-template-kwargs auto-dtype""".split())  # options of other programs


def text_of(file):
    return file.read_text(encoding="utf-8")


def blocks(file, *tags):
    """Return (tag, content) of the code fences with these tags, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(file), re.M | re.S)
    return [(tag, content) for tag, content in found if tag in tags]


def commands(content):
    return [line for line in content.splitlines() if line.strip() and line[0] != "#"]


def execute(folder, line):
    """Run one command of the documentation in folder."""
    input, _, line = line.rpartition(" | ")
    if input:
        input = subprocess.run(input, shell=True, capture_output=True, check=True).stdout
    *first, line = line.split(" && ")
    if line.startswith("pip "):
        first, line = [line], ""
    for command in first:
        assert command.startswith("pip install -r "), command
        assert (ROOT / command.split()[-1]).is_file(), command
    if not line:
        return
    python, script, *words = shlex.split(line, comments=True)
    assert python == "python", line
    if script != "-m":
        succeed(run(folder, script, *words, *SHORT.get(script, ()), input=input))
    elif words[0] == "pytest":  # the tests, which are running now
        assert all((ROOT / w).is_file() for w in words if w.endswith(".py")), line
    else:
        importlib.import_module(words[0]).main()


@pytest.fixture(scope="module")
def after_readme(demo, tmp_path_factory):
    """A folder as the README's first commands leave it."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(demo, folder)
    (folder / "data" / "raw").symlink_to(ROOT / "data" / "raw")
    (folder / "config").symlink_to(ROOT / "config")
    for script, config in (("pretrain.py", "config/demo.py"), ("sft.py", "config/demo_sft.py")):
        succeed(run(folder, script, config, *SHORT[script]))
    return folder


@pytest.mark.parametrize("file", [f for f in DOCS if f.name != "change.md"], ids=lambda f: f.name)
def test_the_commands_and_the_python_code_run(file, after_readme, tmp_path, monkeypatch):
    folder, names = tmp_path / "clone", {}
    shutil.copytree(after_readme, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for tag, content in blocks(file, "bash", "python"):
        if tag == "python":
            exec(compile(content, file.name, "exec"), names)
            continue
        for line in commands(content):
            execute(folder, line)


def apply_edits(folder, diff):
    """Apply a diff without line numbers: its old lines must occur exactly once in the file."""
    for name, edit in re.findall(r"^--- (\S+)\n((?:[ +-].*\n?|\n)+?)(?=^--- |\Z)", diff, re.M):
        old, new = ("".join(f"{line[1:]}\n" for line in edit.splitlines() if line[:1] not in skip)
                    for skip in ("+", "-"))
        file = folder / name
        text = text_of(file)
        assert text.count(old) == 1, f"{name} holds {text.count(old)} times\n{old}"
        file.write_text(text.replace(old, new), encoding="utf-8")


def test_the_worked_examples_of_a_change_apply_and_run(tmp_path):
    folder, n_edits = tmp_path / "clone", 0
    ignored = shutil.ignore_patterns(".*", "out", "bench_data", "__pycache__", "docs", "tests")
    shutil.copytree(ROOT, folder, ignore=lambda f, names: {
        *ignored(f, names), *(n for n in names if Path(f) == ROOT / "data" and n != "raw")})
    for tag, content in blocks(ROOT / "docs" / "change.md", "diff", "bash", "python"):
        if tag == "diff":
            n_edits += content.count("--- ")
            apply_edits(folder, content)
            continue
        for line in [content] if tag == "python" else commands(content):
            words = [sys.executable, "-c", line] if tag == "python" else (
                line.replace("python ", f"{shlex.quote(sys.executable)} ", 1))
            succeed(subprocess.run(words, cwd=folder, env=ENV, shell=tag == "bash", text=True,
                                   capture_output=True, encoding="utf-8"))
    assert n_edits > 5


def names_in(file):
    """Return the names that a source file defines: functions, classes, methods, assignments."""
    names = set()
    for node in ast.parse(text_of(file)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in getattr(node, "body", ())
                      if isinstance(part, ast.FunctionDef)}
        names |= {t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)}
    return names


@pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)
def test_the_files_functions_and_settings_that_are_named_exist(file):
    text = text_of(file)
    for path, name in re.findall(r"`((?:\w+/)*\w+\.py):([\w.]+)`", text):
        assert name in names_in(ROOT / path), f"{path} has no {name}"
    for path in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
        assert (file.parent / path).exists(), path
    for path in re.findall(r"`((?:\w+/)*\w+\.py)\b", text):
        assert path == "model.py" or (ROOT / path).is_file(), path  # model.py is nanoGPT's
    settings = OTHERS.union(*(read_settings(ROOT / script) for script in (
        "prepare.py", "pretrain.py", "sft.py", "sample.py", "eval.py", "bench.py",
        "models/to_bfloat16.py")))
    added = {"activation"} if file.name == "change.md" else set()  # by its second example
    unknown = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)) - settings - added
    assert not unknown, unknown


def test_the_readme_is_one_page_and_the_english_one_has_the_same_commands():
    chinese, english = (text_of(ROOT / name) for name in ("README.md", "README.en.md"))
    assert len(chinese.splitlines()) <= 170 and len(chinese) <= 9_000, len(chinese)
    for line in ("pip install -r requirements.txt",
                 "pip install -r requirements-dev.txt && python -m pytest -q"):
        assert line in chinese.splitlines()
    codes = [[line.partition("  #")[0].strip() for _, content in
              blocks(ROOT / name, "bash", "sh") for line in commands(content)]
             for name in ("README.md", "README.en.md")]
    assert codes[0] == codes[1]
    names = [re.findall(r"`([\w/]+\.py:[\w.]+)`", text) for text in (chinese, english)]
    assert names[0] == names[1] and len(names[0]) >= 10

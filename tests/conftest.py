"""What the tests share: prepared sets, a trained base model, and three ways to run a script.

run() calls a script's main() in this process, which saves the seconds that importing torch takes;
run_process() starts `python script.py ...`, for what only a process shows (signals, exit codes,
workers); start() returns a process that is still running.
"""
import importlib
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "data" / "raw" / "demo"  # the embedded corpus
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
ENV = os.environ  # of every script, in this process or its own

import torch  # noqa: E402  (reads the environment above)

from common.command_line import run_main  # noqa: E402

# ---- one suite, two dtypes ----

def pytest_addoption(parser):
    parser.addoption("--auto-dtype", choices=("float32", "bfloat16"), help="dtype that "
                     "dtype=auto means in every script; default: what suits this machine")


def pytest_configure(config):
    if config.getoption("--auto-dtype"):
        os.environ["AUTO_DTYPE"] = config.getoption("--auto-dtype")


@pytest.fixture(autouse=True)
def full_precision():
    """Undo what the scripts set for their process: float32 products may be rounded."""
    yield
    torch.set_float32_matmul_precision("highest")


# ---- scripts ----

def run(folder, script, *words, input=""):
    """Run the script's main in this process, in folder -> CompletedProcess with code and texts.

    A failure that is not a UserError leaves a traceback in .stderr and the code 1, as in Python.
    """
    module, code = importlib.import_module(Path(script).stem), 0
    input = input.encode() if isinstance(input, str) else input
    streams = {name: io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
               for name, data in (("stdin", input), ("stdout", b""), ("stderr", b""))}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(ROOT / script), *map(str, words)])
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        try:
            run_main(module.main, module.__file__)
        except SystemExit as e:
            code = e.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    texts = []
    for name in ("stdout", "stderr"):
        streams[name].flush()
        texts.append(streams[name].buffer.getvalue().decode())
    return subprocess.CompletedProcess([script, *words], code, *texts)


def command(script, words, torchrun=()):
    """The command line of a script, under torchrun if words for that are given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else []
    return [sys.executable, *launcher, str(ROOT / script), *map(str, words)]


def run_process(folder, script, *words, torchrun=(), **more):
    """Run `python script.py words...` in folder -> the finished process, with its texts."""
    return subprocess.run(command(script, words, torchrun), cwd=folder,
                          **dict(env=ENV, capture_output=True, text=True, encoding="utf-8") | more)


def start(folder, script, *words, torchrun=(), **more):
    """Start `python script.py words...` in folder -> the running process; .stdout gives lines."""
    return subprocess.Popen(command(script, words, torchrun), cwd=folder,
                            **dict(env=ENV, stdout=subprocess.PIPE, text=True, encoding="utf-8")
                            | more)


def read_until(process, beginning):
    """Read the process's output up to a line that begins so."""
    assert any(line.startswith(beginning) for line in process.stdout), beginning


def one_line(done, *parts):
    """The script refused its work in one line that has these parts, and showed no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in last, last


def succeed(done):
    """The result of run or run_process, which must have ended well."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


# ---- prepared sets and models; tests do not write in those made once for the session ----

def with_sets(folder, source):
    """The folder, which now sees every prepared set of source/data."""
    (folder / "data").mkdir()
    for prepared in (source / "data").iterdir():
        (folder / "data" / prepared.name).symlink_to(prepared)
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with data/demo and data/demo_chat prepared."""
    folder = tmp_path_factory.mktemp("demo")
    succeed(run(folder, "prepare.py", "demo"))
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo):
    """The setting of prepare.py that names the demo's tokenizer."""
    return f"--tokenizer={demo / 'data' / 'demo'}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def place(demo, tmp_path):
    """An empty folder that sees the prepared demo sets."""
    return with_sets(tmp_path, demo)


@pytest.fixture(scope="session")
def two_sets(demo, tmp_path_factory):
    """A folder with data/a and data/b too: different texts in the demo's tokenizer."""
    folder = with_sets(tmp_path_factory.mktemp("two_sets"), demo)
    for name, file in (("a", "texts_train.jsonl"), ("b", "texts_val.jsonl")):
        succeed(run(folder, "prepare.py", "text", DEMO / file, "--max_docs=200",
                    "--tokenizer=data/demo", f"--name={name}", "--val_fraction=0.1"))
    return folder


@pytest.fixture(scope="session")
def base(demo, tmp_path_factory):
    """A folder with the demo sets and a finished tiny base run in out/tiny."""
    from test_scripts import train
    folder = with_sets(tmp_path_factory.mktemp("base"), demo)
    train(folder, "--out_dir=out/tiny", "--block_size=128", "--max_iters=12")
    return folder

"""What the tests share: a small prepared set, and the scripts run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}


def run(folder, *command, **more):
    """Run `script.py words...` in a folder -> the finished process, with its text."""
    script, *words = [str(w) for w in command]
    return subprocess.run([sys.executable, str(ROOT / script), *words], cwd=folder, env=ENV,
                          capture_output=True, text=True, encoding="utf-8", timeout=300, **more)


def one_line(done, *parts):
    """The process refused its work in one line that has these parts, and showed no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in last, last


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with data/demo and data/demo_chat prepared; do not write in it."""
    folder = tmp_path_factory.mktemp("demo")
    done = run(folder, "prepare.py", "demo")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def place(demo, tmp_path):
    """An empty folder that sees the prepared demo sets."""
    (tmp_path / "data").mkdir()
    for name in ("demo", "demo_chat"):
        (tmp_path / "data" / name).symlink_to(demo / "data" / name)
    return tmp_path


@pytest.fixture(scope="session")
def base(demo, tmp_path_factory):
    """A folder with the demo sets and a finished tiny base run in out/tiny; do not write in it."""
    from test_road import train
    place = tmp_path_factory.mktemp("base")
    (place / "data").mkdir()
    for name in ("demo", "demo_chat"):
        (place / "data" / name).symlink_to(demo / "data" / name)
    train(place, "--out_dir=out/tiny", "--block_size=128", "--max_iters=12")
    return place

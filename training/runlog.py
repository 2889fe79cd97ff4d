"""The folder of a run, out/<name>/: run.json, log.jsonl; leftovers of a killed run are removed."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from common.command_line import UserError
from common.files import current_folder, lock, replace, write_file, write_json
from training.checkpoint import checkpoint_files

RUN_FILES = ["ckpt_step_*.pt", "best", "final", "log.jsonl", "loss.png", "run.json",
             "tensorboard", "wandb", "wandb_id"]
LEFTOVERS = [name + suffix for name in RUN_FILES for suffix in (".part", ".replaced")]


class RunLog:
    """Write the files of out_dir; only the main process has one that is started."""

    def __init__(self, cfg, kind):
        self.cfg, self.kind = cfg, kind
        self.path, self.trackers, self.lock = Path(cfg.out_dir), [], None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.lock:
            self.lock.close()

    def start(self, step, metadata):
        """Lock the folder, remove an old run if this one is new, cut the log back to step."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.path / ".lock", f"another run is writing to {self.path}")
        if step == 0 and not self.cfg.overwrite and checkpoint_files(self.path):
            raise UserError(f"another run has written to {self.path} meanwhile; start again")
        for name in ("best", "final"):  # killed while the folder was being replaced
            if current_folder(self.path / name) != self.path / name:
                replace(current_folder(self.path / name), self.path / name)
        for pattern in (LEFTOVERS + RUN_FILES if step == 0 else LEFTOVERS):
            for path in list(self.path.glob(pattern)):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        self.write_metadata(metadata)  # a run killed from here on is known as this one
        if self.cfg.wandb_log or self.cfg.tensorboard:
            from training.trackers import open_trackers
            self.trackers = open_trackers(self.cfg, self.path)
        log = self.path / "log.jsonl"
        lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
        write_file(log, "".join(line + "\n" for line in lines if is_entry_up_to(line, step)))

    def write_metadata(self, metadata):
        """Write run.json: settings, versions and data, enough to repeat the run."""
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent) if shutil.which("git") else None
        metadata = dict(kind=self.kind, settings=vars(self.cfg), torch=torch.__version__,
                        python=sys.version.split()[0],
                        git=git.stdout.strip() if git and git.returncode == 0 else "") | metadata
        write_json(self.path / "run.json", metadata)

    def log(self, step, values, text):
        """Append values to log.jsonl, send them to the trackers, print text."""
        if not self.lock:
            return
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(dict(step=step) | values) + "\n")
        for track in self.trackers:
            track(step, values)
        print(f"step {step:,}/{self.cfg.max_iters:,}  {text}", flush=True)


def is_entry_up_to(line, step):
    """Return whether a line of log.jsonl is whole and not later than step."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def visible(text):
    """Return a text as one line, without the control characters that a terminal executes."""
    return "".join(filter(str.isprintable, " ".join(text.split())))

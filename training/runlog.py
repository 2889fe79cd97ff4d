"""The folder of a run, out/<name>/: run.json, log.jsonl, trackers, loss.png."""
import json
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from common.command_line import UserError
from common.files import current_folder, lock, replace, write_file
from training.checkpoint import checkpoint_files

RUN_FILES = ("ckpt_step_*.pt", "best", "best.replaced", "final", "final.replaced", "log.jsonl",
             "loss.png")  # run.json is replaced
TRACKER_FILES = ("tensorboard", "wandb", "wandb_id")
PARTIAL_FILES = ("ckpt_step_*.part", "best.part", "final.part")  # left by a killed run


class RunLog:
    """Write the files of out_dir; in every process but the main one it does nothing."""

    def __init__(self, cfg, kind, is_main):
        self.cfg, self.kind, self.is_main = cfg, kind, is_main
        self.path, self.trackers, self.lock = Path(cfg.out_dir), [], None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.lock:
            self.lock.close()

    def start(self, step, metadata):
        """Lock the folder, remove an old run if this one is new, cut the log back to step."""
        if not self.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.path / ".lock", f"another run is writing to {self.path}")
        if step == 0 and not self.cfg.overwrite and checkpoint_files(self.path):
            raise UserError(f"another run has written to {self.path} meanwhile; start again")
        if not checkpoint_files(self.path) and not (self.path / "run.json").exists():
            self.write_metadata(metadata)  # a run killed from here on is known as this one
        if step == 0:
            remove(self.path, *TRACKER_FILES)
        self.trackers = open_trackers(self.cfg, self.path)  # if it fails, an old run is still whole
        if step == 0:
            remove(self.path, *RUN_FILES)
        self.write_metadata(metadata)
        remove(self.path, *PARTIAL_FILES)
        for name in ("best", "final"):  # killed while the folder was being replaced
            if current_folder(self.path / name) != self.path / name:
                replace(current_folder(self.path / name), self.path / name)
        log = self.path / "log.jsonl"
        lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
        kept = [line for line in lines if step and is_entry_up_to(line, step)]
        write_file(log, "".join(line + "\n" for line in kept))

    def write_metadata(self, metadata):
        """Write run.json: settings, versions and data, enough to repeat the run."""
        if not self.is_main:
            return
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent) if shutil.which("git") else None
        metadata = dict(kind=self.kind, settings=vars(self.cfg), torch=torch.__version__,
                        python=sys.version.split()[0],
                        git=git.stdout.strip() if git and git.returncode == 0 else "") | metadata
        write_file(self.path / "run.json",
                   json.dumps(metadata, ensure_ascii=False, indent=1) + "\n")

    def log(self, step, values, text):
        """Append values to log.jsonl, send them to the trackers, print text."""
        if not self.is_main:
            return
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(dict(step=step) | values) + "\n")
        for track in self.trackers:
            track(step, values)
        print(f"step {step:,}/{self.cfg.max_iters:,}  {text}", flush=True)


def remove(folder, *patterns):
    """Remove the files and folders of folder that match exactly these patterns."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_entry_up_to(line, step):
    """Return whether a line of log.jsonl is whole and not later than step."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def open_trackers(cfg, path):
    """Return functions (step, values) that write to wandb and TensorBoard, as the settings ask."""
    trackers = []
    if cfg.wandb_log:
        try:
            import wandb
        except ImportError as e:
            raise UserError("--wandb_log needs wandb: pip install wandb") from e
        file = path / "wandb_id"  # one id for all parts of a run that was stopped and resumed
        if not file.is_file():
            write_file(file, secrets.token_hex(4))
        try:
            wandb.init(project=cfg.wandb_project, name=path.name, dir=str(path), config=vars(cfg),
                       id=file.read_text(encoding="utf-8"), resume="allow")
        except Exception as e:  # wandb raises errors of many kinds
            raise UserError(f"wandb: {str(e).rstrip('. ')}. WANDB_MODE=offline needs neither login "
                            "nor network") from e
        trackers.append(lambda step, values: wandb.log(values, step=step))
    if cfg.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise UserError("--tensorboard needs it: pip install tensorboard") from e
        writer = SummaryWriter(path / "tensorboard")
        trackers.append(lambda step, values: [writer.add_scalar(key, value, step)
                                              for key, value in values.items()])
        trackers.append(lambda step, values: writer.flush())
    return trackers


def plot_losses(out_dir):
    """Draw loss.png from log.jsonl; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no loss.png: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = (out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "train"), ("val_loss", "val")):
        points = [(e["tokens"], e[key]) for e in entries
                  if {type(e.get(key)), type(e.get("tokens"))} <= {int, float}]
        if points:
            axes.plot(*zip(*points), label=label)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(out_dir / "loss.part.png", dpi=120)
    plt.close(figure)
    replace(out_dir / "loss.part.png", out_dir / "loss.png")

"""Checkpoints of a run: write them, find the one to resume from, refuse one that does not fit."""
import os
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from common.command_line import UserError, first_line, is_out_of_memory
from common.files import atomic_file, current_folder, read_json
from models.folders import load_model
from models.hf import model_of_checkpoint, write_errors_as_user_error
from training.lora import add_adapters

SHAPE = ("arch", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "bias",
         "qkv_bias", "qk_norm")
KEYS = {"step", "best", "cfg", "losses", "model", "model_config", "optimizers", "scaler", "data"}
# A run without a checkpoint is continued by a command with the same values of these settings.
SAME_RUN = ("seed", "dataset", "optimizer", "dropout", "weight_decay", "beta1", "beta2",
            "multi_turn", "lora_rank", *SHAPE)
# What the settings that older runs lack meant: they joined no dialogues, and had other rows.
OLDER = dict(multi_turn=None, lora_rank=0, qkv_bias=False, qk_norm=True)


def checkpoint_files(out_dir):
    """Return the checkpoints of a run, the newest first."""
    files = [p for p in Path(out_dir).glob("ckpt_step_*.pt") if p.stem[10:].isdecimal()]
    return sorted(files, key=lambda p: -int(p.stem[10:]))


def steps_to_keep(cfg):
    """Return the set of steps in the setting keep_steps."""
    steps = [step.strip() for step in cfg.keep_steps.split("|") if step.strip()]
    if not all(step.isdecimal() and len(step) < 16 for step in steps):
        raise UserError(f"keep_steps={cfg.keep_steps} is not like 10000|60000")
    return {int(step) for step in steps}


def save_checkpoint(cfg, state):
    """Write ckpt_step_<step>.pt atomically; remove older ones, as cfg's keep_* settings say."""
    path = Path(cfg.out_dir) / f"ckpt_step_{state['step']}.pt"
    broken = [name for name, t in state["model"].items() if not t.isfinite().all()]
    if broken:
        raise UserError(f"after step {state['step']} {broken[0]} is not finite: lower "
                        "learning_rate or muon_lr")
    with write_errors_as_user_error(Path(f"{path}.part")), atomic_file(path) as f:
        torch.save(state, f)
    files = checkpoint_files(cfg.out_dir)
    files = files[files.index(path):]  # a file with a later step is damaged: not counted
    kept = files[:cfg.keep_checkpoints or None]
    for old in files:
        if old not in kept and int(old.stem[10:]) not in steps_to_keep(cfg):
            old.unlink()


# ---- resuming ----

def find_checkpoint(cfg, bins, ctx):
    """Return the checkpoint to resume from, or None. The main process chooses it for all ranks."""
    found = newest_checkpoint(cfg, bins, ctx.launches) if ctx.is_main else None
    step = ctx.max(found["step"] if found else -1)
    if step < 0 or ctx.is_main:
        return found
    file = Path(cfg.out_dir) / f"ckpt_step_{step}.pt"
    if not file.is_file():
        raise UserError(f"{file} is not there for every process: out_dir must lie on a file system "
                        "that all machines share")
    return read_checkpoint(file, verify=False)


def newest_checkpoint(cfg, bins, launches):
    """Return the newest undamaged checkpoint in out_dir, or None for a new run.

    UserError: the run there is another one, and --overwrite was not given.
    """
    out, run = Path(cfg.out_dir), read_json(Path(cfg.out_dir) / "run.json")
    # torchrun restarts the same command after a crash: --overwrite must not remove its own work
    restarted = bool(launches & set(run.get("launches", ())))
    if not launches:  # torchrun without log files gives its launches no name
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    files = [] if cfg.overwrite and not restarted else checkpoint_files(out)
    if files and cfg.init_from == "scratch" and not restarted:
        raise UserError(f"{out} holds a run already. Choose another --out_dir, or add --overwrite")
    for file in files:
        try:
            checkpoint = read_checkpoint(file)
        except Exception as e:  # a truncated file raises almost anything
            print(f"{file} is damaged ({type(e).__name__}); trying the one before", file=sys.stderr)
            continue
        check_resumable(cfg, bins, checkpoint, file)
        print(f"resuming from {file}")
        return checkpoint
    if files:
        raise UserError(f"{out}: every checkpoint is damaged. Start a new run with --overwrite")
    kept = [name for name in ("final", "best", "log.jsonl", "tensorboard", "wandb")
            if (out / name).exists()]  # a new run would remove these
    if kept and not cfg.overwrite and ("final" in kept or not is_same_run(run, cfg)):
        raise UserError(f"{out} holds {', '.join(kept)} and no checkpoint to resume from. Choose "
                        "another --out_dir, or add --overwrite")
    return None


def is_finished(cfg, step):
    """Return whether the run in out_dir, whose newest checkpoint is at step, made its final/."""
    out = Path(cfg.out_dir)
    return (step >= cfg.max_iters and read_json(out / "run.json").get("finished") == step
            and (current_folder(out / "final") / "config.json").is_file())


def read_checkpoint(file, verify=True):
    """Return a checkpoint, its tensors mapped from the file; almost any error if it is damaged.

    verify: compare the checksums first, which torch.load does not.
    """
    if verify:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile("checksum")
    checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if KEYS - checkpoint.keys():
        raise KeyError(*(KEYS - checkpoint.keys()))
    if checkpoint["step"] != int(file.stem[10:]):
        raise ValueError("its step differs from its name")
    return checkpoint


@contextmanager
def incompatible_as_user_error():
    """Report an incompatible checkpoint as a UserError; also a decorator."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        raise UserError(f"the checkpoint was not written by this program ({type(e).__name__}: "
                        f"{first_line(e)}). Start a new run with --overwrite") from e


@incompatible_as_user_error()
def check_resumable(cfg, bins, checkpoint, file):
    """Refuse to resume with another model, other data, another seed or other tokens per step."""
    old = comparable(checkpoint["cfg"]) | dict(data=checkpoint["data"])
    new = comparable(vars(cfg)) | dict(data=bins.fingerprint())
    shape = SHAPE if new["init_from"] == "auto" else ("block_size",)
    if "multi_turn" in vars(cfg):  # of sft.py: older runs windowed no dialogues
        old["long dialogues"] = "windows" if "row_length" in checkpoint else "cut"
        new["long dialogues"] = "windows"
        new.setdefault("block_size", checkpoint["model_config"]["block_size"])
    for name in ("data", "seed", "optimizer", "init_from", "rows per step", "multi_turn",
                 "lora_rank", "long dialogues", *shape):
        if name in new and new[name] != old[name]:
            if name == "data":  # the names say more than the hashes
                name = "dataset"
                if new[name] == old[name]:
                    old[name] += " as it was then"
                    new[name] += " as it is now"
            raise UserError(f"{file} was made with {name}={old[name]}, not {new[name]}. "
                            "Choose another --out_dir for a new run, or --overwrite this one")


@incompatible_as_user_error()
def restore_model(cfg, checkpoint):
    """Return the checkpoint's model, with this command's dropout. Of a run with adapters the base
    is read again; UserError if it has changed."""
    if not (lora := checkpoint.get("lora")):
        return model_of_checkpoint(checkpoint, cfg.dropout)
    block_size = checkpoint["model_config"]["block_size"]
    model, tok = load_model(lora["base"], cfg.dropout, block_size, add_chat_tokens=True)
    add_adapters(model, cfg.lora_rank, tok, lora["base"])
    if model.lora != lora:
        raise UserError(f"{lora['base']} is not what it was when this run started from it: put its "
                        "old files back, or start a new run with --overwrite")
    missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
    if unexpected or any(model.get_parameter(name).requires_grad for name in missing):
        raise ValueError("other adapters")
    return model


def comparable(settings):
    """Return the settings that must agree between two parts of one run."""
    rows = settings["batch_size"] * settings["gradient_accumulation_steps"]
    known = {name: value for name, value in (OLDER | settings).items() if name in SAME_RUN}
    if known.get("block_size") == 0:  # of sft.py: the base model's
        del known["block_size"]
    return known | {
        "rows per step": rows, "init_from": settings["init_from"].replace("scratch", "auto")}


def is_same_run(run, cfg):
    """Return whether run.json is of this command, killed before its first checkpoint or its end."""
    try:
        old = comparable(run["settings"])
        # sft.py takes the shape from its base model: its cfg has none
        return all(old[name] == value for name, value in comparable(vars(cfg)).items())
    except (KeyError, TypeError, AttributeError):
        return False

"""out/<name>/: a run's checkpoints, models, log and curve, and finding the way back into it.

Every file appears whole or not at all; a killed run leaves nothing that the next start trusts.
"""
import json
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from config import UserError, is_out_of_memory
from data.bins import replace_folder
from data.files import lock, replace, write_file
from data.tokenizer import load_tokenizer
from engine.machine import largest
from gpt import GPT, GPTConfig

SHAPE = ("arch", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "bias")
WATCHING = {  # settings that change what is shown and where, not the weights
    "out_dir", "overwrite", "log_interval", "eval_interval", "eval_tokens", "checkpoint_interval",
    "dry_run", "wandb_log", "wandb_project", "tensorboard", "sample_start", "device", "dtype",
    "compile", "fsdp"}
SAMPLING = {  # small models like to go round in circles; answers have to repeat the question
    "base": dict(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.2),
    "chat": dict(temperature=0.5, top_k=50, top_p=0.9, repetition_penalty=1.05)}

PLAIN = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
RANGES = dict(temperature=(0.0, 1e3), top_k=(0, 2**31), top_p=(1e-6, 1.0), min_p=(0.0, 1.0),
              repetition_penalty=(1e-3, 1e3))


class RunDir:
    """Writes out_dir; in every process but the main one it does nothing."""

    def __init__(self, cfg, kind, main):
        self.cfg, self.kind, self.main = cfg, kind, main
        self.path, self.trackers, self.lock = Path(cfg.out_dir), [], None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.lock:
            self.lock.close()  # another run may start

    def start(self, step, facts):
        """run.json, and the log cut back to the step this run starts from."""
        if not self.main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.path / ".lock", f"another run is writing to {self.path}")
        if step == 0 and not self.cfg.overwrite and checkpoint_files(self.path):
            raise UserError(f"another run has written to {self.path} meanwhile; start again")
        if step == 0:
            remove(self.path, "tensorboard", "wandb", "wandb_id")
        self.trackers = open_trackers(self.cfg, self.path)  # it may fail: then the old run is whole
        if step == 0:
            remove(self.path, "ckpt_step_*.pt", "best", "best.old", "final", "final.old",
                   "log.jsonl", "run.json", "loss.png")
        remove(self.path, "ckpt_step_*.part", "best.part", "final.part")  # of one that was killed
        old = self.path / "best.old"  # killed while best/ was being replaced
        if old.is_dir() and not (self.path / "best").exists():
            replace(old, self.path / "best")
        log = self.path / "log.jsonl"
        lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
        kept = [line for line in lines if step and is_json_up_to(line, step)]
        write_file(log, "".join(line + "\n" for line in kept))
        self.write_facts(facts)

    def write_facts(self, facts):
        """run.json: settings, versions and data, from which the run could be made again."""
        if not self.main:
            return
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent) if shutil.which("git") else None
        facts = dict(kind=self.kind, settings=vars(self.cfg), torch=torch.__version__,
                     python=sys.version.split()[0],
                     git=git.stdout.strip() if git and git.returncode == 0 else "") | facts
        write_file(self.path / "run.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")

    def log(self, step, values, shown):
        """A line of log.jsonl, of the trackers, and `shown` for the person watching."""
        if not self.main:
            return
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(dict(step=step) | values) + "\n")
        for track in self.trackers:
            track(step, values)
        print(f"step {step:,}/{self.cfg.max_iters:,}  {shown}", flush=True)

    def save_checkpoint(self, state):
        """ckpt_step_<step>.pt; the newest two are kept."""
        if not self.main:
            return
        path = self.path / f"ckpt_step_{state['step']}.pt"
        broken = [name for name, t in state["model"].items() if not t.isfinite().all()]
        if broken:
            raise UserError(f"after step {state['step']} {broken[0]} is not finite: lower "
                            "learning_rate or muon_lr")
        part = Path(f"{path}.part")
        with whole_or_nothing(part), open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        replace(part, path)
        files = checkpoint_files(self.path)
        for old in files[files.index(path) + 2:]:  # any later ones are damaged
            old.unlink()

    def save_model(self, name, model, weights, tok, scores):
        """best/ or final/: what transformers, vLLM and sample.py load; config.json has scores."""
        if not self.main:
            return
        part, chat = self.path / f"{name}.part", self.kind == "chat"
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        ids = dict(bos_token_id=tok.eot, pad_token_id=tok.eot,
                   eos_token_id=[tok.im_end, tok.eot] if chat else tok.eot)
        generation = ids | dict(do_sample=True) | SAMPLING[self.kind]
        with whole_or_nothing(part):
            model.save_pretrained(part, weights, **ids, **scores)
            tok.save(part, chat)
            write_file(part / "generation_config.json", json.dumps(generation, indent=1) + "\n")
            replace_folder(part, self.path / name)

    def best_loss(self):
        """Val loss of what is in best/, which a worse model must never replace; inf if unknown."""
        loss = saved_score(self.path / "best", "val_loss")
        return float("inf") if loss is None else loss


@contextmanager
def whole_or_nothing(part):
    """Remove the file or folder `part` if writing it fails, and say so in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        question = "" if isinstance(e, PermissionError) else " Is the disk full?"
        raise UserError(f"{part} can't be written ({reason}).{question} The same command goes on "
                        "from the checkpoint before, where there is one") from e


def is_json_up_to(line, step):
    """Whether a line of log.jsonl is whole and not later than step."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def open_trackers(cfg, path):
    """Functions (step, values) that tell wandb and TensorBoard, where the settings ask for them."""
    trackers = []
    if cfg.wandb_log:
        try:
            import wandb
        except ImportError as e:
            raise UserError("--wandb_log needs wandb: pip install wandb") from e
        file = path / "wandb_id"  # one for all parts of a run that was stopped and went on
        if not file.is_file():
            write_file(file, secrets.token_hex(4))
        try:
            wandb.init(project=cfg.wandb_project, name=path.name, dir=str(path), config=vars(cfg),
                       id=file.read_text(encoding="utf-8"), resume="allow")
        except Exception as e:  # it raises what it likes
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


def plot_losses(out):
    """loss.png from log.jsonl, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no loss.png: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "train"), ("val_loss", "val")):
        points = [(e["tokens"], e[key]) for e in entries
                  if {type(e.get(key)), type(e.get("tokens"))} <= {int, float}]
        axes.plot(*zip(*points), label=label) if points else None
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(out / "loss.part.png", dpi=120)
    plt.close(figure)
    os.replace(out / "loss.part.png", out / "loss.png")


# ---- the way back in ----

def checkpoint_files(out):
    """Checkpoints of a run, the newest first."""
    files = [p for p in Path(out).glob("ckpt_step_*.pt") if p.stem[10:].isdecimal()]
    return sorted(files, key=lambda p: -int(p.stem[10:]))


def remove(out, *patterns):
    """Remove what an earlier run left in out."""
    for path in [path for pattern in patterns for path in out.glob(pattern)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read_run(out):
    """run.json of a run; {} if there is none, or it can't be read."""
    try:
        run = json.loads((Path(out) / "run.json").read_text(encoding="utf-8"))
        return run if isinstance(run.get("settings"), dict) else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def saved_score(folder, name):
    """The number `name` (step, val_loss) in the config.json of best/ or final/; None if unknown."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return float(config[name])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def trained_with(settings):
    """The settings that decide the weights of a run, in one form for equal runs."""
    settings = {name: value for name, value in settings.items() if name not in WATCHING}
    rows = settings.pop("batch_size") * settings.pop("gradient_accumulation_steps")
    return settings | dict(rows=rows, init_from=settings["init_from"].replace("scratch", "auto"))


def is_same_run(out, cfg):
    """Whether run.json is of this command, killed before its first checkpoint or its end."""
    try:
        old = trained_with(read_run(out)["settings"])
        # sft.py takes the shape from its base model: cfg has none
        return all(old[name] == value for name, value in trained_with(vars(cfg)).items())
    except (KeyError, TypeError, AttributeError):
        return False


def find_checkpoint(cfg, bins, machine):
    """The checkpoint this command goes on with, or None: the main process finds it for all."""
    found = newest_checkpoint(cfg, bins, machine.launches) if machine.main else None
    step = largest(found["step"] if found else -1, machine)
    if step < 0 or machine.main:
        return found
    file = Path(cfg.out_dir) / f"ckpt_step_{step}.pt"
    if not file.is_file():
        raise UserError(f"{file} is not there for every process: out_dir must lie on a file system "
                        "that all machines share")
    return read_checkpoint(file, check=False)


def newest_checkpoint(cfg, bins, launches):
    """The newest sound checkpoint of out_dir if this command goes on with it, else None."""
    out = Path(cfg.out_dir)
    # after a crash torchrun starts the same command again, which must not remove its own work
    again = bool(set(launches) & set(read_run(out).get("launches", ())))
    files = [] if cfg.overwrite and not again else checkpoint_files(out)
    if files and cfg.init_from == "scratch" and not again:
        raise UserError(f"{out} holds a run already. Choose another --out_dir, or add --overwrite")
    for file in files:
        try:
            checkpoint = read_checkpoint(file)
        except Exception as e:  # a file cut short raises almost anything
            print(f"{file} is damaged ({type(e).__name__}); trying the one before", file=sys.stderr)
            continue
        check_resumable(cfg, bins, checkpoint, file)
        print(f"going on from {file}")
        return checkpoint
    if files:
        raise UserError(f"{out}: every checkpoint is damaged. Start anew: --overwrite")
    kept = [name for name in ("final", "best", "log.jsonl", "tensorboard", "wandb")
            if (out / name).exists()]
    # a new run would remove them
    if kept and not cfg.overwrite and ("final" in kept or not is_same_run(out, cfg)):
        raise UserError(f"{out} holds {', '.join(kept)} and no checkpoint to go on from. Choose "
                        "another --out_dir, or add --overwrite")
    return None


def read_checkpoint(file, check=True):
    """A checkpoint whose bytes are those that were written; else it raises almost anything.

    Its tensors are read from the file when they are used. check: compare the checksums first.
    """
    if check:
        with zipfile.ZipFile(file) as archive:  # torch.load does not look at them
            if archive.testzip():
                raise zipfile.BadZipFile
    checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    missing = {"step", "best", "cfg", "losses", "model", "model_config", "optimizers", "scaler",
               "data"} - checkpoint.keys()
    if missing:
        raise KeyError(*missing)
    if checkpoint["step"] != int(file.stem[10:]):
        raise ValueError("it is of another step than its name says")
    return checkpoint


@contextmanager
def checked():
    """A decorator of what takes up a checkpoint: what does not fit in it becomes one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        raise UserError("that checkpoint is none this program wrote "
                        f"({type(e).__name__}: {str(e).splitlines()[0]}). Start anew: --overwrite"
                        ) from e


@checked()
def check_resumable(cfg, bins, checkpoint, file):
    """Refuse to go on with another model, other data, another seed or other steps."""
    old, new = checkpoint["cfg"], vars(cfg) | dict(data=bins.fingerprint())
    old["data"] = checkpoint["data"]
    shape = SHAPE if new["init_from"] in ("auto", "scratch") else ("block_size",)
    for settings in (old, new):
        settings["init_from"] = settings["init_from"].replace("scratch", "auto")
        settings["rows per step"] = settings["batch_size"] * settings["gradient_accumulation_steps"]
    for name in ("data", "seed", "optimizer", "init_from", "rows per step", *shape):
        if name in new and new[name] != old[name]:
            if name == "data" and new["dataset"] != old["dataset"]:
                name = "dataset"  # says more than the hashes
            raise UserError(f"{file} was made with {name}={old[name]}, not {new[name]}. "
                            "Choose another --out_dir for a new run, or --overwrite this one")


@checked()
def restore_model(cfg, checkpoint):
    """The checkpoint's model, with this command's dropout."""
    model = GPT(GPTConfig(**checkpoint["model_config"] | dict(dropout=cfg.dropout)))
    model.load_state_dict(checkpoint["model"])
    return model


# ---- model folders ----

def load_model(path, dropout=0.0, block_size=0, grow=False):
    """(GPT, Tokenizer) of a model folder or hub id; what is wrong with it becomes one line.

    grow: give the model rows for the control tokens of chats where its vocabulary lacks them.
    """
    if (Path(path) / "best" / "config.json").is_file():
        raise UserError(f"{path} is a run; its models are {path}/best and {path}/final")
    if Path(path).is_file():
        raise UserError(f"{path} is a file; name the folder of a model")
    if not Path(path).exists() and (path.count("/") > 1 or Path(path).parent.is_dir()
                                    and "/" in path):
        raise UserError(f"{path}: no such folder, and not a hub id like Qwen/Qwen3-0.6B")
    try:
        model = GPT.from_pretrained(path, dropout, block_size)
    except (OSError, ValueError, RuntimeError, OverflowError, TypeError, KeyError) as e:
        hint = "" if Path(path).exists() else (
            ". No such folder; where the hub can't be reached, set HF_ENDPOINT to a mirror")
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path} can't be loaded: {reason}{hint}") from e
    tok = load_tokenizer(path)
    if grow and tok.n_ids > model.config.vocab_size:
        model.grow_vocab(-(-tok.n_ids // 128) * 128)
        model.config.n_ids = tok.n_ids
    if tok.n_ids > model.config.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tok.n_ids} ids, its model "
                        f"{model.config.vocab_size}")
    model.config.n_ids = tok.n_ids
    return model, tok


def read_generation(path):
    """Sampling settings in generation_config.json of a model folder or hub id, which was loaded
    before, PLAIN's where it says nothing; and the ids that end a text -> (dict, list)."""
    file = Path(path) / "generation_config.json"
    if not Path(path).is_dir():
        from huggingface_hub import try_to_load_from_cache
        found = try_to_load_from_cache(str(path), file.name)
        file = Path(found) if isinstance(found, str) else file
    try:
        own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        settings = {name: type(plain)(plain if own.get(name) is None else own[name])
                    for name, plain in PLAIN.items()}
        if own.get("do_sample") is False:
            settings["temperature"] = 0.0
        eos = own.get("eos_token_id")
        eos = [int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{file} can't be read ({type(e).__name__})") from e
    for name, value in settings.items():
        check_range(name, value, *RANGES[name], f"{file}: ")
    return settings, eos


def check_range(name, value, low, high, where=""):
    if not low <= value <= high:  # nan is not either
        raise UserError(f"{where}{name}={value} is not from {low} to {high}")


def load_base(path, bins, dropout, block_size=0):
    """The model to start from, which must have the tokenizer that made bins."""
    model, tok = load_model(path, dropout, block_size, grow=True)
    if tok.fingerprint != bins.tokenizer.fingerprint:
        ours, theirs = bins.tokenizer.fingerprint[:8], tok.fingerprint[:8]
        raise UserError(f"{bins.folder} was made with another tokenizer (sha256 {ours}) than "
                        f"{path} has ({theirs}). Prepare it again with --tokenizer={path}")
    return model

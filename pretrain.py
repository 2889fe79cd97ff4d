"""Train a base model on a prepared set: the settings, the batches, and the loop that sft.py shares.

    python pretrain.py config/demo.py                        # five minutes on a laptop, no network
    python pretrain.py config/pretrain_zh.py --batch_size=8
    torchrun --nproc_per_node=8 pretrain.py config/pretrain_zh.py

The same command, started again, goes on from the newest checkpoint. Ctrl-C saves one first.
"""
# ---- run ----
out_dir = "out/pretrain"  # checkpoints, log.jsonl, best/ and final/ go there
init_from = "auto"        # auto: go on with out_dir, else anew; scratch; a model folder or hub id
overwrite = False         # let a new run replace what is in out_dir
seed = 1337               # decides first weights, order of data, dropout
# ---- data ----
dataset = "wiki"          # folder under data/, made by prepare.py; or several with their weights:
#                           "wiki:0.7,thucnews:0.3"
block_size = 256          # tokens of context
batch_size = 8            # sequences per micro-batch and per process
gradient_accumulation_steps = 32  # micro-batches per step over all processes: 8 * 32 * 256 = 65,536
# ---- model ----
arch = "gpt2"             # gpt2 or qwen3 (gpt.py)
n_layer = 12
n_head = 12
n_kv_head = 0             # qwen3: heads of keys and values; 0 = n_head
n_embd = 768
n_inner = 0               # width inside the MLP; 0 = 4 n_embd (gpt2), 8/3 n_embd (qwen3)
dropout = 0.0             # 0 where the data is seen once; 0.1 and more over many epochs
bias = True               # gpt2: biases in linear layers and norms
# ---- optimizer ----
optimizer = "adamw"       # adamw, or muon for the blocks' matrices and adamw for the rest
learning_rate = 6e-4      # AdamW's peak rate
muon_lr = 2e-3            # Muon's peak rate
min_lr = 6e-5             # where AdamW's rate ends; Muon's falls by the same factor
warmup_iters = 200        # steps of linear warmup; cosine decay from there to max_iters
max_iters = 10_000        # steps
weight_decay = 0.1        # on the blocks' matrices
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0           # largest norm of the gradient; 0 = no limit
# ---- watching ----
log_interval = 10         # steps
eval_interval = 250       # steps between evaluations, with samples; a new best goes to best/
eval_tokens = 262_144     # the first tokens of val.bin that are evaluated; 0 = all
checkpoint_interval = 250
sample_start = "数学是|长江"  # texts to continue at each evaluation, "|" between them
# ---- machine ----
device = "auto"           # cuda, cuda:1, mps, cpu; auto takes the first of these that is there
dtype = "auto"            # float32, bfloat16, float16; auto: 16 bits where hardware does them
compile = False           # torch.compile: worth its minute on a GPU

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel

from config import UserError, configure, run_main
from data.batches import TextData, tokens_per_step
from data.bins import open_sets, replace_folder
from data.files import write_file
from data.tokenizer import load_tokenizer
from gpt import GPT, GPTConfig

SHAPE = ("arch", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "bias")
SAMPLING = {  # small models like to go round in circles; answers have to repeat the question
    "base": dict(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.2),
    "chat": dict(temperature=0.5, top_k=50, top_p=0.9, repetition_penalty=1.05)}
MANY_EPOCHS = 4  # Muennighoff et al., arXiv:2305.16264
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}  # bf16


# ---- the machine ----

def choose_device(name):
    """torch.device of a name or "auto"; under torchrun each process gets its own card."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device={name} can't be used here ({str(e).splitlines()[0]})") from e
    return device


def set_up_machine(cfg):
    """Device, number type and this process's place among all -> a namespace the loop reads."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(cfg.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 speaks for all
    if cfg.gradient_accumulation_steps % world:
        raise UserError(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} can't be "
                        f"shared equally by {world} processes")
    cpu_group = dist.new_group(backend="gloo") if world > 1 else None  # for what no GPU need wait
    dtype = choose_dtype(cfg.dtype, device.type)
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked of a GPU
    return SimpleNamespace(
        device=device, dtype=dtype, rank=rank, world=world, main=rank == 0, cpu_group=cpu_group,
        autocast=lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32))


def choose_dtype(wanted, device_type):
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted in known:
        return known[wanted]
    if wanted != "auto":
        raise UserError(f"dtype={wanted} is none of auto, {', '.join(known)}")
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # a CPU without bf16 instructions computes it several times slower than float32
    native = device_type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if native else torch.float32


def to_device(tensor, device):
    """A tensor (or None) on its way to the device, without waiting for a GPU."""
    if tensor is None or device.type != "cuda":
        return tensor if tensor is None else tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


# ---- the loop ----

class StopWish:
    """Ctrl-C and SIGTERM, which the loop grants where nothing is lost by it; a second one ends the
    process at once."""

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def agreed(self, machine):
        """Whether any process has it; all processes ask together, and stop together."""
        if machine.world == 1:
            return self.signal
        wish = torch.tensor(self.signal)
        dist.all_reduce(wish, dist.ReduceOp.MAX, group=machine.cpu_group)
        self.signal = int(wish)
        return self.signal


class Trainer:
    """Trains model on data from where checkpoint (a dict, or None) left off; see train()."""

    def __init__(self, cfg, machine, model, data, kind, checkpoint):
        self.cfg, self.machine, self.model, self.data, self.kind = cfg, machine, model, data, kind
        self.out = Path(cfg.out_dir)
        model.to(machine.device)
        if cfg.compile:
            model.compile_parts()
        self.parallel = model if machine.world == 1 else DistributedDataParallel(
            model, device_ids=[machine.device] if machine.device.type == "cuda" else None)
        self.optimizers = model.configure_optimizers(
            cfg.optimizer, cfg.learning_rate, cfg.muon_lr, cfg.weight_decay, (cfg.beta1, cfg.beta2))
        self.scaler = torch.amp.GradScaler(machine.device.type,
                                           enabled=machine.dtype == torch.float16)
        self.step, self.best, self.losses, self.resumed_at = 0, math.inf, [], -1
        self.stop = StopWish()
        if checkpoint:
            self.restore(checkpoint)

    def restore(self, checkpoint):
        """Take up a checkpoint's state; rates and decay are this command's."""
        self.step = self.resumed_at = checkpoint["step"]
        self.best = checkpoint["best"]
        self.losses = list(torch.tensor(checkpoint["losses"], device=self.machine.device))
        for opt, state in zip(self.optimizers, checkpoint["optimizers"]):
            new = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
            opt.load_state_dict(state)
            for group, settings in zip(opt.param_groups, new):
                group.update(settings)
        self.scaler.load_state_dict(checkpoint["scaler"])

    def run(self):
        with self.stop:
            self.loop()

    def loop(self):
        cfg = self.cfg
        self.start_files()
        self.mark, self.seconds, self.timed = time.time(), 0.0, 0
        while True:
            done = self.step >= cfg.max_iters
            if self.step != self.resumed_at:  # else both were done before that checkpoint
                if self.step % cfg.eval_interval == 0 or done:
                    self.evaluate()
                if self.step and (self.step % cfg.checkpoint_interval == 0 or done):
                    self.save_checkpoint()
            if done:
                return self.finish()
            result = None if self.stop.agreed(self.machine) else self.train_step()
            if result is None:
                return self.leave()
            loss, self.norm = result
            self.step += 1
            self.timed += 1
            self.losses.append(loss)
            if self.step % cfg.log_interval == 0 or self.step == cfg.max_iters:
                self.log_training()

    def leave(self):
        """Save where the run stands, say how it goes on, and end as the signal asks for."""
        if self.step != self.resumed_at and self.step:
            self.save_checkpoint()
        if self.machine.world > 1:
            dist.destroy_process_group()
        print(f"stopped at step {self.step:,}. Go on with:  python {shlex.join(sys.argv)}")
        sys.exit(128 + self.stop.signal)

    def train_step(self):
        """One optimizer step -> its mean loss and gradient norm, as tensors; None where a lone
        process was asked to stop, before anything has changed."""
        cfg, m = self.cfg, self.machine
        n, total = self.data.n_trained(self.step), torch.zeros((), device=m.device)
        micros = range(m.rank, cfg.gradient_accumulation_steps, m.world)
        for micro in micros:
            if self.stop.signal and m.world == 1:
                return self.model.zero_grad(set_to_none=True)
            batch = [to_device(t, m.device) for t in self.data.batch(self.step, micro)]
            # dropout is a function of (seed, step, micro-batch), so no random state need be saved
            torch.manual_seed(((cfg.seed * 1_000_003 + self.step) * 1_000_003 + micro) % 2**63)
            wait = m.world > 1 and micro != micros[-1]
            with self.parallel.no_sync() if wait else nullcontext():
                with m.autocast():
                    loss, _ = self.parallel(*batch)
                # DistributedDataParallel averages over processes: world makes it the sum again
                self.scaler.scale(loss * (m.world / n)).backward()
            total += loss.detach()
        return total * m.world / n, self.update()

    def update(self):
        """Clip, let every optimizer step at this step's rate, clear gradients -> gradient norm."""
        factor = lr_factor(self.step, self.cfg)
        for opt in self.optimizers:
            self.scaler.unscale_(opt)
            for group in opt.param_groups:
                group["lr"] = group["peak_lr"] * factor
        limit = self.cfg.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        # under float16 an overflow anywhere skips both optimizers, or one would run ahead
        if not self.scaler.is_enabled() or norm.isfinite():
            for opt in self.optimizers:
                opt.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)
        return norm

    @torch.inference_mode()
    def evaluate(self):
        """Val loss over the same tokens each time, shared by all processes; the best is kept."""
        m = self.machine
        began, sums = time.time(), torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        for i, batch in enumerate(self.data.val_batches()):
            if i % m.world == m.rank:
                with m.autocast():
                    loss, n = self.model(*(to_device(t, m.device) for t in batch))
                sums += torch.tensor([loss.item(), n.item()])
        if m.world > 1:
            sums = sums.to(m.device)
            dist.all_reduce(sums)
        scores = self.data.scores((sums[0] / sums[1]).item())
        better = scores["val_loss"] < self.best
        self.best = min(self.best, scores["val_loss"])
        better = better and self.step > 0  # the untrained model is only what there is to beat
        if m.main:
            if better:
                self.save_model("best")
            shown = "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
            self.log(scores, f"{shown}{'  (best)' if better else ''}")
            self.print_samples()
        self.model.train()
        self.mark += time.time() - began  # speeds are of training alone

    def print_samples(self):
        tok = self.data.tokenizer
        for shown, ids in self.data.prompts():
            ids = torch.tensor([ids], device=self.machine.device)
            ids = ids[:, -self.model.config.block_size:]
            with self.machine.autocast():
                new = [t.item() for t in self.model.generate(
                    ids, 48, seed=self.cfg.seed, stop_ids=(tok.eot, tok.im_end),
                    **SAMPLING[self.kind])]
            raw = tok.decode_bytes([i for i in new if i not in (tok.eot, tok.im_end)])
            text = " ".join(raw.decode("utf-8", errors="ignore").split())
            print(f"    {shown} > {text}")

    # ---- files ----

    def start_files(self):
        """run.json, and the log cut back to the step this run starts from."""
        if not self.machine.main:
            return
        if self.step == 0:
            clear_run(self.out)
        old = self.out / "best.old"  # killed while best/ was being replaced
        if old.is_dir() and not (self.out / "best").exists():
            os.replace(old, self.out / "best")
        self.out.mkdir(parents=True, exist_ok=True)
        log = self.out / "log.jsonl"
        lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
        kept = [line for line in lines if self.step and is_json_up_to(line, self.step)]
        write_file(log, "".join(line + "\n" for line in kept))
        self.write_run()
        embedding, body = self.model.n_params()
        cfg, m = self.cfg, self.machine
        epochs = self.data.epochs(cfg.max_iters)
        shown = ", ".join(f"{name} {n:.1f}" for name, n in epochs.items())
        print(f"{self.out}: {self.model.config.arch}, {(embedding + body) / 1e6:.2f}M parameters "
              f"({embedding / 1e6:.2f}M in embeddings), {m.device.type} {str(m.dtype)[6:]}, "
              f"{m.world} process{'es' if m.world > 1 else ''}; steps {self.step:,} to "
              f"{cfg.max_iters:,} of {tokens_per_step(cfg):,} tokens = {shown} epochs", flush=True)
        for name, n in epochs.items():
            if n > MANY_EPOCHS and self.kind == "base":
                print(f"{name} will be read {n:.1f} times: past {MANY_EPOCHS} a model gains little "
                      "and begins to recite. Take more text, fewer steps or less weight")

    def write_run(self, **more):
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent) if shutil.which("git") else None
        run = dict(kind=self.kind, settings=vars(self.cfg), data=self.data.bins.fingerprint(),
                   model=asdict(self.model.config),
                   tokenizer=self.data.tokenizer.fingerprint, device=str(self.machine.device),
                   dtype=str(self.machine.dtype), torch=torch.__version__,
                   python=sys.version.split()[0],
                   git=git.stdout.strip() if git and git.returncode == 0 else "", **more)
        write_file(self.out / "run.json", json.dumps(run, ensure_ascii=False, indent=1) + "\n")

    def log(self, values, shown):
        entry = dict(step=self.step, tokens=self.step * tokens_per_step(self.cfg)) | values
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
        print(f"step {self.step:,}/{self.cfg.max_iters:,}  {shown}", flush=True)

    def log_training(self):
        """Mean loss since the last log, speed and the time to go; a GPU is waited for only here."""
        loss, norm = self.mean_loss(), self.norm.item()
        seconds = max(time.time() - self.mark, 1e-9)
        speed = self.timed * tokens_per_step(self.cfg) / seconds
        left = seconds / self.timed * (self.cfg.max_iters - self.step)
        rate = self.cfg.learning_rate * lr_factor(self.step - 1, self.cfg)
        values = dict(loss=loss, lr=rate, grad_norm=norm, tokens_per_second=round(speed, 1))
        shown = (f"loss {loss:.4f}  lr {rate:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s  "
                 f"{int(left) // 60}:{int(left) % 60:02d} to go")
        peak = self.peak_flops()
        if peak:
            values["mfu"] = speed * self.model.flops_per_token(self.cfg.block_size) / peak
            shown += f"  mfu {values['mfu']:.1%}"
        if self.machine.main:
            self.log(values, shown)
        self.seconds += seconds
        self.mark, self.timed, self.losses = time.time(), 0, []

    def mean_loss(self):
        """Mean training loss since the last log, over all processes.

        The run ends where that, or the gradient, is not finite (float16 skips such a step instead).
        """
        loss = torch.stack(self.losses).mean()
        if self.machine.world > 1:
            dist.all_reduce(loss)
            loss /= self.machine.world
        if not loss.isfinite() or not (self.scaler.is_enabled() or self.norm.isfinite()):
            raise UserError(f"step {self.step}: the loss is {loss.item()}, the gradient norm "
                            f"{self.norm.item()}. Lower learning_rate or muon_lr; the last "
                            f"checkpoint in {self.out} is sound")
        return loss.item()

    def peak_flops(self):
        """Of all cards together, where their 16-bit peak is known and used."""
        if self.machine.device.type != "cuda" or self.machine.dtype == torch.float32:
            return None
        words = torch.cuda.get_device_name(self.machine.device).replace("-", " ").split()
        peak = next((flops for card, flops in PEAK_FLOPS.items() if card in words), None)
        return peak and peak * self.machine.world

    def save_checkpoint(self):
        """ckpt_step_<step>.pt, whole or not at all; the newest two are kept."""
        if self.losses:
            self.mean_loss()  # what is not finite is not kept
        if not self.machine.main:
            return
        path = self.out / f"ckpt_step_{self.step}.pt"
        part = Path(f"{path}.part")
        state = dict(
            step=self.step, best=self.best, losses=[loss.item() for loss in self.losses],
            cfg=vars(self.cfg), data=self.data.bins.fingerprint(), model=self.model.state_dict(),
            model_config=asdict(self.model.config), scaler=self.scaler.state_dict(),
            optimizers=[opt.state_dict() for opt in self.optimizers])
        with whole_or_nothing(part), open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        for old in checkpoint_files(self.out)[2:]:
            old.unlink()

    def save_model(self, name):
        """best/ or final/: what transformers, vLLM and sample.py load."""
        part, tok, chat = self.out / f"{name}.part", self.data.tokenizer, self.kind == "chat"
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        ids = dict(bos_token_id=tok.eot, pad_token_id=tok.eot,
                   eos_token_id=[tok.im_end, tok.eot] if chat else tok.eot)
        generation = ids | dict(do_sample=True) | SAMPLING[self.kind]
        with whole_or_nothing(part):
            self.model.save_pretrained(part, **ids)
            tok.save(part, chat)
            write_file(part / "generation_config.json", json.dumps(generation, indent=1) + "\n")
            replace_folder(part, self.out / name)

    def finish(self):
        if self.machine.main:
            self.save_model("final")
            trained = (self.step - max(self.resumed_at, 0)) * tokens_per_step(self.cfg)
            self.write_run(finished=self.step, best_val_loss=self.best,
                           tokens_per_second=round(trained / max(self.seconds, 1e-9), 1))
            plot_losses(self.out)
        if self.machine.world > 1:
            dist.destroy_process_group()


@contextmanager
def whole_or_nothing(part):
    """Remove the file or folder `part` if writing it fails, and say so in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        raise UserError(f"{part} can't be written ({reason}). Is the disk full? The checkpoint "
                        "before is sound; the same command goes on from it") from e


def lr_factor(step, cfg):
    """Share of the peak rate at a step: linear warmup, then a cosine down to min_lr's share."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    floor = cfg.min_lr / cfg.learning_rate
    progress = min(1.0, (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def is_json_up_to(line, step):
    """Whether a line of log.jsonl is whole and not later than step."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


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
        points = [(e["tokens"], e[key]) for e in entries if key in e and "tokens" in e]
        axes.plot(*zip(*points), label=label) if points else None
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(out / "loss.part.png", dpi=120)
    plt.close(figure)
    os.replace(out / "loss.part.png", out / "loss.png")


# ---- starting and going on ----

def checkpoint_files(out):
    """Checkpoints of a run, the newest first."""
    files = [p for p in Path(out).glob("ckpt_step_*.pt") if p.stem[10:].isdigit()]
    return sorted(files, key=lambda p: -int(p.stem[10:]))


def clear_run(out):
    """Remove what an earlier run left in out."""
    for name in ("best", "best.old", "best.part", "final", "final.part"):
        shutil.rmtree(out / name, ignore_errors=True)
    for file in [*out.glob("ckpt_step_*"), out / "log.jsonl", out / "run.json", out / "loss.png"]:
        file.unlink(missing_ok=True)


def find_checkpoint(cfg, bins):
    """The newest sound checkpoint of out_dir if this command goes on with it, else None."""
    out = Path(cfg.out_dir)
    files = [] if cfg.overwrite else checkpoint_files(out)
    if files and cfg.init_from == "scratch":
        raise UserError(f"{out} holds a run already. Choose another --out_dir, or add --overwrite")
    for file in files:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            missing = {"step", "best", "cfg", "losses", "model", "model_config", "optimizers",
                       "scaler", "data"} - checkpoint.keys()
            if missing:
                raise KeyError(*missing)
        except Exception as e:  # a file cut short raises almost anything
            print(f"{file} is damaged ({type(e).__name__}); trying the one before", file=sys.stderr)
            continue
        check_resumable(cfg, bins, checkpoint, file)
        print(f"going on from {file}")
        return checkpoint
    if files:
        raise UserError(f"{out}: every checkpoint is damaged. Start anew: --overwrite")
    if (out / "final").is_dir() and not cfg.overwrite:
        raise UserError(f"{out} holds a finished model and no checkpoint to go on from. Choose "
                        "another --out_dir, or add --overwrite")
    return None


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
            raise UserError(f"{file} was made with {name}={old[name]}, not {new[name]}. "
                            "Choose another --out_dir for a new run, or --overwrite this one")


def load_model(path, dropout=0.0, block_size=0):
    """(GPT, Tokenizer) of a model folder or hub id; what is wrong with it becomes one line."""
    if (Path(path) / "best" / "config.json").is_file():
        raise UserError(f"{path} is a run; its models are {path}/best and {path}/final")
    if not Path(path).exists() and (path.count("/") > 1 or Path(path).parent.is_dir()
                                    and "/" in path):
        raise UserError(f"{path}: no such folder, and not a hub id like Qwen/Qwen3-0.6B")
    try:
        model = GPT.from_pretrained(path, dropout, block_size)
    except (OSError, ValueError, RuntimeError, OverflowError) as e:
        hint = "" if Path(path).exists() else (
            ". No such folder; where the hub can't be reached, set HF_ENDPOINT to a mirror")
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path} can't be loaded: {reason}{hint}") from e
    tok = load_tokenizer(path)
    if tok.n_ids > model.config.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tok.n_ids} ids, its model "
                        f"{model.config.vocab_size}")
    model.config.n_ids = min(model.config.n_ids, tok.n_ids)
    return model, tok


def load_base(path, bins, dropout, block_size=0):
    """The model to start from, which must have the tokenizer that made bins."""
    model, tok = load_model(path, dropout, block_size)
    if tok.fingerprint != bins.tokenizer.fingerprint:
        ours, theirs = bins.tokenizer.fingerprint[:8], tok.fingerprint[:8]
        raise UserError(f"{bins.folder} was made with another tokenizer (sha256 {ours}) than "
                        f"{path} has ({theirs}). Prepare it again with --tokenizer={path}")
    return model


def restore_model(cfg, checkpoint):
    """The checkpoint's model, with this command's dropout."""
    model = GPT(GPTConfig(**checkpoint["model_config"] | dict(dropout=cfg.dropout)))
    model.load_state_dict(checkpoint["model"])
    return model


def make_model(cfg, bins):
    """A new model for bins, or the one init_from names."""
    if cfg.init_from not in ("auto", "scratch"):
        model = load_base(cfg.init_from, bins, cfg.dropout, cfg.block_size)
        if cfg.block_size > model.config.block_size:
            raise UserError(f"block_size={cfg.block_size} is more than {cfg.init_from} was made "
                            f"for ({model.config.block_size})")
        return model
    n_ids = bins.tokenizer.n_ids
    try:
        return GPT(GPTConfig(
            vocab_size=-(-n_ids // 128) * 128, n_ids=n_ids, dropout=cfg.dropout,
            **{name: getattr(cfg, name) for name in SHAPE}))
    except ValueError as e:
        raise UserError(e) from e


def check_settings(cfg, words):
    """Words and numbers no run can use, refused before anything is loaded."""
    if words:
        raise UserError(f"'{words[0]}' is neither a config file (.py) nor a setting (--name=value)")
    for name in ("block_size", "batch_size", "gradient_accumulation_steps", "n_layer", "n_head",
                 "n_embd", "max_iters", "log_interval", "eval_interval", "checkpoint_interval",
                 "learning_rate"):
        if hasattr(cfg, name) and not 0 < getattr(cfg, name) < 2**63:
            raise UserError(f"{name}={getattr(cfg, name)} must be greater than 0")
    for name in ("seed", "n_kv_head", "n_inner", "eval_tokens", "muon_lr", "min_lr", "warmup_iters",
                 "weight_decay", "grad_clip"):
        if hasattr(cfg, name) and not 0 <= getattr(cfg, name) < 2**63:
            raise UserError(f"{name}={getattr(cfg, name)} must be 0 or more")
    for name in ("dropout", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)} is not a share between 0 and 1")
    if cfg.optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer={cfg.optimizer} is neither adamw nor muon")


def train(cfg, make_model, make_data, kind):
    """Train to cfg.max_iters; False if that was done already.

    make_model(cfg, bins) is called for a new run only, then make_data(cfg, bins, model) for the
    batches; kind is "base" or "chat".
    """
    machine = set_up_machine(cfg)
    bins = open_dataset(cfg.dataset, machine)
    checkpoint = find_checkpoint(cfg, bins)
    done = checkpoint and checkpoint["step"] >= cfg.max_iters
    if done and (Path(cfg.out_dir) / "final").is_dir():
        print(f"{cfg.out_dir} is finished at step {checkpoint['step']:,}. "
              "A larger --max_iters goes on; --overwrite begins anew")
        return False
    torch.manual_seed(cfg.seed)
    model = restore_model(cfg, checkpoint) if checkpoint else make_model(cfg, bins)
    Trainer(cfg, machine, model, make_data(cfg, bins, model), kind, checkpoint).run()
    return True


def open_dataset(name, machine):
    """The set or mixture; the embedded demo set is made on first use, by one process."""
    missing = not (Path("data") / name / "meta.json").is_file()
    if name in ("demo", "demo_chat") and missing and machine.main:
        import prepare
        print("preparing the embedded text")
        prepare.main(["demo"])
    if machine.world > 1:
        dist.barrier()
    return open_sets(name)


def main():
    cfg, words = configure(__file__)
    check_settings(cfg, words)

    def make_data(cfg, bins, model):
        return TextData(bins, cfg)

    if train(cfg, make_model, make_data, "base"):
        chat = "python sft.py config/demo_sft.py" if cfg.dataset == "demo" else (
            "python prepare.py chat PATH, then python sft.py config/sft_zh.py")
        print(f'\nnext:  python sample.py --start="数学是"\n       {chat}')


if __name__ == "__main__":
    run_main(main, __file__)

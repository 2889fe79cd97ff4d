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
dry_run = False           # print what the run will cost, time three steps, write nothing
wandb_log = False         # also to wandb (pip install wandb; WANDB_MODE=offline needs no network)
wandb_project = "xiaoyu"
tensorboard = False       # also to out_dir/tensorboard (pip install tensorboard)
sample_start = "数学是|长江"  # texts to continue at each evaluation, "|" between them
# ---- machine ----
device = "auto"           # cuda, cuda:1, mps, cpu; auto takes the first of these that is there
dtype = "auto"            # float32, bfloat16, float16; auto: 16 bits where hardware does them
compile = False           # torch.compile: worth its minute on a GPU
fsdp = False              # share weights and optimizer among the processes: models past one card

import math
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from config import UserError, configure, is_out_of_memory, run_main
from data.batches import TextData
from data.bins import open_sets
from engine import machine as machines
from engine.machine import StopWish, set_up_machine, to_device
from engine.plan import fit_micro_batch, print_plan
from engine.rundir import (
    SAMPLING, SHAPE, RunDir, checked, find_checkpoint, load_base, plot_losses, restore_model,
    saved_score)
from gpt import GPT, GPTConfig

LARGEST = 2**40  # of any setting; far beyond any run, and no 64-bit sum of rows overflows
TIMED_STEPS = 3  # before the first word on how long it will take; the step before them warms up


class Trainer:
    """Trains model on data from where checkpoint (a dict, or None) left off; see train()."""

    def __init__(self, cfg, machine, model, data, kind, checkpoint):
        self.cfg, self.machine, self.model, self.data, self.kind = cfg, machine, model, data, kind
        self.files = RunDir(cfg, kind, machine.main)
        self.parallel = machines.parallelize(model, machine)
        self.optimizers = model.configure_optimizers(
            cfg.optimizer, cfg.learning_rate, cfg.muon_lr, cfg.weight_decay, (cfg.beta1, cfg.beta2))
        self.scaler = torch.amp.GradScaler(machine.device.type,
                                           enabled=machine.dtype == torch.float16)
        self.step, self.best, self.losses, self.resumed_at = 0, math.inf, [], -1
        self.scores = {}
        self.timer = Timer(machine.device)
        self.start_clock()
        self.stop = StopWish()
        if checkpoint:
            self.restore(checkpoint)

    @checked()
    def restore(self, checkpoint):
        """Take up a checkpoint's state; rates and decay are this command's."""
        self.step = self.resumed_at = checkpoint["step"]
        self.best = min(checkpoint["best"], self.files.best_loss())
        self.losses = list(torch.tensor(checkpoint["losses"], device=self.machine.device))
        self.scores = checkpoint.get("scores", {})
        for opt, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            new = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
            machines.load_optimizer(opt, state)
            for group, settings in zip(opt.param_groups, new):
                group.update(settings)
        if checkpoint["scaler"]:  # else that run had none: it was not in float16
            self.scaler.load_state_dict(checkpoint["scaler"])

    def run(self):
        """Train to max_iters -> 0, or the number of the signal that ended it before."""
        with self.stop, self.files:
            return self.loop()

    def loop(self):
        cfg = self.cfg
        self.files.start(self.step, self.facts())
        self.start_clock()
        while True:
            done = self.step >= cfg.max_iters
            if self.step != self.resumed_at:  # else both were done before that checkpoint
                if self.step % cfg.eval_interval == 0 or done:
                    self.evaluate()
                if self.step and (self.step % cfg.checkpoint_interval == 0 or done):
                    self.save_checkpoint()
            if done:
                return self.finish()
            if self.stop.agreed(self.machine) or not self.take_step():
                return self.leave()
            if self.step % cfg.log_interval == 0 or self.step == cfg.max_iters:
                self.log_training()
            if self.step == self.first + 1 + TIMED_STEPS:
                self.print_time()

    def take_step(self):
        """train_step, counted; False where it was given up."""
        result = self.train_step()
        if result is None:
            return False
        loss, self.norm = result
        self.losses.append(loss)
        self.step += 1
        if self.step == self.first + 1:
            machines.wait_for(self.machine.device)
            self.warm = self.timer.now()
        return True

    def leave(self):
        """Save where the run stands, say how it goes on -> the signal's number."""
        number = self.stop.agreed(self.machine)
        if self.step != self.resumed_at and self.step:
            self.save_checkpoint()
        words = [w for w in sys.argv if w.partition("=")[0] != "--overwrite"
                 and w != "--init_from=scratch"]  # either would begin anew
        how = ("the same torchrun command, without --overwrite" if self.machine.world > 1 else
               f"python {shlex.join(words)}")
        print(f"stopped at step {self.step:,}. Go on with:  {how}")
        return number

    def train_step(self):
        """One optimizer step -> its mean loss and gradient norm, as tensors; None where a lone
        process was asked to stop, before anything has changed."""
        cfg, m = self.cfg, self.machine
        n, total = self.data.n_trained(self.step), torch.zeros((), device=m.device)
        micros = range(m.rank, cfg.gradient_accumulation_steps, m.world)
        for micro in micros:
            if self.stop.received and m.world == 1:
                return self.model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            batch = [to_device(t, m.device) for t in self.data.batch(self.step, micro)]
            self.waited += time.perf_counter() - began
            # dropout is a function of (seed, step, micro-batch), so no random state need be saved
            torch.manual_seed(((cfg.seed * 1_000_003 + self.step) * 1_000_003 + micro) % 2**63)
            machines.share_gradients(self.parallel, micro == micros[-1])
            with m.autocast():
                loss, _ = self.parallel(*batch)
            # gradients are averaged over processes: world makes that the sum again
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
        norm = norm.full_tensor() if self.machine.fsdp else norm
        # under float16 an overflow anywhere skips both optimizers, or one would run ahead
        if not self.scaler.is_enabled() or norm.isfinite():
            for opt in self.optimizers:
                opt.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def evaluate(self):
        """Val loss over the same tokens each time, shared by all processes; the best is kept."""
        with self.timer.paused():
            self.model.eval()
            self.scores = scores = self.data.scores(self.val_loss())
            if not math.isfinite(scores["val_loss"]):
                raise UserError(f"val loss after step {self.step} is {scores['val_loss']}: lower "
                                "learning_rate or muon_lr")
            better = scores["val_loss"] < self.best
            self.best = min(self.best, scores["val_loss"])
            better = better and self.step > 0  # the untrained model is only what there is to beat
            if better:
                self.save_model("best")
            shown = "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
            self.log(scores, f"{shown}{'  (best)' if better else ''}")
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
                self.print_samples()
            self.model.train()

    def val_loss(self):
        """Mean over all tokens of all val batches, in nats."""
        m, sums = self.machine, torch.zeros(2, dtype=torch.float64)
        for batch in machines.shared_out(self.data.val_batches(), m):
            with m.autocast():
                loss, n = self.model(*(to_device(t, m.device) for t in batch))
            sums += torch.tensor([loss.item(), n.item()])
        if m.world > 1:
            dist.all_reduce(sums, group=m.cpu_group)
        return (sums[0] / sums[1]).item()

    def print_samples(self):
        """Continue each prompt; a sharded model needs all processes for it."""
        tok = self.data.tokenizer
        for shown, ids in self.data.prompts() if self.machine.main or self.machine.fsdp else ():
            ids = torch.tensor([ids], device=self.machine.device)
            ids = ids[:, -self.model.config.block_size:]
            with self.machine.autocast():
                new = [t.item() for t in self.model.generate(
                    ids, 48, seed=self.cfg.seed, stop_ids=(tok.eot, tok.im_end),
                    **SAMPLING[self.kind])]
            raw = tok.decode_bytes([i for i in new if i not in (tok.eot, tok.im_end)])
            text = " ".join(raw.decode("utf-8", errors="ignore").split())
            print(f"    {shown} > {text}")

    # ---- watching ----

    def start_clock(self):
        self.first = self.logged = self.step
        self.began = self.mark = self.timer.now()
        self.waited = 0.0

    def log(self, values, shown):
        tokens = dict(tokens=self.data.tokens_read(self.step))
        self.files.log(self.step, tokens | values, shown)

    def speed(self, first, seconds):
        """Tokens per second of the steps since `first`."""
        return (self.data.tokens_read(self.step) - self.data.tokens_read(first)) / seconds

    def log_training(self):
        """Mean loss since the last log, speed and the time to go; a GPU is waited for only here."""
        loss, norm = self.mean_loss(), self.norm.item()
        seconds = max(self.timer.now() - self.mark, 1e-9)
        speed = self.speed(self.logged, seconds)
        left = seconds / (self.step - self.logged) * (self.cfg.max_iters - self.step)
        rate = self.cfg.learning_rate * lr_factor(self.step - 1, self.cfg)
        values = dict(loss=loss, lr=rate, grad_norm=norm, tokens_per_second=round(speed, 1),
                      memory_gib=round(machines.peak_memory(self.machine.device) / 2**30, 3),
                      data_wait=round(self.waited / seconds, 4))
        shown = (f"loss {loss:.4f}  lr {rate:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s  "
                 f"{clock(left)} to go")
        peak = machines.peak_flops(self.machine)
        if peak:
            values["mfu"] = speed * self.model.flops_per_token(self.cfg.block_size) / peak
            shown += f"  mfu {values['mfu']:.1%}"
        self.log(values, shown)
        self.losses, self.logged, self.mark, self.waited = [], self.step, self.timer.now(), 0.0

    def mean_loss(self):
        """Mean training loss since the last log, over all processes.

        The run ends where that, or the gradient, is not finite (float16 skips such a step instead),
        and where it is worse than twice a guess among all words.
        """
        losses = torch.stack(self.losses)
        if self.machine.world > 1:
            dist.all_reduce(losses)
            losses /= self.machine.world
            self.losses = list(losses)  # what a checkpoint keeps is of all processes
        limit = 2 * math.log(self.model.config.vocab_size)
        sound = losses.mean() < limit and (self.scaler.is_enabled() or self.norm.isfinite())
        if not sound:
            bad = [i for i, loss in enumerate(losses.tolist()) if not loss < limit] or [-1]
            step = self.step - len(losses) + range(len(losses))[bad[0]]
            raise UserError(
                f"step {step + 1} went wrong: loss {losses[bad[0]].item():.4g}, gradient norm at "
                f"step {self.step} {self.norm.item():.4g}; it read {self.data.where(step)}. Lower "
                f"learning_rate or muon_lr; what {self.files.path} keeps is from before it")
        return losses.mean().item()

    def print_time(self):
        """The time the rest will take, from the first timed steps; evaluations come on top."""
        machines.wait_for(self.machine.device)
        seconds = max(self.timer.now() - self.warm, 1e-9)
        left = seconds / TIMED_STEPS * (self.cfg.max_iters - self.step)
        memory = machines.peak_memory(self.machine.device) / 2**30
        print(f"measured: {self.speed(self.first + 1, seconds):,.0f} tokens/s"
              f"{f', {memory:.2f} GiB a process' * (memory > 0)}; {clock(left)} to finish",
              flush=True)

    def dry_run(self):
        """Time a few steps and forget them."""
        self.start_clock()
        for _ in range(1 + TIMED_STEPS):
            self.take_step()
        self.mean_loss()
        self.print_time()
        print("dry_run: nothing was trained, out_dir is as it was")
        return 0

    # ---- files ----

    def facts(self, **more):
        """What run.json tells of this run beside its settings."""
        return dict(data=self.data.bins.fingerprint(), model=asdict(self.model.config),
                    tokenizer=self.data.tokenizer.fingerprint, device=str(self.machine.device),
                    dtype=str(self.machine.dtype), processes=self.machine.world,
                    launches=self.machine.launches, **more)

    def save_checkpoint(self):
        """All that the next step depends on, but for what (seed, step) decide."""
        with self.timer.paused():
            if self.losses:
                self.mean_loss()  # what is not finite is not kept
            state = dict(model=self.model.state_dict(),
                         optimizers=[opt.state_dict() for opt in self.optimizers])
            self.files.save_checkpoint(machines.whole(state, self.machine.main) | dict(
                step=self.step, best=self.best, losses=[loss.item() for loss in self.losses],
                scores=self.scores, cfg=vars(self.cfg), data=self.data.bins.fingerprint(),
                model_config=asdict(self.model.config), scaler=self.scaler.state_dict()))

    def save_model(self, name):
        weights = machines.whole(self.model.state_dict(), self.machine.main)
        self.files.save_model(name, self.model, weights, self.data.tokenizer,
                              dict(step=self.step) | self.scores)

    def finish(self):
        speed = self.speed(self.first, max(self.timer.now() - self.began, 1e-9))
        self.save_model("final")
        if self.machine.main:
            self.files.write_facts(self.facts(finished=self.step, best_val_loss=self.best,
                                              tokens_per_second=round(speed, 1)))
            plot_losses(self.files.path)
        return 0


class Timer:
    """A clock of training alone: it stands still during evaluation and saving."""

    def __init__(self, device):
        self.device, self.lost = device, 0.0

    def now(self):
        """Seconds since some moment."""
        return time.perf_counter() - self.lost

    @contextmanager
    def paused(self):
        machines.wait_for(self.device)  # the steps before it are not done yet
        began = time.perf_counter()
        yield
        self.lost += time.perf_counter() - began


def lr_factor(step, cfg):
    """Share of the peak rate at a step: linear warmup, then a cosine down to min_lr's share."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    floor = cfg.min_lr / cfg.learning_rate
    progress = min(1.0, (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def clock(seconds):
    """Hours, minutes and seconds as a watch shows them."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ---- starting ----

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
        if hasattr(cfg, name) and not 0 < getattr(cfg, name) < LARGEST:
            raise UserError(f"{name}={getattr(cfg, name)} must be greater than 0 and below 2^40")
    for name in ("seed", "n_kv_head", "n_inner", "eval_tokens", "muon_lr", "min_lr", "warmup_iters",
                 "weight_decay", "grad_clip"):
        if hasattr(cfg, name) and not 0 <= getattr(cfg, name) < LARGEST:
            raise UserError(f"{name}={getattr(cfg, name)} must be 0 or more and below 2^40")
    for name in ("dropout", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)} is not a share between 0 and 1")
    if cfg.min_lr > cfg.learning_rate:
        raise UserError(f"min_lr={cfg.min_lr} is more than learning_rate={cfg.learning_rate}")
    if not cfg.out_dir.strip() or "\0" in cfg.out_dir:
        raise UserError(f"out_dir={cfg.out_dir!r}: name the folder of the run")
    if cfg.optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer={cfg.optimizer} is neither adamw nor muon")


def train(cfg, make_model, make_data, kind):
    """Train to cfg.max_iters; False if that was done already, or only tried.

    make_model(cfg, bins) is called for a new run only, then make_data(cfg, bins, model) for the
    batches; kind is "base" or "chat".
    """
    machine = set_up_machine(cfg)
    bins = open_dataset(cfg.dataset, machine)
    checkpoint = find_checkpoint(cfg, bins, machine)
    step = checkpoint["step"] if checkpoint else 0
    finished = step >= cfg.max_iters and saved_score(Path(cfg.out_dir) / "final", "step") == step
    if machines.largest(finished and machine.main, machine):
        machines.leave_group()
        print(f"{cfg.out_dir} is finished at step {step:,}. "
              "A larger --max_iters goes on; --overwrite begins anew")
        return False
    torch.manual_seed(cfg.seed)
    model = restore_model(cfg, checkpoint) if checkpoint else make_model(cfg, bins)
    data = make_data(cfg, bins, model)
    try:
        print_plan(cfg, machine, model, data, step, kind)
        model.to(machine.device)
        if cfg.compile:
            model.compile_parts()
        fit_micro_batch(cfg, machine, model, data)
        trainer = Trainer(cfg, machine, model, data, kind, checkpoint)
        del checkpoint  # its file stays open as long
        stopped_by = trainer.dry_run() if cfg.dry_run else trainer.run()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        raise UserError(f"{machine.device} is out of memory: halve batch_size={cfg.batch_size} and "
                        f"double gradient_accumulation_steps={cfg.gradient_accumulation_steps}; "
                        "the same command goes on from the last checkpoint") from e
    machines.leave_group()
    if stopped_by:
        sys.exit(128 + stopped_by)
    return not cfg.dry_run


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

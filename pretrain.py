"""Train a base model on a prepared set: the settings, the step and the loop, which sft.py shares.

    python pretrain.py config/demo.py                        # five minutes on a laptop, no network
    python pretrain.py config/pretrain_zh.py --batch_size=8
    torchrun --nproc_per_node=8 pretrain.py config/pretrain_zh.py

The same command resumes from the newest checkpoint. Ctrl-C saves one first.
"""
# ---- run ----
out_dir = "out/pretrain"  # folder for checkpoints, log.jsonl, best/ and final/
init_from = "auto"        # auto: resume out_dir, else a new model; scratch; xiaoyu, a folder or
#                         hub id: start from that model
overwrite = False         # let a new run replace the one in out_dir
size = ""                 # auto: start, shape, steps and rates that suit the set, but for those
#                         that a config file or the command line sets (training/estimate.py)
seed = 1337               # of the initial weights, the order of the data and dropout
# ---- data ----
dataset = "wiki"          # folder under data/; or several with weights: "wiki:0.7,thucnews:0.3".
#                         Dialogues may be among them, but validation is on the texts
block_size = 256          # tokens of context
batch_size = 8            # sequences per micro-batch and per process
gradient_accumulation_steps = 32  # micro-batches per step over all processes: 8 * 32 * 256 = 65,536
# ---- model ----
arch = "gpt2"             # gpt2 or qwen3 (gpt.py)
n_layer = 12              # blocks
n_head = 12               # attention heads; n_embd must be a multiple
n_kv_head = 0             # qwen3: heads of keys and values; 0 = n_head
n_embd = 768              # width of the residual stream
n_inner = 0               # width inside the MLP; 0 = 4 n_embd (gpt2), 8/3 n_embd (qwen3)
dropout = 0.0             # 0 for one epoch; 0.1 and more for many
bias = True               # gpt2: biases in linear layers and norms
qkv_bias = False          # qwen3: biases of q, k and v; with qk_norm = False it is Qwen2's shape
qk_norm = True            # qwen3: norms of q and k; without them and qkv_bias it is Llama's shape
# ---- optimizer ----
optimizer = "adamw"       # adamw, or muon for the blocks' matrices and adamw for the rest
learning_rate = 6e-4      # AdamW's peak rate
muon_lr = 2e-3            # Muon's peak rate; it rises and falls by the same factors
min_lr = -1.0             # AdamW's final rate; -1, or more than learning_rate: a tenth of that
warmup_iters = 200        # steps of linear warmup; cosine decay from there to max_iters
max_iters = 10_000        # steps
weight_decay = 0.1        # on the blocks' matrices
beta1 = 0.9               # decay rate of AdamW's mean of gradients
beta2 = 0.95              # decay rate of AdamW's mean of squared gradients
grad_clip = 1.0           # largest norm of the gradient; 0 = no limit
# ---- watching ----
log_interval = 10         # steps
eval_interval = 250       # steps between evaluations, with samples; a new best goes to best/
eval_tokens = 262_144     # the first tokens of val.bin that are evaluated; 0 = all
checkpoint_interval = 250  # steps between checkpoints
keep_checkpoints = 2      # the newest so many are kept; 0 = all
keep_steps = ""           # steps with a checkpoint that is never removed: "10000|60000"
dry_run = False           # print the estimate, time micro-batches, leave out_dir unchanged
wandb_log = False         # also to wandb (pip install wandb; WANDB_MODE=offline needs no network)
wandb_project = "xiaoyu"  # name of the project on wandb
tensorboard = False       # also to out_dir/tensorboard (pip install tensorboard)
sample_start = ""         # texts to continue at each evaluation, "a|b"; "": the first of val.bin
# ---- device ----
device = "auto"           # cuda, cuda:1, mps, cpu; auto takes the first of these that is there
dtype = "auto"            # float32, bfloat16, float16; auto: 16 bits where the hardware has them
compile = False           # torch.compile: worth its minute on a GPU
recompute = False         # keep only the blocks' inputs for the backward pass, compute the rest
#                         twice: a third of the memory of activations or less, 1.4 times the time
fsdp = False              # shard weights and optimizer state over the processes (FSDP2)

import math
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec

from common.command_line import UserError, run_main  # first: reports Ctrl-C

import torch

from common.device import to_device
from common.settings import check_ranges, configure
from models.hf import SAMPLING, save_model, saved_value
from tokens.batches import TextData
from tokens.bins import open_sets
from tokens.demo import demo_sets, prepare_demo
from training.checkpoint import (
    SHAPE, find_checkpoint, incompatible_as_user_error, is_finished, restore_model,
    save_checkpoint, steps_to_keep)
from training.context import GracefulStop, end_together, init_context, resume_command
from training.estimate import (
    avoidable_errors, choose_settings, fit_micro_batch, new_model, print_plan)
from training.lora import merged_weights
from training.optim import configure_optimizers, load_optimizer_state, lr_factor
from training.progress import Progress
from training.runlog import RunLog, visible

MAX, TINY, BELOW_1 = 2**40, 1e-30, 1 - 1e-9
RANGES = dict(  # of the numeric settings, both ends included; no real run comes near the upper ones
    seed=(0, MAX), block_size=(2, 2**24), batch_size=(1, 2**20),
    gradient_accumulation_steps=(1, 2**20), n_layer=(1, 1000), n_head=(1, 2**16),
    n_kv_head=(0, 2**16), n_embd=(1, 2**17), n_inner=(0, 2**20), dropout=(0, BELOW_1),
    learning_rate=(TINY, MAX), muon_lr=(0, MAX), min_lr=(-MAX, MAX), warmup_iters=(0, MAX),
    max_iters=(1, MAX), weight_decay=(0, MAX), beta1=(0, BELOW_1), beta2=(0, BELOW_1),
    grad_clip=(0, MAX), log_interval=(1, MAX), eval_interval=(1, MAX), eval_tokens=(0, MAX),
    checkpoint_interval=(1, MAX), keep_checkpoints=(0, MAX))


# ---- the model ----

def make_model(cfg, bins):
    """Return a new model for bins, or the one that init_from names."""
    if cfg.init_from not in ("auto", "scratch"):
        from models.folders import find_model, load_base_model  # here: a new model needs none
        path = find_model(cfg.init_from, "base", "init_from")
        model = load_base_model(path, bins, cfg.dropout, cfg.block_size)
        if cfg.block_size > model.config.block_size:
            raise UserError(f"block_size={cfg.block_size} is more than {cfg.init_from} was made "
                            f"for ({model.config.block_size})")
        return model
    tok = bins.tokenizer
    return new_model(
        vocab_size=tok.vocab_size, padded_vocab_size=tok.padded_vocab_size,
        dropout=cfg.dropout, **{name: getattr(cfg, name) for name in SHAPE})


# ---- the loop ----

class Trainer:
    """Train model on data, resuming from checkpoint (a dict) if there is one; see train()."""

    def __init__(self, cfg, ctx, model, data, kind, checkpoint):
        self.cfg, self.ctx, self.model, self.data, self.kind = cfg, ctx, model, data, kind
        self.runlog, self.stop = RunLog(cfg, kind), GracefulStop()
        self.progress = Progress(cfg, ctx, model, data, self.runlog)
        self.wrapped = ctx.wrap(model)  # DDP or FSDP; the model itself for one process
        self.optimizers = configure_optimizers(
            model, cfg.optimizer, cfg.learning_rate, cfg.muon_lr, cfg.weight_decay,
            (cfg.beta1, cfg.beta2))
        # float16 needs its loss scaled, or small gradients underflow
        self.scaler = torch.amp.GradScaler(ctx.device.type, enabled=ctx.dtype == torch.float16)
        self.step, self.evaluated, self.saved = 0, -1, -1  # steps: now, last evaluated, last saved
        self.best, self.scores = math.inf, {}  # lowest val loss; scores of the last evaluation
        self.keep_steps = steps_to_keep(cfg)
        if checkpoint:
            self.restore(checkpoint)
        self.progress.start(self.step)

    def run(self):
        """Train to max_iters; return 0, or the number of the signal that stopped the run."""
        cfg = self.cfg
        with self.stop, self.runlog:
            if self.ctx.is_main:
                with self.progress.timer.paused():
                    self.runlog.start(self.step, self.metadata())
            while True:
                if self.is_due(cfg.eval_interval, self.evaluated): self.evaluate()
                if self.step and self.is_due(cfg.checkpoint_interval, self.saved, self.keep_steps):
                    self.save_checkpoint()
                if self.step >= cfg.max_iters: return self.finish()
                if self.ctx.max(self.stop.received) or not self.advance(): return self.leave()
                if self.step % cfg.log_interval == 0 or self.step == cfg.max_iters:
                    self.progress.log(self.step)

    def is_due(self, interval, done, steps=()):
        """Return whether to act now: at every interval, at steps and at the end, once; done is the
        step at which it was done last."""
        at_end = self.step >= self.cfg.max_iters
        return self.step != done and (self.step % interval == 0 or at_end or self.step in steps)

    def advance(self):
        """Make a step and count it; return False if it was left unfinished."""
        if (result := self.train_step()) is None:
            return False
        self.step += 1
        loss, self.progress.norm = result
        self.progress.losses.append(loss)
        return True

    def train_step(self):
        """Make one optimizer step; return its mean loss and gradient norm, as tensors.

        Return None, and change nothing, if a signal arrived in a single process or a dry run has
        timed enough micro-batches.
        """
        cfg, ctx = self.cfg, self.ctx
        n_trained = self.data.n_trained(self.step)  # tokens of the whole step, on all ranks
        total = torch.zeros((), device=ctx.device)
        micro_batches = range(ctx.rank, cfg.gradient_accumulation_steps, ctx.world_size)
        for micro in micro_batches:
            if (self.stop.received and ctx.world_size == 1
                    or cfg.dry_run and self.progress.is_measured()):
                self.model.zero_grad(set_to_none=True)
                return None
            began = time.perf_counter()
            batch = [to_device(t, ctx.device) for t in self.data.batch(self.step, micro)]
            self.progress.data_seconds += time.perf_counter() - began
            # dropout is a function of (seed, step, micro-batch): no random state need be saved
            torch.manual_seed(((cfg.seed * 1_000_003 + self.step) * 1_000_003 + micro) % 2**63)
            # DDP reduces gradients in the last backward only: all that its no_sync() does
            self.wrapped.require_backward_grad_sync = micro == micro_batches[-1]
            with ctx.autocast():
                loss_sum, _ = self.wrapped(*batch)
            # DDP and FSDP average over the ranks; world_size turns the mean back into the sum
            self.scaler.scale(loss_sum * (ctx.world_size / n_trained)).backward()
            total += loss_sum.detach()  # stays on the device: no synchronisation
            self.progress.add_micro_batch()
        return total * ctx.world_size / n_trained, self.update()

    def update(self):
        """Clip the gradient, step every optimizer at this step's rate; return the norm."""
        factor = lr_factor(self.step, self.cfg)
        for opt in self.optimizers:
            self.scaler.unscale_(opt)
            for group in opt.param_groups:
                group["lr"] = group["peak_lr"] * factor  # one schedule for AdamW and Muon
        limit = self.cfg.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if self.ctx.fsdp else norm
        # float16: if any gradient overflowed, skip all optimizers, so that they stay in step
        if not self.scaler.is_enabled() or norm.isfinite():
            for opt in self.optimizers:
                opt.step()
        self.scaler.update()  # of its scale; does nothing unless in float16
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)  # None: memory is free until the next backward
        return norm

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self):
        """Log the val loss and print samples; save the model to best/ if the loss is the lowest."""
        with self.progress.timer.paused():
            self.model.eval()  # no dropout
            self.scores, self.evaluated = self.data.scores(self.val_loss(self.data)), self.step
            if self.data.base:  # fine-tuning: what it forgets
                base = self.data.base
                self.scores["base_bpc"] = base.scores(self.val_loss(base))["bpc"]
            loss = self.scores["val_loss"]
            if not math.isfinite(loss):
                raise UserError(f"val loss after step {self.step} is {loss}: lower learning_rate "
                                "or muon_lr")
            is_best = loss < self.best and self.step > 0  # never save the untrained model as best
            self.best = min(self.best, loss)
            if is_best:
                self.save_model("best")
            text = "  ".join(f"{name} {score:.4f}" for name, score in self.scores.items())
            self.runlog.log(self.step, dict(tokens=self.data.tokens_read(self.step)) | self.scores,
                            text + "  (best)" * is_best)
            with torch.compiler.set_stance("force_eager"):  # don't compile for each sample's length
                self.print_samples()
            self.model.train()

    def val_loss(self, data):
        """Return the mean loss over data's val tokens in nats; each rank evaluates its share."""
        ctx, sums = self.ctx, torch.zeros(2, dtype=torch.float64)
        for batch in ctx.share(data.val_batches()):
            with ctx.autocast():
                loss_sum, n = self.model(*(to_device(t, ctx.device) for t in batch))
            sums += torch.tensor([loss_sum.item(), n.item()])
        sums = ctx.sum(sums)
        return (sums[0] / sums[1]).item()

    def print_samples(self):
        """Continue each prompt up to a control token; with FSDP all ranks must take part."""
        tok = self.data.tokenizer
        if not (self.ctx.is_main or self.ctx.fsdp):
            return
        for prompt, ids in self.data.prompts():
            ids, controls = torch.tensor([ids], device=self.ctx.device), set(tok.specials.values())
            with self.ctx.autocast():
                new = [t.item() for t in self.model.generate(
                    ids[:, -self.model.config.block_size:], 48, seed=self.cfg.seed,
                    stop_ids=controls, **SAMPLING[self.kind])]
            raw = tok.decode_bytes([i for i in new if i not in controls])
            print(f"    {visible(prompt)} > {visible(raw.decode(errors='ignore'))}")

    # ---- files ----

    @incompatible_as_user_error()
    def restore(self, checkpoint):
        """Restore a checkpoint's state; learning rates and weight decay are this command's."""
        self.step = self.saved = checkpoint["step"]
        self.scores = checkpoint.get("scores", {})  # older checkpoints lack it and "evaluated"
        self.evaluated = checkpoint.get("evaluated", self.step if self.scores else -1)
        saved = saved_value(self.runlog.path / "best", "val_loss")
        self.best = min(checkpoint["best"], math.inf if saved is None else saved)
        self.progress.losses = list(torch.tensor(checkpoint["losses"], device=self.ctx.device))
        for opt, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            load_optimizer_state(opt, state, self.step, self.ctx)
        if checkpoint["scaler"]:  # empty unless that run used float16
            self.scaler.load_state_dict(checkpoint["scaler"])

    def metadata(self, **more):
        """Return what run.json holds in addition to the settings."""
        ctx = self.ctx
        return dict(data=self.data.bins.fingerprint(), model=asdict(self.model.config),
                    tokenizer=self.data.tokenizer.fingerprint, device=str(ctx.device),
                    dtype=str(ctx.dtype), processes=ctx.world_size,
                    row_length=self.data.row_length,
                    launches=sorted(ctx.launches), **more)

    def save_checkpoint(self):
        """Save all that the next step depends on and (seed, step) do not decide."""
        with self.progress.timer.paused():
            if self.progress.losses:
                self.progress.mean_loss(self.step)  # refuses a loss that is not finite
            trained = {name: p.detach() for name, p in self.model.named_parameters()
                       if p.requires_grad}  # all; with adapters (training/lora.py) these
            state = self.ctx.gather(dict(
                model=trained,
                optimizers=[opt.state_dict() for opt in self.optimizers]))
            if self.ctx.is_main:
                save_checkpoint(self.cfg, state | dict(
                    step=self.step, best=self.best, scores=self.scores, evaluated=self.evaluated,
                    losses=[loss.item() for loss in self.progress.losses],  # since the last log
                    cfg=vars(self.cfg), kind=self.kind, lora=self.model.lora,
                    data=self.data.bins.fingerprint(), row_length=self.data.row_length,
                    scaler=self.scaler.state_dict(), model_config=asdict(self.model.config)))
            self.saved = self.step

    def save_model(self, name):
        """Save the model to best/ or final/."""
        weights = self.ctx.gather(merged_weights(self.model))
        if self.ctx.is_main:
            save_model(self.runlog.path / name, self.model, weights, self.data.tokenizer,
                       self.kind, dict(step=self.step) | self.scores)

    def finish(self):
        """Save final/, run.json and the curve; return 0."""
        with self.progress.timer.paused():
            self.save_model("final")
        if self.ctx.is_main:
            speed = self.progress.speed(self.progress.first, self.step)
            self.runlog.write_metadata(self.metadata(
                finished=self.step, best_val_loss=self.best, tokens_per_second=round(speed, 1)))
            from training.trackers import plot_losses
            plot_losses(self.runlog.path)
        return 0

    def leave(self):
        """Save a checkpoint, print how to resume; return the number of the signal."""
        number = self.ctx.max(self.stop.received)
        if self.step not in (0, self.saved):
            self.save_checkpoint()
        print(f"stopped at step {self.step:,}. Resume with:  {resume_command(self.ctx)}")
        return number

    def dry_run(self):
        """Time a few micro-batches, leave out_dir unchanged; return 0."""
        while self.advance(): pass
        print("dry_run: out_dir is unchanged")
        return 0


# ---- starting ----

def check_settings(cfg, words, ranges=RANGES):
    """Validate the settings before anything is loaded."""
    if words:
        raise UserError(f"'{words[0]}' is neither a config file (.py) nor a setting (--name=value)")
    check_ranges(cfg, ranges)
    steps_to_keep(cfg)
    for name in ("out_dir", "dataset", "init_from"):
        if not getattr(cfg, name).strip() or "\0" in getattr(cfg, name):
            raise UserError(f"{name}={getattr(cfg, name)!r} names nothing")
    if cfg.size not in ("", "auto"):
        raise UserError(f"size={cfg.size} is neither empty nor auto")
    if cfg.optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer={cfg.optimizer} is neither adamw nor muon")
    for name, package in (("wandb_log", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(cfg, name) and not find_spec(package):
            raise UserError(f"--{name} needs {package}: pip install {package}")


def train(cfg, make_model, make_data, kind):
    """Train to cfg.max_iters; return False if it was finished already, or for a dry run.

    make_model(cfg, bins) is called for a new run only, make_data(bins, cfg) makes the batches; kind
    is "base" or "chat".
    """
    ctx = init_context(cfg)
    if ctx.is_main:
        prepare_demo(cfg.dataset)
    ctx.max(0)  # the other processes wait here for the main one
    bins = open_sets(cfg.dataset)
    if cfg.size:
        choose_settings(cfg, kind, bins)
    checkpoint = find_checkpoint(cfg, bins, ctx)
    step = checkpoint["step"] if checkpoint else 0
    if ctx.max(ctx.is_main and is_finished(cfg, step)):
        print(f"{cfg.out_dir} is finished at step {step:,}. A larger --max_iters continues it; "
              "--overwrite starts a new run")
        return False
    torch.manual_seed(cfg.seed)  # of the initial weights
    model = restore_model(cfg, checkpoint) if checkpoint else make_model(cfg, bins)
    cfg.block_size = cfg.block_size or model.config.block_size  # 0 in sft.py
    data = make_data(bins, cfg)
    with avoidable_errors(cfg, ctx):
        model.recompute = cfg.recompute
        ctx.store_frozen(model)
        print_plan(cfg, ctx, model, data, step)
        model.to(ctx.device)
        if cfg.compile:
            model.compile_parts()
        fit_micro_batch(cfg, ctx, model, data)
        trainer = Trainer(cfg, ctx, model, data, kind, checkpoint)
        del checkpoint  # closes its file
        stopped_by = trainer.dry_run() if cfg.dry_run else trainer.run()
    if stopped_by:
        sys.exit(128 + stopped_by)
    return not cfg.dry_run


@end_together
def main():
    """Pretrain as the command line says."""
    cfg, words = configure(__file__)
    check_settings(cfg, words)
    if train(cfg, make_model, TextData, "base"):
        chat = "python sft.py config/demo_sft.py" if demo_sets(cfg.dataset) else (
            "python prepare.py chat PATH, then python sft.py config/sft_zh.py")
        print(f'\nnext:  python sample.py --start="数学是"\n       {chat}')


if __name__ == "__main__":
    run_main(main, __file__)

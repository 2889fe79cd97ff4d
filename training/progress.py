"""Progress of a run: mean loss, gradient norm, speed, time left."""
import math
import time
from contextlib import contextmanager

import torch

from common.command_line import UserError
from common.device import peak_flops, peak_memory, synchronize
from training.checkpoint import checkpoint_files
from training.optim import lr_factor

TIMED = 2  # micro-batches timed for the first estimate, after one warm-up


class Timer:
    """A clock of training time: evaluation and saving are not counted."""

    def __init__(self, device):
        self.device, self.paused_seconds = device, 0.0

    def now(self):
        return time.perf_counter() - self.paused_seconds

    def since(self, began):
        """Return the seconds since began, at least 1e-9, so that they can divide."""
        return max(self.now() - began, 1e-9)

    @contextmanager
    def paused(self):
        synchronize(self.device)  # queued steps are training time
        began = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - began


class Progress:
    """Collect losses and norms of the steps, as tensors on the device; log their mean and speed."""

    def __init__(self, cfg, ctx, model, data, runlog):
        self.cfg, self.ctx, self.model, self.data, self.runlog = cfg, ctx, model, data, runlog
        self.timer, self.losses, self.norm = Timer(ctx.device), [], None
        self.start(0)

    def start(self, step):
        """Start the clock at a step."""
        self.first = self.last = step, self.timer.now()  # of the run; of the last log
        self.data_seconds, self.n_micro_batches = 0.0, 0

    def is_measured(self):
        """Return whether enough micro-batches were timed for the first estimate."""
        return self.n_micro_batches > TIMED

    def add_micro_batch(self):
        """Count a micro-batch; after a few of them print how long training will take."""
        self.n_micro_batches += 1
        if self.n_micro_batches == 1:  # not timed: it compiles and allocates
            synchronize(self.ctx.device)
            self.warm_time = self.timer.now()
        if self.n_micro_batches != TIMED + 1:
            return
        synchronize(self.ctx.device)
        first, last, n_ranks = self.first[0], self.cfg.max_iters, self.ctx.world_size
        n = (last - first) * self.cfg.gradient_accumulation_steps // n_ranks  # micro-batches
        seconds = self.timer.since(self.warm_time) / TIMED * n
        tokens = self.data.tokens_read(last) - self.data.tokens_read(first)
        memory = peak_memory(self.ctx.device) / 2**30
        print(f"measured: {tokens / seconds:,.0f} tokens/s"
              f"{f', {memory:.2f} GiB a process' * (memory > 0)}; {clock(seconds)} to finish, "
              "evaluations not counted", flush=True)

    def speed(self, since, step):
        """Return tokens per second from since, (a step, its time), to step."""
        tokens = self.data.tokens_read(step) - self.data.tokens_read(since[0])
        return tokens / self.timer.since(since[1])

    def log(self, step):
        """Log the steps since the last log; here the CPU waits for a GPU."""
        loss, norm = self.mean_loss(step), self.norm.item()
        speed, seconds = self.speed(self.last, step), self.timer.since(self.last[1])
        left = seconds / (step - self.last[0]) * (self.cfg.max_iters - step)
        rate = self.cfg.learning_rate * lr_factor(step - 1, self.cfg)
        values = dict(loss=loss, lr=rate, grad_norm=norm, tokens_per_second=round(speed, 1),
                      memory_gib=round(peak_memory(self.ctx.device) / 2**30, 3),
                      data_wait=round(self.data_seconds / seconds, 4))
        text = (f"loss {loss:.4f}  lr {rate:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s  "
                f"{clock(left)} to go")
        peak = peak_flops(self.ctx.device, self.ctx.dtype, self.ctx.world_size)
        if peak:
            values["mfu"] = speed * self.model.flops_per_token(self.data.row_length) / peak
            text += f"  mfu {values['mfu']:.1%}"
        self.runlog.log(step, dict(tokens=self.data.tokens_read(step)) | values, text)
        self.losses, self.last, self.data_seconds = [], (step, self.timer.now()), 0.0

    def mean_loss(self, step):
        """Return the mean loss since the last log, over all ranks.

        UserError: a loss is more than twice that of guessing among all ids, or a loss or gradient
        is not finite (float16 skips such a step instead).
        """
        losses = torch.stack(self.losses)
        losses = self.ctx.sum(losses) / self.ctx.world_size
        self.losses = list(losses)  # a checkpoint keeps the mean of all ranks
        limit = 2 * math.log(self.model.config.padded_vocab_size)
        skips = self.ctx.dtype == torch.float16
        if not losses.mean() < limit or not (skips or self.norm.isfinite()):
            i = next((i for i, x in enumerate(losses.tolist()) if not x < limit), len(losses) - 1)
            bad_step = step - len(losses) + i
            start = "starts again" if not checkpoint_files(self.runlog.path) else (
                f"resumes from the last checkpoint in {self.runlog.path}, from before it")
            raise UserError(
                f"step {bad_step + 1} diverged: loss {losses[i].item():.4g}, gradient norm "
                f"at step {step} {self.norm.item():.4g}; it read {self.data.describe(bad_step)}. "
                f"Lower learning_rate or muon_lr: the same command then {start}")
        return losses.mean().item()


def clock(seconds):
    """Format seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

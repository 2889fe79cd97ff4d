"""What a run shows of its training: mean loss, gradient norm, speed, time left."""
import math
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from common.command_line import UserError
from common.device import peak_flops, peak_memory, synchronize
from training.optim import lr_factor

TIMED_STEPS = 3  # steps timed for the first estimate, after one warm-up step


class Timer:
    """A clock of training time: evaluation and saving are not counted."""

    def __init__(self, device):
        self.device, self.paused_seconds = device, 0.0

    def now(self):
        return time.perf_counter() - self.paused_seconds

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
        self.first_step = self.last_step = step
        self.began = self.last_time = self.timer.now()
        self.data_seconds, self.warm_time = 0.0, self.began

    def add(self, step, loss, norm):
        """Take the loss and the gradient norm of the step that led to `step`."""
        self.losses.append(loss)
        self.norm = norm
        if step == self.first_step + 1:  # the first step compiles and allocates: not timed
            synchronize(self.ctx.device)
            self.warm_time = self.timer.now()
        elif step == self.first_step + 1 + TIMED_STEPS:
            self.print_time(step)

    def speed(self, first_step, began, step):
        """Return tokens per second from first_step, which began at that time, to step."""
        tokens = self.data.tokens_read(step) - self.data.tokens_read(first_step)
        return tokens / max(self.timer.now() - began, 1e-9)

    def mean_speed(self, step):
        """Return tokens per second since the start."""
        return self.speed(self.first_step, self.began, step)

    def print_time(self, step):
        """Print how long the rest will take, without evaluations."""
        synchronize(self.ctx.device)
        seconds = (self.timer.now() - self.warm_time) / TIMED_STEPS
        memory = peak_memory(self.ctx.device) / 2**30
        print(f"measured: {self.speed(self.first_step + 1, self.warm_time, step):,.0f} tokens/s"
              f"{f', {memory:.2f} GiB a process' * (memory > 0)}; "
              f"{clock(seconds * (self.cfg.max_iters - step))} to finish", flush=True)

    def log(self, step):
        """Log the steps since the last log; here the CPU waits for a GPU."""
        loss, norm = self.mean_loss(step), self.norm.item()
        seconds = max(self.timer.now() - self.last_time, 1e-9)
        speed = self.speed(self.last_step, self.last_time, step)
        left = seconds / (step - self.last_step) * (self.cfg.max_iters - step)
        rate = self.cfg.learning_rate * lr_factor(step - 1, self.cfg)
        values = dict(loss=loss, lr=rate, grad_norm=norm, tokens_per_second=round(speed, 1),
                      memory_gib=round(peak_memory(self.ctx.device) / 2**30, 3),
                      data_wait=round(self.data_seconds / seconds, 4))
        text = (f"loss {loss:.4f}  lr {rate:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s  "
                f"{clock(left)} to go")
        peak = peak_flops(self.ctx.device, self.ctx.dtype, self.ctx.world_size)
        if peak:
            values["mfu"] = speed * self.model.flops_per_token(self.cfg.block_size) / peak
            text += f"  mfu {values['mfu']:.1%}"
        self.runlog.log(step, dict(tokens=self.data.tokens_read(step)) | values, text)
        self.losses, self.last_step, self.last_time = [], step, self.timer.now()
        self.data_seconds = 0.0

    def mean_loss(self, step):
        """Return the mean loss since the last log, over all ranks.

        UserError: a loss is more than twice that of guessing among all ids, or a loss or gradient
        is not finite (float16 skips such a step instead).
        """
        losses = torch.stack(self.losses)
        if self.ctx.world_size > 1:
            dist.all_reduce(losses)
            losses /= self.ctx.world_size
            self.losses = list(losses)  # a checkpoint keeps the mean of all ranks
        limit = 2 * math.log(self.model.config.padded_vocab_size)
        skips = self.ctx.dtype == torch.float16
        if not losses.mean() < limit or not (skips or self.norm.isfinite()):
            i = next((i for i, x in enumerate(losses.tolist()) if not x < limit), len(losses) - 1)
            bad_step = step - len(losses) + i
            raise UserError(
                f"step {bad_step + 1} diverged: loss {losses[i].item():.4g}, gradient norm "
                f"at step {step} {self.norm.item():.4g}; it read {self.data.describe(bad_step)}. "
                f"Lower learning_rate or muon_lr; the last checkpoint in {self.runlog.path} is "
                "from before it")
        return losses.mean().item()


def clock(seconds):
    """Format seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

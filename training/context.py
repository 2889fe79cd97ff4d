"""Where a run computes: its device, its dtype and its processes; and how it is stopped.

init_context returns the Context that the training loop passes around. For one process its methods
do nothing; distributed.py overrides them for several.
"""
import functools
import os
import shlex
import signal
import sys
from pathlib import Path

import torch

from common.command_line import UserError
from common.cpu import cpu_count
from common.device import autocast, choose_device, choose_dtype


class Context:
    """The device, dtype and processes of a run; here one process."""
    rank, world_size = 0, 1

    def __init__(self, device, dtype, fsdp=False):
        self.device = device
        self.dtype = dtype  # of the computation; weights and optimizer state stay float32
        self.fsdp = fsdp    # shard weights, gradients and optimizer state over the processes
        self.launches = {launch_name()} - {""}

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """Return the context of a forward pass in this dtype."""
        return autocast(self.device, self.dtype)

    def store_frozen(self, model):
        """Convert frozen matrices to this dtype, to which autocast would cast them anyway."""
        for p in model.parameters():
            if p.dim() == 2 and not p.requires_grad:
                p.data = p.data.to(self.dtype)

    def max(self, number):
        """Return the largest of an int or bool over all processes."""
        return number

    def sum(self, tensor):
        """Return the sum of a tensor over all processes."""
        return tensor

    def wrap(self, model):
        """Return the module to train with: its backward leaves the mean over the ranks in .grad."""
        return model

    def share(self, batches):
        """Distribute batches (ids, targets, doc_ids) over the ranks; yield those of this rank."""
        return batches

    def gather(self, state):
        """Return a state dict with its tensors whole, on the main process; all must call it."""
        return state

    def place(self, tensor, param):
        """Return a copy of a whole tensor on param's device, sharded as param is."""
        return tensor.to(param.device, copy=True)


def init_context(cfg):
    """Choose device and dtype, join the other processes, silence all but the main one."""
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device.type)
    if several_processes():
        from training.distributed import DistributedContext
        ctx = DistributedContext(device, dtype, cfg.fsdp)
    else:
        ctx = Context(device, dtype, cfg.fsdp)
    if not ctx.is_main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if cfg.gradient_accumulation_steps % ctx.world_size:
        raise UserError(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a "
                        f"multiple of the number of processes, {ctx.world_size}")
    if cfg.fsdp and (ctx.world_size == 1 or dtype == torch.float16):
        raise UserError("fsdp needs several processes (torchrun) and bfloat16 or float32; this is "
                        f"{ctx.world_size} process{'es' * (ctx.world_size > 1)}, {str(dtype)[6:]}")
    torch.set_float32_matmul_precision("high")  # TF32 for float32 products on a GPU
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))
    return ctx


def several_processes():
    """Return whether torchrun started more than one process."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(f"RANK={rank} of WORLD_SIZE={world_size}: only torchrun should set these")
    return int(world_size) > 1


def launch_name():
    """Return a name of the torchrun command that started this process, "" if it keeps no logs.

    A restart after a crash has the same name; a command started by the user has another.
    """
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # .../LAUNCH/attempt_1/0/error.json
    return file.parent.parent.parent.name  # made by mkdtemp


def end_together(main):
    """Decorate a script's main: a UserError in one process ends all, and one of them prints it."""
    @functools.wraps(main)
    def decorated():
        if not several_processes():
            return main()
        from training.distributed import run_together
        run_together(main)
    return decorated


# ---- stopping ----

def resume_command(ctx):
    """Return the command that resumes this run after a stop."""
    if ctx.world_size > 1:
        return "the same torchrun command, without --overwrite"
    words = [w for w in sys.argv if w.partition("=")[0] != "--overwrite"
             and w != "--init_from=scratch"]  # these would start a new run
    return f"python {shlex.join(words)}"


class GracefulStop:
    """Record SIGINT and SIGTERM; the loop saves and exits at the next step. A second signal exits
    at once."""

    def __init__(self):
        self.received = 0  # the first signal of this process; only its handler writes here

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self.record)
                         for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def record(self, number, frame):
        if self.received:
            os._exit(128 + number)
        self.received = number

"""Several processes: the process group, sharding (FSDP2), collectives, and a graceful stop.

init_context returns the Context that the training loop passes around. Collectives do nothing when
world_size is 1.
"""
import hashlib
import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.command_line import UserError
from common.cpu import cpu_count
from common.device import choose_device, choose_dtype


@dataclass
class Context:
    """The device, dtype and process group of a run."""
    device: torch.device
    dtype: torch.dtype       # of the computation; weights and optimizer state stay float32
    rank: int = 0
    world_size: int = 1
    fsdp: bool = False       # shard weights, gradients and optimizer state over the processes
    cpu_group: object = None  # a gloo group: its collectives never wait for a GPU
    launches: tuple = ()     # see torchrun_launches

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def init_context(cfg):
    """Choose device and dtype, join the process group, silence all ranks but the main one."""
    try:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < world_size:
            raise ValueError
    except ValueError as e:
        raise UserError(f"RANK={os.environ.get('RANK')} of WORLD_SIZE="
                        f"{os.environ.get('WORLD_SIZE')}: only torchrun should set these") from e
    device = choose_device(cfg.device)
    if world_size > 1 and not dist.is_initialized():
        init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if cfg.gradient_accumulation_steps % world_size:
        raise UserError(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a "
                        f"multiple of the number of processes, {world_size}")
    dtype = choose_dtype(cfg.dtype, device.type)
    if cfg.fsdp and (world_size == 1 or dtype == torch.float16):
        raise UserError("fsdp needs several processes (torchrun) and bfloat16 or float32; this is "
                        f"{world_size} process{'es' * (world_size > 1)}, {str(dtype)[6:]}")
    torch.set_float32_matmul_precision("high")  # TF32 for float32 products on a GPU
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))
    cpu_group = dist.new_group(backend="gloo") if world_size > 1 else None
    return Context(device, dtype, rank, world_size, cfg.fsdp, cpu_group,
                   torchrun_launches(cpu_group))


def init_process_group(backend):
    """Join the other processes that torchrun started."""
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart the store still has the addresses of the dead processes: use another
            # prefix. (Machines count restarts separately; for several see docs/train.md.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except (ValueError, RuntimeError) as e:
        raise UserError("the processes did not find each other; start them with torchrun "
                        f"({str(e).splitlines()[0]})") from e


def torchrun_launches(cpu_group):
    """Return a sorted list with one number for each torchrun command (one a machine) of this run.

    A restart after a crash has the same numbers; a command started by the user has others.
    """
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # .../LAUNCH/attempt_1/0/error.json
    name = file.parent.parent.parent.name  # made by mkdtemp
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")
    own = torch.tensor(number if name else 0)
    numbers = [own]
    if cpu_group is not None:
        numbers = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(numbers, own, group=cpu_group)
    return sorted({int(n) for n in numbers} - {0})


def destroy_process_group():
    """Leave the group; a process that ends without it prints "terminate called"."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_max(number, ctx):
    """Return the largest of an int or bool over all processes."""
    if ctx.world_size == 1:
        return number
    shared = torch.tensor(int(number))
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=ctx.cpu_group)
    return int(shared)


def all_reduce_sum(tensor, ctx):
    """Return the sum of a CPU tensor over all processes."""
    if ctx.world_size > 1:
        dist.all_reduce(tensor, group=ctx.cpu_group)
    return tensor


def barrier(ctx):
    """Wait until every process is here."""
    if ctx.world_size > 1:
        dist.barrier(group=ctx.cpu_group)


def shard_batches(batches, ctx):
    """Distribute batches (ids, targets, doc_ids) over the ranks; yield those of this rank.

    Every rank gets the same number, the last ones padded with ignored targets, because FSDP ranks
    must run forward together.
    """
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == ctx.world_size:
            yield group[ctx.rank]
            group = []
    if group:
        ids, _, doc_ids = group[-1]
        padding = (ids, torch.full_like(ids, -1), doc_ids)
        yield group[ctx.rank] if ctx.rank < len(group) else padding


# ---- data parallel and sharded models ----

def wrap_model(model, ctx):
    """Return the module to train with: its backward leaves the mean over the ranks in .grad."""
    if ctx.world_size == 1:
        return model
    if not ctx.fsdp:
        return DistributedDataParallel(
            model, device_ids=[ctx.device] if ctx.device.type == "cuda" else None,
            gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # autocast would cast the blocks' weights anyway: casting first halves the all-gather's traffic
    param_dtype = ctx.dtype if ctx.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model)  # wte, wpe, the last norm and the head


def set_gradient_sync(wrapped, sync):
    """Choose whether the next backward reduces gradients over the ranks (DDP).

    FSDP reduces in every micro-batch: unreduced gradients would be whole on every rank.
    """
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = sync  # all that its no_sync() does


def full_state_dict(tree, keep=True):
    """Gather the sharded tensors of a state dict on the CPU; all ranks must call it together.

    Ranks with keep=False get None in their place. The result is the same for one process, DDP and
    FSDP, so a checkpoint can be resumed with any number of processes.
    """
    if isinstance(tree, dict):
        return {key: full_state_dict(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(full_state_dict(value, keep) for value in tree)
    if not hasattr(tree, "full_tensor"):
        return tree
    full = tree.full_tensor()
    return full.cpu() if keep else None


def shard_like(tensor, param):
    """Return this rank's shard of a full tensor, sharded as param is; the tensor if it is not."""
    if not hasattr(param, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def load_optimizer_state(optimizer, state):
    """Load momenta and step counts from full tensors, each sharded as its parameter is.

    The settings of the groups (learning rate, weight decay, betas) stay those of this command.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if name == "step":  # a number; copied, because it may be mapped from the file
                values[name] = value.clone() if torch.is_tensor(value) else value
                continue
            if value.shape != params[i].shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}")
            values[name] = shard_like(value.to(params[i].device, copy=True), params[i])
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)


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

    def requested(self, ctx):
        """Return the number of a signal that any process received, else 0; all ask together."""
        return all_reduce_max(self.received, ctx)

"""Several processes, started by torchrun: joining them, collectives, DDP and FSDP2.

A checkpoint holds full tensors, so any number of processes can resume it.
"""
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common.command_line import UserError, first_line
from training.context import Context, launch_name


class DistributedContext(Context):
    """A Context of several processes; all of them must call its methods together."""

    def __init__(self, device, dtype, fsdp=False):
        super().__init__(device, dtype, fsdp)
        store, self.rank, self.world_size = rendezvous()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store,
                                    rank=self.rank, world_size=self.world_size)
        self.cpu_group = dist.new_group(backend="gloo")  # its collectives never wait for a GPU
        store.set(f"launch {self.rank}", launch_name())
        names = {store.get(f"launch {rank}").decode() for rank in range(self.world_size)}
        self.launches = names - {""}  # one for each machine

    def max(self, number):
        shared = torch.tensor(int(number))
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.cpu_group)
        return int(shared)

    def sum(self, tensor):
        dist.all_reduce(tensor, group=self.cpu_group if tensor.device.type == "cpu" else None)
        return tensor

    def wrap(self, model):
        if self.fsdp:
            return shard(model, self.dtype)
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    def share(self, batches):
        """Every rank gets the same number, the last ones padded with ignored targets, because FSDP
        ranks must run forward together."""
        group = []
        for batch in batches:
            group.append(batch)
            if len(group) == self.world_size:
                yield group[self.rank]
                group = []
        if group:
            ids, _, doc_ids = group[-1]
            padding = (ids, torch.full_like(ids, -1), doc_ids)
            yield group[self.rank] if self.rank < len(group) else padding

    def gather(self, state):
        return full_tensors(state, keep=self.is_main)

    def place(self, tensor, param):
        tensor = super().place(tensor, param)
        return tensor if not self.fsdp else distribute_tensor(
            tensor, param.device_mesh, param.placements, src_data_rank=None)


@functools.cache
def rendezvous():
    """Return (store, rank, world_size): the store holds keys that all processes see."""
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as e:
        raise UserError("the processes did not find each other; start them with torchrun "
                        f"({first_line(e)})") from e
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart the store still has the addresses of the dead processes: use another
        # prefix. (Machines count restarts separately; for several see docs/train.md.)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    return store, rank, world_size


def run_together(main):
    """Call main(); a UserError in one process ends all, and one of them prints it.

    That process counts its error in the store. The others raise the same error, or a collective
    fails because that process has ended: they find the count and exit silently.
    """
    try:
        main()
    except (UserError, OSError, RuntimeError) as e:
        n = int(not isinstance(e, RuntimeError))  # a RuntimeError may be another rank's fault
        if rendezvous()[0].add("errors", n) > n:
            sys.exit(2)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # without it a process prints "terminate called"


# ---- sharded models ----

def shard(model, dtype):
    """Shard a model over the processes with FSDP2; return it."""
    # autocast would cast the blocks' weights anyway: casting first halves the all-gather's traffic
    policy = MixedPrecisionPolicy(dtype if dtype != torch.float32 else None,
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model)  # wte, wpe, the last norm and the head


def full_tensors(tree, keep):
    """Gather the sharded tensors of a state dict on the CPU; with keep=False get None instead."""
    if isinstance(tree, dict):
        return {key: full_tensors(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(full_tensors(value, keep) for value in tree)
    if not hasattr(tree, "full_tensor"):
        return tree
    full = tree.full_tensor()
    return full.cpu() if keep else None

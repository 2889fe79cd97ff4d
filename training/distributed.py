"""The machine a run is on: device, number type, processes, and what they do together.

A namespace from set_up_machine tells the loop all it needs to know; with one process every function
here that speaks of many does nothing.
"""
import hashlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import UserError
from data.pool import cpu_count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEAK_FLOPS = {  # dense bfloat16, by the words of a card's name; the first that fits
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "5090": 209e12, "4090": 165e12, "3090": 71e12}


# ---- one process ----

def choose_device(name):
    """torch.device of a name or "auto"; under torchrun each process gets its own card."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f"device={name} can't be used here ({str(e).splitlines()[0]})") from e
    return device


def choose_dtype(wanted, device_type):
    """torch.dtype of a name or "auto"; the environment's AUTO_DTYPE, a name too, decides auto."""
    wanted = os.environ.get("AUTO_DTYPE", wanted) if wanted == "auto" else wanted
    if wanted in DTYPES:
        return DTYPES[wanted]
    if wanted != "auto":
        raise UserError(f"dtype={wanted} is none of auto, {', '.join(DTYPES)}")
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


def wait_for(device):
    """Let a GPU finish what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(machine):
    """Of all cards together, where their 16-bit peak is known and used; else None."""
    if machine.device.type != "cuda" or machine.dtype == torch.float32:
        return None
    words = set(torch.cuda.get_device_name(machine.device).replace("-", " ").split())
    peaks = (flops for card, flops in PEAK_FLOPS.items() if words.issuperset(card.split()))
    peak = next(peaks, None)
    return peak and peak * machine.world


def peak_memory(device):
    """The most bytes this process has held so far: of the card, or of main memory; 0 = unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory():
    """Bytes of main memory that nobody uses; 0 = unknown."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, macOS
        return 0


# ---- several processes ----

def set_up_machine(cfg):
    """Device, number type and this process's place among all -> a namespace the loop reads."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < world:
            raise ValueError
    except ValueError as e:
        raise UserError(f"RANK={os.environ.get('RANK')} of WORLD_SIZE="
                        f"{os.environ.get('WORLD_SIZE')}: torchrun sets both, nobody else") from e
    device = choose_device(cfg.device)
    if world > 1 and not dist.is_initialized():
        meet("nccl" if device.type == "cuda" else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 speaks for all
    if cfg.gradient_accumulation_steps % world:
        raise UserError(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} can't be "
                        f"shared equally by {world} processes")
    cpu_group = dist.new_group(backend="gloo") if world > 1 else None  # no GPU waits for it
    dtype = choose_dtype(cfg.dtype, device.type)
    if cfg.fsdp and (world == 1 or dtype == torch.float16):
        raise UserError("fsdp shares a model among the processes of torchrun, in bfloat16 or "
                        f"float32; this is {world} process{'es' * (world > 1)}, {str(dtype)[6:]}")
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked of a GPU
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))
    return SimpleNamespace(
        device=device, dtype=dtype, rank=rank, world=world, main=rank == 0, fsdp=cfg.fsdp,
        cpu_group=cpu_group, launches=torchrun_launches(cpu_group),
        autocast=lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32))


def meet(backend):
    """Join the other processes that torchrun has started."""
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # started again after one has died, the others would find the addresses of the dead;
            # several machines count restarts each for itself, README has their way
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (ValueError, RuntimeError) as e:
        raise UserError("the processes did not find each other; torchrun starts them so that "
                        f"they do ({str(e).splitlines()[0]})") from e


def torchrun_launches(cpu_group):
    """A number for each torchrun command (one a machine) that started these processes.

    A restart after a crash has the same numbers.
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


def leave_group():
    """Part from the other processes; a process that ends without it prints an error of its own."""
    if dist.is_initialized():
        dist.destroy_process_group()


def largest(number, machine):
    """The largest of an integer or bool over all processes, which ask together; no GPU waits."""
    if machine.world == 1:
        return number
    shared = torch.tensor(int(number))
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=machine.cpu_group)
    return int(shared)


def shared_out(batches, machine):
    """This process's part of batches, (ids, targets, doc_ids) each, as many for every process.

    Where they don't come out even, the last is read again with nothing to predict: a sharded model
    computes only when all processes do.
    """
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == machine.world:
            yield group[machine.rank]
            group = []
    if group:
        ids, _, doc_ids = group[-1]
        blank = (ids, torch.full_like(ids, -1), doc_ids)
        yield group[machine.rank] if machine.rank < len(group) else blank


def parallelize(model, machine):
    """The module to train with: it leaves in .grad the mean over all processes."""
    if machine.world == 1:
        return model
    if not machine.fsdp:
        return DistributedDataParallel(
            model, device_ids=[machine.device] if machine.device.type == "cuda" else None,
            gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # autocast would cast the blocks' weights anyway: casting first halves what is sent
    half = machine.dtype if machine.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model)  # wte, wpe, the last norm and the head, used at both ends


def share_gradients(parallel, now):
    """Whether the next backward averages gradients, or they wait for a later micro-batch.

    A sharded model averages them every time: waiting gradients would be whole on every process.
    """
    if isinstance(parallel, DistributedDataParallel):
        parallel.require_backward_grad_sync = now  # all that its no_sync() does


def whole(tree, keep=True):
    """A state dict with its sharded tensors gathered on the CPU, which all processes do together.

    Those without `keep` get None for them. The file written from it is the same for one process,
    DistributedDataParallel and fully_shard, and is read back on any number of processes.
    """
    if isinstance(tree, dict):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value, keep) for value in tree)
    if not hasattr(tree, "full_tensor"):
        return tree
    full = tree.full_tensor()
    return full.cpu() if keep else None


def shard_like(t, p):
    """The part of t, whole in every process, that belongs to this one as p does."""
    if not hasattr(p, "device_mesh"):
        return t
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


def load_optimizer(optimizer, state):
    """Optimizer.load_state_dict of whole tensors, each copied and sharded as its parameter is."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if name == "step":
                continue
            if value.shape != params[i].shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}")
            values[name] = shard_like(value.to(params[i].device, copy=True), params[i])
    optimizer.load_state_dict(state)


class StopWish:
    """Ctrl-C and SIGTERM, which the loop grants where nothing is lost by it; a second one ends the
    process at once."""

    def __init__(self):
        self.received = 0  # by this process; written by its handler alone, at any moment

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.received:
            os._exit(128 + number)
        self.received = number

    def agreed(self, machine):
        """A signal that any process has, or 0; all processes ask together, and stop together."""
        return largest(self.received, machine)

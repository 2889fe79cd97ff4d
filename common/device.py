"""The device and dtype of a run, its memory and its peak speed."""
import os
import sys
from pathlib import Path

import torch

from common.command_line import UserError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEAK_FLOPS = {  # dense bfloat16 FLOP/s by words of the card's name; the first match counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "5090": 209e12, "4090": 165e12, "3090": 71e12}


def choose_device(name):
    """Return the torch.device of a name or "auto"; under torchrun each process gets its own GPU."""
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
        reason = first_line(e).partition(". ")[0]  # PyTorch adds advice to its developers
        raise UserError(f"device={name} can't be used here ({reason})") from e
    return device


def choose_dtype(name, device_type):
    """Return the torch.dtype of a name or "auto".

    auto is bfloat16 or float16 on CUDA, bfloat16 on CPUs with its instructions, else float32. The
    tests set the environment variable AUTO_DTYPE (one of DTYPES) to choose what "auto" means.
    """
    name = os.environ.get("AUTO_DTYPE", name) if name == "auto" else name
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"dtype={name} is none of auto, {', '.join(DTYPES)}")
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # a CPU without bfloat16 instructions emulates them, several times slower than float32
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    native = device_type == "cpu" and check is not None and check()
    return torch.bfloat16 if native else torch.float32


def autocast(device, dtype):
    """Return the context in which a model computes in dtype; with float32 it does nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(tensor, device):
    """Copy a tensor (or None) to the device without waiting for a GPU."""
    if tensor is None:
        return None
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def synchronize(device):
    """Wait until a GPU has finished all queued work, so that a clock read afterwards is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device, dtype, world_size=1):
    """Return the 16-bit peak FLOP/s of all GPUs together; None where unknown or not used."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    peaks = (peak for card, peak in PEAK_FLOPS.items() if words.issuperset(card.split()))
    return next((peak * world_size for peak in peaks), None)


def peak_memory(device):
    """Return the most bytes this process has held: of the GPU, or of main memory; 0 = unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main_memory():
    """Return the bytes of main memory of this machine, or of its container; 0 = unknown."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # not Linux, or "max": no limit
        return memory

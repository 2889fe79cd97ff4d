"""What a run will cost, said before its first step, and the micro-batch that fits the device.

    python -m engine.plan        # a table of memory and days for three sizes on 1, 8 and 64 H200s
"""
from collections import Counter
from types import SimpleNamespace

import torch

from config import UserError, is_out_of_memory
from engine.machine import PEAK_FLOPS, free_memory, largest, to_device
from gpt import GPT, GPTConfig, Muon

MANY_EPOCHS = 4  # Muennighoff et al., arXiv:2305.16264
GIB = 2**30


def state_bytes(model, optimizer):
    """(weights, gradients, optimizer states) of a model in bytes, before any sharding.

    Weights and gradients are float32; AdamW keeps two moments, Muon one for the blocks' matrices.
    """
    n = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return 4 * n, 4 * n, 4 * (2 * n - matrices * (optimizer == "muon"))


def activation_bytes(config, tokens, dtype):
    """About what one forward keeps for its backward, without torch.compile (which keeps less).

    A block keeps, per token: its two inputs in float32; in dtype both normed inputs, q, k, v, what
    attention gives, and the MLP's inner values; qwen3 also q and k around their norm and rotation.
    """
    c, size = config, dtype.itemsize
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    kept = 2 * c.n_embd + 2 * (q + kv) + 2 * c.n_inner
    if c.arch == "qwen3":
        kept += 3 * (q + kv) + 2 * c.n_inner
    return tokens * (c.n_layer * (8 * c.n_embd + size * kept) + 8 * c.n_embd)


def logits_bytes(config, tokens, budget, dtype):
    """The chunk of logits at hand: in dtype where that is not float32, twice in float32; and the
    gradients that the loss makes ahead of the backward, of the head's weight."""
    per_logit = 8 + (dtype.itemsize if dtype != torch.float32 else 0)
    chunk = min(tokens * config.vocab_size, max(budget, config.vocab_size))
    return chunk * per_logit + config.vocab_size * config.n_embd * 4


def muon_bytes(model, optimizer):
    """What Muon's step holds at once, for a slice of matrices of one shape: four of their size
    (directions, their stack, its product, the update) and up to 2.5 Gram matrices beside these."""
    if optimizer != "muon":
        return 0
    shapes = Counter(p.shape for p in model.blocks.parameters() if p.dim() == 2)
    return max(4 * min(n, max(1, Muon.slice_numel // shape.numel()))
               * (4 * shape.numel() + 5 * min(shape) ** 2 // 2) for shape, n in shapes.items())


def memory_plan(model, cfg, machine):
    """{what: bytes} of one process; activations and logits are gone when Muon steps."""
    tokens, shards = cfg.batch_size * cfg.block_size, machine.world if machine.fsdp else 1
    weights, gradients, states = state_bytes(model, cfg.optimizer)
    if machine.dtype != torch.float32:  # autocast keeps a copy of every weight
        weights += weights // 4 * machine.dtype.itemsize
    if machine.fsdp:  # one block, and wte with the head, are whole at a time
        whole = max(sum(p.numel() for p in model.blocks[0].parameters()), model.head.numel())
        weights += 4 * shards * whole
    activations = activation_bytes(model.config, tokens, machine.dtype)
    logits = logits_bytes(model.config, tokens, model.logits_budget(), machine.dtype)
    return {"weights, gradients and optimizer": (weights + gradients + states) / shards,
            "activations": activations, "logits": logits,
            "Muon's step beyond these": max(0, muon_bytes(model, cfg.optimizer) - activations
                                            - logits)}


def print_plan(cfg, machine, model, data, step, kind):
    """Size, tokens, epochs, FLOPs and memory of the run; warns of what will not go well."""
    c, (embedding, body) = model.config, model.n_params()
    tokens = data.tokens_read(cfg.max_iters)
    epochs = data.epochs(cfg.max_iters)
    shown = ", ".join(f"{name} {n:.1f}" for name, n in epochs.items())
    print(f"{cfg.out_dir}: {c.arch}, {(embedding + body) / 1e6:.2f}M parameters "
          f"({embedding / 1e6:.2f}M in embeddings), {machine.device.type} "
          f"{str(machine.dtype)[6:]}, {machine.world} process{'es' * (machine.world > 1)}"
          f"{', sharded' * machine.fsdp}\n"
          f"steps {step:,} to {cfg.max_iters:,} of {tokens / cfg.max_iters:,.0f} tokens = "
          f"{tokens / 1e6:,.1f}M tokens = {shown} epochs, "
          f"{model.flops_per_token(cfg.block_size) * tokens:.2g} FLOPs")
    memory = memory_plan(model, cfg, machine)
    parts = ", ".join(f"{name} {n / GIB:.2f}" for name, n in memory.items() if n)
    print(f"memory a process: about {sum(memory.values()) / GIB:.2f} GiB ({parts})", flush=True)
    free = free_memory() if machine.device.type == "cpu" else 0
    if free and sum(memory.values()) > free:
        print(f"only {free / GIB:.2f} GiB of memory are free: lower batch_size")
    for name, n in epochs.items():
        if n > MANY_EPOCHS and kind == "base":
            print(f"{name} will be read {n:.1f} times: past {MANY_EPOCHS} a model gains little "
                  "and begins to recite. Take more text, fewer steps or less weight")


def fit_micro_batch(cfg, machine, model, data):
    """Try one micro-batch, with room for the optimizer; too large a batch_size is divided.

    gradient_accumulation_steps grows by as much, so every step still reads the same rows. All
    processes agree. A sharded model can't be tried by one process alone, and is not.
    """
    while not machine.fsdp:
        failed = largest(int(not fits(cfg, machine, model, data)), machine)
        if not failed:
            return
        if cfg.batch_size == 1:
            raise UserError(f"not even one row of block_size={cfg.block_size} fits in the memory "
                            f"of {machine.device}: lower block_size, n_layer or n_embd")
        by = next(d for d in range(2, cfg.batch_size + 1) if cfg.batch_size % d == 0)
        print(f"batch_size={cfg.batch_size} does not fit in the memory of {machine.device}; going "
              f"on with --batch_size={cfg.batch_size // by} "
              f"--gradient_accumulation_steps={cfg.gradient_accumulation_steps * by}", flush=True)
        cfg.batch_size //= by
        cfg.gradient_accumulation_steps *= by


def fits(cfg, machine, model, data):
    """Whether forward and backward of a micro-batch find room beside the optimizer's states."""
    try:
        room = torch.empty(state_bytes(model, cfg.optimizer)[2], dtype=torch.uint8,
                           device=machine.device)
        batch = [to_device(t, machine.device) for t in data.widest()]
        with machine.autocast():
            loss, _ = model(*batch)
        loss.backward()
        del loss
        torch.empty(muon_bytes(model, cfg.optimizer), dtype=torch.uint8, device=machine.device)
        del room
        return True
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def main(cards=(1, 8, 64), tokens=(10e9, 100e9), mfu=0.4):
    """GPT-2's shapes with 50,304 words, rows of 1,024 tokens, bfloat16; at an assumed MFU."""
    print("| model | cards | micro-batch | GiB a card | with --fsdp | "
          + " | ".join(f"days for {t / 1e9:.0f}B" for t in tokens) + " |")
    print("|---" * (5 + len(tokens)) + "|")
    for name, n_layer, n_head, n_embd, rows in (
            ("124M", 12, 12, 768, 32), ("350M", 24, 16, 1024, 32), ("1.5B", 48, 25, 1600, 16)):
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size=50_304, block_size=1024, n_layer=n_layer,
                                  n_head=n_head, n_embd=n_embd))
        cfg = SimpleNamespace(batch_size=rows, block_size=1024, optimizer="adamw")
        for world in cards:
            gib = []
            for fsdp in (False, True):
                machine = SimpleNamespace(world=world, fsdp=fsdp, dtype=torch.bfloat16)
                gib.append(sum(memory_plan(model, cfg, machine).values()) / GIB)
            seconds = [model.flops_per_token(1024) * t / (world * PEAK_FLOPS["H200"] * mfu)
                       for t in tokens]
            print(f"| {name} | {world} | {rows} | {gib[0]:.1f} | "
                  f"{f'{gib[1]:.1f}' if world > 1 else ''} | "
                  + " | ".join(f"{s / 86400:.2f}" for s in seconds) + " |")


if __name__ == "__main__":
    main()

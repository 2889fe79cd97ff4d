"""Estimate tokens, FLOPs and memory of a run, and fit the micro-batch to the device.

    python -m training.estimate  # a table of memory and days for three sizes on 1, 8 and 64 H200s
"""
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch

from common.command_line import UserError, first_line, is_out_of_memory, run_main
from common.device import PEAK_FLOPS, main_memory, to_device
from gpt import GPT, GPTConfig
from training.context import Context
from training.muon import muon_bytes

MANY_EPOCHS = 4  # more repetition gains little (Muennighoff et al., arXiv:2305.16264)
GIB = 2**30


def state_bytes(model, optimizer):
    """Return bytes of (weights, gradients, optimizer states) of a model, before any sharding.

    Weights and gradients are float32; AdamW keeps two moments, Muon one for the blocks' matrices.
    """
    n = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return 4 * n, 4 * n, 4 * (2 * n - matrices * (optimizer == "muon"))


def activation_bytes(config, tokens, dtype):
    """Estimate the bytes that a forward keeps for its backward; torch.compile keeps less.

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
    """Return bytes of one chunk of logits (in dtype if that is not float32, and twice in float32),
    and of the head's gradient, which the loss computes in the forward pass."""
    per_logit = 8 + (dtype.itemsize if dtype != torch.float32 else 0)
    chunk = min(tokens * config.padded_vocab_size, max(budget, config.padded_vocab_size))
    return chunk * per_logit + config.padded_vocab_size * config.n_embd * 4


def update_bytes(model, optimizer):
    """Return bytes that the optimizer's step holds beside its states: AdamW, fused, none."""
    return muon_bytes(model) if optimizer == "muon" else 0


def memory_plan(model, cfg, ctx):
    """Return {part: bytes} of one process. Activations and logits are freed before Muon's step."""
    tokens, shards = cfg.batch_size * cfg.block_size, ctx.world_size if ctx.fsdp else 1
    weights, gradients, states = state_bytes(model, cfg.optimizer)
    if ctx.dtype != torch.float32:  # autocast keeps a copy of every weight
        weights += weights // 4 * ctx.dtype.itemsize
    if ctx.fsdp:  # the root's tensors and one block are whole at once, on every rank
        outside, inside = model.n_params()
        weights += 4 * shards * (outside + inside // len(model.blocks))
    activations = activation_bytes(model.config, tokens, ctx.dtype)
    logits = logits_bytes(model.config, tokens, model.logits_budget(), ctx.dtype)
    return {"weights, gradients and optimizer": (weights + gradients + states) / shards,
            "activations": activations, "logits": logits,
            "Muon's step beyond these": max(0, update_bytes(model, cfg.optimizer) - activations
                                            - logits)}


def new_model(**settings):
    """Return a new GPT; UserError, before it is built, if its weights exceed the main memory."""
    try:
        config = GPTConfig(**settings)
    except ValueError as e:
        raise UserError(e) from e
    with torch.device("meta"):
        outside, block = GPT(replace(config, n_layer=1)).n_params()
    n, memory = outside + config.n_layer * block, main_memory()
    if 0 < memory < 4 * n:
        raise UserError(f"a model of {n / 1e9:,.1f}B parameters needs {4 * n / GIB:,.0f} GiB for "
                        f"its weights alone, and {memory / GIB:,.0f} GiB of memory are here: lower "
                        "n_layer or n_embd")
    return GPT(config)


def print_plan(cfg, ctx, model, data, step):
    """Print size, tokens, epochs, FLOPs and memory of the run; warn of too many epochs."""
    c, (embedding, body) = model.config, model.n_params()
    tokens = data.tokens_read(cfg.max_iters) - data.tokens_read(step)
    per_step = tokens / max(1, cfg.max_iters - step)
    epochs = data.epochs(cfg.max_iters)
    shown = ", ".join(f"{name} {n:.1f}" for name, n in epochs.items())
    print(f"{cfg.out_dir}: {c.arch}, {(embedding + body) / 1e6:.2f}M parameters "
          f"({embedding / 1e6:.2f}M in embeddings), {ctx.device.type} "
          f"{str(ctx.dtype)[6:]}, {ctx.world_size} process{'es' * (ctx.world_size > 1)}"
          f"{', sharded' * ctx.fsdp}\n"
          f"steps {step:,} to {cfg.max_iters:,} of {per_step:,.0f} tokens = "
          f"{tokens / 1e6:,.1f}M tokens = {shown} epochs, "
          f"{model.flops_per_token(cfg.block_size) * tokens:.2g} FLOPs")
    memory = memory_plan(model, cfg, ctx)
    parts = ", ".join(f"{name} {n / GIB:.2f}" for name, n in memory.items() if n)
    print(f"memory a process: about {sum(memory.values()) / GIB:.2f} GiB ({parts})", flush=True)
    dialogues = {part.folder.name for part, _ in data.bins.parts if part.kind == "chat"}
    for name, n in epochs.items():
        if n > MANY_EPOCHS and name not in dialogues:  # which are repeated on purpose
            print(f"{name} will be read {n:.1f} times: after {MANY_EPOCHS} epochs a model gains "
                  "little and starts to memorise. Use more text, fewer steps or a smaller weight")


def fit_micro_batch(cfg, ctx, model, data):
    """Try one micro-batch, with room for the optimizer; divide a batch_size that is too large.

    gradient_accumulation_steps grows by the same factor, so every step still reads the same rows.
    All processes choose alike. A sharded model is not tried: its ranks must run forward together.
    """
    while not ctx.fsdp and ctx.max(not fits(cfg, ctx, model, data)):
        if cfg.batch_size == 1:
            raise UserError(f"not even one row of block_size={cfg.block_size} fits in the memory "
                            f"of {ctx.device}: lower block_size, n_layer or n_embd")
        factor = next(d for d in range(2, cfg.batch_size + 1) if cfg.batch_size % d == 0)
        print(f"batch_size={cfg.batch_size} does not fit in the memory of {ctx.device}; ", end="")
        cfg.batch_size //= factor
        cfg.gradient_accumulation_steps *= factor
        print(f"continuing with --batch_size={cfg.batch_size} "
              f"--gradient_accumulation_steps={cfg.gradient_accumulation_steps}", flush=True)


def fits(cfg, ctx, model, data):
    """Return whether a micro-batch's forward and backward fit beside the optimizer's states."""
    # Linux grants more main memory than there is, and kills the process that uses it
    if ctx.device.type == "cpu" and 0 < main_memory() < sum(memory_plan(model, cfg, ctx).values()):
        return False
    try:
        room = torch.empty(state_bytes(model, cfg.optimizer)[2], dtype=torch.uint8,
                           device=ctx.device)
        batch = [to_device(t, ctx.device) for t in data.widest()]
        with ctx.autocast():
            loss, _ = model(*batch)
        loss.backward()
        del loss
        torch.empty(update_bytes(model, cfg.optimizer), dtype=torch.uint8, device=ctx.device)
        del room
        return True
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if ctx.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def avoidable_errors(cfg, ctx):
    """Report running out of memory and a missing compiler as a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise UserError(
                f"{ctx.device} is out of memory: halve batch_size={cfg.batch_size} and double "
                f"gradient_accumulation_steps={cfg.gradient_accumulation_steps}; the same command "
                "resumes from the last checkpoint") from e
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"torch.compile failed ({first_line(e)}): it needs a C "
                            "compiler (gcc, clang or cl). Install one or leave out --compile"
                            ) from e
        raise


def main(tokens=(10e9, 100e9), mfu=0.4):
    """Print the table for GPT-2's shapes, 50,304 tokens, context 1,024, bfloat16, assumed MFU."""
    print("| model | GPUs | micro-batch | GiB a GPU | with --fsdp | "
          + " | ".join(f"days for {t / 1e9:.0f}B" for t in tokens) + " |")
    print("|---" * (5 + len(tokens)) + "|")
    for name, n_layer, n_head, n_embd, rows in (
            ("124M", 12, 12, 768, 32), ("350M", 24, 16, 1024, 32), ("1.5B", 48, 25, 1600, 16)):
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size=50_304, block_size=1024, n_layer=n_layer,
                                  n_head=n_head, n_embd=n_embd))
        cfg = SimpleNamespace(batch_size=rows, block_size=1024, optimizer="adamw")
        for world in (1, 8, 64):
            gib = []
            for fsdp in (False, True):
                ctx = Context(torch.device("cuda"), torch.bfloat16, fsdp)
                ctx.world_size = world
                gib.append(sum(memory_plan(model, cfg, ctx).values()) / GIB)
            seconds = [model.flops_per_token(1024) * t / (world * PEAK_FLOPS["H200"] * mfu)
                       for t in tokens]
            print(f"| {name} | {world} | {rows} | {gib[0]:.1f} | "
                  f"{f'{gib[1]:.1f}' if world > 1 else ''} | "
                  + " | ".join(f"{s / 86400:.2f}" for s in seconds) + " |")


if __name__ == "__main__":
    run_main(main, __file__)

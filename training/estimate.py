"""Estimate tokens, FLOPs and memory of a run, choose its settings, fit its micro-batch."""
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from common.command_line import UserError, first_line, is_out_of_memory
from common.device import main_memory, to_device
from common.files import read_json
from gpt import GPT, GPTConfig
from models.hf import model_type
from tokens.tokenizer_files import load_tokenizer
from training.muon import muon_bytes

MANY_EPOCHS = 4  # more repetition gains little (Muennighoff et al., arXiv:2305.16264)
GIB = 2**30


def state_bytes(model, optimizer):
    """Return bytes of (weights, gradients, optimizer states) of a model, before any sharding.

    All are float32, but for frozen matrices; these have no gradients and states. AdamW keeps two
    moments, Muon one for the blocks' matrices.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    n, weights = sum(p.numel() for p in trained), sum(p.nbytes for p in model.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return weights, 4 * n, 4 * (2 * n - matrices * (optimizer == "muon"))


def activation_bytes(config, tokens, dtype, recompute=False):
    """Estimate the bytes that a forward keeps for its backward; torch.compile keeps less.

    A block keeps, per token: its two inputs in float32; in dtype both normed inputs (one copy for
    each product that autocast casts), q, k, v, what attention gives, and the MLP's inner values;
    qwen3 also q and k around their norm and rotation. recompute: a block keeps its input, and in
    the backward one block at a time keeps all.
    """
    c, size = config, dtype.itemsize
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    modern = c.arch == "qwen3"
    normed = 2 if dtype == torch.float32 else 4 + modern
    kept = normed * c.n_embd + 2 * (q + kv) + 2 * c.n_inner
    if modern:
        kept += (2 + c.qk_norm) * (q + kv) + 2 * c.n_inner
    block = 8 * c.n_embd + size * kept
    blocks = 4 * c.n_embd * c.n_layer + block if recompute else c.n_layer * block
    return tokens * (blocks + 8 * c.n_embd)


def mask_bytes(config, rows, T, dtype, recompute=False):
    """Return bytes of the mask of packed rows: bool, and copied to dtype by the kernel of each
    layer, which keeps it for the backward pass."""
    return rows * T * T * (1 + (1 if recompute else config.n_layer) * dtype.itemsize)


def logits_bytes(model, tokens, dtype):
    """Return bytes of one chunk of logits (in dtype if that is not float32, and twice in float32),
    and of the head's gradient, which the loss computes in the forward pass."""
    rows, head = model.config.padded_vocab_size, model.head
    per_logit = 8 + (dtype.itemsize if dtype != torch.float32 else 0)
    chunk = min(tokens * rows, max(model.logits_budget(), rows))
    return chunk * per_logit + head.numel() * 4 * head.requires_grad


def update_bytes(model, optimizer):
    """Return bytes that the optimizer's step holds beside its states: AdamW, fused, none."""
    return muon_bytes(model) if optimizer == "muon" else 0


def memory_plan(model, cfg, ctx, T, packed=False):
    """Return {part: bytes} of one process whose rows have T positions; packed: with dialogues.

    Activations, mask and logits are freed before Muon's step.
    """
    tokens, shards = cfg.batch_size * T, ctx.world_size if ctx.fsdp else 1
    weights, gradients, states = state_bytes(model, cfg.optimizer)
    # autocast keeps a copy of every weight that is not stored in its dtype
    weights += sum(p.numel() * ctx.dtype.itemsize for p in model.parameters()
                   if p.dtype != ctx.dtype)
    if ctx.fsdp:  # the root's tensors and one block are whole at once, on every rank
        outside, inside = model.n_params()
        weights += 4 * shards * (outside + inside // len(model.blocks))
    activations = activation_bytes(model.config, tokens, ctx.dtype, model.recompute)
    logits = logits_bytes(model, tokens, ctx.dtype)
    mask = packed and mask_bytes(model.config, cfg.batch_size, T, ctx.dtype, model.recompute)
    return {"weights, gradients and optimizer": (weights + gradients + states) / shards,
            "activations": activations, "attention mask": mask, "logits": logits,
            "Muon's step beyond these": max(0, update_bytes(model, cfg.optimizer) - activations
                                            - mask - logits)}


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


# Widths and layers of new models. The blocks get a twentieth as many weights as the tokens that are
# read (Hoffmann et al., arXiv:2203.15556).
SIZES = ((128, 4), (192, 6), (256, 6), (384, 8), (512, 8), (640, 10), (768, 12))


CHOSEN = ("init_from", "arch", "n_layer", "n_head", "n_embd", "block_size", "dropout", "optimizer",
          "learning_rate", "muon_lr", "min_lr", "batch_size", "gradient_accumulation_steps",
          "max_iters", "warmup_iters", "log_interval", "eval_interval", "checkpoint_interval")


def suitable_settings(kind, tokens, base=None, block_size=1024):
    """Return ({setting: value}, their reason) for a run on a set with so many training tokens.

    kind "base": of a model that starts from base, a GPTConfig, or without one of a new model; kind
    "chat": of a fine-tuning of base. block_size: the longest context that is wanted. LOG.md, "Own
    texts", has the measurements behind the numbers.
    """
    block_size = min(block_size, base.block_size if base else 512)
    epochs = 8 if tokens < 300_000 else 6 if tokens < 3_000_000 else 4
    if base:  # that has learned the language already
        epochs = 3 if kind == "base" else max(2, epochs - 3)
    step_tokens = min(65_536, max(2_048, 2 ** round(math.log2(tokens / 200))))
    if base and base.n_embd > 512:  # a large model, trained on far more text than this
        found, reason = dict(learning_rate=0.02 / base.n_embd), f"a base model {base.n_embd} wide"
    elif base:
        found = dict(optimizer="muon", learning_rate=0.008, muon_lr=2e-3, dropout=0.1)
        reason = f"a base model {base.n_embd} wide"
    else:
        width, layers = next((size for size in SIZES if 12 * size[0] ** 2 * size[1] * 20
                              > epochs * tokens), SIZES[-1])
        found = dict(arch="qwen3", n_layer=layers, n_embd=width, n_head=width // 64, dropout=0.05,
                     optimizer="muon", learning_rate=4 / width, muon_lr=3e-3)
        reason = f"a new model, {layers} layers, {width} wide"
    found["learning_rate"] = float(f"{found['learning_rate']:.1g}")
    rows, steps = max(1, step_tokens // block_size), max(40, round(epochs * tokens / step_tokens))
    return found | dict(
        block_size=block_size, batch_size=min(8, rows),
        gradient_accumulation_steps=max(1, rows // 8), max_iters=steps, min_lr=0.0,
        warmup_iters=min(200, steps // 10), log_interval=max(1, steps // 100),
        eval_interval=max(5, steps // 12), checkpoint_interval=max(5, steps // 12)), reason


def choose_settings(cfg, kind, bins):
    """Give the settings that neither a config file nor the command line sets the values that suit
    the set, and print them. A run that goes on keeps those that it began with."""
    from models.folders import SHIPPED, find_model, load_model  # here: most runs need none
    run = {} if cfg.overwrite else read_json(Path(cfg.out_dir) / "run.json").get("settings", {})
    tokens = sum(part.meta["splits"]["train"]["tokens"] for part, _ in bins.parts)
    if run.get("size") == "auto":
        found, reason = run, "settings that this run began with"
    else:
        start = cfg.init_from
        if start == "auto" and kind == "chat":
            start = find_model("", "base", "init_from")
        elif start == "auto" and (
                load_tokenizer(SHIPPED / "base").fingerprint == bins.tokenizer.fingerprint):
            start = "xiaoyu"
        base = None
        if start not in ("auto", "scratch"):
            base = load_model(find_model(start, "base"), add_chat_tokens=True)[0].config
        own = dict(block_size=cfg.block_size) if "block_size" in cfg.given else {}
        found, reason = suitable_settings(kind, tokens, base, **own)
        found["init_from"] = start
        if getattr(cfg, "lora_rank", 0):
            found |= dict(optimizer="adamw", learning_rate=5e-4)
    chosen = {name: found[name] for name in CHOSEN
              if name in found and name not in cfg.given and hasattr(cfg, name)}
    vars(cfg).update(chosen)
    print(f"size=auto: {tokens:,} training tokens, {reason}:\n  "
          + " ".join(f"--{name}={value}" for name, value in chosen.items()), flush=True)


def print_plan(cfg, ctx, model, data, step):
    """Print size, tokens, epochs, FLOPs and memory of the run; warn of too many epochs."""
    c, (embedding, body) = model.config, model.n_params()
    tokens = data.tokens_read(cfg.max_iters) - data.tokens_read(step)
    per_step = tokens / max(1, cfg.max_iters - step)
    epochs = data.epochs(cfg.max_iters)
    shown = ", ".join(f"{name} {n:.1f}" for name, n in epochs.items())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{cfg.out_dir}: {model_type(c)}, {(embedding + body) / 1e6:.2f}M parameters "
          f"({embedding / 1e6:.2f}M in embeddings"
          f"{f', {trained / 1e6:.2f}M trained' if model.lora else ''}), {ctx.device.type} "
          f"{str(ctx.dtype)[6:]}, {ctx.world_size} process{'es' * (ctx.world_size > 1)}"
          f"{', sharded' * ctx.fsdp}\n"
          f"steps {step:,} to {cfg.max_iters:,} of {per_step:,.0f} tokens = "
          f"{tokens / 1e6:,.1f}M tokens = {shown} epochs, "
          f"{model.flops_per_token(data.row_length) * tokens:.2g} FLOPs")
    memory = memory_plan(model, cfg, ctx, data.row_length, data.bins.kind == "chat")
    parts = ", ".join(f"{name} {n / GIB:.2f}" for name, n in memory.items() if n)
    print(f"memory a process: about {sum(memory.values()) / GIB:.2f} GiB ({parts})", flush=True)
    dialogues = {part.folder.name for part, _ in data.bins.parts if part.kind == "chat"}
    for name, n in epochs.items():
        if n > MANY_EPOCHS and not cfg.size and name not in dialogues:  # those: on purpose
            print(f"{name} will be read {n:.1f} times: after {MANY_EPOCHS} epochs a model gains "
                  "little and starts to memorise. Use more text, fewer steps or a smaller weight")


def fit_micro_batch(cfg, ctx, model, data):
    """Try one micro-batch, with room for the optimizer; divide a batch_size that is too large.

    gradient_accumulation_steps grows by the same factor, so every step still reads the same rows.
    All processes choose alike. A sharded model is not tried: its ranks must run forward together.
    """
    while not ctx.fsdp and ctx.max(not fits(cfg, ctx, model, data)):
        if cfg.batch_size == 1:
            raise UserError(f"not even one row of {data.row_length:,} tokens fits in the memory of "
                            f"{ctx.device}: lower block_size={cfg.block_size}"
                            + ", n_layer or n_embd" * hasattr(cfg, "n_layer"))
        factor = next(d for d in range(2, cfg.batch_size + 1) if cfg.batch_size % d == 0)
        print(f"batch_size={cfg.batch_size} does not fit in the memory of {ctx.device}; ", end="")
        cfg.batch_size //= factor
        cfg.gradient_accumulation_steps *= factor
        print(f"continuing with --batch_size={cfg.batch_size} "
              f"--gradient_accumulation_steps={cfg.gradient_accumulation_steps}", flush=True)


def fits(cfg, ctx, model, data):
    """Return whether a micro-batch's forward and backward fit beside the optimizer's states."""
    # Linux grants more main memory than there is, and kills the process that uses it
    memory = memory_plan(model, cfg, ctx, data.row_length, data.bins.kind == "chat")
    if ctx.device.type == "cpu" and 0 < main_memory() < sum(memory.values()):
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
            raise UserError(f"{ctx.device} is out of memory: " + (
                f"halve batch_size={cfg.batch_size} and double "
                f"gradient_accumulation_steps={cfg.gradient_accumulation_steps}; the same command "
                "resumes from the last checkpoint" if cfg.batch_size > 1 else "add --recompute, or "
                f"lower block_size={cfg.block_size} in a new run with another --out_dir")) from e
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"torch.compile failed ({first_line(e)}): it needs a C "
                            "compiler (gcc, clang or cl). Install one or leave out --compile"
                            ) from e
        raise

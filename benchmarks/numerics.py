"""Numeric checks of gpt.py on any device, against the CPU in float32 and against each other.

    for name, limit, check in numeric_checks(device): difference = check()   # at most limit

Differences are relative: the norm of the difference over the norm of the expected values.
"""
import copy
import io
import traceback
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.contenders import train_step
from common.device import autocast, choose_device
from gpt import GPT, GPTConfig, linear_cross_entropy
from training.optim import configure_optimizers

ROWS, T, VOCAB = 4, 64, 512
# Limits: rounding to bfloat16 has a relative error of up to 2^-9 = 0.002, some ten times in a row.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def numerics(name, cfg):
    """Run the numeric checks as a kind of work: each turn is the next check, whatever its size."""
    checks = iter(numeric_checks(choose_device(cfg.device), cfg.compile))

    def turn(_):
        name, limit, check = next(checks)
        try:
            difference = check()
        except Exception:  # the other checks still run
            traceback.print_exc()
            difference = float("inf")
        return dict(check=name, ok=difference <= limit, difference=difference, limit=limit)

    return turn


def numeric_checks(device, compile=False):
    """Yield (name, limit, function that returns the difference); with compile the slow ones too."""
    for arch in ("gpt2", "qwen3"):
        yield f"{arch}: cached = uncached, greedy ids", 0, partial(cached_error, arch, device)
        yield f"{arch}: resumed = uninterrupted", 1e-5, partial(resume_error, arch, device)
        for dtype, limit in LIMITS.items():
            for what, error in (("chunked = plain loss, gradient", chunked_error),
                                ("packed row = documents alone", packed_error),
                                ("8 steps = float32 on the CPU", training_error)):
                yield (f"{arch} {str(dtype)[6:]}: {what}", limit,
                       partial(error, arch, device, dtype))
    for arch in ("gpt2", "qwen3") if compile else ():
        # fused operators round less often: 0.004 (gpt2) and 0.017 (qwen3) on a CPU
        yield (f"{arch} bfloat16: compiled = eager loss, gradient", 5e-2,
               partial(compile_error, arch, device, torch.bfloat16))


def make_model(arch, device):
    """Return a small model with seeded weights, far from the initial ones (identity blocks)."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(arch=arch, vocab_size=VOCAB, block_size=T, n_layer=2, n_head=4,
                          n_kv_head=2 if arch == "qwen3" else 0, n_embd=128))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.to(device)


def make_ids(device):
    """Return seeded ids (ROWS, T + 1), equal on every device."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCAB, (ROWS, T + 1), generator=generator).to(device)


def distance(got, want):
    """Return the relative difference of two lists of tensors."""
    got, want = (torch.cat([t.detach().double().cpu().flatten() for t in ts]) for ts in (got, want))
    return ((got - want).norm() / want.norm()).item()


def loss_error(got, want):
    """Return the larger difference of loss and gradient; got and want: (model, its loss)."""
    grads = [torch.autograd.grad(loss, model.parameters()) for model, loss in (got, want)]
    return max(distance([got[1]], [want[1]]), distance(*grads))


def chunked_error(arch, device, dtype):
    """Compare loss and gradient in chunks with those of all logits at once."""
    model, ids = make_model(arch, device), make_ids(device)
    ids, targets = ids[:, :-1], ids[:, 1:]
    with autocast(device, dtype):
        x = model.hidden(ids).flatten(0, 1)
        chunked = linear_cross_entropy(x, model.head, targets.flatten(), 50 * VOCAB)
        logits = model(ids).flatten(0, 1)
        plain = F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")
    return loss_error((model, chunked), (model, plain))


@torch.no_grad()
def packed_error(arch, device, dtype):
    """Compare the logits of documents packed in a row with those of each document alone."""
    model, ids = make_model(arch, device), make_ids(device)[:, :-1]
    lengths = [5, 1, T - 18, 12]
    doc_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).to(device)
    with autocast(device, dtype):
        packed = model(ids, doc_ids=doc_ids.expand(ROWS, -1))
        alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    return distance([packed], [alone])


@torch.no_grad()
def cached_error(arch, device):
    """Count the greedy ids that differ."""
    model, ids = make_model(arch, device), make_ids(device)[:, :-1]
    context = ids[:, :9]
    cached = torch.stack(list(model.generate(context, T - 9, temperature=0)), dim=1)
    for _ in range(T - 9):
        context = torch.cat((context, model(context)[:, -1:].argmax(-1)), dim=1)
    return (cached != context[:, 9:]).sum().item()


class Run:
    """A training run of a small model: AdamW for gpt2, Muon for qwen3."""

    def __init__(self, arch, device):
        self.model, self.ids = make_model(arch, device), make_ids(device)
        self.optimizers = configure_optimizers(
            self.model, "muon" if arch == "qwen3" else "adamw", 3e-3, 3e-3, 0.1, (0.9, 0.95))

    def train(self, steps, dtype=torch.float32):
        """Train on one batch; return the losses (steps,) on the CPU."""
        return torch.stack([train_step(self.model, self.optimizers, self.ids, dtype)
                            for _ in range(steps)]).cpu()


def training_error(arch, device, dtype):
    """Compare the fall of the loss after each step with that of float32 on the CPU."""
    got, want = Run(arch, device).train(9, dtype), Run(arch, torch.device("cpu")).train(9)
    return distance([got[0] - got[1:]], [want[0] - want[1:]])


def resume_error(arch, device):
    """Compare the losses of steps 4 to 8 with those of a run that is saved and loaded after 3."""
    whole, first, second = (Run(arch, device) for _ in range(3))
    first.train(3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (first.model, *first.optimizers)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True, map_location="cpu")
    for part, state in zip((second.model, *second.optimizers), states):
        part.load_state_dict(state)
    return distance([second.train(5)], [whole.train(8)[3:]])


def compile_error(arch, device, dtype):
    """Compare loss and gradient of a compiled model with those of an eager one."""
    eager, ids = make_model(arch, device), make_ids(device)
    compiled = copy.deepcopy(eager)
    compiled.compile_parts()
    with autocast(device, dtype):
        losses = [model(ids[:, :-1], ids[:, 1:])[0] for model in (compiled, eager)]
    return loss_error((compiled, losses[0]), (eager, losses[1]))

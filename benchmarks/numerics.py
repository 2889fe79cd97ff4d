"""Numeric checks of gpt.py on any device, against the CPU in float32 and against each other.

    for name, limit, check in numeric_checks(device): error = check()   # must be at most limit

Errors are relative: the norm of the difference over the norm of the expected values.
"""
import copy
import io
from functools import partial

import torch
import torch.nn.functional as F

from gpt import GPT, GPTConfig, linear_cross_entropy
from training.optim import configure_optimizers

ROWS, T, VOCAB = 4, 64, 512
# Limits: a bfloat16 number is rounded by up to 2^-9 = 0.002 of itself, some ten times in a row.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def numeric_checks(device, compile=False):
    """Yield (name, limit, function that returns the error); with compile the slow ones, last."""
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
    """A small model with seeded weights, far from the initial ones (blocks start as identity)."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(arch=arch, vocab_size=VOCAB, block_size=T, n_layer=2, n_head=4,
                          n_kv_head=2 if arch == "qwen3" else 0, n_embd=128))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.to(device)


def make_batch(device):
    """Seeded ids and targets (ROWS, T), equal on every device."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCAB, (ROWS, T + 1), generator=generator).to(device)
    return ids[:, :-1], ids[:, 1:]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def distance(got, want):
    """Relative error of a list of tensors."""
    got, want = (torch.cat([t.detach().double().cpu().flatten() for t in ts]) for ts in (got, want))
    return ((got - want).norm() / want.norm()).item()


def loss_error(got, want):
    """The larger relative error of loss and gradient; got and want: (model, its loss)."""
    grads = [torch.autograd.grad(loss, model.parameters()) for model, loss in (got, want)]
    return max(distance([got[1]], [want[1]]), distance(*grads))


def chunked_error(arch, device, dtype):
    model, (ids, targets) = make_model(arch, device), make_batch(device)
    with autocast(device, dtype):
        x = model.hidden(ids).flatten(0, 1)
        chunked = linear_cross_entropy(x, model.head, targets.flatten(), 50 * VOCAB)
        logits = model(ids).flatten(0, 1)
        plain = F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")
    return loss_error((model, chunked), (model, plain))


@torch.no_grad()
def packed_error(arch, device, dtype):
    model, (ids, _) = make_model(arch, device), make_batch(device)
    lengths = [5, 1, T - 18, 12]
    doc_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).to(device)
    with autocast(device, dtype):
        packed = model(ids, doc_ids=doc_ids.expand(ROWS, -1))
        alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    return distance([packed], [alone])


@torch.no_grad()
def cached_error(arch, device):
    """Number of greedy ids that differ."""
    model, (ids, _) = make_model(arch, device), make_batch(device)
    context = ids[:, :9]
    cached = torch.stack(list(model.generate(context, T - 9, temperature=0)), dim=1)
    for _ in range(T - 9):
        context = torch.cat((context, model(context)[:, -1:].argmax(-1)), dim=1)
    return (cached != context[:, 9:]).sum().item()


class Run:
    """A training run of a small model: AdamW for gpt2, Muon for qwen3."""

    def __init__(self, arch, device, dtype=torch.float32):
        self.model, self.device, self.dtype = make_model(arch, device), device, dtype
        self.optimizers = configure_optimizers(
            self.model, "muon" if arch == "qwen3" else "adamw", 3e-3, 3e-3, 0.1, (0.9, 0.95))

    def train(self, first, last):
        """Do steps first to last - 1 on one batch; return their losses."""
        losses = []
        for _ in range(first, last):
            with autocast(self.device, self.dtype):
                loss, n = self.model(*make_batch(self.device))
            (loss / n).backward()
            for opt in self.optimizers:
                opt.step()
                opt.zero_grad(set_to_none=True)
            losses.append(loss.detach() / n)
        return losses


def training_error(arch, device, dtype):
    """Of how far the loss has fallen after each step."""
    runs = (Run(arch, device, dtype), Run(arch, torch.device("cpu")))
    losses = [torch.stack(run.train(0, 9)).cpu() for run in runs]
    return distance(*([curve[0] - curve[1:]] for curve in losses))


def resume_error(arch, device):
    """Of the losses of steps 4 to 8; the second run is written and read again after step 3."""
    whole, first, second = (Run(arch, device) for _ in range(3))
    first.train(0, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (first.model, *first.optimizers)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True, map_location="cpu")
    for part, state in zip((second.model, *second.optimizers), states):
        part.load_state_dict(state)
    return distance(second.train(3, 8), whole.train(0, 8)[3:])


def compile_error(arch, device, dtype):
    eager, batch = make_model(arch, device), make_batch(device)
    compiled = copy.deepcopy(eager)
    compiled.compile_parts()
    with autocast(device, dtype):
        got, want = compiled(*batch)[0], eager(*batch)[0]
    return loss_error((compiled, got), (eager, want))

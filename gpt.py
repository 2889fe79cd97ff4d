"""The whole model: GPT-2 and Qwen3 in one file, with their loss, sampling, optimizers and files.

    model = GPT(GPTConfig(arch="qwen3", vocab_size=2176, n_layer=4, n_head=4, n_embd=256))
    loss_sum, n_tokens = model(ids, targets)           # training: both (batch, time) int64
    for next_ids in model.generate(ids, 100): ...      # sampling: one id a row and step
    model.save_pretrained("out/x/final")               # transformers loads this folder as it is
    model = GPT.from_pretrained("out/x/final")         # ours, or Hugging Face's GPT-2 and Qwen3

Needs torch and the standard library; safetensors and huggingface_hub only where files are touched.
"""
import json
import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


@dataclass
class GPTConfig:
    arch: str = "gpt2"       # learned positions, LayerNorm, GELU; "qwen3": RoPE, RMSNorm, SwiGLU
    vocab_size: int = 50304  # rows of the embedding: the ids, padded up to a multiple of 128
    n_ids: int = 0           # ids that mean something, all the sampler draws; 0 = vocab_size
    block_size: int = 1024   # longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0       # heads of keys and values (grouped-query attention); 0 = n_head
    n_embd: int = 768
    head_dim: int = 0        # 0 = n_embd // n_head
    n_inner: int = 0         # width inside the MLP; 0 = 4 n_embd (gpt2), 8/3 n_embd (qwen3)
    dropout: float = 0.0     # after the embedding and on what each half of a block adds
    bias: bool = True        # gpt2 only: biases in linear layers and norms
    activation: str = "gelu_pytorch_tanh"  # gpt2 only; "gelu_new" is the same, "gelu" exact
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie: bool = True         # the output head is the embedding matrix

    def __post_init__(self):
        for f in fields(self):  # a config.json may hold anything; 0 only where it is the default
            value, number = getattr(self, f.name), f.type in (int, float)
            if (type(value) not in ((int, float) if f.type is float else (f.type,))
                    or number and not (0 < value < 2**31 or value == f.default)):
                raise ValueError(f"{f.name} is {value!r}, no {'sensible ' * number}"
                                 f"{f.type.__name__}")
        modern = self.arch == "qwen3"
        if self.arch not in ("gpt2", "qwen3"):
            raise ValueError(f"arch is {self.arch!r}; known are 'gpt2' and 'qwen3'")
        if self.activation not in ("gelu_pytorch_tanh", "gelu_new", "gelu"):
            raise ValueError(f"activation is {self.activation!r}; known are GPT-2's GELU forms")
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}: there is nothing to predict from")
        self.n_ids = self.n_ids or self.vocab_size
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        # 8/3: three matrices so wide hold as many weights as two of 4 n_embd (arXiv:2002.05202)
        inner = max(1, round(self.n_embd / 24)) * 64 if modern else 4 * self.n_embd
        self.n_inner = self.n_inner or inner
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if modern and self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs: head_dim {self.head_dim} must be even")
        if not modern and (self.n_kv_head != self.n_head or not self.tie):
            raise ValueError("gpt2 has as many key heads as query heads, and a tied output head")
        self.bias = self.bias and not modern


# ---- the blocks ----

def rope_table(positions, head_dim, theta):
    """Rotary angles (arXiv:2104.09864): positions (1 or B, T) -> cos, sin (1 or B, 1, T, D/2)."""
    even = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() / theta ** (even / head_dim)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Turn the pairs (x[i], x[i + head_dim/2]) by their angles; x (B, heads, T, head_dim)."""
    cos, sin = (t.to(x.dtype) for t in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values one layer has seen, (B, n_kv_head, max_len, head_dim), allocated once."""

    def __init__(self, max_len):
        self.max_len, self.length, self.k, self.v = max_len, 0, None, None

    def append(self, k, v):
        """Store k, v (B, n_kv_head, T, head_dim) and return all that is stored."""
        if self.k is None:  # only here is dtype known: autocast decides it
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(B, H, self.max_len, D), v.new_empty(B, H, self.max_len, D)
        end = self.length + k.size(2)
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Cache:
    """What a model has read: ids (B, T) or None, and each layer's KVCache of max_len."""

    def __init__(self, n_layer, max_len):
        self.layers, self.ids = [KVCache(max_len) for _ in range(n_layer)], None

    def rewind(self, ids):
        """Forget what is not how ids (B, T) begin -> how many of them need not be read again.

        The last id is always read: its logits are what comes next.
        """
        kept = 0
        if self.ids is not None and len(self.ids) == len(ids):
            n = min(self.ids.size(1), ids.size(1) - 1)
            differs = (self.ids[:, :n] != ids[:, :n]).any(0).nonzero()
            kept = int(differs[0]) if len(differs) else n
        for layer in self.layers:
            layer.length = kept
        self.ids = ids[:, :kept]  # a forward that is interrupted leaves ids and layers in agreement
        return kept


# The kernels of both norms need x and the weight in one dtype: under autocast x of q_norm has 16
# bits, and under FSDP's mixed precision the weight has.

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim, inner = config.head_dim, config.n_head * config.head_dim
        inner_kv = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, inner, bias=config.bias)
        self.k_proj = nn.Linear(config.n_embd, inner_kv, bias=config.bias)
        self.v_proj = nn.Linear(config.n_embd, inner_kv, bias=config.bias)
        self.o_proj = nn.Linear(inner, config.n_embd, bias=config.bias)
        modern = config.arch == "qwen3"
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if modern else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if modern else nn.Identity()
        self.group_size = config.n_head // config.n_kv_head  # query heads per key head

    def forward(self, x, rope, mask, cache):
        B, T, C = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is not None and x.is_cuda:
            # CUDA's only kernel for a mask with grouped heads is the slow one (math)
            k, v = (t.repeat_interleave(self.group_size, dim=1) for t in (k, v))
        # is_causal aligns top left: with a cache it would let a lone query see only the first key.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=mask is None and T > 1,
                                           enable_gqa=k.size(1) < q.size(1))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # heads side by side again


class MLP(nn.Module):
    """GPT-2's: widen, GELU, narrow."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.gelu = nn.GELU("none" if config.activation == "gelu" else "tanh")

    def forward(self, x):
        return self.down_proj(self.gelu(self.up_proj(x)))


class SwiGLU(nn.Module):
    """Qwen3's: a second projection gates the first (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make_norm(config):
    if config.arch == "qwen3":
        return RMSNorm(config.n_embd, config.norm_eps)
    return LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config) if config.arch == "qwen3" else MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, cache))
        return x + self.drop(self.mlp(self.norm2(x)))


# ---- the loss ----

def loss_chunk(x, weight, targets, need_grad):
    """Loss of some rows: (sum, d/dlogits or None); their logits live only in here."""
    logp = F.linear(x, weight).float().log_softmax(-1)  # (rows, V)
    index = targets.clamp(min=0)[:, None]
    loss = -(logp.gather(1, index)[:, 0] * (targets >= 0)).sum()
    if not need_grad:
        return loss, None
    grad = logp.exp_()  # softmax, in the same memory
    grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
    return loss, grad.to(x.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, need_grad, rows, chunk):
        w, ignored = weight.to(x.dtype), (targets < 0)[:, None]
        x = x.masked_fill(ignored, 0)  # cheaper here than in the logits: they add 0 to d/dweight
        loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if need_grad else None
        grad_w = torch.zeros_like(weight) if need_grad else None
        for i in range(0, len(x), rows):
            part, grad = chunk(x[i:i + rows], w, targets[i:i + rows], need_grad)
            loss += part
            if need_grad:
                torch.mm(grad, w, out=grad_x[i:i + rows])
                if x.dtype == grad_w.dtype:
                    grad_w.addmm_(grad.T, x[i:i + rows])  # no second matrix of its size
                else:
                    grad_w += grad.T @ x[i:i + rows]
        if need_grad:
            ctx.save_for_backward(grad_x.masked_fill_(ignored, 0), grad_w)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        # In place: a copy of d/dweight is 466 MB at 151,680 x 768. A second backward is refused by
        # autograd, which sees that what was saved has changed.
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(scale), grad_w.mul_(scale), None, None, None, None


def linear_cross_entropy(x, weight, targets, logits_budget=2**26, chunk=loss_chunk):
    """Summed cross-entropy of x @ weight.T against targets, never holding all logits at once.

    x (N, C) any float dtype, weight (V, C), targets (N,) int64 -> scalar float32.
    Rows with target -1 count nothing. Peak extra memory is about logits_budget floats instead of
    N * V; gradients are made in the forward pass, so logits are made once (Liger kernels,
    arXiv:2410.10989). Under autocast both matrices are cast to its dtype.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    rows = max(1, logits_budget // len(weight))
    need_grad = torch.is_grad_enabled()  # inside the Function it is always off
    with torch.autocast(device_type, enabled=False):
        return LinearCrossEntropy.apply(x, weight, targets, need_grad, rows, chunk)


# ---- sampling ----

def sample_next(logits, temperature, top_k, top_p, min_p, generators):
    """Draw one id a row from logits (B, V) -> (B,) int64; temperature 0 takes the likeliest.

    generators: a torch.Generator for each row, so that a row is the same in any batch; or None.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # descending
    probs = (logits / max(temperature, 1e-5)).softmax(-1)
    # nucleus (arXiv:1904.09751): keep the fewest likeliest ids whose mass reaches top_p;
    # min_p (arXiv:2407.01082): and of those the ones not that much less likely than the first
    unlikely = (probs.cumsum(-1) - probs >= top_p) | (probs < min_p * probs[:, :1])
    probs = probs.masked_fill(unlikely, 0.0)
    if generators is None:
        choice = torch.multinomial(probs, 1)
    else:
        choice = torch.stack([torch.multinomial(p, 1, generator=g)
                              for p, g in zip(probs, generators)])
    return order.gather(-1, choice)[:, 0]


def penalise(logits, seen, penalty):
    """Divide the positive and multiply the negative logits of every id seen (B, V) bool (CTRL,
    arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


# ---- Muon ----

def orthogonalize(g, steps=5):
    """About U V^T of each matrix g = U S V^T, (n, rows, columns) float32, by Newton-Schulz.

    Every step is a polynomial of g g^T, so all of them work on the smaller of the two Gram matrices
    and g is multiplied once, at the end. Coefficients: https://kellerjordan.github.io/posts/muon
    """
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    gram = x @ x.mT
    norm2 = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + 1e-14
    gram, total = gram / norm2, None
    eye = torch.eye(gram.size(-1), device=g.device)
    for step in range(steps):
        p = 3.4445 * eye - 4.7750 * gram + 2.0315 * (gram @ gram)
        total = p if total is None else p @ total
        gram = p @ gram @ p if step < steps - 1 else None
    x = total @ x / norm2.sqrt()
    return x.mT if tall else x


def orthogonalize_all(matrices):
    """orthogonalize a list of matrices of one shape; each process does its share of sharded ones.
    """
    if not hasattr(matrices[0], "device_mesh"):
        return orthogonalize(torch.stack(matrices))
    from torch.distributed.tensor import DTensor, Shard
    mesh, shape = matrices[0].device_mesh, (len(matrices), *matrices[0].shape)
    stride = (shape[1] * shape[2], shape[2], 1)
    rows = torch.stack([m.to_local() for m in matrices])  # some rows of every matrix
    stack = DTensor.from_local(rows, mesh, [Shard(1)], shape=shape, stride=stride)
    whole = stack.redistribute(placements=[Shard(0)]).to_local()  # some matrices, all their rows
    done = orthogonalize(whole) if len(whole) else whole
    done = DTensor.from_local(done, mesh, [Shard(0)], shape=shape, stride=stride)
    return done.redistribute(placements=[Shard(1)]).unbind(0)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is orthogonalized, for matrices only.

    The update of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"): as large as AdamW's, so that
    rates and weight decay compare (arXiv:2502.16982). That one works matrix by matrix in bfloat16,
    which a CPU without bfloat16 instructions does 25 times slower than this; here matrices of one
    shape are multiplied together, in float32, slice_numel elements (or one matrix) at a time.
    """
    slice_numel = 2**24  # orthogonalize holds about 5 times as many floats

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                n = max(1, self.slice_numel // params[0].numel())
                n *= params[0].device_mesh.size() if hasattr(params[0], "device_mesh") else 1
                for i in range(0, len(params), n):
                    self.update(params[i:i + n], group)

    def update(self, params, group):
        """Update params, matrices of one shape."""
        directions = []
        for p in params:
            state, grad = self.state[p], p.grad.float()
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            directions.append(grad.lerp(state["momentum_buffer"], group["momentum"]))
        step_size = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
        for p, direction in zip(params, orthogonalize_all(directions)):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(direction * step_size)


# ---- the model ----

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        modern = config.arch == "qwen3"
        self.wpe = None if modern else nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = None if config.tie else nn.Linear(config.n_embd, config.vocab_size,
                                                         bias=False)
        self.loss_chunk = loss_chunk
        self.init_weights()

    def init_weights(self):
        """Blocks begin as the identity: what they add to the residual stream starts at zero."""
        for name, p in self.named_parameters():
            if name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
                nn.init.normal_(p, std=0.02)
            elif name.endswith(("o_proj.weight", "down_proj.weight", ".bias")):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.5 / math.sqrt(p.size(1)))  # 0.018 at 768, as GPT-2's 0.02

    @property
    def device(self):
        return self.wte.weight.device

    @property
    def head(self):
        """The (vocab_size, n_embd) matrix that makes logits."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def n_params(self):
        """Parameters in the embeddings and head, and in the blocks."""
        total = sum(p.numel() for p in self.parameters())
        body = sum(p.numel() for p in self.blocks.parameters())
        return total - body, body

    def flops_per_token(self, T):
        """Matmul FLOPs of forward and backward per token at context T (PaLM, appendix B)."""
        c = self.config
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        return 6 * (matrices + self.head.numel()) + 12 * c.n_layer * c.n_head * c.head_dim * T

    def hidden(self, ids, doc_ids=None, caches=None):
        """Final hidden states (B, T, n_embd) of ids (B, T); see forward."""
        B, T = ids.shape
        past = caches[0].length if caches else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit a context of {self.config.block_size}")
        positions, mask = torch.arange(past, past + T, device=ids.device)[None], None
        if doc_ids is not None:
            mask = (doc_ids[:, :, None] == doc_ids[:, None, :]).tril()[:, None]   # (B, 1, T, T)
            begins = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))             # (B, T)
            positions = positions - torch.where(begins, positions, 0).cummax(1).values
        elif past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=ids.device).tril(past)
        x = self.wte(ids)
        if self.wpe is not None:
            x, rope = x + self.wpe(positions), None
        else:
            rope = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, caches[i] if caches else None)
        return self.norm(x)

    def forward(self, ids, targets=None, doc_ids=None, caches=None, last=False):
        """Logits, or the loss.

        ids (B, T) int64. Without targets -> logits (B, T, vocab_size), with last=True only those of
        the last position, (B, 1, vocab_size). With targets (B, T), -1 = ignored -> (the SUM of the
        loss as float32 scalar, the number of trained tokens).
        doc_ids (B, T), non-decreasing: positions restart at every change and attention stays inside
        a document; never with caches (one KVCache a block, which T new tokens extend).
        """
        x = self.hidden(ids, doc_ids, caches)
        if targets is None:
            return F.linear(x[:, -1:] if last else x, self.head)
        loss = linear_cross_entropy(x.flatten(0, 1), self.head, targets.flatten(),
                                    self.logits_budget(), self.loss_chunk)
        return loss, (targets >= 0).sum()

    def logits_budget(self):
        """Logits held at once: a GPU works best on many, a CPU on what its caches hold.

        Not under 256 rows: every chunk reads and writes the whole of the head's gradient.
        """
        on_cpu = self.device.type == "cpu"
        return max(2**22 if on_cpu else 2**26, 256 * self.config.vocab_size)

    @torch.no_grad()
    def grow_vocab(self, vocab_size):
        """More ids: the new rows of embedding and head begin as the mean of the old ones."""
        tables = [self.wte] if self.lm_head is None else [self.wte, self.lm_head]
        for table in tables:
            old = table.weight
            new = old.mean(0).expand(vocab_size - len(old), -1)
            table.weight = nn.Parameter(torch.cat((old, new)))
        self.config.vocab_size = vocab_size

    def compile_parts(self):
        """torch.compile each block in place (no prefix in names) and the body of the loss."""
        for block in self.blocks:
            block.compile()
        self.loss_chunk = torch.compile(loss_chunk)

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                 repetition_penalty=1.0, stop_ids=(), seed=None, cache=None):
        """Yield one (B,) int64 tensor of new ids a step, continuing ids (B, T >= 1).

        temperature 0 = greedy; top_k 0 = all. A row ends with the first of stop_ids, which is
        yielded, and yields -1 from then on; all rows ended or max_new_tokens reached ends it. Past
        block_size the last half of the context is kept and read again. seed: one a row, or of the
        first row, and each next row's is one more; a row draws the same in any batch. cache: a
        Cache of block_size from the call before, so that only what is new in ids is read.
        """
        block_size, n_ids, device = self.config.block_size, self.config.n_ids, ids.device
        seeds = range(seed, seed + len(ids)) if isinstance(seed, int) else seed
        generators = seeds and [torch.Generator(device).manual_seed(s) for s in seeds]
        stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
        seen = torch.zeros(len(ids), n_ids, dtype=torch.bool, device=device).scatter_(1, ids, True)
        cache = cache or Cache(len(self.blocks), min(block_size, ids.size(1) + max_new_tokens))
        context, unread = ids, None
        for _ in range(max_new_tokens):
            if context.size(1) > block_size:
                context, unread = context[:, -(block_size // 2):], None
            if unread is None:
                unread = context[:, cache.rewind(context):]
            logits = self(unread, caches=cache.layers, last=True)[:, 0, :n_ids].float()
            cache.ids = context
            if repetition_penalty != 1.0:
                logits = penalise(logits, seen, repetition_penalty)
            new = sample_next(logits, temperature, top_k, top_p, min_p, generators)
            yield torch.where(ended, -1, new)
            ended |= torch.isin(new, stops)
            if ended.all():
                return
            seen.scatter_(1, new[:, None], True)
            unread = new[:, None]
            context = torch.cat((context, unread), dim=1)

    # ---- optimizers ----

    def configure_optimizers(self, optimizer, learning_rate, muon_lr, weight_decay, betas):
        """A list of optimizers: "adamw" for all, or "muon" for the blocks' matrices beside it.

        Weight decay falls on the blocks' matrices only: not on norms, biases and embeddings.
        Each group keeps its peak rate as group["peak_lr"], for the schedule to scale.
        """
        if optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer is {optimizer!r}; known are 'adamw' and 'muon'")
        matrices = [p for p in self.blocks.parameters() if p.dim() == 2]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.parameters() if id(p) not in taken]
        groups = [dict(params=rest, weight_decay=0.0)]
        if optimizer == "adamw":
            groups.append(dict(params=matrices, weight_decay=weight_decay))
        fused = self.device.type in ("cuda", "cpu", "mps")
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)]
        if optimizer == "muon":
            optimizers.append(Muon(matrices, muon_lr, weight_decay))
        for group in (g for opt in optimizers for g in opt.param_groups):
            group["peak_lr"] = group["lr"]
        return optimizers

    # ---- files ----

    def save_pretrained(self, folder, state=None, dtype=torch.float32, **extra):
        """Write config.json (with extra in it) and model.safetensors, as transformers has them.

        state: the state dict, where this process does not hold all of it (fully_shard).
        """
        from safetensors.torch import save_file
        folder, state, tensors = Path(folder), state or self.state_dict(), {}
        folder.mkdir(parents=True, exist_ok=True)
        for theirs, ours in hf_names(self.config):
            # transformers' GPT-2 always has biases: where ours has none they are zeros
            parts = [state[name] if name in state else
                     torch.zeros(len(state[name.replace(".bias", ".weight")])) for name in ours]
            tensor = torch.cat(parts).to(dtype)
            tensors[theirs] = (tensor.T if is_conv1d(theirs) else tensor).contiguous().cpu()
        config = hf_config(self.config) | {"dtype": str(dtype).removeprefix("torch.")} | extra
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # it is made 0600

    @classmethod
    def from_pretrained(cls, path, dropout=0.0, block_size=0):
        """Read a model folder or hub id of GPT-2 or Qwen3 architecture, as float32 on the CPU.

        block_size > 0 shortens the context. ValueError: another architecture, a feature of it that
        is not built here, tensors missing, extra or misshapen. OSError: no such file, no network.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        folder = Path(path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download
            patterns = ["config.json", "generation_config.json", "*.safetensors"]
            folder = Path(snapshot_download(str(path), allow_patterns=patterns))
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: no config.json, so not a model folder")
        try:
            text = (folder / "config.json").read_text(encoding="utf-8")
            config = read_hf_config(json.loads(text))
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"{folder / 'config.json'}: {e}") from e
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                new = load_file(file)
            except SafetensorError as e:
                raise ValueError(f"{file}: damaged ({e})") from e
            if new.keys() & tensors.keys():
                raise ValueError(f"{file}: {min(new.keys() & tensors.keys())} stands in another "
                                 ".safetensors file too")
            tensors |= new
        config.dropout = dropout
        if config.n_layer > len(tensors):
            raise ValueError(f"{folder}: {len(tensors)} tensors for {config.n_layer} layers")
        with torch.device("meta"):  # no memory and no random numbers before names and shapes fit
            model = cls(config)
        model.load_hf_tensors(tensors, folder)
        if 0 < block_size < config.block_size:
            config.block_size = block_size
            if model.wpe is not None:
                model.wpe.weight = nn.Parameter(model.wpe.weight[:block_size].clone())
        return model

    @torch.no_grad()
    def load_hf_tensors(self, tensors, source):
        """Give this model, on the meta device, the tensors of a transformers state dict."""
        tensors = dict(tensors)
        if self.config.arch == "gpt2":  # the hub's oldest files lack the prefix, hold mask buffers
            tensors = {f"transformer.{k.removeprefix('transformer.')}": t
                       for k, t in tensors.items()
                       if not k.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))}
        elif self.config.tie:
            tensors.pop("lm_head.weight", None)
        state, table = self.state_dict(), dict(hf_names(self.config))
        missing = sorted(table.keys() - tensors.keys())
        extra = sorted(tensors.keys() - table.keys())
        if missing or extra:
            raise ValueError(f"{source}: missing tensors {missing[:3] or 'none'} ({len(missing)}), "
                             f"unknown tensors {extra[:3] or 'none'} ({len(extra)})")
        copies = []
        for theirs, ours in table.items():
            tensor = tensors[theirs].T if is_conv1d(theirs) else tensors[theirs]
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise ValueError(f"{source}: {theirs} is of type {tensor.dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{source}: {theirs} holds values that are not finite")
            if not all(name in state for name in ours):  # a model made without biases has zeros
                if tensor.any():
                    raise ValueError(f"{source}: {theirs} is not zero, config.json says no bias")
                continue
            rows = [len(state[name]) for name in ours]
            want = (sum(rows), *state[ours[0]].shape[1:])
            if tensor.shape != want:
                raise ValueError(f"{source}: {theirs} has shape {tuple(tensors[theirs].shape)}, "
                                 f"config.json says {want}")
            copies += [(name, part) for name, part in zip(ours, tensor.split(rows))]
        self.to_empty(device="cpu")
        state = self.state_dict()
        for name, part in copies:
            state[name].copy_(part)


# ---- the same model in Hugging Face's words ----

def hf_names(c):
    """Pairs (their tensor, our tensors): theirs is ours concatenated on the first dimension."""
    if c.arch == "qwen3":
        parts = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
        parts |= {f"self_attn.{n}": f"attn.{n}" for n in
                  ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
        parts |= {f"mlp.{n}": f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
        yield "model.embed_tokens.weight", ["wte.weight"]
        for i in range(c.n_layer):
            for theirs, ours in parts.items():
                yield f"model.layers.{i}.{theirs}.weight", [f"blocks.{i}.{ours}.weight"]
        yield "model.norm.weight", ["norm.weight"]
        if not c.tie:
            yield "lm_head.weight", ["lm_head.weight"]
        return
    parts = {"ln_1": ["norm1"], "ln_2": ["norm2"], "attn.c_proj": ["attn.o_proj"],
             "attn.c_attn": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
             "mlp.c_fc": ["mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}
    yield "transformer.wte.weight", ["wte.weight"]
    yield "transformer.wpe.weight", ["wpe.weight"]
    for kind in ("weight", "bias"):
        for i in range(c.n_layer):
            for theirs, ours in parts.items():
                yield f"transformer.h.{i}.{theirs}.{kind}", [f"blocks.{i}.{o}.{kind}" for o in ours]
        yield f"transformer.ln_f.{kind}", [f"norm.{kind}"]


def is_conv1d(name):
    """GPT-2's linear layers are Conv1D modules: the transpose of nn.Linear's weight."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def hf_config(c):
    """config.json of a GPTConfig; n_ids and bias are our own keys, which transformers ignores."""
    common = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tie, n_ids=c.n_ids)
    if c.arch == "qwen3":
        return common | dict(
            architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=c.n_embd,
            intermediate_size=c.n_inner, num_hidden_layers=c.n_layer, head_dim=c.head_dim,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, hidden_act="silu",
            max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, attention_bias=False,
            attention_dropout=0.0, use_sliding_window=False, rope_theta=c.rope_theta,
            rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta))
    return common | dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, n_inner=c.n_inner, n_positions=c.block_size, n_ctx=c.block_size,
        activation_function=c.activation, layer_norm_epsilon=c.norm_eps, bias=c.bias,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=0.0)


def read_hf_config(h):
    """GPTConfig of a config.json (a dict); refuses what this file does not compute."""
    kind = h.get("model_type")
    if kind == "qwen3":
        ropes = [h[key] for key in ("rope_parameters", "rope_scaling") if h.get(key)]
        rope = ropes[0] if ropes else {}
        needs = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
        for r in ropes:
            if r.get("rope_type", r.get("type", "default")) != "default":
                raise ValueError(f"RoPE scaling {r} is not built here")
        config = GPTConfig(
            arch="qwen3", n_embd=h["hidden_size"], n_inner=h["intermediate_size"],
            n_layer=h["num_hidden_layers"], n_head=h["num_attention_heads"],
            n_kv_head=h["num_key_value_heads"], head_dim=h.get("head_dim", 128),
            block_size=h["max_position_embeddings"], norm_eps=h["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", h.get("rope_theta", 10000.0))),
            vocab_size=h["vocab_size"], tie=h.get("tie_word_embeddings", False),
            n_ids=h.get("n_ids", 0))
    elif kind == "gpt2":
        needs = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                 "add_cross_attention": False, "tie_word_embeddings": True}
        config = GPTConfig(
            arch="gpt2", n_embd=h["n_embd"], n_layer=h["n_layer"], n_head=h["n_head"],
            n_inner=h.get("n_inner") or 0, norm_eps=h.get("layer_norm_epsilon", 1e-5),
            block_size=h.get("n_positions", h.get("n_ctx", 1024)), vocab_size=h["vocab_size"],
            activation=h.get("activation_function", "gelu_new"), bias=h.get("bias", True),
            n_ids=h.get("n_ids", 0))
    else:
        raise ValueError(f"model_type is {kind!r}; the two that work are 'gpt2' and 'qwen3'")
    for key, need in needs.items():
        if h.get(key, need) != need:
            raise ValueError(f"{key}={h[key]!r} is not built here, only {need!r}")
    return config

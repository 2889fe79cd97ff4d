"""The whole model: GPT-2 and Qwen3 in one file, with the loss, the key-value cache and sampling.

    model = GPT(GPTConfig(arch="qwen3", vocab_size=2176, n_layer=4, n_head=4, n_embd=256))
    loss_sum, n_tokens = model(ids, targets)           # training: ids and targets (B, T) int64
    for next_ids in model.generate(ids, 100): ...      # sampling: (B,) int64 a step

Shapes in the comments: B sequences, T tokens, C = n_embd, H heads, D = head_dim, V rows of the
embedding. Files in Hugging Face's format are written by models/hf.py and read by models/load.py,
optimizers are in training/optim.py. This file imports torch and the standard library only.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    arch: str = "gpt2"       # learned positions, LayerNorm, GELU; "qwen3": RoPE, RMSNorm, SwiGLU
    vocab_size: int = 50304  # number of token ids; rows beyond it are never sampled
    padded_vocab_size: int = 0  # rows of the embedding, V; 0 = vocab_size
    block_size: int = 1024   # longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0       # heads of keys and values (grouped-query attention); 0 = n_head
    n_embd: int = 768
    head_dim: int = 0        # 0 = n_embd // n_head
    n_inner: int = 0         # width inside the MLP; 0 = 4 n_embd (gpt2), 8/3 n_embd (qwen3)
    dropout: float = 0.0     # on the embeddings and on each residual branch
    bias: bool = True        # gpt2 only: biases in linear layers and norms
    qkv_bias: bool = False   # qwen3: biases of q, k and v, as in Qwen2; gpt2: as bias
    qk_norm: bool = True     # qwen3: norms of q and k; off and no qkv_bias: Llama's shape
    activation: str = "gelu_pytorch_tanh"  # gpt2 only; "gelu_new" is the same, "gelu" exact
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie: bool = True         # the output head is the embedding matrix

    def __post_init__(self):
        for f in fields(self):  # a config.json may hold anything; 0 only where it is the default
            value, is_number = getattr(self, f.name), f.type in (int, float)
            types = (int, float) if f.type is float else (f.type,)
            if type(value) not in types or (
                    is_number and not (0 < value < 2**31 or value == f.default)):
                kind = f"positive {f.type.__name__}" if is_number else f.type.__name__
                raise ValueError(f"{f.name} must be a {kind}, got {value!r}")
        modern = self.arch == "qwen3"
        if self.arch not in ("gpt2", "qwen3"):
            raise ValueError(f"arch must be 'gpt2' or 'qwen3', got {self.arch!r}")
        if self.activation not in ("gelu_pytorch_tanh", "gelu_new", "gelu"):
            raise ValueError(f"activation must be one of GPT-2's GELUs, got {self.activation!r}")
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")
        self.padded_vocab_size = self.padded_vocab_size or self.vocab_size
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} is less than vocab_size "
                             f"{self.vocab_size}")
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        # 8/3: three matrices of that width hold as many weights as two of 4 (arXiv:2002.05202)
        inner = max(1, round(self.n_embd / 24)) * 64 if modern else 4 * self.n_embd
        self.n_inner = self.n_inner or inner
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head "
                             f"{self.n_kv_head}")
        if modern and self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs: head_dim must be even, got {self.head_dim}")
        if not modern and (self.n_kv_head != self.n_head or not self.tie):
            raise ValueError("gpt2 needs n_kv_head = n_head and a tied output head")
        self.bias = self.bias and not modern
        self.qkv_bias = self.qkv_bias if modern else self.bias
        self.qk_norm = self.qk_norm and modern
        if self.qkv_bias and self.qk_norm:
            raise ValueError("qkv_bias (as Qwen2 has) and qk_norm (as Qwen3 has) exclude each "
                             "other, because no known format holds both: switch one off")


# ---- positions and norms ----

def rope_table(positions, head_dim, theta):
    """Return cos and sin of the rotary angles, (1 or B, 1, T, D/2) float32 (arXiv:2104.09864)."""
    even = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)   # (D/2,)
    angles = positions[:, None, :, None].float() / theta ** (even / head_dim)  # (B, 1, T, D/2)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Rotate each pair (x[i], x[i + D/2]) by its angle; x (B, H, T, D)."""
    cos, sin = (t.to(x.dtype) for t in rope)
    a, b = x.chunk(2, dim=-1)                                    # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# Both norms cast their weight to the dtype of x, because the kernels need the two alike: autocast
# gives q_norm an x of 16 bits, and FSDP's mixed precision gives the norms a weight of 16 bits.

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


def make_norm(config):
    if config.arch == "qwen3":
        return RMSNorm(config.n_embd, config.norm_eps)
    return LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


# ---- the key-value cache ----

class LayerCache:
    """Keys and values of one layer, (B, n_kv_head, max_len, D) each, allocated once."""

    def __init__(self, max_len):
        self.max_len, self.length, self.k, self.v = max_len, 0, None, None

    def append(self, k, v):
        """Store k and v (B, n_kv_head, T, D); return all that is stored."""
        if self.k is None:  # allocated here, because autocast decides the dtype
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(B, H, self.max_len, D), v.new_empty(B, H, self.max_len, D)
        end = self.length + k.size(2)                            # tokens stored from now on
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """The ids (B, T) that a model has read, or None, and a LayerCache for each layer."""

    def __init__(self, n_layer, max_len):
        self.layers, self.ids = [LayerCache(max_len) for _ in range(n_layer)], None

    def rewind(self, ids):
        """Keep the longest common prefix of the cached ids and ids (B, T); return its length.

        It is at most T - 1: the last id is always read, because its logits predict the next token.
        """
        kept = 0
        if self.ids is not None and len(self.ids) == len(ids):
            n = min(self.ids.size(1), ids.size(1) - 1)
            differs = (self.ids[:, :n] != ids[:, :n]).any(0).nonzero()
            kept = int(differs[0]) if len(differs) else n        # first column that differs
        for layer in self.layers:
            layer.length = kept                                  # the rest is overwritten
        self.ids = ids[:, :kept]  # an interrupted forward leaves ids and layers consistent
        return kept


# ---- the blocks ----

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.group_size = config.n_head // config.n_kv_head  # queries a key (arXiv:2305.13245)
        inner, inner_kv = (n * config.head_dim for n in (config.n_head, config.n_kv_head))
        bias, normed = config.qkv_bias, config.qk_norm
        self.q_proj = nn.Linear(config.n_embd, inner, bias=bias)     # C -> n_head * D
        self.k_proj = nn.Linear(config.n_embd, inner_kv, bias=bias)  # C -> n_kv_head * D
        self.v_proj = nn.Linear(config.n_embd, inner_kv, bias=bias)
        self.o_proj = nn.Linear(inner, config.n_embd, bias=config.bias)     # n_head * D -> C
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if normed else nn.Identity()

    def forward(self, x, rope, mask, cache):
        # mask (B or 1, 1, T, past + T): True where a query attends to a key; None = causal
        B, T, C = x.shape
        # split the heads, then move them before the tokens: (B, T, C) -> (B, T, H, D) -> ...
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        # now q (B, n_head, T, D), k and v (B, n_kv_head, T, D)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)              # scores depend on distance
        if cache is not None:
            k, v = cache.append(k, v)                            # (B, n_kv_head, past + T, D)
        if mask is not None and x.is_cuda:
            # CUDA has only a slow kernel (math) for a mask with grouped heads
            k, v = (t.repeat_interleave(self.group_size, dim=1) for t in (k, v))
        # is_causal aligns at the top left: with a cache a single query would see one key only
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=mask is None and T > 1,
                                           enable_gqa=k.size(1) < q.size(1))
        y = y.transpose(1, 2).reshape(B, T, -1)                  # (B, n_head, T, D) -> (B, T, H*D)
        return self.o_proj(y)                                    # (B, T, C)


class MLP(nn.Module):
    """GPT-2's MLP: up, GELU, down."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)    # C -> inner
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)  # inner -> C
        self.gelu = nn.GELU("none" if config.activation == "gelu" else "tanh")

    def forward(self, x):
        return self.down_proj(self.gelu(self.up_proj(x)))        # (B, T, C) -> inner -> (B, T, C)


class SwiGLU(nn.Module):
    """Qwen3's MLP: a second projection gates the first (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)  # C -> inner
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)    # C -> inner
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)  # inner -> C

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attn = Attention(config)                            # mixes tokens
        self.mlp = SwiGLU(config) if config.arch == "qwen3" else MLP(config)
        self.drop = nn.Dropout(config.dropout)                   # off in eval()

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, cache))  # mixes positions
        return x + self.drop(self.mlp(self.norm2(x)))                   # each token by itself


# ---- the loss ----

def loss_chunk(x, weight, targets, need_grad):
    """Return the loss of some rows and d loss / d logits (or None); x (N, C), weight (V, C)."""
    logp = F.linear(x, weight).float().log_softmax(-1)           # (N, V)
    index = targets.clamp(min=0)[:, None]                        # (N, 1); -1 becomes any valid id
    loss = -(logp.gather(1, index)[:, 0] * (targets >= 0)).sum()
    if not need_grad:
        return loss, None
    grad = logp.exp_()                                           # softmax, in the same memory
    grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))  # softmax - one_hot(targets)
    return loss, grad.to(x.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, tuned, ids, targets, need_grad, rows, chunk):
        w, ignored = weight.to(x.dtype), (targets < 0)[:, None]
        x = x.masked_fill(ignored, 0)  # zero the ignored rows: they add nothing to d/dweight
        loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if need_grad else None      # (N, C)
        grad_w = torch.zeros_like(tuned) if need_grad else None  # (V or n, C), in tuned's dtype
        for i in range(0, len(x), rows):
            # the logits of these rows exist only inside chunk()
            part, grad = chunk(x[i:i + rows], w, targets[i:i + rows], need_grad)
            loss += part
            if need_grad:
                torch.mm(grad, w, out=grad_x[i:i + rows])        # (rows, V) @ (V, C)
                grad = grad[:, ids]                              # (rows, V or n)
                if x.dtype == grad_w.dtype:
                    grad_w.addmm_(grad.T, x[i:i + rows])         # without a second (V, C) matrix
                else:
                    grad_w += grad.T @ x[i:i + rows]
        if need_grad:
            ctx.save_for_backward(grad_x.masked_fill_(ignored, 0), grad_w)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        # In place, because a copy of d/dweight takes 466 MB at 151,680 x 768. autograd refuses a
        # second backward, since it sees that the saved tensors have changed.
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(scale), None, grad_w.mul_(scale), None, None, None, None, None


def linear_cross_entropy(x, weight, targets, logits_budget=2**26, chunk=loss_chunk, tuned=None):
    """Return the summed cross-entropy of x @ weight.T against targets in chunks of logits.

    x (N, C) of any float dtype, weight (V, C), targets (N,) int64 -> scalar float32. Targets of -1
    are ignored. Peak extra memory is 8 to 10 bytes for each of logits_budget logits and the (V, C)
    gradient, instead of N * V logits. Gradients are computed in the forward pass, so each chunk of
    logits is computed once (Liger kernels, arXiv:2410.10989). Autocast's dtype applies to both.
    tuned: (ids, rows (n, C)): weight is frozen; its rows ids, which equal rows, get a gradient.
    """
    ids, tuned = tuned or (slice(None), weight)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    rows = max(1, logits_budget // len(weight))
    need_grad = torch.is_grad_enabled()  # read here: in Function.forward it is always off
    with torch.autocast(device_type, enabled=False):
        return LinearCrossEntropy.apply(x, weight.detach(), tuned, ids, targets, need_grad, rows,
                                        chunk)


# ---- sampling ----

def sample_next(logits, temperature, top_k, top_p, min_p, generators):
    """Draw one id per row from logits (B, V) -> (B,) int64; temperature 0 takes the most likely.

    generators: one torch.Generator per row, so that a row is the same in any batch; or None.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # descending
    probs = (logits / max(temperature, 1e-5)).softmax(-1)
    # top_p (nucleus, arXiv:1904.09751): the smallest set of ids whose probability reaches top_p;
    # min_p (arXiv:2407.01082): of these, only ids at least min_p times as likely as the first
    unlikely = probs < min_p * probs[:, :1]
    if top_p < 1:  # a float32 sum reaches 1 before the last ids
        unlikely |= probs.cumsum(-1) - probs >= top_p
    probs = probs.masked_fill(unlikely, 0.0)
    if generators is None:
        choice = torch.multinomial(probs, 1)                     # (B, 1)
    else:
        choice = torch.stack([torch.multinomial(p, 1, generator=g)
                              for p, g in zip(probs, generators)])
    return order.gather(-1, choice)[:, 0]


def penalise(logits, seen, penalty):
    """Divide positive and multiply negative logits of the ids in seen (B, V) bool by penalty
    (CTRL, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


# ---- the model ----

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        rows, modern = config.padded_vocab_size, config.arch == "qwen3"
        self.wte = nn.Embedding(rows, config.n_embd)             # token embedding
        self.wpe = None if modern else nn.Embedding(config.block_size, config.n_embd)  # positions
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)                            # before the head
        self.lm_head = None if config.tie else nn.Linear(config.n_embd, rows, bias=False)
        self.loss_chunk = loss_chunk
        self.recompute = False  # keep only the blocks' inputs for the backward (arXiv:1604.06174)
        self.lora = self.tuned = None  # with adapters: their base; (ids, rows) that the head trains
        self.init_weights()

    def init_weights(self):
        """Blocks start as the identity: the last matrix of each residual branch is zero."""
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
        """The (V, C) matrix that makes logits."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def n_params(self):
        """Return the number of parameters outside and inside the blocks."""
        total = sum(p.numel() for p in self.parameters())
        body = sum(p.numel() for p in self.blocks.parameters())
        return total - body, body

    def flops_per_token(self, T):
        """Return the matmul FLOPs of forward and backward per token at context T (PaLM, app. B)."""
        c = self.config
        matrices = [p for p in self.blocks.parameters() if p.dim() == 2] + [self.head]
        # 2 FLOPs an element for the forward, for d/dx, and for d/dweight where it is not frozen
        products = sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
        return products + 12 * c.n_layer * c.n_head * c.head_dim * T

    def hidden(self, ids, doc_ids=None, caches=None):
        """Return the final hidden states (B, T, C) of ids (B, T); arguments as in forward."""
        B, T = ids.shape
        past = caches[0].length if caches else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit a context of {self.config.block_size}")
        positions, mask = torch.arange(past, past + T, device=ids.device)[None], None  # (1, T)
        if doc_ids is not None:
            # attend inside a document only, and count positions from its first token
            mask = (doc_ids[:, :, None] == doc_ids[:, None, :]).tril()[:, None]   # (B, 1, T, T)
            begins = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))             # (B, T)
            positions = positions - torch.where(begins, positions, 0).cummax(1).values
        elif past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=ids.device).tril(past)
        x = self.wte(ids)                                        # (B, T, C)
        if self.wpe is not None:
            x, rope = x + self.wpe(positions), None              # gpt2: added once
        else:
            # qwen3: q and k are rotated in every block
            rope = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():       # with the same dropout
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, caches[i] if caches else None)
        return self.norm(x)                                      # (B, T, C)

    def forward(self, ids, targets=None, doc_ids=None, caches=None, last=False):
        """Return logits, or the loss where targets are given.

        ids (B, T) int64. Without targets: logits (B, T, V), with last=True those of the last
        position only, (B, 1, V). With targets (B, T), -1 = ignored: the SUM of the loss as float32
        scalar, and the number of trained tokens.
        doc_ids (B, T), non-decreasing: positions restart at each change and attention stays inside
        a document; not together with caches, one LayerCache per block, which the T tokens extend.
        """
        x = self.hidden(ids, doc_ids, caches)                    # (B, T, C)
        if targets is None:
            return F.linear(x[:, -1:] if last else x, self.head)  # (B, T or 1, V)
        x, targets = x.flatten(0, 1), targets.flatten()          # (B * T, C), (B * T,)
        if doc_ids is not None:  # dialogues: many positions have no target and need no logits
            trained = (targets >= 0).nonzero()[:, 0]
            x, targets = x[trained], targets[trained]
        loss = linear_cross_entropy(x, self.head, targets, self.logits_budget(), self.loss_chunk,
                                    self.tuned)
        return loss, (targets >= 0).sum()

    def logits_budget(self):
        """Return how many logits the loss holds at once: many for a GPU, few for a CPU's caches.

        At least 256 rows, because every chunk reads and writes the whole gradient of the head.
        """
        on_cpu = self.device.type == "cpu"
        return max(2**22 if on_cpu else 2**26, 256 * self.config.padded_vocab_size)

    @torch.no_grad()
    def grow_vocab(self, vocab_size, padded_vocab_size):
        """Append rows to embedding and head; each new row is the mean of the old ones."""
        for table in [self.wte] if self.lm_head is None else [self.wte, self.lm_head]:
            old = table.weight                                   # (V, C)
            new = old.mean(0).expand(padded_vocab_size - len(old), -1)
            table.weight = nn.Parameter(torch.cat((old, new)))
        self.config.vocab_size, self.config.padded_vocab_size = vocab_size, padded_vocab_size

    def compile_parts(self):
        """Compile each block in place, which keeps parameter names, and the loss of a chunk."""
        for block in self.blocks:
            block.compile()
        self.loss_chunk = torch.compile(loss_chunk)

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                 repetition_penalty=1.0, stop_ids=(), seed=None, cache=None):
        """Yield one (B,) int64 tensor of new ids per step, continuing ids (B, T >= 1).

        temperature 0 = greedy; top_k 0 = all. A row ends with the first of stop_ids, which is
        yielded, and yields -1 from then on; generation ends when all rows have ended or after
        max_new_tokens. Past block_size the last half of the context is kept and read again.
        seed: a list with one seed per row, or an int: row i uses seed + i; so a row is the same in
        any batch. cache: the KVCache of the call before; then only what is new in ids is read.
        """
        block_size, vocab_size, device = self.config.block_size, self.config.vocab_size, ids.device
        seeds = range(seed, seed + len(ids)) if isinstance(seed, int) else seed
        generators = seeds and [torch.Generator(device).manual_seed(s) for s in seeds]
        stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=device)            # (B,)
        seen = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=device)
        seen.scatter_(1, ids, True)
        cache = cache or KVCache(len(self.blocks), min(block_size, ids.size(1) + max_new_tokens))
        context, unread = ids, None
        for _ in range(max_new_tokens):
            if context.size(1) > block_size:
                context, unread = context[:, -(block_size // 2):], None  # positions restart
            if unread is None:                                   # the prompt, or a cut context
                unread = context[:, cache.rewind(context):]
            logits = self(unread, caches=cache.layers, last=True)[:, 0, :vocab_size].float()
            cache.ids = context
            if repetition_penalty != 1.0:
                logits = penalise(logits, seen, repetition_penalty)
            new = sample_next(logits, temperature, top_k, top_p, min_p, generators)
            yield torch.where(ended, -1, new)
            ended |= torch.isin(new, stops)
            if ended.all():
                return
            seen.scatter_(1, new[:, None], True)                 # for the repetition penalty
            unread = new[:, None]                                # (B, 1)
            context = torch.cat((context, unread), dim=1)

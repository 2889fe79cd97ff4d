"""LoRA (arXiv:2106.09685): train low-rank adapters of the blocks' matrices, freeze the base.

A matrix W (out, in) becomes W + SCALE B A, A (rank, in) random, B (out, rank) zero at first. The
rows of <|im_start|> and <|im_end|> in the embedding and an untied head are trained whole: a base
that never read a dialogue does not know them, and where it had to be given them, they are equal.
"""
import hashlib

import torch
import torch.nn as nn
import torch.nn.functional as F

SCALE = 2.0  # alpha = 2 rank, the usual choice: one learning rate then suits all ranks


class LoraLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + F.linear(SCALE * F.linear(x, self.lora_a), self.lora_b)


class LoraEmbedding(nn.Embedding):
    def forward(self, ids):
        chosen = ids[..., None] == torch.tensor(self.ids, device=ids.device)    # (B, T, 2)
        change = self.rows - self.weight[self.ids]  # zero, or of rounding; it has the gradient
        return super().forward(ids).float() + chosen.float() @ change           # (B, T, C)


def add_adapters(model, rank, tok, base):
    """Freeze a GPT and add adapters. base: the folder, file or hub id that it was read from.

    model.lora is what a checkpoint keeps of the base: its name and the hash of its weights.
    """
    digest, ids, tables = hashlib.sha256(), [tok.im_start, tok.im_end], [model.wte]
    tables += [] if model.lm_head is None else [model.lm_head]
    for name, p in model.requires_grad_(False).state_dict().items():
        p = p[:tok.vocab_size - 2] if len(p) == len(model.head) else p  # no rows that were added
        digest.update(b"" if p.is_meta else p.numpy())
    model.lora = dict(base=str(base), sha256=digest.hexdigest())
    for m in [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]:
        m.__class__ = LoraLinear  # in place: names and weights stay
        m.lora_a = nn.Linear(m.in_features, rank, bias=False, device=m.weight.device).weight
        m.lora_b = nn.Parameter(m.weight.new_zeros(m.out_features, rank))
    for table in tables:
        table.ids, table.rows = ids, nn.Parameter(table.weight[ids])
    model.wte.__class__, model.tuned = LoraEmbedding, (ids, tables[-1].rows)

    def write_rows(*_):
        for table in tables:
            table.weight.data[ids] = table.rows.detach().to(table.weight.dtype)
    model.register_forward_pre_hook(write_rows)


@torch.no_grad()
def merged_weights(model):
    """Return a model's state dict; adapters and rows are merged, in float32 on the CPU."""
    state = model.state_dict()
    if not model.lora:
        return state
    for name, m in model.named_modules():
        own = {key: t.float().cpu() for key, t in m.named_parameters(recurse=False)}
        if isinstance(m, LoraLinear):
            state[f"{name}.weight"] = own["weight"] + SCALE * own["lora_b"] @ own["lora_a"]
        elif "rows" in own:
            state[f"{name}.weight"] = own["weight"].clone()
            state[f"{name}.weight"][m.ids] = own["rows"]
    return state

"""What a model thinks of text: bits per byte of documents, likelihoods of endings.

Both go through the model's own loss, so that they mean what a training log means.
"""
import math
from collections import Counter
from os.path import commonprefix

import numpy as np
import torch
from tqdm import tqdm

from config import UserError
from gpt import linear_cross_entropy


def bar(items, unit, total=None):
    return tqdm(items, total=total, unit=unit, delay=2, disable=None, leave=False)


# ---- documents ----

def windows(tokens, eot, block_size, stride, batch_size):
    """ids, targets (rows, block_size) int64 in which each of tokens (n,) is a target exactly once.

    A window's targets are its tokens, save those the window before had: -1 stands there. Before
    the first token comes <|endoftext|>, as one comes before every other document.
    """
    y = np.asarray(tokens, dtype=np.int64)
    x = np.append(eot, y[:-1])
    firsts = range(0, max(1, len(y) - block_size + stride), stride)
    for i in range(0, len(firsts), batch_size):
        some = firsts[i:i + batch_size]
        ids = torch.zeros(len(some), block_size, dtype=torch.long)
        targets = torch.full_like(ids, -1)
        for row, first in enumerate(some):
            n, seen = min(block_size, len(y) - first), block_size - stride if first else 0
            ids[row, :n] = torch.from_numpy(x[first:first + n])
            targets[row, seen:n] = torch.from_numpy(y[first + seen:first + n])
        yield ids, targets


def bits_per_byte(model, tok, docs, stride=0, batch_size=8):
    """Of (text, ids) pairs: documents, tokens, bytes, characters, nats (per token), bpb, bpc.

    The documents stand in a row, each closed by its <|endoftext|>, and a window may reach from one
    into the next, as in training. Every token of theirs, <|endoftext|> too, is predicted once; the
    bits of all are shared out among the UTF-8 bytes (or characters) of the texts alone.
    """
    sizes, parts = Counter(), []
    for text, ids in docs:
        parts.append(np.asarray(ids))
        sizes.update(documents=1, tokens=len(ids), bytes=len(text.encode()), characters=len(text))
    if not parts:
        raise UserError("there is no text in it")
    context, device, nats = model.config.block_size, model.wte.weight.device, 0.0
    stride = stride or context
    batches = windows(np.concatenate(parts), tok.eot, context, stride, batch_size)
    for batch in bar(batches, " batches", math.ceil(sizes["tokens"] / stride / batch_size)):
        nats += model(*(t.to(device) for t in batch))[0].item()
    if not math.isfinite(nats):
        raise UserError("the model's loss is not finite; --dtype=float32 may help")
    bits = nats / math.log(2)
    return dict(sizes, nats=nats / sizes["tokens"], bpb=bits / sizes["bytes"],
                bpc=bits / sizes["characters"])


# ---- endings ----

def encode_rows(tok, prompt, endings, begin, block_size):
    """Rows (ids, number of ids given), one an ending, and whether a beginning was cut off.

    begin: ids before the prompt. Given is what the ids of the prompt and of all rows have in
    common: a token that reaches over the prompt's end is predicted, for every ending alike. lm-eval
    takes the length of the prompt's ids, which is the same wherever no token does that.
    """
    rows = [[*begin, *tok.encode(prompt + ending)] for ending in endings]
    given = len(commonprefix([[*begin, *tok.encode(prompt)], *rows]))
    # the last id is predicted and not read: block_size + 1 of them fit
    cuts = [max(0, len(ids) - block_size - 1) for ids in rows]
    return [(ids[cut:], max(1, given - cut)) for ids, cut in zip(rows, cuts)], any(cuts)


def likelihoods(model, rows, batch_size):
    """Log-likelihood, in nats, of what follows the given ids of each row -> list of floats.

    Padding stands on the right, where no position that counts looks. Rows that differ in their last
    id alone, as those of letters do, are read once.
    """
    alike, sums, device = {}, [0.0] * len(rows), model.wte.weight.device
    for n, (ids, _) in enumerate(rows):
        alike.setdefault(tuple(ids[:-1]), []).append(n)
    inputs = sorted(alike, key=len, reverse=True)
    for i in bar(range(0, len(inputs), batch_size), " batches"):
        batch = inputs[i:i + batch_size]
        padded = [[*ids, *[0] * (len(batch[0]) - len(ids))] for ids in batch]
        hidden = model.hidden(torch.tensor(padded, device=device))
        for ids, x in zip(batch, hidden):
            for n in alike[ids]:
                row, given = rows[n]
                targets = torch.tensor(row[given:], device=device)
                sums[n] = -linear_cross_entropy(x[given - 1:len(ids)], model.head, targets,
                                                model.logits_budget()).item()
    return sums


def choose(model, tok, asked, begin, batch_size):
    """(number of the likeliest ending for each of asked, how many prompts lost their beginning).

    asked: pairs (prompt, endings). Likeliest per character, as lm-eval's acc_norm has it.
    """
    rows, n_cut = [], 0
    for prompt, endings in asked:
        new, cut = encode_rows(tok, prompt, endings, begin, model.config.block_size)
        rows += new
        n_cut += cut
    sums = likelihoods(model, rows, batch_size)
    if not all(map(math.isfinite, sums)):
        raise UserError("the model's loss is not finite; --dtype=float32 may help")
    sums = iter(sums)
    means = [[next(sums) / len(ending) for ending in endings] for _, endings in asked]
    return [some.index(max(some)) for some in means], n_cut


def standard_error(p, n):
    """Of a share p of n questions: their sample deviation / sqrt(n), as lm-eval has it."""
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan

"""Bits per byte of documents and likelihoods of answers.

Both use the loss of training, so they agree with the training log.
"""
import math
from collections import Counter, defaultdict
from os.path import commonprefix

import numpy as np
import torch
from tqdm import tqdm

from common.command_line import UserError
from gpt import linear_cross_entropy
from tokens.batches import windows


def bar(items, unit, total=None):
    """Show a progress bar over items that take more than two seconds."""
    return tqdm(items, total=total, unit=unit, delay=2, disable=None, leave=False)


# ---- documents ----

def bits_per_byte(model, tok, texts, stride=0, batch_size=8):
    """Return documents, tokens, bytes, characters, nats (per token), bpb and bpc of texts.

    The ids of each text end with <|endoftext|>. They are concatenated, and a window may hold the
    end of one text and the beginning of the next, as in training. Every token is predicted once,
    <|endoftext|> included. bpb and bpc divide the sum by the UTF-8 bytes and the characters
    of the texts. UserError: the loss is not finite.
    """
    sizes, parts = Counter(), []
    for text in texts:
        ids = [*tok.encode(text), tok.eot]
        parts.append(np.array(ids))
        sizes.update(documents=1, tokens=len(ids), bytes=len(text.encode()), characters=len(text))
    context, device, nats = model.config.block_size, model.wte.weight.device, 0.0
    stride = stride or context
    batches = windows(np.concatenate(parts), tok.eot, context, stride, batch_size)
    for batch in bar(batches, " batches", math.ceil(sizes["tokens"] / stride / batch_size)):
        nats += model(*(t.to(device) for t in batch))[0].item()
    if not math.isfinite(nats):
        raise UserError("the model's loss is not finite; --dtype=float32 may help")
    return per_unit(sizes, nats)


def total_of(scores):
    """Return the total of several results of bits_per_byte, in the same form."""
    names = "documents", "tokens", "bytes", "characters"
    sizes = {name: sum(score[name] for score in scores) for name in names}
    return per_unit(sizes, sum(score["nats"] * score["tokens"] for score in scores))


def per_unit(sizes, nats):
    """Return sizes and the sum nats of the loss per token, and in bits per byte and character."""
    bits = nats / math.log(2)
    return dict(sizes, nats=nats / sizes["tokens"], bpb=bits / sizes["bytes"],
                bpc=bits / sizes["characters"])


# ---- answers ----

def encode_rows(tok, prompt, answers, begin, block_size):
    """Return a row (ids, n_given) for each answer, and whether the prompt's beginning was cut off.

    begin: ids before the prompt. The ids from n_given on are predicted. n_given is the length of
    the common prefix of the prompt and all rows: a token that reaches over the end of the prompt is
    predicted, in every row alike. lm-eval takes the length of the prompt's ids, which is the same
    where no token does that.
    """
    rows = [[*begin, *tok.encode(prompt + answer)] for answer in answers]
    n_given = len(commonprefix([[*begin, *tok.encode(prompt)], *rows]))
    # the last id is predicted but not read, so block_size + 1 ids fit
    cuts = [max(0, len(ids) - block_size - 1) for ids in rows]
    return [(ids[cut:], max(1, n_given - cut)) for ids, cut in zip(rows, cuts)], any(cuts)


def likelihoods(model, rows, batch_size):
    """Return the log-likelihood in nats, a float, of each row's ids after the given ones.

    Rows that differ in their last id only, such as those of letters, share one forward pass.
    """
    row_numbers, sums, device = defaultdict(list), [0.0] * len(rows), model.wte.weight.device
    for n, (ids, _) in enumerate(rows):
        row_numbers[tuple(ids[:-1])].append(n)
    inputs = sorted(row_numbers, key=len, reverse=True)
    for i in bar(range(0, len(inputs), batch_size), " batches"):
        batch = inputs[i:i + batch_size]
        # causal attention: padding on the right has no effect on the positions before it
        padded = [[*ids, *[0] * (len(batch[0]) - len(ids))] for ids in batch]
        hidden = model.hidden(torch.tensor(padded, device=device))  # (B, T, C)
        for ids, x in zip(batch, hidden):
            for n in row_numbers[ids]:
                row, n_given = rows[n]
                targets = torch.tensor(row[n_given:], device=device)
                sums[n] = -linear_cross_entropy(x[n_given - 1:len(ids)], model.head, targets,
                                                model.logits_budget()).item()
    return sums


def choose(model, tok, prompts, begin, batch_size):
    """Return (index of the most likely answer to each prompt, number of prompts that were cut).

    prompts: a list of (prompt, answers). The log-likelihood is divided by the number of characters
    of the answer, as in lm-eval's acc_norm. UserError: the loss is not finite.
    """
    encoded = [encode_rows(tok, *prompt, begin, model.config.block_size) for prompt in prompts]
    sums = likelihoods(model, [row for rows, _ in encoded for row in rows], batch_size)
    if not all(map(math.isfinite, sums)):
        raise UserError("the model's loss is not finite; --dtype=float32 may help")
    sums = iter(sums)
    means = [[next(sums) / len(answer) for answer in answers] for _, answers in prompts]
    return [m.index(max(m)) for m in means], sum(cut for _, cut in encoded)


def standard_error(p, n):
    """Return the standard error of an accuracy p over n questions, as lm-eval computes it."""
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan

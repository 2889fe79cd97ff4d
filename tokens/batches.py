"""Batches of texts: which tokens a step sees is a function of (seed, step) alone.

So a resumed run equals an uninterrupted one, and any number of processes equals one, without any
random state in a checkpoint.
"""
import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from common.command_line import UserError

CYCLE = 1000  # samples; each cycle holds the sets in proportion to their weights


class EpochPermutation:
    """Index i of an infinite stream in which every epoch is a new permutation of n items."""

    def __init__(self, n, seed):
        self.n, self.seed = n, seed
        self.epoch = lru_cache(maxsize=2)(self.epoch)

    def epoch(self, number):
        """Return (permutation of n, offset in [0, 1)) of an epoch, drawn from (seed, number)."""
        rng = np.random.default_rng([self.seed, number])
        offset = rng.random()
        return rng.permutation(self.n), offset

    def at(self, i):
        """Return (the item at index i, the offset of its epoch)."""
        order, offset = self.epoch(i // self.n)
        return int(order[i % self.n]), offset


class MixtureSampler:
    """Map sample i to a data set. Every CYCLE samples hold each set in proportion to its weight,
    shuffled."""

    def __init__(self, weights, seed):
        """weights: shares that add up to 1. UserError: one is below 1/CYCLE."""
        exact = np.array(weights) * CYCLE
        self.counts = np.floor(exact).astype(int)  # samples of each set in a cycle
        for k in np.argsort(self.counts - exact, kind="stable")[:CYCLE - self.counts.sum()]:
            self.counts[k] += 1  # those with the largest remainders
        if self.counts.min() < 1:
            raise UserError(f"a weight in the mixture is under 1/{CYCLE:,} of the whole")
        self.seed, self.cycle = seed, None

    def at(self, i):
        """Return (number of the set, how many samples of that set came before)."""
        cycle, i = divmod(i, CYCLE)
        if self.cycle != cycle:
            self.cycle = cycle
            self.sets = np.random.default_rng([self.seed, cycle, 1]).permutation(
                np.repeat(np.arange(len(self.counts)), self.counts))
            self.before = np.zeros(CYCLE, dtype=int)
            for k, n in enumerate(self.counts):
                self.before[self.sets == k] = np.arange(n)
        k = int(self.sets[i])
        return k, cycle * int(self.counts[k]) + int(self.before[i])


def windows(tokens, eot, block_size, stride, batch_size):
    """Yield ids and targets, each (rows <= batch_size, block_size) int64, of windows over tokens.

    tokens: (n,). Each token is a target exactly once; where windows overlap, the later one has
    targets of -1. The first token follows an <|endoftext|>, as every later document does.
    """
    y = np.asarray(tokens, dtype=np.int64)
    x = np.append(eot, y[:-1])
    firsts = range(0, max(1, len(y) - block_size + stride), stride)
    for i in range(0, len(firsts), batch_size):
        batch = firsts[i:i + batch_size]
        ids = torch.zeros(len(batch), block_size, dtype=torch.long)
        targets = torch.full_like(ids, -1)
        for row, first in enumerate(batch):
            n, seen = min(block_size, len(y) - first), block_size - stride if first else 0
            ids[row, :n] = torch.from_numpy(x[first:first + n])
            targets[row, seen:n] = torch.from_numpy(y[first + seen:first + n])
        yield ids, targets


class TextData:
    """Windows of a text set, or of several sets mixed by weight, of which some may be dialogues:
    those are trained as texts with role headers, and are not part of the validation.

    An epoch of a set is every window of block_size tokens once, in a new order and from a new
    offset, so that each epoch cuts the text elsewhere.
    """

    def __init__(self, bins, cfg):
        if bins.kind != "text":
            raise UserError(f"{bins.folder} holds dialogues: those are for sft.py, or to be mixed "
                            "with texts (dataset=wiki:0.9,chat:0.1)")
        self.bins, self.cfg, self.tokenizer, self.parts = bins, cfg, bins.tokenizer, bins.parts
        self.row_length, self.base = cfg.block_size, None
        self.rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps
        self.train = [part.tokens("train") for part, _ in self.parts]
        self.val_parts = [(part, w) for part, w in self.parts if part.kind == "text"]
        self.val = [part.tokens("val") for part, _ in self.val_parts]
        self.sampler = MixtureSampler([weight for _, weight in self.parts], cfg.seed)
        self.orders = []
        for (part, _), tokens in zip(self.parts, self.train):
            windows = (len(tokens) - cfg.block_size) // cfg.block_size
            if windows < 1:
                raise UserError(f"{part.folder}/train.bin has {len(tokens):,} tokens: too few for "
                                f"a window of block_size={cfg.block_size} and its shift")
            self.orders.append(EpochPermutation(windows, cfg.seed))

    def locate(self, i):
        """Return (number of the set, first token) of the i-th sample of the run."""
        k, i = self.sampler.at(i)
        window, offset = self.orders[k].at(i)
        return k, window * self.cfg.block_size + int(offset * self.cfg.block_size)

    def window(self, i):
        """Return the block_size + 1 tokens of the i-th sample of the run."""
        k, start = self.locate(i)
        return self.train[k][start:start + self.cfg.block_size + 1]

    def batch(self, step, micro):
        """Return ids and targets (batch_size, block_size), and None for doc_ids, of a micro-batch.

        micro counts the micro-batches of the step over all processes.
        """
        first = step * self.rows_per_step + micro * self.cfg.batch_size
        numbers = range(first, first + self.cfg.batch_size)
        windows = [self.window(i).astype(np.int64) for i in numbers]
        rows = torch.from_numpy(np.stack(windows))  # (batch_size, block_size + 1)
        return rows[:, :-1], rows[:, 1:], None

    def widest(self):
        """Return a micro-batch of the largest size."""
        return self.batch(0, 0)

    def describe(self, step):
        """Return where the tokens of a step come from, for a message: offsets in train.bin."""
        first, n = step * self.rows_per_step, self.rows_per_step
        starts = [self.locate(i) for i in range(first, first + min(8, n))]
        shown = ", ".join(f"{self.parts[k][0].folder.name}[{start}]" for k, start in starts)
        return f"windows {shown}" + f" and {n - 8:,} more" * (n > 8)

    def n_trained(self, step):
        """Return the trained tokens of a whole step."""
        return self.rows_per_step * self.cfg.block_size

    def tokens_read(self, steps):
        """Return the tokens of the first `steps` steps of the run."""
        return steps * self.rows_per_step * self.cfg.block_size

    def epochs(self, steps):
        """Return {name of a set: epochs of it in so many steps}."""
        return {part.folder.name: steps * self.rows_per_step * n / CYCLE / order.n
                for (part, _), n, order in zip(self.parts, self.sampler.counts, self.orders)}

    def val_sizes(self):
        """Return how many tokens of each text set are evaluated: a share of eval_tokens, or all."""
        total = sum(weight for _, weight in self.val_parts)
        wanted = [math.ceil(self.cfg.eval_tokens * weight / total) for _, weight in self.val_parts]
        return [min(len(val), n or len(val)) for val, n in zip(self.val, wanted)]

    def val_batches(self):
        """Yield the first tokens of each text set in adjacent windows; each is predicted once."""
        T = self.cfg.block_size
        for val, n in zip(self.val, self.val_sizes()):
            for ids, targets in windows(val[:n], self.tokenizer.eot, T, T, self.cfg.batch_size):
                yield ids, targets, None

    def scores(self, loss):
        """Return the loss (nats per token) also as bits per byte and per character of the text."""
        splits, sizes = [part.meta["splits"]["val"] for part, _ in self.val_parts], self.val_sizes()
        bits = loss / math.log(2) * sum(sizes)
        n_bytes = sum(n * s["bytes"] / s["tokens"] for n, s in zip(sizes, splits))
        chars = sum(n * s["characters"] / s["tokens"] for n, s in zip(sizes, splits))
        return dict(val_loss=loss, bpb=bits / n_bytes, bpc=bits / chars)

    def prompts(self):
        """Return (text, ids) of each text to continue during training: those of sample_start, or
        the first 10 characters of two val documents."""
        tok, texts = self.tokenizer, [s for s in self.cfg.sample_start.split("|") if s]
        if not texts:
            starts = self.val_parts[0][0].starts("val")[:3]
            texts = [tok.decode(self.val[0][a:b - 1][:32])[:10] for a, b in pairwise(starts)]
        return [(s, [tok.eot, *tok.encode(s)]) for s in texts]

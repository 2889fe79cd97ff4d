"""Which tokens a step of pretraining sees: a function of (seed, step) alone.

That makes a resumed run equal an undisturbed one, and any number of processes equal one, without
any random state to save.
"""
import math

import numpy as np
import torch

from config import UserError

DECK = 1000  # samples in which the weights of a mixture come out exactly


def tokens_per_step(cfg):
    return cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size


def step_rows(cfg, step, micro):
    """Numbers, in the whole run, of the rows in one global micro-batch."""
    first = (step * cfg.gradient_accumulation_steps + micro) * cfg.batch_size
    return range(first, first + cfg.batch_size)


def rows_of_step(cfg, step):
    """Numbers, in the whole run, of all rows of a step."""
    n = cfg.batch_size * cfg.gradient_accumulation_steps
    return range(step * n, (step + 1) * n)


class Shuffle:
    """Item i of an endless reading of n items: each epoch all of them, in a fresh order."""

    def __init__(self, n, seed):
        self.n, self.seed, self.epoch = n, seed, None

    def at(self, i):
        """(the item, a number in [0, 1) its whole epoch shares): random, by (seed, i) alone."""
        if self.epoch != i // self.n:
            self.epoch = i // self.n
            rng = np.random.default_rng([self.seed, self.epoch])
            self.chance, self.order = rng.random(), rng.permutation(self.n)
        return int(self.order[i % self.n]), self.chance


class Deck:
    """The set of a mixture that sample i comes from: cards by weight, shuffled, dealt, and anew."""

    def __init__(self, weights, seed):
        """weights: shares that add up to 1. UserError: one is too small for a card."""
        exact = np.array(weights) * DECK
        self.cards = np.floor(exact).astype(int)
        for k in np.argsort(self.cards - exact, kind="stable")[:DECK - self.cards.sum()]:
            self.cards[k] += 1  # the largest remainders
        if self.cards.min() < 1:
            raise UserError(f"a weight in the mixture is under 1/{DECK:,} of the whole")
        self.seed, self.deck = seed, None

    def at(self, i):
        """-> (number of the set, how many samples of that set came before)."""
        deck, place = divmod(i, DECK)
        if self.deck != deck:
            self.deck = deck
            self.sets = np.random.default_rng([self.seed, deck, 1]).permutation(
                np.repeat(np.arange(len(self.cards)), self.cards))
            self.before = np.zeros(DECK, dtype=int)
            for k, n in enumerate(self.cards):
                self.before[self.sets == k] = np.arange(n)
        k = int(self.sets[place])
        return k, deck * int(self.cards[k]) + int(self.before[place])


class TextData:
    """Windows of a text set, or of several mixed by weight.

    An epoch of a set is every window of block_size tokens once, in a fresh order and from a fresh
    offset, so that no two epochs cut the text alike.
    """

    def __init__(self, bins, cfg):
        if bins.kind != "text":
            raise UserError(f"{bins.folder} holds dialogues: those are for sft.py")
        self.bins, self.cfg, self.tokenizer, self.parts = bins, cfg, bins.tokenizer, bins.parts
        self.train = [part.tokens("train") for part, _ in self.parts]
        self.val = [part.tokens("val") for part, _ in self.parts]
        self.deck = Deck([weight for _, weight in self.parts], cfg.seed)
        self.orders = []
        for (part, _), tokens in zip(self.parts, self.train):
            windows = (len(tokens) - cfg.block_size) // cfg.block_size
            if windows < 1:
                raise UserError(f"{part.folder}/train.bin has {len(tokens):,} tokens: too few for "
                                f"a window of block_size={cfg.block_size} and its shift")
            self.orders.append(Shuffle(windows, cfg.seed))

    def place(self, i):
        """(number of the set, first token) of the i-th sample of the whole run."""
        k, i = self.deck.at(i)
        window, chance = self.orders[k].at(i)
        return k, window * self.cfg.block_size + int(chance * self.cfg.block_size)

    def window(self, i):
        """The block_size + 1 tokens of the i-th sample of the whole run."""
        k, start = self.place(i)
        return self.train[k][start:start + self.cfg.block_size + 1]

    def batch(self, step, micro):
        """ids, targets (batch_size, block_size) and no doc_ids, of one global micro-batch."""
        windows = [self.window(i).astype(np.int64) for i in step_rows(self.cfg, step, micro)]
        rows = torch.from_numpy(np.stack(windows))  # (batch_size, block_size + 1)
        return rows[:, :-1], rows[:, 1:], None

    def widest(self):
        """As many tokens as a micro-batch can have."""
        return self.batch(0, 0)

    def where(self, step):
        """Where the tokens of a step come from, for a message: places in the sets' train.bin."""
        rows = rows_of_step(self.cfg, step)
        places = [self.place(i) for i in rows[:8]]
        shown = ", ".join(f"{self.parts[k][0].folder.name}[{start}]" for k, start in places)
        return f"windows {shown}" + (f" and {len(rows) - 8:,} more" if len(rows) > 8 else "")

    def n_trained(self, step):
        """Trained tokens of a whole step."""
        return tokens_per_step(self.cfg)

    def tokens_read(self, steps):
        """Tokens of the first so many steps of the run."""
        return steps * tokens_per_step(self.cfg)

    def epochs(self, steps):
        """{name of a set: how often so many steps go through it}."""
        rows = steps * self.cfg.gradient_accumulation_steps * self.cfg.batch_size
        return {part.folder.name: rows * cards / DECK / order.n
                for (part, _), cards, order in zip(self.parts, self.deck.cards, self.orders)}

    def val_sizes(self):
        """Tokens evaluated of each set: its share of eval_tokens, or all."""
        wanted = [math.ceil(self.cfg.eval_tokens * weight) for _, weight in self.parts]
        return [min(len(val), n or len(val)) for val, n in zip(self.val, wanted)]

    def val_batches(self):
        """The first tokens of each set in windows side by side; each is predicted exactly once."""
        T = self.cfg.block_size
        for val, n in zip(self.val, self.val_sizes()):
            y = val[:n].astype(np.int64)
            x = np.append(self.tokenizer.eot, y[:-1])  # a document's end comes before the first
            pad = -n % T
            x = torch.from_numpy(np.append(x, np.zeros(pad, dtype=np.int64))).view(-1, T)
            y = torch.from_numpy(np.append(y, np.full(pad, -1))).view(-1, T)
            for i in range(0, len(x), self.cfg.batch_size):
                yield x[i:i + self.cfg.batch_size], y[i:i + self.cfg.batch_size], None

    def scores(self, loss):
        """Mean loss, nats per token -> also in bits per byte and per character of the val text."""
        splits, sizes = [part.meta["splits"]["val"] for part, _ in self.parts], self.val_sizes()
        bits = loss / math.log(2) * sum(sizes)
        n_bytes, chars = (sum(n * s[key] / s["tokens"] for n, s in zip(sizes, splits))
                          for key in ("bytes", "characters"))
        return dict(val_loss=loss, bpb=bits / n_bytes, bpc=bits / chars)

    def prompts(self):
        """(shown, ids) of the samples during training; a text begins a document."""
        starts = [s for s in self.cfg.sample_start.split("|") if s]
        return [(s, [self.tokenizer.eot, *self.tokenizer.encode(s)]) for s in starts]

"""Fine-tune a base model on dialogues: pretrain.py's loop over packed rows, answers alone trained.

    python sft.py config/demo_sft.py          # after pretrain.py config/demo.py
    python sft.py config/sft_zh.py --init_from=out/pretrain_zh/best

The same command, started again, goes on from the newest checkpoint. All of pretrain.py's settings
hold too, but for the shape, which the base model brings.
"""
# ---- run ----
out_dir = "out/sft"
init_from = "auto"       # auto: go on with out_dir, else from the newest base model under out/;
#                          or the folder or hub id of a base model
# ---- data ----
dataset = "chat"         # folder under data/, made by prepare.py chat
batch_size = 8           # rows of packed dialogues per micro-batch and per process
gradient_accumulation_steps = 4
# ---- optimizer ----
learning_rate = 5e-5     # an order below pretraining: the base should bend, not break
min_lr = 5e-6
warmup_iters = 50
max_iters = 2000
# ---- watching ----
eval_interval = 100
checkpoint_interval = 100
sample_start = "你好|你是谁？|什么是细胞？"  # questions asked at each evaluation, "|" between them

from bisect import bisect_left, bisect_right
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import pretrain
from config import UserError, configure, newest_model, run_main
from data.batches import Shuffle, rows_of_step
from engine.rundir import SHAPE, load_base

CANDIDATES = 64  # lengths tried to fill a row: enough for any sum


def fit(ids, tok, max_len):
    """Tokens of a dialogue that fit max_len, cut behind a message; none if no whole answer fits."""
    if len(ids) <= max_len:
        return ids
    ends = np.flatnonzero(ids[:max_len] == tok.im_end)
    ids = ids[:ends[-1] + 1] if len(ends) else ids[:0]
    return ids if tok.trained(ids).any() else ids[:0]


def pack(lengths, size):
    """Item numbers for each row, whose lengths add up to at most size, with little left over.

    Each row takes the longest item that is left and then, by subset sum, those that fill it best;
    of equally good ones the longer, which are harder to place.
    """
    items = {}  # length: numbers of the items so long
    for i in reversed(range(len(lengths))):
        items.setdefault(lengths[i], []).append(i)
    left, rows = sorted(items), []
    while left:
        chosen = [left[-1]]
        room = size - left[-1]
        chosen += fill(room, candidates(left[:bisect_right(left, room)], items, chosen[0], room))
        rows.append([items[n].pop() for n in chosen])
        for n in {n for n in chosen if not items[n]}:
            del left[bisect_left(left, n)]
    return rows


def candidates(left, items, taken, room):
    """Up to CANDIDATES lengths among those left that fit room, spread over all, the longest first;
    each as often as it is there and fits, at most four times."""
    spread = left[::-1][::-(-len(left) // CANDIDATES) or 1]
    return [n for n in spread
            for _ in range(min(4, room // n, len(items[n]) - (n == taken)))]


def fill(room, lengths):
    """The lengths, a sublist, whose sum comes nearest to room from below."""
    reach, mask = [1], (2 << room) - 1  # bit s: some of the lengths so far add up to s
    for n in lengths:
        reach.append((reach[-1] | reach[-1] << n) & mask)
    total, chosen = reach[-1].bit_length() - 1, []
    for n, before in zip(reversed(lengths), reversed(reach[:-1])):
        if not before >> total & 1:  # not without this one
            chosen.append(n)
            total -= n
    return chosen


class ChatData:
    """Rows of up to block_size positions, each several whole dialogues that do not see each other.

    The rows of a step are about equally full, and a micro-batch is as wide as its fullest row, so
    next to nothing is padding; an epoch is every row once, its steps in a fresh order.
    """

    def __init__(self, bins, cfg):
        if bins.kind != "chat":
            raise UserError(f"{bins.folder} holds texts; sft.py takes a chat set (prepare.py chat)")
        if len(bins.parts) > 1:
            raise UserError(f"dataset={cfg.dataset}: sft.py takes one set. Prepare them together: "
                            "python prepare.py belle sharegpt --name=chat")
        self.bins, self.cfg, self.tokenizer = bins, cfg, bins.tokenizer
        self.dialogues, self.rows, self.fills = {}, {}, {}
        for split in ("train", "val"):
            tokens, starts = bins.tokens(split), bins.starts(split)
            whole = [tokens[a:b] for a, b in zip(starts, starts[1:])]
            # each position predicts the next token, so n tokens fill n - 1 positions
            kept = [fit(ids, self.tokenizer, cfg.block_size + 1) for ids in whole]
            cut = sum(0 < len(k) < len(w) for k, w in zip(kept, whole))
            self.dialogues[split] = kept = [ids for ids in kept if len(ids)]
            self.lay_out(split, [len(ids) - 1 for ids in kept])
            self.report(split, cut, len(whole) - len(kept))
        n = len(self.rows["train"])
        self.steps = np.array_split(np.arange(n), -(-n // len(rows_of_step(cfg, 0))))
        self.order = Shuffle(len(self.steps), cfg.seed)
        self.row = lru_cache(maxsize=4096)(self.row)  # n_trained and batch both read a step's rows

    def lay_out(self, split, lengths):
        """Pack a split, and sort its rows by what they hold; equally full ones in random order."""
        rows = pack(lengths, self.cfg.block_size)
        fills = np.array([sum(lengths[i] for i in row) for row in rows])
        chance = np.random.default_rng(self.cfg.seed).random(len(rows))
        order = np.lexsort((chance, -fills))
        self.rows[split], self.fills[split] = [rows[i] for i in order], fills[order]

    def report(self, split, cut, dropped):
        kept, fills = self.dialogues[split], self.fills[split]
        if not kept:
            raise UserError(f"{self.bins.folder}: no {split} dialogue has an answer within "
                            f"{self.cfg.block_size} tokens, the context of the base model. Take a "
                            "base with a larger block_size, or prepare with --val_fraction=0.05")
        widths = np.repeat(fills[::self.cfg.batch_size], self.cfg.batch_size)[:len(fills)]
        print(f"{split}: {len(kept):,} dialogues in {len(fills):,} rows, "
              f"{1 - fills.sum() / widths.sum():.1%} padding; "
              f"{cut:,} cut after a message, {dropped:,} dropped (first answer too long)")

    def row(self, split, number):
        """ids, targets, doc_ids of a row's dialogues; targets are -1 but for answers."""
        ids = [self.dialogues[split][item].astype(np.int64) for item in self.rows[split][number]]
        targets = [np.where(self.tokenizer.trained(d), d, -1)[1:] for d in ids]
        doc_ids = [np.full(len(d) - 1, k) for k, d in enumerate(ids)]
        return [np.concatenate(parts) for parts in ([d[:-1] for d in ids], targets, doc_ids)]

    def stack(self, split, numbers):
        """ids, targets, doc_ids (rows, width of the fullest); padding is a document of its own."""
        width = max((self.fills[split][n] for n in numbers), default=1)
        shape = (max(1, len(numbers)), width)  # without rows: one with nothing to learn
        x, y, doc_ids = np.zeros(shape, np.int64), np.full(shape, -1), np.full(shape, width)
        for i, n in enumerate(numbers):
            for out, values in zip((x, y, doc_ids), self.row(split, n)):
                out[i, :len(values)] = values
        return [torch.from_numpy(t) for t in (x, y, doc_ids)]

    def batch(self, step, micro):
        """ids, targets, doc_ids (up to batch_size, up to block_size) of one global micro-batch."""
        rows = self.steps[self.order.at(step)[0]]
        micros = np.array_split(rows, self.cfg.gradient_accumulation_steps)
        return self.stack("train", micros[micro])

    def widest(self):
        """As many tokens as a micro-batch can have."""
        return self.stack("train", range(min(self.cfg.batch_size, len(self.rows["train"]))))

    def n_trained(self, step):
        """Trained tokens of a whole step, over all its micro-batches."""
        rows = self.steps[self.order.at(step)[0]]
        return max(1, sum(int((self.row("train", n)[1] >= 0).sum()) for n in rows))

    def tokens_read(self, steps):
        """Tokens of the first so many steps of the run, without padding."""
        sizes, n = [int(self.fills["train"][rows].sum()) for rows in self.steps], len(self.steps)
        epochs, rest = divmod(steps, n)
        return epochs * sum(sizes) + sum(sizes[self.order.at(epochs * n + i)[0]]
                                         for i in range(rest))

    def where(self, step):
        """Which rows a step reads, for a message."""
        rows = self.steps[self.order.at(step)[0]]
        return f"rows {rows[0]:,} to {rows[-1]:,} of {self.bins.folder.name}, packed"

    def epochs(self, steps):
        return {self.bins.folder.name: steps / len(self.steps)}

    def val_batches(self):
        n_rows = len(self.rows["val"])
        if self.cfg.eval_tokens:
            n_rows = min(n_rows, -(-self.cfg.eval_tokens // self.cfg.block_size))
        for i in range(0, n_rows, self.cfg.batch_size):
            yield self.stack("val", range(i, min(i + self.cfg.batch_size, n_rows)))

    def scores(self, loss):
        """Mean loss in nats per assistant token."""
        return dict(val_loss=loss)

    def prompts(self):
        """(shown, ids) of the questions asked during training."""
        tok = self.tokenizer
        return [(q, tok.dialogue([dict(role="user", content=q)]) + tok.header("assistant"))
                for q in self.cfg.sample_start.split("|") if q]


def make_model(cfg, bins):
    """The base model that init_from names, or the newest one."""
    base = newest_model("base") if cfg.init_from == "auto" else Path(cfg.init_from)
    if base is None or cfg.init_from == "scratch":
        raise UserError("there is no base model under out/ to start from. Run pretrain.py first, "
                        "or name one: --init_from=FOLDER_OR_HUB_ID")
    print(f"base model: {base}")
    return load_base(base.as_posix(), bins, cfg.dropout)


def make_data(cfg, bins, model):
    cfg.block_size = model.config.block_size
    return ChatData(bins, cfg)


def main():
    cfg, words = configure(__file__, base=pretrain.__file__, fixed=SHAPE)
    pretrain.check_settings(cfg, words)
    if pretrain.train(cfg, make_model, make_data, "chat"):
        print("\nnext:  python sample.py --chat")


if __name__ == "__main__":
    run_main(main, __file__)

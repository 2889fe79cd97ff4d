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

from bisect import bisect_left, insort
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import pretrain
from config import UserError, configure, newest_model, run_main
from data.batches import Shuffle, step_rows


def fit(ids, tok, max_len):
    """Tokens of a dialogue that fit max_len, cut behind a message; none if no whole answer fits."""
    if len(ids) <= max_len:
        return ids
    ends = np.flatnonzero(ids[:max_len] == tok.im_end)
    ids = ids[:ends[-1] + 1] if len(ends) else ids[:0]
    return ids if tok.trained(ids).any() else ids[:0]


def pack(lengths, size):
    """Best fit, the longest first: lists of item numbers whose lengths add up to at most size."""
    rows, spaces = [], []  # spaces: sorted (room left, row)
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        i = bisect_left(spaces, (lengths[item], -1))  # the row where it leaves the least room
        room, row = spaces.pop(i) if i < len(spaces) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        insort(spaces, (room - lengths[item], row))
    return rows


class ChatData:
    """Rows of block_size positions, each several whole dialogues that do not see each other."""

    def __init__(self, bins, cfg):
        if bins.kind != "chat":
            raise UserError(f"{bins.folder} holds texts; sft.py takes a chat set (prepare.py chat)")
        if len(bins.parts) > 1:
            raise UserError(f"dataset={cfg.dataset}: sft.py takes one set. Prepare them together: "
                            "python prepare.py belle sharegpt --name=chat")
        self.bins, self.cfg, self.tokenizer = bins, cfg, bins.tokenizer
        self.dialogues, self.rows = {}, {}
        for split in ("train", "val"):
            tokens, starts = bins.tokens(split), bins.starts(split)
            whole = [tokens[a:b] for a, b in zip(starts, starts[1:])]
            # each position predicts the next token, so n tokens fill n - 1 positions
            kept = [fit(ids, self.tokenizer, cfg.block_size + 1) for ids in whole]
            cut = sum(0 < len(k) < len(w) for k, w in zip(kept, whole))
            self.dialogues[split] = kept = [ids for ids in kept if len(ids)]
            self.rows[split] = pack([len(ids) - 1 for ids in kept], cfg.block_size)
            self.report(split, cut, len(whole) - len(kept))
        self.order = Shuffle(len(self.rows["train"]), cfg.seed)
        self.row = lru_cache(maxsize=4096)(self.row)  # n_trained and batch both read a step's rows

    def report(self, split, cut, dropped):
        kept, n_rows = self.dialogues[split], len(self.rows[split])
        if not kept:
            raise UserError(f"{self.bins.folder}: no {split} dialogue has an answer within "
                            f"{self.cfg.block_size} tokens, the context of the base model. Take a "
                            "base with a larger block_size, or prepare with --val_fraction=0.05")
        padding = 1 - sum(len(ids) - 1 for ids in kept) / (n_rows * self.cfg.block_size)
        print(f"{split}: {len(kept):,} dialogues in {n_rows:,} rows, {padding:.1%} padding; "
              f"{cut:,} cut after a message, {dropped:,} dropped (first answer too long)")

    def row(self, split, number):
        """ids, targets, doc_ids (block_size,); targets -1 but for answers, padding a document."""
        T, at = self.cfg.block_size, 0
        items = self.rows[split][number]
        x, y, doc_ids = np.zeros(T, np.int64), np.full(T, -1), np.full(T, len(items))
        for k, item in enumerate(items):
            ids = self.dialogues[split][item].astype(np.int64)
            end = at + len(ids) - 1
            x[at:end], doc_ids[at:end] = ids[:-1], k
            y[at:end] = np.where(self.tokenizer.trained(ids), ids, -1)[1:]
            at = end
        return x, y, doc_ids

    def stack(self, split, numbers):
        columns = zip(*(self.row(split, n) for n in numbers))
        return [torch.from_numpy(np.stack(column)) for column in columns]

    def batch(self, step, micro):
        """ids, targets, doc_ids (batch_size, block_size) of one global micro-batch."""
        rows = step_rows(self.cfg, step, micro)
        return self.stack("train", [self.order.at(i)[0] for i in rows])

    def n_trained(self, step):
        """Trained tokens of a whole step, over all its micro-batches."""
        micros = range(self.cfg.gradient_accumulation_steps)
        return sum(int((self.batch(step, micro)[1] >= 0).sum()) for micro in micros)

    def epochs(self, steps):
        rows = steps * self.cfg.batch_size * self.cfg.gradient_accumulation_steps
        return {self.bins.folder.name: rows / len(self.rows["train"])}

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
    return pretrain.load_base(base.as_posix(), bins, cfg.dropout)


def make_data(cfg, bins, model):
    cfg.block_size = model.config.block_size
    return ChatData(bins, cfg)


def main():
    cfg, words = configure(__file__, base=pretrain.__file__, fixed=pretrain.SHAPE)
    pretrain.check_settings(cfg, words)
    if pretrain.train(cfg, make_model, make_data, "chat"):
        print("\nnext:  python sample.py --chat")


if __name__ == "__main__":
    run_main(main, __file__)

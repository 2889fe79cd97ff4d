"""Batches of dialogues: several in a row, some rows joined to one conversation; the loss covers the
answers only."""
from bisect import bisect_left, insort
from collections import defaultdict
from functools import lru_cache

import numpy as np
import torch

from common.command_line import UserError
from tokens.batches import EpochPermutation
from tokens.bins import SPLITS
from tokens.chat_windows import begins_dialogue, chat_windows, window_ids


ROW = 1024  # positions of a row, or as many as the longest window takes


def pack(lengths, row_size):
    """Return rows, lists of item indices, whose lengths add up to at most row_size.

    Best fit decreasing: the longest item first, each into the row where it leaves the least room.
    """
    rows, by_room, rooms = [], defaultdict(list), []  # by_room: {room left: rows}; rooms: sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[item])
        if at == len(rooms):  # no row has room for it
            room, row = row_size, []
            rows.append(row)
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        row.append(item)
        room -= lengths[item]
        if not by_room[room]:
            insort(rooms, room)
        by_room[room].append(row)
    return rows


def system_message(ids, tok):
    """Return the ids of a dialogue's system message; they are none if it has none."""
    header = tok.role_header("system")
    starts_with_it = np.array_equal(ids[:len(header)], header)
    return ids[:np.flatnonzero(ids == tok.im_start)[1] if starts_with_it else 0]


class ChatData:
    """Rows of at most row_length positions, each packed with dialogues, or with windows of those
    that are longer than block_size; attention stays inside one, or inside the conversation that a
    share of the rows joins them to.

    The rows of a step have about the same length, and a micro-batch is as wide as its longest row,
    so there is hardly any padding. An epoch is every row once, with its steps in a new order.

    For each split: windows are those of chat_windows, lengths (n_windows,) the positions that they
    take, rows lists of indices into windows, longest row first, row_lengths (n_rows,) the positions
    that the rows fill. row_length: those of the longest row. base: None, or the TextData of the
    texts that the base model was trained on.
    """

    def __init__(self, bins, cfg):
        if len(bins.parts) > 1:
            raise UserError(f"dataset={cfg.dataset}: sft.py takes one set. Prepare them together: "
                            "python prepare.py belle sharegpt --name=chat")
        if bins.kind != "chat":
            raise UserError(f"{bins.folder} holds texts; sft.py takes a chat set (prepare.py chat)")
        self.bins, self.cfg, self.tokenizer, self.base = bins, cfg, bins.tokenizer, None
        self.tokens = {split: np.asarray(bins.tokens(split)) for split in SPLITS}
        self.windows, self.lengths, self.rows, self.row_lengths = {}, {}, {}, {}
        counts = {split: self.load_split(split) for split in SPLITS}
        longest = max(int(lengths.max()) for lengths in self.lengths.values())
        for split in SPLITS:
            self.pack_split(split, min(cfg.block_size, max(ROW, longest)), counts[split])
        self.row_length = int(max(lengths[0] for lengths in self.row_lengths.values()))
        rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps
        n_rows = len(self.rows["train"])
        self.steps = np.array_split(np.arange(n_rows), -(-n_rows // rows_per_step))
        self.step_tokens = np.array([self.row_lengths["train"][rows].sum() for rows in self.steps])
        self.order = EpochPermutation(len(self.steps), cfg.seed)
        # n_trained and batch read the same rows of a step
        self.packed_row = lru_cache(maxsize=4096)(self.packed_row)
        self.exchanged = lru_cache(maxsize=2)(self.exchanged)

    def load_split(self, split):
        """Find the windows of a split; return the Counter of what was cut or left out for them."""
        windows, counts = chat_windows(self.tokens[split], self.bins.starts(split), self.tokenizer,
                                       self.cfg.block_size)
        if not len(windows):
            raise UserError(f"{self.bins.folder}: no {split} dialogue has an answer within "
                            f"block_size={self.cfg.block_size} tokens. Raise it up to the context "
                            "of the base model, or prepare with --val_fraction=0.05")
        # a position predicts the next token, so n tokens take n - 1 positions
        self.windows[split] = windows
        self.lengths[split] = (windows[:, 1:6:2] - windows[:, 0:6:2]).sum(1) - 1
        return counts

    def pack_split(self, split, size, counts):
        """Pack the windows of a split into rows of size positions, sort these by length, print what
        came of the dialogues."""
        windows, lengths = self.windows[split], self.lengths[split]
        rows = pack(lengths.tolist(), size)
        filled = np.array([lengths[row].sum() for row in rows])
        tie_break = np.random.default_rng(self.cfg.seed).random(len(rows))
        order = np.lexsort((tie_break, -filled))  # the longest first, equal ones shuffled
        self.rows[split], self.row_lengths[split] = [rows[i] for i in order], filled[order]
        widths = np.repeat(filled[order][::self.cfg.batch_size], self.cfg.batch_size)[:len(rows)]
        cut = "".join(f"; {n:,} {what}" for what, n in counts.items() if n)
        print(f"{split}: {len(np.unique(windows[:, 0])):,} dialogues, {len(windows):,} windows, "
              f"{len(rows):,} rows of at most {filled.max():,} tokens, "
              f"{1 - filled.sum() / widths.sum():.1%} padding{cut}")

    def window(self, split, index):
        """Return ids (n,) and targets (n,) int64 of a window; -1 outside its trained answers."""
        ids, first = window_ids(self.tokens[split], self.windows[split][index])
        return ids, np.where(self.tokenizer.loss_mask(ids, first), ids, -1)

    def exchanged(self, epoch):
        """Return an index of a training window for each of them, by (seed, epoch): windows of equal
        length change places, so that rows have other dialogues and the same lengths."""
        lengths = self.lengths["train"]
        random = np.random.default_rng([self.cfg.seed, epoch, 0, 1]).random(len(lengths))
        new = np.empty(len(lengths), np.int64)
        new[np.argsort(lengths, kind="stable")] = np.lexsort((random, lengths))
        return new

    def packed_row(self, split, index, epoch=None):
        """Return ids, targets, doc_ids of a row, each (at most row length,) int64; targets outside
        the answers are -1.

        A row of an epoch of training depends on (seed, epoch): its windows, their order, and
        whether it is one of the share cfg.multi_turn in which dialogues with equal system messages
        are joined to one document: the message stands once, no <|endoftext|> separates them. Only
        a window that ends with its dialogue is continued, and only by one that begins another.
        """
        tok, items, joined = self.tokenizer, self.rows[split][index], False
        if epoch is not None:
            rng = np.random.default_rng([self.cfg.seed, epoch, index, 2])
            items = rng.permutation(self.exchanged(epoch)[items])
            joined = rng.random() < self.cfg.multi_turn
        windows = [(*self.window(split, i), begins_dialogue(self.windows[split][i])) for i in items]
        if joined:  # equal system messages next to each other
            windows.sort(key=lambda window: system_message(window[0], tok).tobytes())
        parts, doc_id, before = [], -1, None
        for ids, targets, begins in windows:
            begin, system = 0, system_message(ids, tok) if joined else None
            if joined and begins and np.array_equal(system, before):
                begin = len(system)
            else:
                doc_id += 1
            part = ids[begin:-1]
            parts.append((part, targets[begin + 1:], np.full(len(part), doc_id)))
            before = system if ids[-1] == tok.eot else None
        return [np.concatenate(arrays) for arrays in zip(*parts)]

    def collate(self, split, indices, epoch=None):
        """Return ids, targets, doc_ids, each (rows, length of the longest row) int64.

        Padding is a document of its own without targets; no indices give one position of it.
        """
        width = max((self.row_lengths[split][i] for i in indices), default=1)
        shape = (max(1, len(indices)), width)
        batch = np.zeros(shape, np.int64), np.full(shape, -1), np.full(shape, width)
        for i, index in enumerate(indices):
            for padded, values in zip(batch, self.packed_row(split, index, epoch)):
                padded[i, :len(values)] = values
        return [torch.from_numpy(array) for array in batch]

    def rows_of_step(self, step):
        """Return the indices of the training rows of a step of the run."""
        return self.steps[self.order.at(step)[0]]

    def batch(self, step, micro):
        """Return ids, targets and doc_ids of a micro-batch of at most batch_size rows.

        micro counts the micro-batches of the step over all processes.
        """
        micros = np.array_split(self.rows_of_step(step), self.cfg.gradient_accumulation_steps)
        return self.collate("train", micros[micro], step // len(self.steps))

    def widest(self):
        """Return a micro-batch of the largest size."""
        return self.collate("train", range(min(self.cfg.batch_size, len(self.rows["train"]))))

    def n_trained(self, step):
        """Return the number of targets of a step, over all its micro-batches."""
        epoch = step // len(self.steps)
        rows = [self.packed_row("train", index, epoch) for index in self.rows_of_step(step)]
        return max(1, sum(int((targets >= 0).sum()) for _, targets, _ in rows))

    def tokens_read(self, steps):
        """Return the tokens of the first `steps` steps of the run, without padding."""
        epoch, i = divmod(steps, len(self.steps))
        read = self.order.epoch(epoch)[0][:i]  # of the last epoch
        return int(epoch * self.step_tokens.sum() + self.step_tokens[read].sum())

    def describe(self, step):
        """Return which rows a step reads, for a message."""
        rows = self.rows_of_step(step)
        return f"rows {rows[0]:,} to {rows[-1]:,} of {self.bins.folder.name}, packed"

    def epochs(self, steps):
        """Return {name of the set: epochs of it in so many steps}."""
        return {self.bins.folder.name: steps / len(self.steps)}

    def val_batches(self):
        """Yield the batches of the first val rows, as many as eval_tokens asks for (0: all)."""
        n_rows = len(self.rows["val"])
        if self.cfg.eval_tokens:
            n_rows = min(n_rows, -(-self.cfg.eval_tokens // self.row_length))
        for i in range(0, n_rows, self.cfg.batch_size):
            yield self.collate("val", range(i, min(i + self.cfg.batch_size, n_rows)))

    def scores(self, loss):
        """Return the val loss, in nats per assistant token."""
        return dict(val_loss=loss)

    def prompts(self):
        """Return (question, ids) of each question asked during training: those of sample_start, or
        the first ones of two val dialogues."""
        tok, questions = self.tokenizer, [q for q in self.cfg.sample_start.split("|") if q]
        if questions:
            return [(q, tok.encode_chat([dict(role="user", content=q)])
                     + tok.role_header("assistant")) for q in questions]
        first_ones = np.unique(self.windows["val"][:, 0], return_index=True)[1][:2]
        windows = [self.window("val", i) for i in first_ones]
        asked = [ids[:(targets >= 0).argmax()] for ids, targets in windows]
        return [(tok.plain_text(ids).decode(errors="ignore"), ids.tolist()) for ids in asked]

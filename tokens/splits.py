"""Encoded documents to a prepared set: drop duplicates, split into train and val, write."""
from array import array
from typing import NamedTuple

import numpy as np

from common.command_line import UserError
from corpus.near_duplicates import NearDuplicates
from corpus.sources import SOURCES
from tokens.bins import SPLITS

MIN_DOCUMENTS = 20     # with fewer texts, hold out the end of each instead of whole texts
MIN_HELD_OUT = 20      # documents of a large enough set
LARGE = 50_000_000     # training tokens; from here on val_fraction is never adjusted


class Encoded(NamedTuple):
    """A cleaned and encoded document, without its ids."""
    place: str           # where it was read: "file" or "file:line"
    key: int             # its 64-bit hash
    tokens: int
    characters: int
    bytes: int
    trimmed: dict        # Counter of what cleaning removed
    signature: object    # MinHash, or None


class SplitWriter:
    """Write encoded documents, in input order, to the splits of a BinWriter and count them.

    .splits: {split: {"characters", "bytes"}} of what was written.
    """

    def __init__(self, out, kind, tokenizer, counts, val_fraction, near_duplicates=0.0):
        self.out, self.kind, self.tok, self.counts = out, kind, tokenizer, counts
        self.val_fraction, self.threshold = val_fraction, int(val_fraction * 2**64)
        self.seen = set()  # hashes of the documents written
        # Hashes of the training documents in the order of writing, 2**64 - 1 for one that must not
        # be held out.
        self.train_keys = array("Q")
        self.near = NearDuplicates(near_duplicates) if near_duplicates else None
        self.splits = {split: dict(characters=0, bytes=0) for split in SPLITS}

    def add(self, source, documents, ids):
        """Write documents [Encoded] of one source; ids: theirs, one after the other."""
        foreign = self.kind != SOURCES[source].kind  # dialogues as plain text
        chosen = []  # the split of each document, "" = dropped
        for doc in documents:
            split = "val" if doc.key < self.threshold else "train"
            reason = self.reason_to_drop(doc, split == "val" and foreign)
            chosen.append("" if reason else split)
            if reason:
                self.counts.drop(source, reason, doc.place)
                continue
            self.seen.add(doc.key)
            if split == "train":
                self.train_keys.append(2**64 - 1 if foreign else doc.key)
            self.counts.write(source, doc)
            self.splits[split]["characters"] += doc.characters
            self.splits[split]["bytes"] += doc.bytes
        lengths = np.array([doc.tokens for doc in documents], dtype=np.int64)
        for split in SPLITS:
            mask = np.array(chosen) == split
            if mask.any():
                self.out.add(split, ids[np.repeat(mask, lengths)], lengths[mask])

    def reason_to_drop(self, doc, in_chat_val):
        """Return why a document is not written, "" if it is. in_chat_val: the chat set of the same
        dialogues has it in its val split, so it must not be in this training split."""
        if doc.key in self.seen:
            return "duplicate"
        if in_chat_val:
            return "held out for the chat set"
        near = self.near and self.near.has_or_add(doc.key, doc.signature)
        return "near duplicate" if near else ""

    def hold_out_enough(self):
        """Hold out more if val_fraction gives too few documents of a set that is not LARGE.

        Then the documents with the smallest hashes are held out, MIN_HELD_OUT or a twentieth of
        all; of fewer than MIN_DOCUMENTS texts the end of each.
        """
        n_train, n_val = map(self.out.n_docs, SPLITS)
        total = n_train + n_val
        if n_val and self.out.starts["train"][-1] > LARGE:
            return
        few_texts = total < MIN_DOCUMENTS and self.kind == "text"
        wanted = 0 if few_texts else min(MIN_HELD_OUT, max(1, total // 20), total - 1)
        keys = np.array(self.train_keys)
        held = np.argsort(keys, kind="stable")[:max(0, wanted - n_val)]
        held = set(held[keys[held] < 2**64 - 1].tolist())
        if not held and n_val and not few_texts:
            return
        if not held and self.kind == "chat":
            raise UserError("one dialogue can't be split into training and validation; give more")
        train, val = map(self.out.documents, SPLITS)
        if held:
            print(f"  val_fraction={self.val_fraction} would hold out {n_val} documents; "
                  f"holding out {n_val + len(held)}")
            self.rewrite([(doc[:0], doc) if i in held else (doc, doc[:0])
                          for i, doc in enumerate(train)] + [(doc[:0], doc) for doc in val])
        else:
            print(f"  few documents: the last {self.val_fraction:.1%} of each of the {total} "
                  "is the validation split")
            self.rewrite([self.cut_end(doc) for doc in train + val])

    def cut_end(self, ids):
        """Return (training part, held-out part) of a document. The held-out part has its end token
        and at least four more, or half of it."""
        cut = len(ids) - max(round(self.val_fraction * len(ids)), min(5, len(ids) // 2))
        return np.append(ids[:cut], self.tok.eot)[:cut + (cut > 0)], ids[cut:]

    def rewrite(self, parts):
        """Write the set anew from [(training part, held-out part)] and update .splits."""
        raw = b"".join(self.tok.plain_text(part) for _, part in parts)
        held = dict(characters=len(raw.decode("utf-8", errors="ignore")), bytes=len(raw))
        totals = {key: sum(self.splits[s][key] for s in SPLITS) for key in held}
        if not 0 < held["characters"] < totals["characters"]:
            raise UserError("there is too little text to hold any out for validation; give more")
        self.out.restart()
        for split, part in zip(SPLITS, zip(*parts)):
            for ids in part:
                if len(ids):
                    self.out.add(split, ids)
        self.splits = dict(train={key: totals[key] - held[key] for key in held}, val=held)

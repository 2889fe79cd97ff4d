"""Encoded documents to a prepared set: drop duplicates, split into train and val, write."""
import os
import re
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command_line import UserError
from corpus.files import first_reason
from corpus.near_duplicates import similarity_index
from corpus.sources import SOURCES
from tokens.bins import SPLITS

MIN_DOCUMENTS = 20     # with fewer texts, hold out the end of each instead of whole texts
MIN_HELD_OUT = 20      # documents of a large enough set
LARGE = 50_000_000     # training tokens; from here on val_fraction is never adjusted
NAMES = dict(train="train", training="train", 训练集="train", dev="val", val="val", valid="val",
             validation="val", eval="val", 验证集="val", 开发集="val", test="test", testing="test",
             测试集="test")


def named_splits(source, files):
    """Return {split: files} by the names of the files or their folders, such as "me_train.json" and
    "validation/data.arrow", and print it. Files without such a name are for training. Without both
    files named for training and files named for another split: {"": files}."""
    paths, found = [Path(os.path.abspath(file)).parts for file in files], {}
    shared = len(os.path.commonprefix(paths))  # folders above all files tell nothing
    for file, (*folders, name) in zip(files, paths):
        words = [*folders[shared:], *re.findall(r"[^\W\d_]+", name)]
        split = next((NAMES[w.lower()] for w in words if w.lower() in NAMES), "")
        found.setdefault(split, []).append(file)
    if not {"train"} < found.keys() - {""}:
        return {"": files}
    found["train"] += found.pop("", [])
    print(f"{source}: splits as the files are named: "
          + ", ".join(f"{len(part)} {split}" for split, part in sorted(found.items()))
          + " (test is used for neither)" * ("test" in found))
    return found if "val" in found else {"": found["train"], "test": found["test"]}


def split_of(given, key, threshold):
    """Return the given split of a document; if it is "", the one that its hash chooses."""
    return given or ("val" if key < threshold else "train")


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
        self.held_out = set()  # hashes of the documents whose given split is val or test
        self.val_is_given = False
        # Hashes of the training documents in the order of writing, 2**64 - 1 for one that must not
        # be held out.
        self.train_keys = array("Q")
        self.near = similarity_index(near_duplicates) if near_duplicates else None
        self.splits = {split: dict(characters=0, bytes=0) for split in SPLITS}

    def add(self, source, given, documents, ids):
        """Write documents [Encoded] of a source and given split; ids: theirs, concatenated."""
        foreign = self.kind != SOURCES[source].kind  # dialogues as plain text
        self.val_is_given |= given == "val" and not foreign
        chosen = []  # the split of each document, "" = dropped
        for doc in documents:
            split = split_of(given, doc.key, self.threshold)
            reason = self.reason_to_drop(doc, split, foreign)
            if given in ("val", "test"):
                self.held_out.add(doc.key)
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

    def reason_to_drop(self, doc, split, foreign):
        """Return why a document is not written, "" if it is. foreign: a dialogue as plain text; if
        it is in the val split of the chat set of the same files, no other set may train on it."""
        reason = first_reason({
            "test split": split == "test",
            "held out": split == "train" and doc.key in self.held_out,
            "duplicate": doc.key in self.seen,
            "held out for the chat set": split == "val" and foreign,
            "near duplicate": self.near and self.near.query(doc.signature)})
        if self.near and not reason:
            self.near.insert(doc.key, doc.signature)
        return reason

    def hold_out_enough(self):
        """Hold out more if val_fraction gives too few documents of a set that is not LARGE.

        Then the documents with the smallest hashes are held out, MIN_HELD_OUT or a twentieth of
        all; of fewer than MIN_DOCUMENTS texts the end of each. A given val split stays as it is.
        """
        n_train, n_val = map(self.out.n_docs, SPLITS)
        total = n_train + n_val
        if self.val_is_given or n_val and self.out.starts["train"][-1] > LARGE:
            return
        few_texts = total < MIN_DOCUMENTS and self.kind == "text"
        wanted = 0 if few_texts else min(MIN_HELD_OUT, max(1, total // 20))
        order = np.argsort(np.array(self.train_keys), kind="stable")[:max(0, wanted - n_val)]
        held = {i for i in order.tolist() if self.train_keys[i] < 2**64 - 1}
        if not held and n_val and not few_texts:
            return
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

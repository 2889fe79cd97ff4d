"""Encoded documents to a prepared set: drop duplicates, split into train and val, write."""
import os
import re
from array import array
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command_line import UserError
from corpus.files import first_reason
from corpus.near_duplicates import similarity_index
from corpus.sources import SOURCES
from tokens.bins import SPLITS, Bins

SMALL = 50_000_000     # bytes of text; a set with less holds out SMALL_FRACTION of its documents
SMALL_FRACTION = 0.05
MIN_DOCUMENTS = 20     # with fewer texts, hold out the end of each instead of whole texts
MIN_HELD_OUT = 2_000   # characters of validation text, where a set has ten times as many
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


def split_of(given, key, threshold, before):
    """Return the given split of a document; if it is "", the one that its hash chooses, or "val" if
    it is among those (before) that the set held out before."""
    return given or ("val" if key < threshold or key in before else "train")


def held_out_before(folder, kind, digest):
    """Return the hashes of the validation documents of the set that a new one will replace: they
    stay held out, however much is added. digest: that of a document's identity."""
    if not (folder / "meta.json").is_file():
        return frozenset()
    with suppress(UserError):  # a damaged set is replaced, too
        bins = Bins(folder)
        if bins.kind == kind:
            read = bins.tokenizer.decode_chat if kind == "chat" else bins.tokenizer.decode
            return frozenset(digest(read(ids[:-1])) for ids in bins.documents("val"))
    return frozenset()


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

    def __init__(self, out, kind, tokenizer, counts, settings):
        self.out, self.kind, self.tok, self.counts = out, kind, tokenizer, counts
        self.val_fraction, self.small = settings.val_fraction, settings.small
        self.threshold, self.before = settings.threshold, settings.before
        self.seen = set()  # hashes of the documents written
        self.held_out = set()  # hashes of the documents whose given split is val or test
        self.val_is_given = False
        # Hashes of the documents in the order of writing, 2**64 - 1 for one that must not be held
        # out.
        self.keys = {split: array("Q") for split in SPLITS}
        near = settings.near_duplicates
        self.near = similarity_index(near) if near else None
        self.splits = {split: dict(characters=0, bytes=0) for split in SPLITS}

    def add(self, source, given, documents, ids):
        """Write documents [Encoded] of a source and given split; ids: theirs, concatenated."""
        foreign = self.kind != SOURCES[source].kind  # dialogues as plain text
        self.val_is_given |= given == "val" and not foreign
        # a chat set of the same dialogues may be small, and hold out more of them than this set
        threshold = max(self.threshold, int(SMALL_FRACTION * 2**64 * foreign))
        chosen = []  # the split of each document, "" = dropped
        for doc in documents:
            split = split_of(given, doc.key, threshold, self.before)
            reason = self.reason_to_drop(doc, split, foreign)
            if given in ("val", "test"):
                self.held_out.add(doc.key)
            chosen.append("" if reason else split)
            if reason:
                self.counts.drop(source, reason, doc.place)
                continue
            self.seen.add(doc.key)
            self.keys[split].append(2**64 - 1 if foreign else doc.key)
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
        """Hold out more of a small set if the hashes chose too little: then the documents with the
        smallest hashes; of fewer than MIN_DOCUMENTS texts the end of each. A document of over a
        tenth of the set is not held out. A given val split stays as it is."""
        if self.val_is_given or not self.small:
            return
        train, val = map(self.out.documents, SPLITS)
        total = len(train) + len(val)
        characters = sum(s["characters"] for s in self.splits.values())
        least = MIN_HELD_OUT / characters if characters >= 10 * MIN_HELD_OUT else 0  # of the text
        if self.kind == "text" and total < MIN_DOCUMENTS:
            share = max(self.val_fraction, least)
            print(f"  few documents: the last {share:.1%} of each of the {total} is the validation "
                  "split")
            self.rewrite([self.cut_end(doc, share) for doc in train + val])
            return
        documents = [*zip(self.keys["train"], train), *zip(self.keys["val"], val)]  # (hash, ids)
        n_tokens = sum(len(ids) for _, ids in documents)
        # a novel among essays is for training
        longest = n_tokens / 10 if total >= MIN_DOCUMENTS else n_tokens
        may = {i for i, (key, ids) in enumerate(documents)
               if key < 2**64 - 1 and (len(ids) <= longest or key in self.before)}
        held = {i for i in may if i >= len(train)}
        wanted = max(1, int(total * min(self.val_fraction, SMALL_FRACTION) + 1e-9))  # documents
        missing = least * n_tokens - sum(len(documents[i][1]) for i in held)  # tokens
        for i in sorted(may - held, key=lambda i: documents[i][0]):
            if missing <= 0 and len(held) >= wanted:
                break
            held.add(i)
            missing -= len(documents[i][1])
        if len(held) != len(val):
            print(f"  the hashes chose {len(val)} documents for validation; holding out "
                  f"{len(held)}")
        # in the order of their hashes: the next time the same documents are chosen as they are read
        ordered = sorted((documents[i] for i in held), key=lambda document: document[0])
        self.rewrite([(ids, ids[:0]) for i, (_, ids) in enumerate(documents) if i not in held]
                     + [(ids[:0], ids) for _, ids in ordered])

    def cut_end(self, ids, share):
        """Return (training part, held-out part) of a document. The held-out part has its end token
        and at least four more, or half of it."""
        cut = len(ids) - max(round(share * len(ids)), min(5, len(ids) // 2))
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

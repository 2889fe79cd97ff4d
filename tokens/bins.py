"""Prepared sets on disk, data/<name>/: token ids, where documents start, metadata.

    train.bin val.bin   ids, little-endian uint16 (up to 65,536 ids) or uint32; np.memmap reads them
    train.idx val.idx   uint64: index of each document's first token, and the total at the end
    tokenizer.json      the tokenizer that made them (and tokenizer_config.json)
    meta.json           format, sizes, hashes, counts of each source
"""
import hashlib
import json
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from common.command_line import UserError
from common.files import current_folder, read_json, write_file
from tokens.tokenizer import Tokenizer

VERSION = 1
SPLITS = ("train", "val")
VERIFIED = ".verified.json"  # sizes and times of the files whose checksums were compared


def id_dtype(vocab_size):
    """Return the type in which token ids below vocab_size are stored."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def set_folder(name, root="data"):
    """Return the folder of a prepared set, which may be given as "demo" or "data/demo"."""
    return current_folder(Path(root) / str(name).removeprefix(f"{root}/"))


class Bins:
    """A prepared set: .folder, .kind, .meta (dict), .tokenizer. UserError if it is damaged."""

    def __init__(self, name, root="data"):
        self.folder = set_folder(name, root)
        if not (self.folder / "meta.json").is_file():
            names = {path.name for path in self.folder.glob("*")}
            if "tokenizer.json" in names and "train.bin" not in names:
                raise UserError(f"{self.folder} is a tokenizer, not a prepared set. To prepare one "
                                f"with it: python prepare.py SOURCE --tokenizer={self.folder}")
            raise UserError(f"{self.folder.absolute()} is not prepared (no meta.json). Run: "
                            f"python prepare.py SOURCE --name={self.folder.name}")
        with self._reading("meta.json"):
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self._check_meta()
        if self.meta["version"] != VERSION:
            raise self._bad(f"format {self.meta['version']}, this program reads {VERSION}")
        with self._reading("tokenizer.json"):
            spec = (self.folder / "tokenizer.json").read_text(encoding="utf-8")
            self.tokenizer = Tokenizer(json.loads(spec))
        if self.tokenizer.fingerprint != self.meta["tokenizer"]:
            have, want = self.tokenizer.fingerprint[:8], self.meta["tokenizer"][:8]
            raise self._bad(f"tokenizer.json (sha256 {have}) did not make the bins ({want})")
        self._check_files()

    @contextmanager
    def _reading(self, file):
        try:
            yield
        except PermissionError:
            raise
        except Exception as e:  # `tokenizers` raises plain Exception
            raise self._bad(f"{file} can't be read ({type(e).__name__}: {e})") from e

    def _check_meta(self):
        """Set .kind and .dtype; raise one of many errors if a value that is used later is bad."""
        # an expression without effect fails if its value is missing or of another type
        self.meta["version"], self.meta["tokenizer"][:8]
        self.meta.setdefault("vocab_size", self.meta.get("n_ids"))  # sets of older versions
        self.meta["vocab_size"] + 1
        self.kind, self.dtype = self.meta["kind"], np.dtype(self.meta["dtype"]).newbyteorder("<")
        if self.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError(f"dtype {self.dtype}")
        for split in SPLITS:
            counts = self.meta["splits"][split]
            if min(counts[k] for k in ("tokens", "documents", "bytes", "characters")) < 1:
                raise ValueError(f"{split} is empty")
        for c in self.meta["sources"].values():
            c["read"] + c["written"] + sum(c["dropped"].values())
        self.fingerprint()

    def _check_files(self):
        """Compare the sizes of the files with meta.json, and their checksums if they have changed
        since the last time: sizes and times are recorded, unless the disk is read-only."""
        vocab_size, files = self.meta["vocab_size"], []
        for split in SPLITS:
            c = self.meta["splits"][split]
            files += [(f"{split}.bin", c["tokens"] * self.dtype.itemsize, c["sha256"]),
                      (f"{split}.idx", c["documents"] * 8 + 8, c.get("idx_sha256"))]
        found = dict(data=self.fingerprint(), vocab_size=vocab_size)
        for name, want, _ in files:
            path = self.folder / name
            have = path.stat().st_size if path.is_file() else None
            if have != want:
                raise self._bad(f"{name} has {have} bytes, meta.json says {want}")
            found[name] = [have, path.stat().st_mtime_ns]
        if read_json(self.folder / VERIFIED) == found:
            return
        for name, _, want in files:
            with open(self.folder / name, "rb") as f:  # older sets have no sha256 of the .idx
                if want and hashlib.file_digest(f, "sha256").hexdigest() != want:
                    raise self._bad(f"{name} has changed: its sha256 is not that in meta.json")
        for split in SPLITS:
            if (top := self.tokens(split).max()) >= vocab_size:
                raise self._bad(f"{split}.bin has the id {top:,} in a vocabulary of {vocab_size:,}")
        with suppress(OSError):
            write_file(self.folder / VERIFIED, json.dumps(found))

    def _bad(self, what):
        return UserError(f"{self.folder}: {what}. Prepare it again: python prepare.py SOURCE "
                         f"--name={self.folder.name}")

    def tokens(self, split):
        """Return all ids of a split (n,), a read-only memmap."""
        return np.memmap(self.folder / f"{split}.bin", dtype=self.dtype, mode="r")

    def starts(self, split):
        """Return the index of each document's first token and the total, (documents + 1,) int64."""
        starts = np.fromfile(self.folder / f"{split}.idx", dtype="<u8").astype(np.int64)
        total = self.meta["splits"][split]["tokens"]
        if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 1).any():
            raise self._bad(f"{split}.idx is damaged")
        return starts

    def documents(self, split):
        """Yield the ids of each document (n,), views of a memmap."""
        tokens, starts = self.tokens(split), self.starts(split)
        for first, end in zip(starts, starts[1:]):
            yield tokens[first:end]

    @property
    def parts(self):
        """Return [(set, weight)], as Mixture.parts."""
        return [(self, 1.0)]

    def fingerprint(self):
        """Return a string that identifies the ids of both splits; a resumed run checks it."""
        return "-".join(self.meta["splits"][s]["sha256"][:16] for s in SPLITS)


class Mixture:
    """Several sets of the same tokenizer. .parts: [(Bins, weight)], weights sum to 1. .kind: "chat"
    if all sets hold dialogues, else "text"."""

    def __init__(self, weights, root="data"):
        total = sum(weights.values())
        self.parts = [(Bins(name, root), weight / total) for name, weight in weights.items()]
        first = self.parts[0][0]
        self.folder, self.tokenizer = first.folder, first.tokenizer
        kinds = {part.kind for part, _ in self.parts}
        self.kind = "text" if "text" in kinds else "chat"
        for part, _ in self.parts:
            if part.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise UserError(f"{part.folder} was made with another tokenizer than "
                                f"{self.folder}. Prepare it again with --tokenizer={self.folder}")

    def fingerprint(self):
        """Return a string that identifies the sets and their weights."""
        return " ".join(f"{part.fingerprint()}:{weight:.6f}" for part, weight in self.parts)


def open_sets(text, root="data"):
    """Return the Bins of "wiki", or the Mixture of "wiki:0.7,thucnews:0.3"."""
    if not set(text) & set(":,"):
        return Bins(text, root)
    weights = {}
    for part in text.split(","):
        match = re.fullmatch(r"((?:data/)?[^:/]+):([0-9]*\.?[0-9]+)", part.strip())
        if not match or match[1] in weights or not 0 < float(match[2]) < 1e9:
            raise UserError(f"dataset={text}: '{part.strip()}' is not one set and its weight. "
                            "Write wiki:0.7,thucnews:0.3")
        weights[match[1]] = float(match[2])
    return Mixture(weights, root)



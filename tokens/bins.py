"""Prepared sets on disk, data/<name>/: token ids, where documents start, metadata.

    train.bin val.bin   ids, little-endian uint16 (up to 65,536 ids) or uint32; np.memmap reads them
    train.idx val.idx   uint64: index of each document's first token, and the total at the end
    tokenizer.json      the tokenizer that made them (and tokenizer_config.json)
    meta.json           format, sizes, hashes, counts of each source
"""
import hashlib
import json
import os
import re
import shutil
from array import array
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.command_line import UserError
from common.files import current_folder, lock, replace_folder, write_file
from tokens.tokenizer import Tokenizer

VERSION = 1
SPLITS = ("train", "val")
SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints"}
OWN_FILES = {"train.bin", "val.bin", "train.idx", "val.idx", "tokenizer.json", "meta.json",
             "tokenizer_config.json", "inspect.png"}


def id_dtype(vocab_size):
    """Return the type in which token ids below vocab_size are stored."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def set_folder(name, root="data"):
    """Return the folder of a prepared set, which may be given as "demo" or "data/demo"."""
    return current_folder(Path(root) / str(name).removeprefix(f"{root}/"))


def check_replaceable(folder):
    """Raise a UserError if folder holds anything but a prepared set: it would be removed."""
    names = {p.name for p in Path(folder).glob("*") if not p.name.endswith(".part")} - SYSTEM_FILES
    if others := sorted(names - OWN_FILES):
        raise UserError(f"{folder} holds other files ({others[0]}). Choose another --name")
    if names and names <= {"tokenizer.json", "tokenizer_config.json"}:
        raise UserError(f"{folder} holds only a tokenizer. Choose another --name")


class BinWriter:
    """Write one prepared set into <folder>.part, which finish() renames to <folder>.

    with BinWriter(folder, vocab_size) as out:
        out.add("train", ids); ...; out.finish(tokenizer, meta)
    """

    def __init__(self, folder, vocab_size):
        self.folder, self.vocab_size, self.dtype = Path(folder), vocab_size, id_dtype(vocab_size)
        check_replaceable(folder)
        self.part = Path(f"{self.folder}.part")
        self.part.mkdir(parents=True, exist_ok=True)
        self.lock_file = self.folder.parent / f".{self.folder.name}.lock"  # outside what is renamed
        self.lock = lock(self.lock_file, f"{self.folder} is being prepared by another process")
        self.files = {s: open(self.part / f"{s}.bin", "w+b") for s in SPLITS}
        self.restart()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in self.files.values():
            with suppress(OSError):  # closing fails if the disk is full
                file.close()
        shutil.rmtree(self.part, ignore_errors=True)
        with suppress(OSError):  # Windows keeps the file of an open lock
            self.lock_file.unlink()
        self.lock.close()

    def n_docs(self, split):
        return len(self.starts[split]) - 1

    def add(self, split, ids, lengths=None):
        """Append one document, or with lengths several.

        ids (n,) of any integer type, each document with its <|endoftext|>; lengths sum to n.
        """
        ids = np.asarray(ids)
        lengths = np.asarray([len(ids)] if lengths is None else lengths)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:  # the cast would wrap it
            raise ValueError(f"id {ids.max()} in a set of {self.vocab_size} ids")
        raw = ids.astype(self.dtype).tobytes()
        self.files[split].write(raw)
        self.hashes[split].update(raw)
        starts = self.starts[split]
        starts.frombytes((starts[-1] + lengths.cumsum()).astype(np.uint64).tobytes())

    def documents(self, split):
        """Return the documents added so far, a list of arrays."""
        self.files[split].flush()
        tokens = np.fromfile(self.part / f"{split}.bin", dtype=self.dtype)
        ends = self.starts[split][1:]
        return np.split(tokens, np.array(ends, dtype=np.int64))[:len(ends)]

    def restart(self):
        """Remove all documents, to add others."""
        for split in SPLITS:
            self.files[split].seek(0)
            self.files[split].truncate()
        self.starts = {s: array("Q", [0]) for s in SPLITS}  # 8 bytes a document
        self.hashes = {s: hashlib.sha256() for s in SPLITS}

    def finish(self, tokenizer, meta):
        """Write index, tokenizer and meta.json, then rename the folder, which replaces an old set.

        meta: kind, sources and splits {split: {"characters", "bytes"}}; the rest is added.
        """
        for split, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows can't rename a folder with an open file
            write_file(self.part / f"{split}.idx",
                       np.array(self.starts[split], dtype="<u8").tobytes())
            meta["splits"][split] |= dict(documents=self.n_docs(split),
                                          tokens=self.starts[split][-1],
                                          sha256=self.hashes[split].hexdigest())
        meta |= dict(version=VERSION, dtype=self.dtype.name, vocab_size=self.vocab_size,
                     tokenizer=tokenizer.fingerprint,
                     special_ids=dict(sorted(tokenizer.specials.items(), key=lambda x: x[1])))
        tokenizer.save(self.part, chat=meta["kind"] == "chat")
        write_file(self.part / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
        replace_folder(self.part, self.folder)


class Bins:
    """A prepared set: .folder, .kind, .meta (dict), .tokenizer. UserError if it is damaged."""

    def __init__(self, name, root="data"):
        self.folder = set_folder(name, root)
        meta_file = self.folder / "meta.json"
        if not meta_file.is_file():
            raise UserError(f"{self.folder.absolute()} is not prepared (no meta.json). Run: "
                            f"python prepare.py SOURCE --name={self.folder.name}")
        try:
            self.meta = json.loads(meta_file.read_text(encoding="utf-8"))
            self._check_meta()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                RecursionError) as e:
            raise self._bad(f"meta.json can't be read ({type(e).__name__}: {e})") from e
        if self.meta["version"] != VERSION:
            raise self._bad(f"format {self.meta['version']}, this program reads {VERSION}")
        for split in SPLITS:
            for kind, n, size in (("bin", "tokens", self.dtype.itemsize), ("idx", "documents", 8)):
                file = self.folder / f"{split}.{kind}"
                have = file.stat().st_size if file.is_file() else None
                want = (self.meta["splits"][split][n] + (kind == "idx")) * size
                if have != want:
                    raise self._bad(f"{file.name} has {have} bytes, meta.json says {want}")
        try:
            spec = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))
            self.tokenizer = Tokenizer(spec)
        except Exception as e:  # `tokenizers` raises plain Exception
            raise self._bad(f"tokenizer.json can't be read ({type(e).__name__}: {e})") from e
        if self.tokenizer.fingerprint != self.meta["tokenizer"]:
            have, want = self.tokenizer.fingerprint[:8], self.meta["tokenizer"][:8]
            raise self._bad(f"tokenizer.json (sha256 {have}) did not make the bins ({want})")

    def _check_meta(self):
        """Set .kind and .dtype; raise one of many errors if a value that is used later is bad."""
        self.meta["version"], self.fingerprint(), self.meta["tokenizer"][:8]
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

    @property
    def parts(self):
        """Return [(set, weight)], as Mixture.parts."""
        return [(self, 1.0)]

    def fingerprint(self):
        """Return a string that identifies the ids of both splits; a resumed run checks it."""
        return "-".join(self.meta["splits"][s]["sha256"][:16] for s in SPLITS)


class Mixture:
    """Several sets of the same kind and tokenizer. .parts: [(Bins, weight)], weights sum to 1."""

    def __init__(self, weights, root="data"):
        total = sum(weights.values())
        self.parts = [(Bins(name, root), weight / total) for name, weight in weights.items()]
        first = self.parts[0][0]
        self.folder, self.kind, self.tokenizer = first.folder, first.kind, first.tokenizer
        for part, _ in self.parts:
            if part.kind != self.kind:
                raise UserError(f"{part.folder} is a {part.kind} set, {self.folder} is a "
                                f"{self.kind} set")
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



"""Prepared sets on disk, data/<name>/: token ids, where documents start, and what they are.

    train.bin val.bin   ids, little-endian uint16 (up to 65,536 ids) or uint32; np.memmap reads them
    train.idx val.idx   uint64: index of each document's first token, and the total at the end
    tokenizer.json      the tokenizer that made them;  meta.json  says all else and is written last
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

from config import UserError
from data.files import lock, replace, write_file
from data.tokenizer import Tokenizer

VERSION = 1
SPLITS = ("train", "val")


def id_dtype(n_ids):
    """The type that token ids below n_ids are stored in."""
    return np.dtype("<u2" if n_ids <= 2**16 else "<u4")


class BinWriter:
    """Writes one prepared set: all of it into <folder>/.part/, which finish() empties into place.

    with BinWriter(folder, n_ids) as out: out.add("train", ids); ...; out.finish(tokenizer, meta)
    """

    def __init__(self, folder, n_ids):
        self.folder, self.n_ids, self.dtype = Path(folder), n_ids, id_dtype(n_ids)
        self.part = self.folder / ".part"
        self.part.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.part / "lock", f"{self.folder} is being prepared by another process")
        self.files = {s: open(self.part / f"{s}.bin", "w+b") for s in SPLITS}
        self.restart()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in (*self.files.values(), self.lock):
            with suppress(OSError):  # on a full disk closing fails too
                file.close()
        shutil.rmtree(self.part, ignore_errors=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def n_docs(self, split):
        return len(self.starts[split]) - 1

    def add(self, split, ids, lengths=None):
        """Append a document, or as many as lengths has, one after the other in ids: (n,) of any
        integer type, each with its <|endoftext|>."""
        ids = np.asarray(ids)
        lengths = np.asarray([len(ids)] if lengths is None else lengths)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.n_ids:
            raise ValueError(f"id {ids.max()} in a set of {self.n_ids} ids")  # would wrap silently
        raw = ids.astype(self.dtype).tobytes()
        self.files[split].write(raw)
        self.hashes[split].update(raw)
        starts = self.starts[split]
        starts.frombytes((starts[-1] + lengths.cumsum()).astype(np.uint64).tobytes())

    def documents(self, split):
        """The documents written so far, as arrays."""
        self.files[split].flush()
        tokens = np.fromfile(self.part / f"{split}.bin", dtype=self.dtype)
        ends = self.starts[split][1:]
        return np.split(tokens, np.array(ends, dtype=np.int64))[:len(ends)]

    def restart(self):
        """Forget every document, to write them anew."""
        for split in SPLITS:
            self.files[split].seek(0)
            self.files[split].truncate()
        self.starts = {s: array("Q", [0]) for s in SPLITS}  # 8 bytes a document
        self.hashes = {s: hashlib.sha256() for s in SPLITS}

    def finish(self, tokenizer, meta):
        """Put everything in place, meta.json last."""
        for split, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows renames no open file
            write_file(self.part / f"{split}.idx",
                       np.array(self.starts[split], dtype="<u8").tobytes())
            meta["splits"][split] |= dict(documents=self.n_docs(split),
                                          tokens=self.starts[split][-1],
                                          sha256=self.hashes[split].hexdigest())
        meta |= dict(version=VERSION, dtype=self.dtype.name, n_ids=self.n_ids,
                     tokenizer=tokenizer.fingerprint,
                     special_ids=dict(sorted(tokenizer.specials.items(), key=lambda x: x[1])))
        tokenizer.save(self.part, chat=meta["kind"] == "chat")
        write_file(self.part / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
        (self.folder / "meta.json").unlink(missing_ok=True)
        names = sorted(p.name for p in self.part.iterdir() if p.name not in ("lock", "meta.json"))
        for name in (*names, "meta.json"):
            os.replace(self.part / name, self.folder / name)


class Bins:
    """A prepared set, checked: .meta (dict), .tokenizer, .tokens(split), .starts(split)."""

    def __init__(self, name, root="data"):
        self.folder = Path(root) / str(name).removeprefix(f"{root}/")  # "data/demo" is meant too
        meta_file = self.folder / "meta.json"
        if not meta_file.is_file():
            raise UserError(f"{self.folder} is not prepared (no meta.json). Run: python prepare.py "
                            f"SOURCE --name={self.folder.name}")
        try:
            self.meta = json.loads(meta_file.read_text(encoding="utf-8"))
            version, self.kind = self.meta["version"], self.meta["kind"]
            self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
            if self.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
                raise ValueError(f"dtype {self.dtype}")
            splits = {s: self.meta["splits"][s] for s in SPLITS}
            sizes = {s: (int(splits[s]["tokens"]), int(splits[s]["documents"])) for s in SPLITS}
            for s in SPLITS:
                if min(*sizes[s], splits[s]["bytes"], splits[s]["characters"]) < 1:
                    raise ValueError(f"{s} is empty")
            for c in self.meta["sources"].values():
                c["read"] + c["written"] + sum(c["dropped"].values())
            self.fingerprint(), self.meta["tokenizer"][:8], self.meta["n_ids"] + 1
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                RecursionError) as e:
            raise self._bad(f"meta.json can't be read ({type(e).__name__}: {e})") from e
        if version != VERSION:
            raise self._bad(f"format {version}, this program reads {VERSION}")
        for split, (n_tokens, n_docs) in sizes.items():
            for kind, want in (("bin", n_tokens * self.dtype.itemsize), ("idx", (n_docs + 1) * 8)):
                file = self.folder / f"{split}.{kind}"
                have = file.stat().st_size if file.is_file() else None
                if have != want:
                    raise self._bad(f"{file.name} has {have} bytes, meta.json says {want}")
        try:
            spec = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))
            self.tokenizer = Tokenizer(spec)
        except Exception as e:  # `tokenizers` raises what it likes
            raise self._bad(f"tokenizer.json can't be read ({type(e).__name__}: {e})") from e
        if self.tokenizer.fingerprint != self.meta["tokenizer"]:
            have, want = self.tokenizer.fingerprint[:8], self.meta["tokenizer"][:8]
            raise self._bad(f"tokenizer.json (sha256 {have}) is not what made the bins ({want})")

    def _bad(self, what):
        return UserError(f"{self.folder}: {what}. Prepare it again: python prepare.py SOURCE "
                         f"--name={self.folder.name}")

    def tokens(self, split):
        """All ids of a split, a read-only memmap."""
        return np.memmap(self.folder / f"{split}.bin", dtype=self.dtype, mode="r")

    def starts(self, split):
        """(documents + 1,) int64: where each begins, and the total."""
        starts = np.fromfile(self.folder / f"{split}.idx", dtype="<u8").astype(np.int64)
        total = self.meta["splits"][split]["tokens"]
        if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 1).any():
            raise self._bad(f"{split}.idx is damaged")
        return starts

    @property
    def parts(self):
        """[(set, weight)], as a Mixture has them."""
        return [(self, 1.0)]

    def fingerprint(self):
        """What a resumed run must find unchanged: the ids of both splits."""
        return "-".join(self.meta["splits"][s]["sha256"][:16] for s in SPLITS)


class Mixture:
    """Several sets of one kind and tokenizer; .parts: [(Bins, weight)], the weights sum to 1."""

    def __init__(self, weights, root="data"):
        total = sum(weights.values())
        self.parts = [(Bins(name, root), weight / total) for name, weight in weights.items()]
        first = self.parts[0][0]
        self.folder, self.kind, self.tokenizer = first.folder, first.kind, first.tokenizer
        for part, _ in self.parts:
            if part.kind != self.kind:
                raise UserError(f"{part.folder} is a {part.kind} set, {self.folder} a {self.kind} "
                                "one")
            if part.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise UserError(f"{part.folder} was made with another tokenizer than "
                                f"{self.folder}. Prepare it again with --tokenizer={self.folder}")

    def fingerprint(self):
        return " ".join(f"{part.fingerprint()}:{weight:.6f}" for part, weight in self.parts)


def open_sets(text, root="data"):
    """Bins of "wiki", or the Mixture of "wiki:0.7,thucnews:0.3"."""
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


def replace_folder(part, folder):
    """Move the finished folder `part` to `folder`, whose former content goes."""
    for file in Path(part).iterdir():
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
    old = Path(f"{folder}.old")
    shutil.rmtree(old, ignore_errors=True)
    if Path(folder).exists():
        replace(folder, old)
    replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)

"""Write a prepared set: into a folder beside its place, which is renamed when it is complete."""
import hashlib
import shutil
from array import array
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.command_line import UserError
from common.files import lock, replace_folder, write_file, write_json
from tokens.bins import SPLITS, VERIFIED, VERSION, id_dtype

SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints"}
OWN_FILES = {"train.bin", "val.bin", "train.idx", "val.idx", "tokenizer.json", "meta.json",
             "tokenizer_config.json", "inspect.png", VERIFIED}


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
            file.close()  # Windows can't rename a folder with an open file
            idx = np.array(self.starts[split], dtype="<u8").tobytes()
            write_file(self.part / f"{split}.idx", idx)
            meta["splits"][split] |= dict(
                documents=self.n_docs(split), tokens=self.starts[split][-1],
                sha256=self.hashes[split].hexdigest(), idx_sha256=hashlib.sha256(idx).hexdigest())
        meta |= dict(version=VERSION, dtype=self.dtype.name, vocab_size=self.vocab_size,
                     tokenizer=tokenizer.fingerprint,
                     special_ids=dict(sorted(tokenizer.specials.items(), key=lambda x: x[1])))
        tokenizer.save(self.part, chat=meta["kind"] == "chat")
        write_json(self.part / "meta.json", meta)
        replace_folder(self.part, self.folder)

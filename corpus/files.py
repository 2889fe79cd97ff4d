"""Files to text: find, decompress, decode.

    files = find_files(["corpus"], wanted)
    for place, document in read_each(files, wanted, read): ...  # read(name, stream) yields these

.gz .bz2 .xz files, .zip and .tar archives need not be unpacked. A file that can't be read gives a
Dropped.
"""
import bz2
import codecs
import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial

from common.command_line import UserError
from corpus.encoding import SNIFF_BYTES, UnknownEncoding, encoding_of

MAX_CHARS = 2**22     # of a record or document; the four great novels together have 3 million
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz")
# Files that are refused if they are named, and what to do with them.
CONVERT = dict.fromkeys(".7z .rar .zst .lz4".split(), "unpack it") | dict.fromkeys(
    ".xls .xlsx .ods .et".split(), "save it as .csv") | dict.fromkeys(
    ".doc .docx .epub .pdf .rtf .mobi .azw3 .ppt .pptx .wps".split(), "save it as .txt")
UNDECODABLE = "\udcff"  # replaces bytes that can't be decoded; no decoder makes this character
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError,
               RuntimeError, NotImplementedError, MemoryError, UnicodeError)  # of damaged files
codecs.register_error("mark", lambda error: (UNDECODABLE, error.end))


@dataclass
class Dropped:
    """A document that could not be read."""
    reason: str        # short; documents are counted by it
    details: str = ""  # what is wrong, for the user; "" = reason says it


def first_reason(reasons):
    """Return the first of {reason: whether it holds} that holds, "" if none does."""
    return next((reason for reason, holds in reasons.items() if holds), "")


def suffix(name):
    """Return the suffix that tells a file's format, in lower case: .jsonl for x.JSONL.gz."""
    stem, end = os.path.splitext(str(name))
    return (os.path.splitext(stem)[1] if end.lower() in OPENERS else end).lower()


def find_files(paths, wanted, endings=()):
    """Return the files under paths for which wanted(name) holds and the archives, each once,
    sorted; a file named in paths is always taken. Print how many files are skipped.

    Links are followed, but no folder is read twice. UserError: no such path, a file that holds no
    text, or no file found.
    """
    found, seen, skipped = set(), set(), Counter()
    for path in sorted(os.path.normpath(p) for p in paths):
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        if not os.path.isdir(path):
            refuse_pipe(path)
            if suffix(path) in CONVERT:
                raise UserError(f"{path} can't be read; {CONVERT[suffix(path)]} first")
            found.add(path)
            continue
        for folder, folders, names in os.walk(path, followlinks=True, onerror=_raise):
            real = os.path.realpath(folder)
            names = [] if real in seen else [n for n in names if n[0] != "."]
            folders[:] = [] if real in seen else sorted(f for f in folders if f[0] != ".")
            seen.add(real)
            for name in names:
                file = os.path.join(folder, name)
                if os.path.isfile(file) and (wanted(name) or suffix(name) in ARCHIVES):
                    found.add(file)
                else:
                    skipped[suffix(name) or name] += 1
    if skipped:
        shown = ", ".join(f"{n:,} {end}" for end, n in skipped.most_common(5))
        print(f"skipped {skipped.total():,} files of other types ({shown})")
    if not found:
        known = f" ({' '.join(endings)})" if endings else ""
        raise UserError(f"{', '.join(map(str, paths))}: no file of a known type{known}")
    return sorted(found, key=lambda p: p.replace(os.sep, "/"))


def refuse_pipe(path):
    """Raise a UserError if path is a pipe or a device: it may have no end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a pipe or a device; write its text to a file first")


def _raise(error):
    raise error


def open_files(path, wanted):
    """Yield (name, function that opens it) of a file, or of each wanted file in an archive.

    Nothing is written to disk, so "../" in the names inside an archive does no harm.
    """
    if suffix(path) not in ARCHIVES:
        yield path, lambda: _buffered(path, open(path, "rb"))
        return
    skipped = 0
    for name, opened in _members(path):
        if not _hidden(name) and (wanted(name) or suffix(name) in ARCHIVES):
            yield f"{path}/{name}", lambda: _buffered(name, opened())
        else:
            skipped += not _hidden(name)
    if skipped:
        print(f"skipped {skipped:,} files of other types in {path}")


def _members(path):
    """Yield (name, function that opens it) of each file in an archive."""
    if suffix(path) == ".zip":
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda m: m.filename):
                if not member.is_dir():
                    yield member.filename, partial(archive.open, member)
        return
    with tarfile.open(path) as archive:
        while member := archive.next():
            archive.members.clear()  # else a list of all that were read: gigabytes
            if member.isfile():
                yield member.name, partial(archive.extractfile, member)


def _hidden(name):
    return any(part[:1] == "." and part.strip(".") or part == "__MACOSX"
               for part in name.split("/"))


class DeferredErrors(io.RawIOBase):
    """A stream that delivers all data before the first read error, then raises that error."""

    def __init__(self, file):
        self.file, self.error = file, None

    def readable(self):
        return True

    def seekable(self):
        return self.file.seekable()

    def seek(self, offset, whence=io.SEEK_SET):
        self.error = None
        return self.file.seek(offset, whence)

    def readinto(self, buffer):
        n = 0
        while n < len(buffer) and not self.error:
            try:
                data = self.file.read1(min(len(buffer) - n, 2**16))
            except READ_ERRORS as e:
                self.error, data = e, b""
            if not data:
                break
            buffer[n:n + len(data)] = data
            n += len(data)
        if self.error and not n:
            raise self.error
        return n

    def close(self):
        self.file.close()
        super().close()


def _buffered(name, raw):
    """Return raw as a decompressed stream with peek(SNIFF_BYTES). Closing it closes raw."""
    end = os.path.splitext(name)[1].lower()
    if suffix(name) in ARCHIVES:
        raise tarfile.TarError("an archive in an archive: unpack it first")
    raw = OPENERS[end](raw, "rb") if end in OPENERS else raw
    return io.BufferedReader(DeferredErrors(raw), SNIFF_BYTES)


def read_each(files, wanted, read):
    """Yield (place, document) of read(name, stream) for every file; a read error is a Dropped."""
    for path in files:
        try:
            for name, opened in open_files(path, wanted):
                try:
                    with opened() as stream:
                        yield from read(name, stream)
                except READ_ERRORS as e:
                    yield name, unreadable(e)
        except READ_ERRORS as e:
            yield path, unreadable(e)


def unreadable(error):
    """Return the Dropped of a file from which a read error came."""
    if isinstance(error, UnknownEncoding):
        return Dropped("unknown encoding", str(error))
    what = str(error) or type(error).__name__
    return Dropped("unreadable file", f"can't be read further ({what})")


def too_long():
    """Return the Dropped of a record or document of more than MAX_CHARS characters."""
    return Dropped("too long", f"over {MAX_CHARS:,} characters")


# ---- text ----

def head_of(stream):
    """Return the beginning of a stream as text; the stream stays where it is."""
    head = stream.peek(SNIFF_BYTES)[:SNIFF_BYTES]
    return head.decode(encoding_of(head), "ignore").removeprefix("\ufeff")


def decoded(stream, newline=None):
    """Return the stream as text, its encoding detected; UNDECODABLE replaces invalid bytes."""
    encoding = encoding_of(stream.peek(SNIFF_BYTES)[:SNIFF_BYTES])
    return io.TextIOWrapper(stream, encoding, errors="mark", newline=newline)


def read_lines(text, max_chars=MAX_CHARS):
    """Yield the lines of a text stream with their ends; longer ones in pieces of max_chars."""
    return iter(lambda: text.readline(max_chars), "")


def text_parts(stream):
    """Yield the text of a stream; if it is longer than MAX_CHARS in parts, cut at line ends."""
    text, rest, whole = decoded(stream), "", True
    while len(part := rest + text.read(MAX_CHARS - len(rest))) == MAX_CHARS:
        cut = part.rfind("\n") + 1 or MAX_CHARS
        rest, whole = part[cut:], False
        yield part[:cut]
    if part or whole:
        yield part

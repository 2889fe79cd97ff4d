"""Files to text: find, decompress, decode.

    files = find_files(["corpus"], wanted)
    for place, document in read_each(files, wanted, read): ...  # read(name, stream) yields these

.gz, .bz2, .xz and .zip files need not be unpacked. A file that can't be read gives a Dropped.
"""
import bz2
import codecs
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass

from common.command_line import UserError

MAX_CHARS = 2**22     # of a record or document; the four great novels together have 3 million
SNIFF_BYTES = 2**20   # beginning of a file from which its encoding and format are detected
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
UNDECODABLE = "\udcff"  # replaces bytes that can't be decoded; no decoder makes this character
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError,
               NotImplementedError, MemoryError, UnicodeError)  # damaged files, unknown compression

# Characters of ordinary Chinese text: ASCII, dashes and quotes, full-width punctuation, and the
# 3,755 most common Han characters (level 1 of GB 2312).
COMMON = {chr(code) for codes in (range(9, 14), range(32, 127), range(0x2010, 0x2027),
                                  range(0x3000, 0x3012), range(0xFF01, 0xFF5F)) for code in codes}
COMMON |= {bytes((high, low)).decode("gb2312", "ignore") for high in range(0xB0, 0xD8)
           for low in range(0xA1, 0xFF)} - {""}
codecs.register_error("mark", lambda error: (UNDECODABLE, error.end))


@dataclass
class Dropped:
    """A document that could not be read."""
    reason: str        # short; documents are counted by it
    details: str = ""  # what is wrong, for the user; "" = reason says it


def suffix(name):
    """Return the suffix that tells a file's format, in lower case: .jsonl for x.JSONL.gz."""
    stem, end = os.path.splitext(str(name))
    return (os.path.splitext(stem)[1] if end.lower() in OPENERS else end).lower()


def find_files(paths, wanted, endings=()):
    """Return the files under paths for which wanted(name) holds and the .zip files, each once,
    sorted; a file named in paths is always taken. Print how many files are skipped.

    Links are followed, but no folder is read twice. UserError: no such path, or no file found.
    """
    found, seen, skipped = set(), set(), Counter()
    for path in sorted(os.path.normpath(p) for p in paths):
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        if not os.path.isdir(path):
            if not os.path.isfile(path):  # a pipe or device might never end
                raise UserError(f"{path}: not a file")
            found.add(path)
            continue
        for folder, folders, names in os.walk(path, followlinks=True, onerror=_raise):
            real = os.path.realpath(folder)
            names = [] if real in seen else [n for n in names if n[0] != "."]
            folders[:] = [] if real in seen else sorted(f for f in folders if f[0] != ".")
            seen.add(real)
            for name in names:
                file = os.path.join(folder, name)
                if os.path.isfile(file) and (wanted(name) or suffix(name) == ".zip"):
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


def _raise(error):
    raise error


def open_files(path, wanted):
    """Yield (name, function that opens it) of a file, or of each wanted file in a .zip.

    Nothing is written to disk, so "../" in the names inside a .zip does no harm.
    """
    if not path.lower().endswith(".zip"):
        yield path, lambda: _buffered(path, open(path, "rb"))
        return
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if not m.is_dir() and not _hidden(m.filename)]
        taken = [m for m in members if wanted(m.filename) or suffix(m.filename) == ".zip"]
        if len(taken) < len(members):
            print(f"skipped {len(members) - len(taken):,} files of other types in {path}")
        for member in sorted(taken, key=lambda m: m.filename):
            yield (f"{path}/{member.filename}",
                   lambda m=member: _buffered(m.filename, archive.open(m)))


def _hidden(name):
    return any(part[:1] == "." and part.strip(".") or part == "__MACOSX"
               for part in name.split("/"))


class DeferredErrors(io.RawIOBase):
    """A stream that delivers all data before the first read error, then raises that error."""

    def __init__(self, file):
        self.file, self.error = file, None

    def readable(self):
        return True

    def readinto(self, buffer):
        n = 0
        while n < len(buffer) and not self.error:
            try:
                data = self.file.read1(len(buffer) - n)
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
    if end == ".zip":
        raise zipfile.BadZipFile("a .zip in a .zip: unpack it first")
    if end in OPENERS:
        raw = DeferredErrors(OPENERS[end](raw, "rb"))
    return io.BufferedReader(raw, SNIFF_BYTES)


def read_each(files, wanted, read):
    """Yield the (place, document) of read(name, stream) for every file; a read error is a Dropped."""
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
    what = str(error) or type(error).__name__
    return Dropped("unreadable file", f"can't be read further ({what})")


def too_long(max_chars=MAX_CHARS):
    return Dropped("too long", f"over {max_chars:,} characters")


# ---- text ----

def encoding_of(head):
    """Return the encoding of a file that begins with these bytes.

    That of its byte order mark, else UTF-8 if it is valid and has no zero byte, else the one of
    four encodings that gives the largest share of common characters (at a tie UTF-8).
    """
    for mark, name in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
                       (codecs.BOM_UTF16_BE, "utf-16")):
        if head.startswith(mark):
            return name
    try:  # the last character may be incomplete if the file is longer
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < SNIFF_BYTES)
        if b"\0" not in head:
            return "utf-8"
    except UnicodeDecodeError:
        pass
    return max(("utf-8", "gb18030", "utf-16-le", "utf-16-be"), key=lambda e: _common_share(head, e))


def _common_share(head, encoding):
    """Return the share of common characters when head is decoded this way."""
    text = head.decode(encoding, "mark")
    return sum(map(COMMON.__contains__, text)) / max(1, len(text))


def head_of(stream):
    """Return the beginning of a stream as text; the stream stays where it is."""
    head = stream.peek(SNIFF_BYTES)[:SNIFF_BYTES]
    return head.decode(encoding_of(head), "ignore").removeprefix("\ufeff")


def decoded(stream, newline="\n"):
    """Return the stream as text, its encoding detected; UNDECODABLE replaces invalid bytes."""
    encoding = encoding_of(stream.peek(SNIFF_BYTES)[:SNIFF_BYTES])
    return io.TextIOWrapper(stream, encoding, errors="mark", newline=newline)


def lines(text):
    """Yield the lines of a text stream with their ends; longer ones in pieces of MAX_CHARS."""
    return iter(lambda: text.readline(MAX_CHARS), "")


def text_parts(stream):
    """Yield a whole text, or if it is longer than MAX_CHARS its parts, cut at line ends."""
    text, rest, whole = decoded(stream, newline=None), "", True
    while len(part := rest + text.read(MAX_CHARS - len(rest))) == MAX_CHARS:
        cut = part.rfind("\n") + 1 or MAX_CHARS
        rest, whole = part[cut:], False
        yield part[:cut]
    if part or whole:
        yield part

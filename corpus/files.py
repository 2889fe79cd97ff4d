"""Files to text: found, decompressed, decoded. And files written whole or not at all.

    files = find_files(["corpus"], wanted)
    for document in read_each(files, wanted, read): ...  # read(name, stream) -> documents

.gz .bz2 .xz and .zip are read as they are. What can't be read is yielded as a Dropped in its place.
"""
import bz2
import codecs
import gzip
import io
import lzma
import os
import sys
import time
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from config import UserError

LONGEST = 2**22       # characters of a record or document; the four great novels have 3 million
HEAD = 2**20          # bytes by which a file's encoding and form are known
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
MARK = "\udcff"       # stands where bytes could not be decoded
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError,
               NotImplementedError, MemoryError, UnicodeError)  # of damaged and foreign archives

# what Chinese text is made of: ASCII, dashes and quotes, full-width marks, and the 3,755 commonest
# Han characters (level 1 of GB 2312)
COMMON = {chr(code) for codes in (range(9, 14), range(32, 127), range(0x2010, 0x2027),
                                  range(0x3000, 0x3012), range(0xFF01, 0xFF5F)) for code in codes}
COMMON |= {bytes((high, low)).decode("gb2312", "ignore") for high in range(0xB0, 0xD8)
           for low in range(0xA1, 0xFF)} - {""}
codecs.register_error("mark", lambda error: (MARK, error.end))


@dataclass
class Dropped:
    """A document that could not be read: a short reason to count by, and where it stood."""
    reason: str
    where: str


def suffix(name):
    """The ending that says what a file holds, in lower case: .jsonl of x.JSONL.gz."""
    stem, end = os.path.splitext(str(name))
    return (os.path.splitext(stem)[1] if end.lower() in OPENERS else end).lower()


def find_files(paths, wanted, endings=()):
    """Files under paths for which wanted(name) holds, and .zip files: each once, sorted.

    Links are followed, but no folder is read twice. What is left aside is said.
    """
    found, seen, others = set(), set(), Counter()
    for path in sorted(os.path.normpath(p) for p in paths):
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        if not os.path.isdir(path):
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
                    others[suffix(name) or name] += 1
    if others:
        shown = ", ".join(f"{n:,} {end}" for end, n in others.most_common(5))
        print(f"left aside: {others.total():,} files of another kind ({shown})")
    if not found:
        kinds = " ".join(endings) or "file of this kind"
        raise UserError(f"{', '.join(map(str, paths))}: no file of this kind in there ({kinds})")
    return sorted(found, key=lambda p: p.replace(os.sep, "/"))


def _raise(error):
    raise error


def open_files(path, wanted):
    """(name, a function that opens it) of a file, or of each wanted file in a .zip.

    A .zip is never unpacked, so what its names say of folders does not matter.
    """
    if not path.lower().endswith(".zip"):
        yield path, lambda: _buffered(path, open(path, "rb"))
        return
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if not m.is_dir() and not _hidden(m.filename)]
        taken = [m for m in members if wanted(m.filename) or suffix(m.filename) == ".zip"]
        if len(taken) < len(members):
            print(f"left aside: {len(members) - len(taken):,} files of another kind in {path}")
        for member in sorted(taken, key=lambda m: m.filename):
            yield (f"{path}/{member.filename}",
                   lambda m=member: _buffered(m.filename, archive.open(m)))


def _hidden(name):
    return any(part[:1] == "." and part.strip(".") or part == "__MACOSX"
               for part in name.split("/"))


class Salvage(io.RawIOBase):
    """A stream whose error comes only after all that can be read before it."""

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
                self.error = e
                break
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
    """A stream that can peek(HEAD), decompressed; closing it closes raw."""
    end = os.path.splitext(name)[1].lower()
    if end == ".zip":
        raise zipfile.BadZipFile("a .zip in a .zip: unpack it first")
    return io.BufferedReader(Salvage(OPENERS[end](raw, "rb")) if end in OPENERS else raw, HEAD)


def read_each(files, wanted, read):
    """All that read(name, stream) yields of every file; where one breaks off stands a Dropped."""
    for path in files:
        try:
            for name, opened in open_files(path, wanted):
                try:
                    with opened() as stream:
                        yield from read(name, stream)
                except READ_ERRORS as e:
                    yield _unreadable(name, e)
        except READ_ERRORS as e:
            yield _unreadable(path, e)


def _unreadable(name, error):
    return Dropped("unreadable file", f"{name}: can't be read on ({error or type(error).__name__})")


def write_file(path, content):
    """Write str or bytes whole or not at all: beside, fsync, rename."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        replace(part, path)
    except OSError as e:  # of a full disk it names no file
        e.filename = e.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def replace(source, target):
    """os.replace; on Windows, which refuses while a program reads the target, tried for a second.
    """
    for seconds in (0.05, 0.15, 0.3, 0.5, None):
        try:
            return os.replace(source, target)
        except PermissionError as e:
            if seconds is None or sys.platform != "win32":
                e.strerror = f"{e.strerror}; does another program have it open?"
                raise
            time.sleep(seconds)


def lock(path, taken):
    """An open file that no other process gets while this one lives; UserError(taken) if one has it.
    """
    file = open(path, "wb")
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # POSIX; Windows
        file.close()
        raise UserError(taken) from e
    except OSError:  # network file systems without locks
        pass
    return file


# ---- text ----

def encoding_of(head):
    """The encoding of a file that begins with these bytes.

    A byte order mark tells, and what is valid UTF-8 without a zero is that. Else it is the one of
    four in which most of it is common Chinese or ASCII; UTF-8 if that decides nothing.
    """
    for mark, name in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
                       (codecs.BOM_UTF16_BE, "utf-16")):
        if head.startswith(mark):
            return name
    try:  # the last character may be cut where more follows
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD)
        if b"\0" not in head:
            return "utf-8"
    except UnicodeDecodeError:
        pass
    return max(("utf-8", "gb18030", "utf-16-le", "utf-16-be"), key=lambda e: _sense(head, e))


def _sense(head, encoding):
    """Share of the characters that Chinese text is made of."""
    text = head.decode(encoding, "mark")
    return sum(map(COMMON.__contains__, text)) / max(1, len(text))


def head_of(stream):
    """The beginning of a stream as text, without reading it."""
    head = stream.peek(HEAD)[:HEAD]
    return head.decode(encoding_of(head), "ignore").removeprefix("\ufeff")


def decoded(stream, newline="\n"):
    """The stream as text; MARK stands for bytes that are none."""
    encoding = encoding_of(stream.peek(HEAD)[:HEAD])
    return io.TextIOWrapper(stream, encoding, errors="mark", newline=newline)


def lines(text):
    """Lines of a text stream with their ends; one over LONGEST comes in pieces of that size."""
    return iter(lambda: text.readline(LONGEST), "")


def text_parts(stream):
    """A whole text; one over LONGEST in parts, cut at line ends."""
    text, rest, whole = decoded(stream, newline=None), "", True
    while len(part := rest + text.read(LONGEST - len(rest))) == LONGEST:
        cut = part.rfind("\n") + 1 or LONGEST
        rest, whole = part[cut:], False
        yield part[:cut]
    if part or whole:
        yield part

"""Files to records: found, decompressed, decoded, and cut into lines, JSON values or rows.

    for path in find_files(["corpus"], wanted):
        for name, opened in open_files(path, wanted):     # one, or each file in a .zip
            with opened() as stream:                      # .gz .bz2 .xz are read as they are
                for where, record in records(name, stream): ...

Nothing is held whole but one record, and no record is longer than LONGEST. What can't be read is
yielded as a Dropped in its place.
"""
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from config import UserError

LONGEST = 2**22       # characters of a record or document; the four great novels have 3 million
HEAD = 2**20          # bytes by which a file's encoding and form are known
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside .arrow shards
ROWS = 16             # rows of a table converted at once
MARK = "\udcff"       # stands where bytes could not be decoded
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError,
               NotImplementedError, MemoryError, UnicodeError)  # of damaged and foreign archives

# the 3,755 commonest Han characters (level 1 of GB 2312), ASCII, and full-width marks
COMMON = {bytes((high, low)).decode("gb2312", "ignore") for high in range(0xB0, 0xD8)
          for low in range(0xA1, 0xFF)} | set(map(chr, (*range(9, 14), *range(32, 127),
                                                        *range(0x2010, 0x2027), *range(0x3000, 0x3012),
                                                        *range(0xFF01, 0xFF5F)))) - {""}
codecs.register_error("mark", lambda error: (MARK, error.end))
csv.field_size_limit(LONGEST)


@dataclass
class Dropped:
    """A document that could not be read: a short reason to count by, and where it stood."""
    reason: str
    where: str


def suffix(name):
    """The ending that says what a file holds, in lower case: .jsonl of x.JSONL.gz."""
    stem, end = os.path.splitext(str(name))
    return (os.path.splitext(stem)[1] if end.lower() in OPENERS else end).lower()


def find_files(paths, wanted):
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
        raise UserError(f"{', '.join(map(str, paths))}: no file of this kind in there")
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
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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


# ---- records ----

def records(name, stream):
    """(place, value) of each record in a file of one of the RECORDS forms, else of JSON."""
    kind = suffix(name)
    if kind in (".parquet", ".arrow"):
        yield from arrow_rows(name, stream, kind)
    elif kind in (".csv", ".tsv"):
        yield from csv_rows(name, decoded(stream, newline=""), "\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl" or _is_json_lines(head_of(stream)):
        yield from json_lines(name, decoded(stream))
    else:
        yield from json_values(name, decoded(stream))


def _is_json_lines(head):
    """Whether each line of a .json file is a value: the first or second of several is whole."""
    first, second = ([line for line in head.split("\n", 20) if line.strip()] + ["", ""])[:2]
    if not second.strip():
        return False
    if first.lstrip()[:1] == "[":
        return _is_value(first) and second.lstrip()[:1] == "["
    return first.lstrip()[:1] == "{" and (_is_value(first) or _is_value(second))


def _is_value(line):
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def json_lines(name, text):
    """A JSON value a line; empty lines are none."""
    pieces = lines(text)
    for number, line in enumerate(pieces, 1):
        where = f"{name}:{number}"
        if len(line) == LONGEST and line[-1] != "\n":
            next((piece for piece in pieces if piece[-1] == "\n"), None)
            yield where, Dropped("too long", f"{where}: over {LONGEST:,} characters")
        elif line := line.strip("\ufeff \t\r\n"):
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as e:
                yield where, _not_json(where, e)


def _not_json(where, error, more=""):
    what = "nested too deeply" if isinstance(error, RecursionError) else (
        f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error)
    return Dropped("not JSON", f"{where}: not JSON ({what}){more}")


class TooLong(ValueError):
    pass


class JsonCursor:
    """Walks over JSON text of any length, one value at a time."""
    blanks, decoder = re.compile(r"[ \t\r\n\ufeff]*"), json.JSONDecoder()

    def __init__(self, text):
        self.text, self.buffer, self.ended = text, "", False
        self.at = self.counted = 0  # places in the buffer: the next character; lines so far
        self.line = 1

    def row(self):
        """Number of the line it stands in."""
        self.line += self.buffer.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def fill(self):
        """Forget what was passed and read as much as is left, or HEAD if that is more."""
        self.row()
        self.buffer, self.at, self.counted = self.buffer[self.at:], 0, 0
        more = self.text.read(max(HEAD, len(self.buffer)))
        self.buffer, self.ended = self.buffer + more, not more

    def peek(self):
        """The next character that is not blank; "" at the end."""
        while True:
            self.at = self.blanks.match(self.buffer, self.at).end()
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at:self.at + 1]
            self.fill()

    def take(self, character):
        """Pass over this character if it is next; whether it was."""
        here = self.peek() == character
        self.at += here
        return here

    def value(self):
        """The next value. TooLong, or another ValueError: it is none, or does not end."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
                if end < len(self.buffer) or self.ended:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as e:
                if self.ended:
                    raise ValueError(e.msg) from e
            if len(self.buffer) - self.at > LONGEST:
                raise TooLong(f"no value ends within {LONGEST:,} characters")
            self.fill()

    def elements(self):
        """The values of the array that comes next."""
        self.take("[")
        while not self.take("]"):
            yield self.value()
            if not self.take(",") and self.peek() != "]":
                raise ValueError("the array does not end, or lacks a comma")

    def members(self):
        """What the object that comes next holds: itself, or if it is huge its members that are
        objects or lists; and the elements of a list under 'data' (SQuAD's files) in its place."""
        try:
            value = self.value()
            inner = value.get("data")
            yield from inner if isinstance(inner, list) else [value]
            return
        except TooLong as e:
            found, too_long = 0, e
        self.take("{")
        while not self.take("}"):
            key = self.value()
            if not self.take(":"):
                raise ValueError("the object lacks a colon")
            many = key == "data" and self.peek() == "["
            for value in self.elements() if many else [self.value()]:
                if many or isinstance(value, (dict, list)):
                    found += 1
                    yield value
            if not self.take(",") and self.peek() != "}":
                raise ValueError("the object does not end, or lacks a comma")
        if not found:
            raise too_long


def json_values(name, text):
    """Elements of an array, or values one after the other; see members() for objects."""
    cursor = JsonCursor(text)
    try:
        while first := cursor.peek():
            values = cursor.elements() if first == "[" else (
                cursor.members() if first == "{" else [cursor.value()])
            for value in values:
                yield f"{name}:{cursor.row()}", value
            cursor.take(",")
    except (ValueError, RecursionError) as e:
        where = f"{name}:{cursor.row()}"
        if isinstance(e, TooLong):
            yield where, Dropped("too long", f"{where}: {e}; the rest of the file is not read")
        else:
            yield where, _not_json(where, e, "; the rest of the file is not read")


def csv_rows(name, text, delimiter):
    """{column: field} of each row under the header."""
    rows = csv.reader(lines(text), delimiter=delimiter, strict=True)
    header = None
    while True:
        where = f"{name}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            yield where, Dropped("not CSV", f"{where}: not CSV ({e})")
            continue
        if not any(row):
            continue
        if header is None:
            header = [column.strip("\ufeff ") for column in row]
        elif len(row) == len(header):
            yield where, dict(zip(header, row))
        else:
            what = f"{len(row)} fields, the header has {len(header)}"
            yield where, Dropped("not CSV", f"{where}: {what}")


def arrow_rows(name, stream, kind):
    """Rows of .parquet, and of the .arrow shards that `datasets` saves."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"{name}: reading {kind} needs pyarrow: pip install pyarrow") from e
    number = 0
    try:
        if kind == ".parquet":
            batches = pa.parquet.ParquetFile(stream).iter_batches(ROWS)
        elif stream.peek(6)[:6] == b"ARROW1":
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            batches = pa.ipc.open_stream(stream)
        for batch in batches:
            for i in range(0, batch.num_rows, ROWS):
                for number, row in enumerate(_rows(batch.slice(i, ROWS)), number + 1):
                    where = f"{name}: row {number}"
                    yield where, row or Dropped("bad row", f"{where}: can't be converted")
    except (pa.ArrowException, *READ_ERRORS, ValueError) as e:
        where = f"{name}: row {number + 1}"
        yield where, Dropped("unreadable file", f"{where}: can't be read on ({e})")


def _rows(batch):
    """Rows as dicts; None for one with a value that Python has no form for."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError):  # text that is none, dates past year 9999
        return [None] if batch.num_rows == 1 else [
            row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]

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
MARK = "\udcff"       # stands where bytes could not be decoded
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError,
               NotImplementedError, MemoryError)  # of damaged, encrypted and foreign archives

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
    return (os.path.splitext(stem)[1] if end in OPENERS else end).lower()


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
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            if wanted(os.path.basename(info.filename)):  # a folder has no basename
                yield (f"{path}/{info.filename}",
                       lambda info=info: _buffered(info.filename, archive.open(info)))


def _buffered(name, raw):
    """A stream that can peek(HEAD), decompressed; closing it closes raw."""
    opener = OPENERS.get(os.path.splitext(name)[1])
    return io.BufferedReader(opener(raw, "rb") if opener else raw, HEAD)


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
    """The encoding of a file that begins with these bytes: UTF-8 unless they say otherwise.

    UTF-16 has a byte order mark, or zeros and makes sense; GB18030 is not valid as UTF-8.
    """
    for mark, name in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
                       (codecs.BOM_UTF16_BE, "utf-16")):
        if head.startswith(mark):
            return name
    if 200 * head.count(0) > len(head):  # of every newline, and of U+4E00, "one"
        return max("utf-16-le", "utf-16-be", key=lambda e: _sense(head[:4000].decode(e, "replace")))
    broken = head.decode("utf-8", "replace").count("\ufffd")
    foreign = len(head) - len(head.translate(None, bytes(range(128, 256))))
    return "gb18030" if 5 * broken > foreign else "utf-8"


def _sense(text):
    """How many of the characters are those of Chinese text: Han, ASCII, full-width forms."""
    return len(re.findall("[\u4e00-\u9fff\x09-\x7e\u3000-\u303f\uff00-\uff65]", text))


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
    elif kind == ".jsonl" or _first_line_is_whole(stream):
        yield from json_lines(name, decoded(stream))
    else:
        yield from json_values(name, decoded(stream))


def _first_line_is_whole(stream):
    head = stream.peek(HEAD)[:HEAD]
    first = head.decode(encoding_of(head), "ignore").lstrip().partition("\n")[0].rstrip()
    return first.startswith("{") and first.endswith("}")


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


class JsonCursor:
    """Walks over JSON text of any length, one value at a time."""
    blanks, decoder = re.compile(r"[ \t\r\n\ufeff]*"), json.JSONDecoder()

    def __init__(self, text):
        self.text, self.buffer, self.at, self.line, self.ended = text, "", 0, 1, False

    def fill(self):
        """Forget what was passed and read as much as is left, or HEAD if that is more."""
        self.line += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at = self.buffer[self.at:], 0
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
        """The next value. ValueError: none, or longer than LONGEST."""
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
                raise ValueError(f"no value ends within {LONGEST:,} characters")
            self.fill()

    def row(self):
        """Number of the line it stands in."""
        return self.line + self.buffer.count("\n", 0, self.at)

    def elements(self):
        """The values of the array that comes next."""
        self.take("[")
        while not self.take("]"):
            yield self.value()
            if not self.take(",") and self.peek() != "]":
                raise ValueError("the array does not end, or lacks a comma")

    def object_ends_soon(self):
        """Whether the object that comes next is whole within the next HEAD characters."""
        if len(self.buffer) - self.at < HEAD:
            self.fill()
        try:
            self.decoder.raw_decode(self.buffer, self.at)
        except json.JSONDecodeError:
            return self.ended  # then value() says what is wrong
        return True

    def members(self):
        """The lists and objects in the object that comes next, but under 'data' (SQuAD's files)
        the elements of its list."""
        self.take("{")
        while not self.take("}"):
            key = self.value()
            if not self.take(":"):
                raise ValueError("the object lacks a colon")
            if key == "data" and self.peek() == "[":
                yield from self.elements()
            elif isinstance(value := self.value(), (dict, list)):
                yield value
            if not self.take(",") and self.peek() != "}":
                raise ValueError("the object does not end, or lacks a comma")


def json_values(name, text):
    """Elements of an array, or values one after the other; a huge object's values one by one."""
    cursor = JsonCursor(text)
    try:
        while first := cursor.peek():
            if first == "[":
                values = cursor.elements()
            elif first == "{" and not cursor.object_ends_soon():
                values = cursor.members()
            else:
                values = iter([cursor.value()])
            for value in values:
                yield f"{name}:{cursor.row()}", value
            cursor.take(",")
    except (ValueError, RecursionError) as e:
        where = f"{name}:{cursor.row()}"
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
        if header is None:
            header = [column.strip("\ufeff ") for column in row]
        elif len(row) == len(header):
            yield where, dict(zip(header, row))
        elif row:
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
            batches = pa.parquet.ParquetFile(stream).iter_batches(256)
        elif stream.peek(6)[:6] == b"ARROW1":
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            batches = pa.ipc.open_stream(stream)
        for batch in batches:
            for i in range(0, batch.num_rows, 256):
                for number, row in enumerate(batch.slice(i, 256).to_pylist(), number + 1):
                    yield f"{name}: row {number}", row
    except (pa.ArrowException, UnicodeDecodeError, ValueError) as e:
        where = f"{name}: row {number + 1}"
        yield where, Dropped("unreadable file", f"{where}: can't be read on ({e})")

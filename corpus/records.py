"""Text files to records: JSON lines, JSON of any shape and length, tables.

    for where, record in records(name, stream): ...      # where: "file:line"

Nothing is held whole but one record, and none is longer than LONGEST. What can't be read is yielded
as a Dropped in its place.
"""
import csv
import json
import re

from config import UserError
from data.files import HEAD, LONGEST, READ_ERRORS, Dropped, decoded, head_of, lines, suffix

RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside .arrow shards
ROWS = 16  # of a table, converted at once
csv.field_size_limit(LONGEST)


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


# ---- JSON ----

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


# ---- tables ----

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

"""Text files to records: JSON lines, JSON, tables.

    for place, record in records(name, stream): ...  # place: "file:line"

What can't be read is yielded as a Dropped in its place.
"""
import csv
import json
import re

from common.command_line import UserError
from corpus.files import MAX_CHARS, READ_ERRORS, Dropped, decoded, head_of, lines, suffix, too_long, unreadable

RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside .arrow shards
MAX_JSON_CHARS = 2**30  # of a file that is not JSON lines: it is held in memory, 2 or 4 GB
BLANKS = re.compile(r"[ \t\r\n\ufeff]*")
csv.field_size_limit(MAX_CHARS)


def records(name, stream):
    """Yield (place, value) of each record; the suffix of name tells the format, JSON by default."""
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
    """Return whether a .json file that begins like this has one value a line: of several lines,
    the first or the second is a whole value."""
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
    """Yield (place, value) of each line that is not blank."""
    pieces = lines(text)
    for number, line in enumerate(pieces, 1):
        place = f"{name}:{number}"
        if len(line) == MAX_CHARS and line[-1] != "\n":
            next((piece for piece in pieces if piece[-1] == "\n"), None)  # skip the rest of it
            yield place, too_long()
        elif line := line.strip("\ufeff \t\r\n"):
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as e:
                yield place, _not_json(e)


def _not_json(error, more=""):
    what = "nested too deeply" if isinstance(error, RecursionError) else (
        f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error)
    return Dropped("not JSON", f"not JSON ({what}){more}")


def json_values(name, text):
    """Yield (place, value) of each value that split_values finds. After the first error the rest
    of the file is not read: where its next value begins is unknown."""
    source, read_error = _read_whole(text)
    if len(source) > MAX_JSON_CHARS:
        yield name, Dropped("too long", f"over {MAX_JSON_CHARS:,} characters of JSON; "
                            "convert the file to JSON lines (.jsonl), one value a line")
        return
    line, counted = 1, 0
    try:
        for value, end in split_values(source):
            line += source.count("\n", counted, end)
            counted = end
            yield f"{name}:{line}", value
    except (ValueError, RecursionError) as e:
        if not read_error:
            place = f"{name}:{getattr(e, 'lineno', line)}"
            yield place, _not_json(e, "; the rest of the file is not read")
    if read_error:
        raise read_error


def _read_whole(text):
    """Return (the text up to its end, a read error or just past the limit; the error or None)."""
    pieces, size = [], 0
    try:
        while size <= MAX_JSON_CHARS and (piece := text.read(2**20)):
            pieces.append(piece)
            size += len(piece)
    except READ_ERRORS as e:
        return "".join(pieces), e
    return "".join(pieces), None


def split_values(source):
    """Yield (value, its end in source) of each element of an array, and of values one after the
    other; of an object with a list under "data" (SQuAD), the elements of that list."""
    decoder, at, in_array = json.JSONDecoder(), BLANKS.match(source).end(), False
    while at < len(source):
        if source[at] == "[" and not in_array:
            in_array, at = True, BLANKS.match(source, at + 1).end()
            continue
        if source[at] == "]" and in_array:
            in_array, end = False, at + 1
        else:
            value, end = decoder.raw_decode(source, at)
            data = value.get("data") if isinstance(value, dict) and not in_array else None
            yield from ((v, end) for v in (data if isinstance(data, list) else [value]))
        at = BLANKS.match(source, end).end()
        if source.startswith(",", at):
            at = BLANKS.match(source, at + 1).end()
        elif in_array and not source.startswith("]", at):
            raise json.JSONDecodeError("the array does not end, or lacks a comma", source, at)
    if in_array:
        raise json.JSONDecodeError("the array does not end", source, at)


# ---- tables ----

def csv_rows(name, text, delimiter):
    """Yield (place, {column: field}) of each row below the header."""
    rows = csv.reader(lines(text), delimiter=delimiter, strict=True)
    header = None
    while True:
        place = f"{name}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            yield place, Dropped("not CSV", f"not CSV ({e})")
            continue
        if not any(row):
            continue
        if header is None:
            header = [column.strip("\ufeff ") for column in row]
        elif len(row) == len(header):
            yield place, dict(zip(header, row))
        else:
            yield place, Dropped("not CSV", f"{len(row)} fields, the header has {len(header)}")


def arrow_rows(name, stream, kind):
    """Yield (place, row) of a .parquet file, or of an .arrow shard as `datasets` saves it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"{name}: reading {kind} needs pyarrow: pip install pyarrow") from e
    number = 0
    try:
        if kind == ".parquet":
            batches = pa.parquet.ParquetFile(stream).iter_batches(16)
        elif stream.peek(6)[:6] == b"ARROW1":
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            batches = pa.ipc.open_stream(stream)
        for batch in batches:
            for i in range(batch.num_rows):
                number += 1
                try:
                    row = batch.slice(i, 1).to_pylist()[0]
                except (ValueError, OverflowError, LookupError):  # not UTF-8, a year past 9999
                    row = Dropped("bad row", "a bad row: can't be converted")
                yield f"{name}: row {number}", row
    except (pa.ArrowException, *READ_ERRORS, ValueError) as e:
        yield f"{name}: row {number + 1}", unreadable(e)

"""Text files to records: JSON lines, JSON, tables.

    for place, record in records(name, stream): ...  # place: "file:line"

What can't be read is yielded as a Dropped in its place.
"""
import csv
import json
import re
from collections import deque

from common.command_line import optional_package
from corpus.files import (
    MAX_CHARS, READ_ERRORS, UNDECODABLE, Dropped, decoded, head_of, read_lines, suffix, too_long,
    unreadable)

RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside .arrow shards
MAX_LINE = 8 * MAX_CHARS  # of JSON: a character may be written in 6, like \u6c5f
MAX_JSON_CHARS = 2**30  # of a file that is not JSON lines: it is held in memory, 2 or 4 GB
BLANKS = re.compile(r"[ \t\r\n\ufeff]*")
MAX_BAD = 1000  # values of such a file that are not JSON, before the rest is given up
START = re.compile(r'\[|\{\s*("[^"\\]*")?')  # the bracket and first key of a value
FIRST_LINE = re.compile(r"\s*[^\r\n]*")
DECODER = json.JSONDecoder()
BAD_ENCODING = Dropped(
    "bad encoding", "bad encoding: bytes or half a surrogate pair (\\ud83d) that are no character")
csv.field_size_limit(MAX_CHARS)


def records(name, stream):
    """Yield (place, value) of each record of a file."""
    if suffix(name) in (".parquet", ".arrow"):
        yield from arrow_rows(name, stream, suffix(name))
        return
    head = head_of(stream)
    form, has_tab = form_of(name, head), "\t" in FIRST_LINE.match(head)[0]
    if form == "table" or form == "text" and has_tab:
        yield from csv_rows(name, decoded(stream, newline=""), delimiter_of(name, head))
    elif form == "JSON lines":
        yield from json_lines(name, decoded(stream, newline="\n"))
    else:
        yield from json_values(name, decoded(stream))


def form_of(name, head):
    """Return the form of a file that begins like this: "table", "JSON lines", "JSON" or "text"."""
    kind, (first, second) = suffix(name), _first_lines(head)
    if kind in (".csv", ".tsv"):
        return "table"
    if kind not in RECORDS and not _begins_with_record(head):
        return "text"
    if first[:1] == "[":  # a list on each line, or one list over several lines
        by_line = _is_value(first) and second[:1] == "["
    else:  # either line may be damaged; "{" alone begins a value over several lines
        by_line = (_is_value(second) or second not in ("", "{") and _is_value(first)
                   or kind == ".jsonl" and not _is_value(head, whole=False))
    return "JSON lines" if by_line else "JSON"


def _first_lines(head):
    """Return the first two lines that are not blank, without commas at their ends."""
    lines = (line.strip("\ufeff \t\r").removesuffix(",") for line in head.split("\n", 20))
    return ([line for line in lines if line] + ["", ""])[:2]


def _begins_with_record(head):
    """Return whether a text begins with an object in JSON, or a list of objects or of strings,
    and goes on with another one: a line of a book may be JSON."""
    inner = head.lstrip("\ufeff \t\r\n[")
    if not (inner[:1] == "{" and inner[1:2] != "}" and _is_value(inner, whole=False)):
        inner = head
        if not (re.match(r'\s*(?:\[\s*)+"', head) and _is_value(head, whole=False)):
            return False
    rest = inner[DECODER.raw_decode(inner, BLANKS.match(inner).end())[1]:]
    return rest.strip("\ufeff \t\r\n,]")[:1] in ("", "{", "[", '"')


def _is_value(text, whole=True):
    """Return whether text is an object or a list in JSON, or only begins with one."""
    try:
        value, end = DECODER.raw_decode(text, BLANKS.match(text).end())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, (dict, list)) and not (whole and text[end:].strip())


# ---- JSON ----

def json_lines(name, text):
    """Yield (place, value) of each line that is not blank."""
    pieces = read_lines(text, MAX_LINE)
    for number, line in enumerate(pieces, 1):
        place = f"{name}:{number}"
        if len(line) == MAX_LINE and line[-1] != "\n":
            next((piece for piece in pieces if piece[-1] == "\n"), None)  # skip the rest of it
            yield place, too_long()
        elif line := line.strip("\ufeff \t\r\n"):
            try:
                yield place, _if_encodable(json.loads(line.removesuffix(",")), line)
            except (ValueError, RecursionError) as e:
                yield place, _not_json(e)


def _not_json(error, more=""):
    what = "nested too deeply" if isinstance(error, RecursionError) else error
    if isinstance(error, json.JSONDecodeError):
        what = f"{error.msg}, column {error.colno}"
    return Dropped("not JSON", f"not JSON ({what}){more}")


def _if_encodable(value, source):
    """Return the value read from source, or BAD_ENCODING if a part of it is no character."""
    if UNDECODABLE in source or "\\ud" in source or "\\uD" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            return BAD_ENCODING
    return value


def json_values(name, text):
    """Yield (place, value) of each value that split_values finds."""
    pieces, read_error, line, counted = [], None, 1, 0  # line: that of source[counted]
    try:  # what was read before an error stays
        while len(pieces) <= MAX_JSON_CHARS // 2**20 and (piece := text.read(2**20)):
            pieces.append(piece)
    except READ_ERRORS as e:
        read_error = e
    source = "".join(pieces)
    if len(source) > MAX_JSON_CHARS:
        yield name, Dropped("too long", f"over {MAX_JSON_CHARS:,} characters of JSON; "
                            "convert the file to JSON lines (.jsonl), one value a line")
        return
    try:
        for at, value in split_values(source):
            # forward, or back: after an error reading goes on before the place it names
            line += source.count("\n", counted, at) - source.count("\n", at, counted)
            counted = at
            yield f"{name}:{line}", value
    except (ValueError, RecursionError) as e:
        if not read_error:
            place = f"{name}:{getattr(e, 'lineno', line)}"
            yield place, _not_json(e, "; the rest of the file is not read")
    if read_error:
        raise read_error


def split_values(source):
    """Yield (its beginning in source, value) of each element of an array, and of values one after
    the other; of an object that holds records, each of them.

    A value that is not JSON gives a Dropped, and reading goes on where the text looks like the
    beginning of the first value: in [{"id": 1}, {"id": }, {"id": 3}] at the third. If it does so
    nowhere, the error is raised.
    """
    at, in_array, start, bad = BLANKS.match(source).end(), False, None, 0
    while at < len(source):
        if source[at] == "[" and not in_array:
            in_array, at = True, BLANKS.match(source, at + 1).end()
            continue
        if source[at] == "]" and in_array:
            in_array, end = False, at + 1
        else:
            start = start or START.match(source, at)
            try:
                value, end = DECODER.raw_decode(source, at)
            except (ValueError, RecursionError) as e:
                bad += 1  # limited, because each takes time in proportion to the length
                after = start and _next_like(start, source, at + 1)
                if not after or bad == MAX_BAD:
                    raise
                yield getattr(e, "pos", at), _not_json(e)
                at = after.start()
                continue
            value = _if_encodable(value, source[at:end])
            inside = held_in(value) if isinstance(value, dict) and not in_array else [value]
            yield from ((at, item) for item in inside)
        at = BLANKS.match(source, end).end()
        if source.startswith(",", at):
            at = BLANKS.match(source, at + 1).end()
    if in_array:
        raise json.JSONDecodeError("the array does not end", source, at)


def held_in(value):
    """Return the elements of an object's list under "data" (SQuAD), the rows of a table as pandas
    writes it, {column: {"0": field}} or {"columns": [..], "data": [[..]]}; else [value]."""
    data, columns = value.get("data"), list(value.values())
    if isinstance(data, list):
        names = value.get("columns")
        table = isinstance(names, list) and all(isinstance(row, list) for row in data)
        return [dict(zip(map(str, names), row)) for row in data] if table else data
    if columns and all(isinstance(c, dict) and "0" in c and c.keys() == columns[0].keys()
                       for c in columns):
        return [dict(zip(value, row)) for row in zip(*(c.values() for c in columns))]
    return [value]


def _next_like(start, source, at):
    """Return the match of the next value that begins like start, a match of START, or None."""
    first = re.escape(start[1]) if start[1] else '["{]'
    return re.compile(rf"\{start[0][0]}\s*{first}").search(source, at)


# ---- tables ----

NOT_A_NAME = re.compile(r".*[。！？…?!]|.{10,}\.|.{40,}|[+-]?\d+(?:\.\d+)?", re.S)  # in a header


def delimiter_of(name, head):
    """Return the character between the columns of a table that begins like this."""
    first, usual = FIRST_LINE.match(head)[0], "\t" if suffix(name) == ".tsv" else ","
    if said := re.fullmatch(r'\s*"?sep=(.)"?', first):
        return said[1]
    return usual if usual in first else max(usual + ",;\t|", key=first.count)


def csv_rows(name, text, delimiter):
    """Yield (place, {column: field}) of each row below the header; missing fields are ""."""
    header = None
    for place, row in split_rows(name, text, delimiter):
        if isinstance(row, Dropped):
            yield place, row
        elif UNDECODABLE in "".join(row):
            yield place, BAD_ENCODING
        elif not any(row) or header is None and re.fullmatch("sep=.?", "".join(row)):
            continue
        elif header is None:
            header = [column.strip("\ufeff ") for column in row]
            if any(map(NOT_A_NAME.fullmatch, header)):
                yield place, Dropped("no header", "the first row was taken as the header; put the "
                                     f"names of the columns above it ({', '.join(header)[:60]})")
        elif any(row[len(header):]):
            yield place, Dropped("not CSV", f"{len(row)} fields, the header has {len(header)}")
        else:
            row += [""] * (len(header) - len(row))
            yield place, {column: field for column, field in zip(header, row) if column}


def split_rows(name, text, delimiter):
    """Yield (place, fields) of each row. Quotes in fields are doubled, as in "a ""b"" c", or follow
    a backslash. Of a row that is not CSV only the first line is dropped: where a quote is not
    closed, the row would go on to the end of the file."""
    source = enumerate(read_lines(text), 1)
    again, taken = deque(), []  # (number, line): those to read once more, those of this row

    def feed():
        while numbered := again.popleft() if again else next(source, None):
            taken.append(numbered)
            yield numbered[1]

    rows, escape, failed = csv.reader(feed(), delimiter=delimiter, strict=True), None, 0
    while True:
        taken.clear()
        try:
            row = next(rows, None)
        except csv.Error as e:
            again.extendleft(reversed(taken))
            escape, failed = None if escape else "\\", failed + 1
            rows = csv.reader(feed(), delimiter=delimiter, escapechar=escape, strict=True)
            if failed == 1:  # try the row with the other kind of quotes
                continue
            row = Dropped("not CSV", f"not CSV ({e})")
            again.popleft()
        if row is None:
            return
        failed = 0
        yield f"{name}:{taken[0][0]}", row


def arrow_rows(name, stream, kind):
    """Yield (place, row) of a .parquet file, or of an .arrow shard as `datasets` saves it."""
    with optional_package(f"{name}: reading {kind}", "pyarrow"):
        import pyarrow as pa
        import pyarrow.parquet
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
            for row in converted(batch):
                number += 1
                yield f"{name}: row {number}", row
    except (pa.ArrowException, *READ_ERRORS, ValueError) as e:
        yield f"{name}: row {number + 1}", unreadable(e)


def converted(batch):
    """Return the rows of an Arrow batch, one by one if they can't be converted together."""
    try:
        batch.validate(full=True)  # a damaged one would crash the process
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError):  # not UTF-8, a year past 9999
        if batch.num_rows == 1:
            return [Dropped("bad row", "a bad row: can't be converted")]
        return [row for i in range(batch.num_rows) for row in converted(batch.slice(i, 1))]

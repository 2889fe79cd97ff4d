"""Raw files to documents: one generator a format.

A reader takes a list of files and yields, for each document it meets, a str (text), a list of
messages (chat), or a Dropped that says why there is none. Nothing is passed over in silence.
"""
import bz2
import gzip
import json
import lzma
import re
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

from config import UserError

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
ROLES = ("system", "user", "assistant")


@dataclass
class Dropped:
    """A document that could not be read: a short reason to count by, and where it stood."""
    reason: str
    where: str


def suffix(path):
    """The ending that says what a file holds: .jsonl of x.jsonl.gz."""
    return (path.with_suffix("") if path.suffix in OPENERS else path).suffix.lower()


def find_files(paths, wanted):
    """Files under paths for which wanted(path) holds, each once, sorted: the same in any order."""
    found = set()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        below = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        found |= {p for p in below if path.is_file() or wanted(p)}
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no file of this kind in there")
    return sorted(found, key=lambda p: p.as_posix())


def lines_of(path):
    """(place, line) of a text file, line a str or a Dropped where it is not UTF-8."""
    number = 0
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                where = f"{path}:{number}"
                try:
                    yield where, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as e:
                    yield where, Dropped("not UTF-8", f"{where}: not UTF-8 (byte {e.start})")
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, OSError) as e:
        where = f"{path}:{number + 1}"
        yield where, Dropped("unreadable file", f"{where}: can't be read on ({e})")


def json_lines(path):
    """(place, value) of a file of JSON lines; value is a Dropped where a line is not JSON."""
    for where, line in lines_of(path):
        if isinstance(line, str) and not line.strip():
            continue
        if isinstance(line, str):
            try:
                line = json.loads(line)
            except (ValueError, RecursionError) as e:
                what = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
                line = Dropped("not JSON", f"{where}: not JSON ({what})")
        yield where, line


def text_field(path, field="text"):
    for where, record in json_lines(path):
        if isinstance(record, Dropped):
            yield record
        elif isinstance(record, dict) and isinstance(record.get(field), str):
            yield record[field]
        else:
            yield Dropped(f"no {field}", f"{where}: no string under the key '{field}'")


def read_wiki(files):
    """wiki_zh_2019: JSON lines of id, url, title, text; the text leads with its title."""
    for path in files:
        yield from text_field(path)


def read_text(files):
    """.txt: a document a file; .jsonl: a document a line."""
    for path in files:
        if suffix(path) == ".jsonl":
            yield from text_field(path)
            continue
        lines = [line for _, line in lines_of(path)]
        bad = next((line for line in lines if isinstance(line, Dropped)), None)
        yield bad or "".join(lines)


def read_chat(files):
    """JSON lines of {"messages": [{"role", "content"}, ...]}."""
    for path in files:
        for where, record in json_lines(path):
            if isinstance(record, Dropped):
                yield record
                continue
            messages = record.get("messages") if isinstance(record, dict) else None
            yield check_messages(messages, where)


def check_messages(messages, where):
    """The messages, if they can be trained on; a Dropped otherwise."""
    if not isinstance(messages, list) or not messages:
        return Dropped("no messages", f"{where}: no list under the key 'messages'")
    for m in messages:
        if not (isinstance(m, dict) and isinstance(m.get("content"), str)):
            return Dropped("no messages", f"{where}: a message without a string as content")
        if m.get("role") not in ROLES:
            return Dropped("unknown role", f"{where}: role {m.get('role')!r} is none of {ROLES}")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return Dropped("no answer", f"{where}: no assistant message with content")
    return messages


def is_wiki(path):
    return path.name.startswith("wiki_")


def is_text(path):
    return suffix(path) in (".txt", ".jsonl")


def is_chat(path):
    return suffix(path) == ".jsonl"


# source: (kind, reader, which files of a folder it takes, what to put there)
SOURCES = {
    "wiki": ("text", read_wiki, is_wiki, "the folders AA/, AB/, ... of wiki_zh_2019"),
    "text": ("text", read_text, is_text, ".txt files, or .jsonl with a key 'text'; also .gz, .xz"),
    "chat": ("chat", read_chat, is_chat, '.jsonl lines: {"messages": [{"role", "content"}]}'),
}

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")


def clean(text):
    """NFC, plain newlines, no control characters, no blanks at line ends, one empty line a gap."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = CONTROL.sub("", text)
    text = re.sub(r"[ \t\u3000]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def clean_document(doc):
    """A text or a list of messages, cleaned -> (the same kind, the string it is known by)."""
    if isinstance(doc, str):
        text = clean(doc)
        return text, text
    messages = [dict(role=m["role"], content=clean(m["content"])) for m in doc]
    return messages, "".join(f"{m['role']}\n{m['content']}\n" for m in messages)

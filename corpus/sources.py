"""Files to documents: the sources that prepare.py reads, and the readers of texts.

A reader read(name, stream) yields (place, document): a str, a WikiPage or a dialogue (a list of
messages {"role", "content"}), or a Dropped if it can't be read. place is "file" or "file:line".
"""
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import partial
from typing import Callable

from corpus.chats import read_chat
from corpus.files import (
    MAX_CHARS, Dropped, decoded, head_of, read_each, read_lines, suffix, text_parts, too_long,
    unreadable)
from corpus.records import DATASET_FILES, RECORDS, form_of, records
from corpus.wikitext import DISAMBIGUATION, REDIRECT, plain, tidy, unescape

TEXT_KEYS = ("text", "content", "completion", "body", "article", "paragraphs")
DUMP = re.compile(r"(?:<\?[^<>]*>\s*|<!(?:--.*?--|[^<>]*)>\s*)*<mediawiki\b", re.S)


# ---- texts ----

@dataclass
class WikiPage:
    """An article as it was read. The workers call .text(), which takes time."""
    title: str
    raw: str
    in_wikitext: bool  # else the output of an extractor

    def text(self):
        """Return the article as plain text below its title, "" if nothing is left of it."""
        text = (plain if self.in_wikitext else tidy)(self.raw).strip()
        return titled(self.title.strip(), text)


def titled(title, text):
    """Return the text below its title, unless its first line is the title; "" for a title alone."""
    first_line, _, rest = text.partition("\n")
    if title in ("", first_line.strip()):
        return text if not title or rest.strip() else ""
    return text and f"{title}\n\n{text}"


def record_text(record, field=""):
    """Return the text of a record, or a Dropped.

    field: the key of the text, which is a string or a list of lines; "" = the first of TEXT_KEYS
    that the record has. The title is put above lines, and above a string if no field is given.
    """
    if isinstance(record, (str, Dropped)):
        return record
    if isinstance(record, dict):
        for key in (field,) if field else TEXT_KEYS:
            text, title = record.get(key), record.get("title")
            in_lines = isinstance(text, list) and all(isinstance(line, str) for line in text)
            text = "\n".join(text) if in_lines else text
            if isinstance(text, str):
                title = title.strip() if isinstance(title, str) and (in_lines or not field) else ""
                if len(text) + len(title) > MAX_CHARS:
                    return too_long()
                return titled(title, text.lstrip()) if title else text
    keys = f"keys: {', '.join(record)[:80]}" if isinstance(record, dict) else "not an object"
    return Dropped(f"no {field or 'text'}", "no string under the key "
                   f"{field or ' or '.join(TEXT_KEYS)} ({keys}; set the key with --field)")


def read_text(name, stream, field="", lines=False, document_of=record_text):
    """Yield a document for each record of a file of records, whatever its name; for another file
    its whole text, or with lines a document for each line that is not blank."""
    if suffix(name) in RECORDS or form_of(name, head_of(stream)) != "text":
        for place, record in records(name, stream):
            yield place, document_of(record, field)
    elif lines:
        for number, line in enumerate(read_lines(decoded(stream)), 1):
            if line.strip():
                yield f"{name}:{number}", line
    else:
        without_markup = MARKUP.get(suffix(name), str)
        yield from ((name, without_markup(part)) for part in text_parts(stream))


# ---- markup ----

HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style|noscript|template|svg|select|iframe)\b"
                    r"[^<>]*(?<!/)>.*?(?:</\1\s*>|\Z)", re.S | re.I)
TAG = re.compile(r"""</?([a-z!?][^\s<>/]*)(?:[^<>"']|"[^"]*"|'[^']*')*+>""", re.I)
INLINE = frozenset("a abbr acronym b bdi bdo big cite code del dfn em font i img ins kbd label "
                   "mark q rp rt ruby s samp small span strike strong sub sup tt u var wbr".split())
# Time stamps, the numbers above them, and tags, of subtitles and of lyrics.
SUBTITLE = re.compile(r"\A\ufeff?WEBVTT.*\n(?:(?!.*-->).+\n)*"
                      r"|(?:^\s*\d+[ \t]*\n)?^.*\d\d:\d\d[,.]\d+[ \t]*-->.*\n?"
                      r"|<[^<>\n]*>|\{\\[^{}\n]*\}|^[ \t]*\n", re.M)
LYRICS = re.compile(r"^[ \t]*\[[a-z#]+:[^\]\n]*\][ \t]*\n?|[\[<]\d+:\d\d(?:[.:]\d+)?[\]>]",
                    re.M | re.I)


def html_text(markup):
    """Return the text of a page: without tags, scripts, styles; a newline where a block ends."""
    text = re.sub(r"\s+", " ", HIDDEN.sub("", markup))
    text = TAG.sub(lambda tag: "" if tag[1].lower() in INLINE else "\n", text)
    lines = map(str.strip, unescape(text).split("\n"))
    return "\n".join(line for line in lines if line)


MARKUP = dict.fromkeys((".html", ".htm", ".xhtml"), html_text)
MARKUP |= dict.fromkeys((".srt", ".vtt"), partial(SUBTITLE.sub, "")) | {
    ".lrc": partial(LYRICS.sub, "")}


# ---- wikis and news ----

def read_wiki(name, stream, field="", lines=False):
    """Yield the articles of a MediaWiki dump, or of an extractor's output: <doc> blocks or records.
    """
    head = head_of(stream)[:2000].lstrip()
    if DUMP.match(head):
        yield from dump_pages(name, stream)
    elif suffix(name) == ".xml":
        yield name, Dropped("not a dump", "no dump of a wiki: it does not begin with <mediawiki>")
    elif head.startswith("<doc "):
        yield from doc_blocks(name, decoded(stream))
    else:
        for place, doc in read_text(name, stream, field, lines):
            yield place, WikiPage("", doc, in_wikitext=False) if isinstance(doc, str) else doc


def dump_pages(name, stream):
    """Yield the articles of a pages-articles.xml dump; one page is in memory at a time."""
    page, parents = {}, []
    try:
        for event, element in ET.iterparse(stream, events=("start", "end")):
            if event == "start":
                parents.append(element)
                continue
            parents.pop()
            tag = element.tag.rpartition("}")[2]
            if tag in ("title", "ns", "text", "redirect"):
                page[tag] = element.text or ""
            elif tag == "page":
                title = page.get("title", "")
                yield f"{name}: page {title}", article(title, page)
                page = {}
            if len(parents) == 1:
                parents[0].clear()
    except (ET.ParseError, LookupError, ValueError) as e:  # unknown encodings
        yield name, unreadable(e)


def article(title, page):
    """Return the WikiPage of a page {element: its text}, or a Dropped if it is not an article."""
    text = page.get("text", "")
    if page.get("ns", "0").strip() != "0":
        return Dropped("other namespace")
    if "redirect" in page or REDIRECT.match(text):
        return Dropped("redirect")
    if DISAMBIGUATION.search(text):
        return Dropped("disambiguation")
    return WikiPage(title, text, in_wikitext=True) if len(text) <= MAX_CHARS else too_long()


def doc_blocks(name, text):
    """Yield the articles of WikiExtractor's <doc id= url= title=> ... </doc> blocks."""
    title, body, size, first_place = None, [], 0, ""
    for number, line in enumerate(read_lines(text), 1):
        if title is None:
            head = re.match(r"<doc\b[^>]*?title=\"([^\"]*)\"[^>]*>", line[:2000])
            if head:
                title, body, size, first_place = unescape(head[1]), [], 0, f"{name}:{number}"
            elif line.strip():
                yield f"{name}:{number}", Dropped("outside <doc>")
        elif line.strip() == "</doc>":
            yield first_place, (WikiPage(title, "".join(body), in_wikitext=False)
                                if size <= MAX_CHARS else too_long())
            title = None
        else:
            size += len(line)
            body += [line] if size <= MAX_CHARS else []
    if title is not None:
        yield first_place, Dropped("unreadable file", "this <doc> does not end")


def read_thucnews(name, stream, field="", lines=False):
    """Yield the whole text of a file, or if most of its lines have a tab the document of each line:
    category<TAB>text or title<TAB>class number. field and lines are ignored."""
    first = [line for line in head_of(stream).split("\n", 100)[:100] if line.strip()]
    if 2 * sum("\t" in line for line in first) <= len(first):
        yield from ((name, part) for part in text_parts(stream))
        return
    for number, line in enumerate(read_lines(decoded(stream)), 1):
        left, tab, right = line.strip().partition("\t")
        if tab:
            yield f"{name}:{number}", left if right.strip().isdigit() else right
        elif left:
            yield f"{name}:{number}", Dropped("no tab", "no tab between category and text")


# ---- the sources ----

def read_chinese_chat(name, stream, **options):
    """Yield what read_chat does, but a Dropped for a dialogue without a Chinese character."""
    for place, dialogue in read_chat(name, stream, **options):
        chinese = isinstance(dialogue, Dropped) or any(
            re.search("[\u4e00-\u9fff]", message["content"]) for message in dialogue)
        yield place, dialogue if chinese else Dropped("no Chinese")


@dataclass
class Source:
    """A kind of raw data that prepare.py knows by name."""
    kind: str           # "text" or "chat"
    read: Callable      # (name, stream, **options) -> (place, document) of each
    endings: tuple      # suffixes of its files; "wiki" = names like wiki_00
    what: str           # description of the files that belong in data/raw/<source>/
    hub: tuple = ()     # (ids, files) to download, as corpus.hub.download takes them

    def is_missing(self, folder):
        """Return whether folder is empty, or holds some of the hub's files only: a download that
        was interrupted."""
        names = {n for n in os.listdir(folder) if n[0] != "."} if folder.is_dir() else set()
        return not names or bool(self.hub) and names < set(map(os.path.basename, self.hub[1]))

    def wanted(self, name):
        """Return whether a file of this name in a folder is read."""
        wiki = "wiki" in self.endings and os.path.basename(name).startswith("wiki_")
        return wiki or suffix(name) in self.endings and os.path.basename(name) not in DATASET_FILES

    def documents(self, files, **options):
        """Yield (place, document) of the files. options: evidence for chats, field and
        lines for texts."""
        return read_each(files, self.wanted, partial(self.read, **options))


WIKI_HUB = (("pleisto/wikipedia-cn-20230720-filtered",
             "AI-ModelScope/wikipedia-cn-20230720-filtered"),
            ("wikipedia-cn-20230720-filtered.json",))
BELLE_HUB = (("BelleGroup/multiturn_chat_0.8M",), ("multiturn_chat_0.8M.json",))
BLOSSOM_HUB = (("Azure99/blossom-chat-v2",), ("blossom-chat-v2-30k.json",))
STORIES_HUB = (("RobinChen2001/TinyStories-Zh-2M",),
               [f"data/train-{i:05}-of-00003.parquet" for i in range(3)])
# Some of the 9,745 files of the best grade, whose numbers have gaps.
FINEWEB_HUB = (("opencsg/Fineweb-Edu-Chinese-V2.1",), [f"4_5/{i:06}.parquet" for i in (
    0, 1, 2, 4, 5, 10, 11, 12, 14, 18, 19, 21, 40, 45, 114)])
SOURCES = {
    "wiki": Source("text", read_wiki, (*RECORDS, ".xml", "wiki"), "wiki_zh_2019 (AA/, AB/, ...), a "
                   "dump (zhwiki-*-pages-articles.xml.bz2) or WikiExtractor's output", WIKI_HUB),
    "thucnews": Source("text", read_thucnews, (".txt", ".tsv"),
                       "THUCNews' category folders, or files of category<TAB>text lines"),
    "text": Source("text", read_text, (".txt", ".md", *MARKUP, *RECORDS),
                   ".txt files, or .jsonl .json .csv .parquet .arrow with a text in each record"),
    "tinystories": Source("text", read_text, RECORDS, "the parquet files of TinyStories-Zh-2M",
                          STORIES_HUB),
    "fineweb": Source("text", read_text, RECORDS, "parquet files of Fineweb-Edu-Chinese-V2.1",
                      FINEWEB_HUB),
    "chat": Source("chat", read_chat, RECORDS, "dialogues or questions and answers in .jsonl .json "
                   ".csv .parquet .arrow, the format detected"),
    "belle": Source("chat", read_chat, RECORDS, "Belle's multiturn_chat_0.8M.json, "
                    "train_0.5M_CN.json or train_3.5M_CN.json", BELLE_HUB),
    "blossom": Source("chat", read_chinese_chat, RECORDS, "blossom-chat-v2-30k.json", BLOSSOM_HUB),
    "webqa": Source("chat", read_chat, RECORDS, "WebQA's me_train.json and me_validation.ann.json"),
    "dureader": Source("chat", read_chat, RECORDS, "DuReader's search.train.json and "
                       "zhidao.train.json, or train.csv with question and answer columns"),
    "alpaca": Source("chat", read_chat, RECORDS, "instruction, input, output in .json or .jsonl"),
    "sharegpt": Source("chat", read_chat, RECORDS, "conversations of human and gpt, or firefly's"),
}

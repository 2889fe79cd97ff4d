"""Records to documents: the forms in which Chinese text and dialogues are published.

A reader takes a list of files and yields, for each document it meets, a str, a WikiPage, a list of
messages {"role", "content"} (a dialogue), or a Dropped that says why there is none. Nothing is
passed over in silence.
"""
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import partial
from typing import Callable

from data.files import LONGEST, Dropped, decoded, head_of, lines, read_each, suffix, text_parts
from data.records import OF_DATASETS, RECORDS, records
from data.wikitext import DISAMBIGUATION, REDIRECT, plain, tidy, unescape

TEXT_KEYS = ("text", "content", "completion", "body", "article")
TURN_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog")
ROLES = {"system": "system", "user": "user", "human": "user", "client": "user", "assistant":
         "assistant", "gpt": "assistant", "counselor": "assistant", "bot": "assistant"}
QUESTION_KEYS = ("question", "prompt", "query", "ask", "input", "问题", "title")
ANSWER_KEYS = ("answer", "output", "response", "target", "答案", "回答")
NO_ANSWER = ("", "no_answer")


# ---- text ----

@dataclass
class WikiPage:
    """An article as it was found; .text() is made where there are processors to spare."""
    title: str
    raw: str
    in_wikitext: bool  # else an extractor went over it

    def text(self):
        text = (plain if self.in_wikitext else tidy)(self.raw).strip()
        return titled(self.title.strip(), text) if text else ""


def titled(title, text):
    """The text, led by a line with its title if it is not already."""
    first_line = text.partition("\n")[0].strip()
    return text if title in ("", first_line) else f"{title}\n\n{text}"


def text_of(record, where, field=""):
    """The text in a record, behind its title if it has one; field names another key."""
    if isinstance(record, (str, Dropped)):
        return record
    if isinstance(record, dict):
        for key in (field,) if field else TEXT_KEYS:
            if isinstance(text := record.get(key), str):
                title = record.get("title")
                title = title.strip() if isinstance(title, str) and not field else ""
                if len(text) + len(title) > LONGEST:
                    return Dropped("too long", f"{where}: over {LONGEST:,} characters")
                return titled(title, text.lstrip()) if title else text
    wanted = field or " or ".join(TEXT_KEYS)
    keys = ", ".join(map(str, record))[:80] if isinstance(record, dict) else ""
    return Dropped(f"no {field or 'text'}", f"{where}: no string under the key {wanted} "
                   f"(there is: {keys or 'no object'}; --field= names the key)")


def read_text(name, stream, field=""):
    """.jsonl .json .csv .parquet .arrow: a document a record; .txt and others: one a file."""
    if suffix(name) not in RECORDS and head_of(stream).lstrip()[:1] not in ("{", "["):
        yield from text_parts(stream)
    else:
        for where, record in records(name, stream):
            yield text_of(record, where, field)


def read_wiki(name, stream, field=""):
    """A MediaWiki dump, or what extractors make of one: <doc> blocks, or records with a text."""
    head = head_of(stream)[:2000].lstrip()
    if "<mediawiki" in head:
        yield from dump_pages(name, stream)
    elif head.startswith("<doc "):
        yield from doc_blocks(name, decoded(stream))
    else:
        for doc in read_text(name, stream, field):
            yield doc if isinstance(doc, Dropped) else WikiPage("", doc, in_wikitext=False)


def dump_pages(name, stream):
    """Articles of a pages-articles.xml dump, one in memory at a time."""
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
                yield article(page.get("title", ""), page, name)
                page = {}
            if len(parents) == 1:
                parents[0].clear()
    except (ET.ParseError, UnicodeError, ValueError) as e:
        yield Dropped("unreadable file", f"{name}: can't be read on ({e})")


def article(title, page, name):
    """One page's dict of elements -> WikiPage, or Dropped where it is no article."""
    where, text = f"{name}: page {title}", page.get("text", "")
    if page.get("ns", "0").strip() != "0":
        return Dropped("other namespace", "")
    if "redirect" in page or REDIRECT.match(text):
        return Dropped("redirect", "")
    if DISAMBIGUATION.search(text):
        return Dropped("disambiguation", "")
    if len(text) > LONGEST:
        return Dropped("too long", f"{where}: over {LONGEST:,} characters")
    return WikiPage(title, text, in_wikitext=True)


def doc_blocks(name, text):
    """WikiExtractor's <doc id= url= title=> ... </doc>."""
    title, body, size, began = None, [], 0, ""
    for number, line in enumerate(lines(text), 1):
        if title is None:
            head = re.match(r"<doc\b[^>]*?title=\"([^\"]*)\"[^>]*>", line[:2000])
            if head:
                title, body, size, began = unescape(head[1]), [], 0, f"{name}:{number}"
            elif line.strip():
                yield Dropped("outside <doc>", f"{name}:{number}: outside of a <doc>")
        elif line.strip() == "</doc>":
            yield (WikiPage(title, "".join(body), in_wikitext=False) if size <= LONGEST else
                   Dropped("too long", f"{began}: over {LONGEST:,} characters"))
            title = None
        else:
            size += len(line)
            body += [line] if size <= LONGEST else []
    if title is not None:
        yield Dropped("unreadable file", f"{began}: this <doc> does not end")


def read_thucnews(name, stream, field=""):
    """A document a file, or a line: category<TAB>text, or title<TAB>number of a class. There are no
    fields to choose from."""
    if "\t" not in head_of(stream).partition("\n")[0]:
        yield from text_parts(stream)
        return
    for number, line in enumerate(lines(decoded(stream)), 1):
        left, tab, right = line.strip().partition("\t")
        if tab:
            yield left if right.strip().isdigit() else right
        elif left:
            yield Dropped("no tab", f"{name}:{number}: no tab between category and text")


# ---- dialogues ----

def read_chat(name, stream, evidence=False):
    """Dialogues of every form that dialogues() knows; a file that is one list of turns is one."""
    turns, began = [], ""
    for where, record in records(name, stream):
        if (turn(record) or {}).get("role") in ROLES:
            turns.append(turn(record))
            began = began or where
        elif isinstance(record, Dropped):
            yield record
        else:
            yield from dialogues(record, where, evidence)
    if turns:
        yield check_messages(turns, began)


def dialogues(record, where, evidence):
    """The dialogues in one record, told by its keys; a Dropped for each that can't be trained on.

    evidence: questions about a text get that text in front.
    """
    if isinstance(record, list):
        record = dict(messages=record)
    if not isinstance(record, dict):
        yield Dropped("no messages", f"{where}: neither an object nor a list of messages")
    elif key := next((k for k in TURN_KEYS if k in record), None):
        yield from_turns(record[key], record.get("system"), where)
    elif "paragraphs" in record or "data" in record or "qas" in record:
        yield from from_squad(record, where, evidence)
    elif "evidences" in record or "passages" in record:
        yield from from_webqa(record, where, evidence)
    elif "documents" in record or "answers" in record:
        yield from_dureader(record, where, evidence)
    elif "instruction" in record:
        yield from from_instruction(record, where)
    elif any(k in record for k in QUESTION_KEYS + ANSWER_KEYS):
        question = first_text(record, QUESTION_KEYS)
        yield from_pair(record, question, first_text(record, ANSWER_KEYS), where)
    elif record and all(isinstance(value, dict) for value in record.values()):
        for key, value in record.items():  # WebQA's id -> question
            yield from dialogues(value, f"{where}: {key}", evidence)
    else:
        yield Dropped("no messages", f"{where}: none of the known keys (messages, conversations, "
                      "instruction, question ...)")


def turn(item):
    """{"role", "content"} of {"role" or "from", "content" or "value"}; None if it is no turn."""
    if not isinstance(item, dict):
        return None
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    return dict(role=role, content=content) if isinstance(role, str) and isinstance(
        content, str) else None


def from_turns(items, system, where):
    """A list of turns, or of firefly's {"human", "assistant"}."""
    if isinstance(items, list) and items and all(
            isinstance(i, dict) and {"human", "assistant"} <= i.keys() for i in items):
        items = [dict(role=role, content=i[role]) for i in items for role in ("human", "assistant")]
    if not isinstance(items, list) or not items:
        return Dropped("no messages", f"{where}: no list of messages")
    messages = list(map(turn, items))
    if (messages[0] or {}).get("role") != "system":
        messages = [*system_message(system), *messages]
    return check_messages(messages, where)


def system_message(system):
    given = isinstance(system, str) and system.strip()
    return [dict(role="system", content=system)] if given else []


def from_pair(record, question, answer, where):
    """A question and its answer, behind the record's system message and history of such pairs."""
    history = record.get("history") if isinstance(record.get("history"), list) else []
    before = [turn(dict(role=role, content=content)) for two in history
              if isinstance(two, list) and len(two) == 2
              for role, content in zip(("user", "assistant"), two)]
    now = pair(question, answer, where)
    return now if isinstance(now, Dropped) else check_messages(
        [*system_message(record.get("system")), *before, *now], where)


def from_instruction(record, where):
    """Alpaca's instruction, input, output; Belle's dialogue inside of instruction; seed tasks."""
    instruction = record["instruction"] if isinstance(record["instruction"], str) else ""
    if isinstance(record.get("instances"), list):
        for one in record["instances"]:
            one = one if isinstance(one, dict) else {}
            yield pair(with_input(instruction, one), one.get("output"), where)
        return
    parts = re.split(r"(?:^|\n)(Human|Assistant)[:：]", instruction.strip())
    if len(parts) > 2 and parts[-2] == "Assistant" and not parts[0].strip() + parts[-1].strip():
        messages = [dict(role="user" if who == "Human" else "assistant", content=content)
                    for who, content in zip(parts[1:-2:2], parts[2:-2:2])]
        last = turn(dict(role="assistant", content=record.get("output")))
        yield check_messages([*system_message(record.get("system")), *messages, last], where)
        return
    yield from_pair(record, with_input(instruction, record), record.get("output"), where)


def with_input(instruction, record):
    more = record.get("input")
    return f"{instruction}\n{more}" if isinstance(more, str) and more.strip() else instruction


def from_squad(record, where, evidence):
    """data -> paragraphs -> context, qas -> question, answers (SQuAD, CMRC 2018, DuReader)."""
    if not isinstance(record.get("qas"), list):
        below = record.get("paragraphs", record.get("data"))
        if not isinstance(below, list):
            yield Dropped("no messages", f"{where}: no list of paragraphs or questions")
            return
        for part in below:
            if isinstance(part, dict) and {"paragraphs", "data", "qas"} & part.keys():
                yield from from_squad(part, where, evidence)
            else:
                yield Dropped("no messages", f"{where}: a paragraph without questions")
        return
    for qa in record["qas"]:
        qa = qa if isinstance(qa, dict) else {}
        answers = qa.get("answers") if isinstance(qa.get("answers"), list) else []
        texts = [a.get("text") if isinstance(a, dict) else a for a in answers]
        yield answered(qa.get("question"), texts, record.get("context") if evidence else "",
                       f"{where}: {qa.get('id', '')}")


def from_webqa(record, where, evidence):
    """WebQA: a question and texts that answer it, or do not. Without evidence one dialogue a
    question, with it one for each text."""
    texts = record.get("evidences", record.get("passages"))
    texts = list(texts.values()) if isinstance(texts, dict) else texts
    texts = [t for t in texts if isinstance(t, dict)] if isinstance(texts, list) else []
    found = [(t.get("answer") if isinstance(t.get("answer"), list) else [t.get("answer")],
              t.get("evidence", t.get("passage"))) for t in texts]
    if not evidence or not found:
        found = [([a for answers, _ in found for a in answers], "")]
    for answers, text in found:
        yield answered(record.get("question"), answers, text, where)


def from_dureader(record, where, evidence):
    """DuReader: a question, answers written by people, and documents from the web."""
    answers, context = record.get("answers"), ""
    if evidence:
        for doc in record.get("documents") if isinstance(record.get("documents"), list) else []:
            paragraphs = doc.get("paragraphs") if isinstance(doc, dict) else None
            if isinstance(paragraphs, list) and doc.get("is_selected"):
                best = doc.get("most_related_para", 0)
                best = paragraphs[best:best + 1] if isinstance(best, int) else []
                context = "".join(p for p in best if isinstance(p, str))
                break
    answers = answers if isinstance(answers, list) else []
    return answered(record.get("question"), answers, context, where)


def answered(question, answers, context, where):
    """A question with the first of its answers that is one, the context in front."""
    answer = next((a for a in answers if isinstance(a, str) and a.strip() not in NO_ANSWER), None)
    if answer is None:
        return Dropped("unanswerable", "")
    in_front = f"{context.strip()}\n\n" if isinstance(context, str) and context.strip() else ""
    return pair(in_front + question if isinstance(question, str) else None, answer, where)


def first_text(record, keys):
    found = (record[k] for k in keys if isinstance(record.get(k), str) and record[k].strip())
    return next(found, "")


def pair(question, answer, where):
    """The dialogue of one question and its answer."""
    return check_messages([turn(dict(role="user", content=question)),
                           turn(dict(role="assistant", content=answer))], where)


def check_messages(messages, where):
    """The messages under the roles of ChatML; a Dropped where they can't be trained on."""
    if not all(messages):
        return Dropped("no messages", f"{where}: a message without a role or a string as content")
    for m in messages:
        if m["role"] not in ROLES:
            return Dropped("unknown role", f"{where}: role {m['role']!r} is none of {list(ROLES)}")
        m["role"] = ROLES[m["role"]]
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return Dropped("no answer", f"{where}: no assistant message with content")
    if sum(len(m["content"]) for m in messages) > LONGEST:
        return Dropped("too long", f"{where}: over {LONGEST:,} characters")
    return messages


# ---- the sources ----

@dataclass
class Source:
    kind: str           # text or chat
    read: Callable      # (name, stream) -> documents
    endings: tuple      # of the files it takes from a folder
    what: str           # to put into data/raw/<source>/
    hub: tuple = ()     # (dataset, file) that is fetched where there is nothing

    def wanted(self, name):
        wiki = "wiki" in self.endings and os.path.basename(name).startswith("wiki_")
        return wiki or suffix(name) in self.endings and os.path.basename(name) not in OF_DATASETS

    def documents(self, files, **options):
        return read_each(files, self.wanted, partial(self.read, **options))


SOURCES = {
    "wiki": Source("text", read_wiki, (*RECORDS, ".xml", "wiki"),
                   "wiki_zh_2019 (AA/, AB/, ...), a dump (zhwiki-*-pages-articles.xml.bz2) or what "
                   "WikiExtractor made of one",
                   ("pleisto/wikipedia-cn-20230720-filtered",
                    "wikipedia-cn-20230720-filtered.json")),
    "thucnews": Source("text", read_thucnews, (".txt", ".tsv"),
                       "THUCNews' category folders, or files of category<TAB>text lines"),
    "text": Source("text", read_text, (".txt", *RECORDS),
                   ".txt files, or .jsonl .json .csv .parquet .arrow with a text in each record"),
    "chat": Source("chat", read_chat, RECORDS, "dialogues or questions and answers in .jsonl .json "
                   ".csv .parquet .arrow; the form is told by the content"),
    "belle": Source("chat", read_chat, RECORDS, "Belle's multiturn_chat_0.8M.json, "
                    "train_0.5M_CN.json or train_3.5M_CN.json",
                    ("BelleGroup/multiturn_chat_0.8M", "multiturn_chat_0.8M.json")),
    "webqa": Source("chat", read_chat, RECORDS, "WebQA's me_train.json and me_validation.ann.json"),
    "dureader": Source("chat", read_chat, RECORDS, "DuReader's search.train.json and "
                       "zhidao.train.json, or train.csv with question and answer columns"),
    "alpaca": Source("chat", read_chat, RECORDS, "instruction, input, output in .json or .jsonl"),
    "sharegpt": Source("chat", read_chat, RECORDS, "conversations of human and gpt, or firefly's"),
}

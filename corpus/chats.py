"""Records to dialogues: the formats in which chats and question-answer pairs are published.

A dialogue is a list of messages {"role", "content"}. A record without a usable one gives a Dropped.
"""
import re

from corpus.files import MAX_CHARS, Dropped, too_long
from corpus.records import records

MESSAGE_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog")
ROLES = {"system": "system", "user": "user", "human": "user", "client": "user", "assistant":
         "assistant", "gpt": "assistant", "counselor": "assistant", "bot": "assistant"}
QUESTION_KEYS = ("question", "prompt", "query", "ask", "input", "问题", "title")
ANSWER_KEYS = ("answer", "output", "response", "target", "答案", "回答")
NO_ANSWER = ("", "no_answer")


def read_chat(name, stream, evidence=False):
    """Yield (place, dialogue) of a file in any format that dialogues() knows.

    Records that are single messages form one dialogue: the whole file.
    """
    messages, first_place = [], ""
    for place, record in records(name, stream):
        message = to_message(record)
        if message and message["role"] in ROLES:
            messages.append(message)
            first_place = first_place or place
        elif isinstance(record, Dropped):
            yield place, record
        else:
            yield from ((place, dialogue) for dialogue in dialogues(record, evidence))
    if messages:
        yield first_place, check_messages(messages)


def dialogues(record, evidence):
    """Yield the dialogues in a record, a Dropped for each that can't be trained on. The keys of the
    record tell its format.

    evidence: put the text that a question is about in front of the question.
    """
    if isinstance(record, list):
        record = dict(messages=record)
    if not isinstance(record, dict):
        yield Dropped("no messages", "neither an object nor a list of messages")
    elif key := next((k for k in MESSAGE_KEYS if k in record), None):
        yield from_messages(record, key)
    elif "paragraphs" in record or "data" in record or "qas" in record:
        yield from from_squad(record, evidence)
    elif "evidences" in record or "passages" in record:
        yield from from_webqa(record, evidence)
    elif "documents" in record or "answers" in record:
        yield from_dureader(record, evidence)
    elif "instruction" in record:
        yield from from_instruction(record)
    elif any(k in record for k in QUESTION_KEYS + ANSWER_KEYS):
        question = first_text(record, QUESTION_KEYS)
        yield from_question(record, question, first_text(record, ANSWER_KEYS))
    elif record and all(isinstance(value, dict) for value in record.values()):
        for value in record.values():  # WebQA: {id: question}
            yield from dialogues(value, evidence)
    else:
        yield Dropped("no messages", "none of the known keys (messages, conversations, "
                      "instruction, question ...)")


def as_list(value):
    return value if isinstance(value, list) else []


def as_dict(value):
    return value if isinstance(value, dict) else {}


def first_text(record, keys):
    """Return the first string among the values of keys that is not blank, or ""."""
    found = (record[k] for k in keys if isinstance(record.get(k), str) and record[k].strip())
    return next(found, "")


# ---- messages ----

def to_message(item):
    """Return {"role", "content"} of an object with these keys or with "from" and "value"; None if
    it has no such strings."""
    item = as_dict(item)
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    both = isinstance(role, str) and isinstance(content, str)
    return dict(role=role, content=content) if both else None


def check_messages(messages):
    """Return the messages with ChatML's roles, or a Dropped if they can't be trained on.

    messages: as to_message returns them, None included.
    """
    if not all(messages):
        return Dropped("no messages", "a message without a role or a string as content")
    for m in messages:
        if m["role"] not in ROLES:
            return Dropped("unknown role", f"role {m['role']!r} is none of {list(ROLES)}")
        m["role"] = ROLES[m["role"]]
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return Dropped("no answer", "no assistant message with content")
    if sum(len(m["content"]) for m in messages) > MAX_CHARS:
        return too_long()
    return messages


def question_and_answer(question, answer):
    """Return the two messages; None for one that is not a string."""
    return [to_message(dict(role="user", content=question)),
            to_message(dict(role="assistant", content=answer))]


def system_message(record):
    """Return a list of the record's system message, empty if there is none."""
    system = first_text(record, ["system"])
    return [dict(role="system", content=system)] if system else []


# ---- formats ----

def from_messages(record, key):
    """Return the dialogue of a list of messages, or of firefly's {"human", "assistant"} pairs."""
    items = as_list(record[key])
    if not items:
        return Dropped("no messages", "no list of messages")
    if all({"human", "assistant"} <= as_dict(i).keys() for i in items):
        items = [dict(role=role, content=i[role]) for i in items for role in ("human", "assistant")]
    messages = [to_message(item) for item in items]
    if (messages[0] or {}).get("role") != "system":
        messages = [*system_message(record), *messages]
    return check_messages(messages)


def from_question(record, question, answer):
    """Return the dialogue of the record's system message, its history of question-answer pairs,
    question and answer. A Dropped if this last pair alone can't be trained on."""
    history = [m for two in as_list(record.get("history")) if len(as_list(two)) == 2
               for m in question_and_answer(*two)]
    last = check_messages(question_and_answer(question, answer))
    return last if isinstance(last, Dropped) else check_messages(
        [*system_message(record), *history, *last])


def from_instruction(record):
    """Yield the dialogues of a record with an instruction: Alpaca's (instruction, input, output),
    Belle's (a dialogue within the instruction), a seed task (several instances)."""
    instruction = record["instruction"] if isinstance(record["instruction"], str) else ""
    if isinstance(record.get("instances"), list):
        for one in map(as_dict, record["instances"]):
            messages = question_and_answer(with_input(instruction, one), one.get("output"))
            yield check_messages(messages)
        return
    parts = re.split(r"(?:^|\n)(Human|Assistant)[:：]", instruction.strip())
    if len(parts) > 2 and parts[-2] == "Assistant" and not parts[0].strip() + parts[-1].strip():
        messages = [dict(role="user" if who == "Human" else "assistant", content=content)
                    for who, content in zip(parts[1:-2:2], parts[2:-2:2])]
        last = to_message(dict(role="assistant", content=record.get("output")))
        yield check_messages([*system_message(record), *messages, last])
    else:
        yield from_question(record, with_input(instruction, record), record.get("output"))


def with_input(instruction, record):
    more = first_text(record, ["input"])
    return f"{instruction}\n{more}" if more else instruction


def from_squad(record, evidence):
    """Yield the dialogues of data -> paragraphs -> (context, qas -> (question, answers)), nested
    like this (SQuAD, CMRC 2018, DuReader)."""
    if not isinstance(record.get("qas"), list):
        below = record.get("paragraphs", record.get("data"))
        if not isinstance(below, list):
            yield Dropped("no messages", "no list of paragraphs or questions")
            return
        for part in below:
            if {"paragraphs", "data", "qas"} & as_dict(part).keys():
                yield from from_squad(part, evidence)
            else:
                yield Dropped("no messages", "a paragraph without questions")
        return
    for qa in map(as_dict, record["qas"]):
        texts = [a.get("text") if isinstance(a, dict) else a for a in as_list(qa.get("answers"))]
        context = record.get("context") if evidence else ""
        yield with_first_answer(qa.get("question"), texts, context)


def from_webqa(record, evidence):
    """Yield the dialogues of a WebQA question with several texts, of which some answer it: one for
    each text with evidence, else one in all."""
    texts = record.get("evidences", record.get("passages"))
    texts = as_list(list(texts.values()) if isinstance(texts, dict) else texts)
    found = [(t["answer"] if isinstance(t.get("answer"), list) else [t.get("answer")],
              t.get("evidence", t.get("passage"))) for t in texts if isinstance(t, dict)]
    if not evidence or not found:
        found = [([a for answers, _ in found for a in answers], "")]
    for answers, text in found:
        yield with_first_answer(record.get("question"), answers, text)


def from_dureader(record, evidence):
    """Return the dialogue of a DuReader question: answers by people, documents from the web."""
    documents = map(as_dict, as_list(record.get("documents")) if evidence else [])
    doc = next((d for d in documents if d.get("is_selected")
                and isinstance(d.get("paragraphs"), list)), dict(paragraphs=[]))
    best = doc.get("most_related_para", 0)
    best = doc["paragraphs"][best:best + 1] if isinstance(best, int) else []
    context = "".join(p for p in best if isinstance(p, str))
    return with_first_answer(record.get("question"), as_list(record.get("answers")), context)


def with_first_answer(question, answers, context):
    """Return the dialogue of a question, its context in front, and the first usable answer."""
    answer = next((a for a in answers if isinstance(a, str) and a.strip() not in NO_ANSWER), None)
    if answer is None:
        return Dropped("unanswerable")
    if isinstance(question, str) and isinstance(context, str) and context.strip():
        question = f"{context.strip()}\n\n{question}"
    return check_messages(question_and_answer(question, answer))

"""Records to dialogues: every format in which chats, questions and answers are published.

    for place, dialogue in read_chat(name, stream): ...  # a list of messages {"role", "content"}

A few rules read all formats: the names of roles and of keys (ROLES, KEYS), and messages(), which
walks through a value of any form. What can't be trained on is yielded as a Dropped in its place.
"""
import ast
import json
import re
from contextlib import suppress
from functools import lru_cache

from corpus.files import MAX_CHARS, Dropped
from corpus.records import records

# ---- names, as normal() writes them ----

ROLES = {  # of speakers; "thought", "call": what the assistant thinks, its call of a tool
    "system": "system developer 系统", "thought": "inner_thoughts",
    "user": "user human client patient usr question 用户 人类 客户 患者 病人 来访者 提问 问题 问",
    "assistant": "assistant gpt chatgpt bing bard claude gemini deepseek qwen model ai bot moss "
                 "sys agent counselor doctor answer 助手 助理 机器人 客服 医生 咨询师 模型 回答 答",
    "tool": "tool function observation tool_response function_response results ipython 工具",
    "call": "function_call tool_call tool_calls commands"}
KEYS = {  # of a record; of several names of a part the first that has a value counts
    "role": "role from speaker sender 角色", "history": "history 历史", "title": "title 标题",
    "content": "content value text utterance message answer_text plain_text 内容",
    "messages": "messages conversations conversation dialogue dialog chat turns 对话",
    "system": "system system_prompt meta_instruction prefix", "documents": "documents",
    "instruction": "instruction_zh instruction 指令", "context": "context evidence passage",
    "question": "question questions prompt query ask q 问题 提问 问 src human user patient 用户 患者",
    "more": "input_zh input desc description 输入 描述", "calls": "tool_calls function_call",
    "answer": "output_zh output response answer answers target completion a 答案 回答 回复 答 输出 tgt "
              "summary assistant bot gpt moss doctor chatgpt_answers human_answers 助手 医生",
    "thought": "reasoning_content reasoning thinking thought think cot complex_cot",
    "chosen": "chosen pos_resp response_chosen chosen_response accepted preferred_output",
    "rejected": "rejected neg_resp response_rejected rejected_response non_preferred_output",
    "inside": "data paragraphs qas instances items train valid validation dev test",
    "images": "images image videos video audios audio", "passages": "evidences passages"}
ASKS = {"instruction", "question", "more"}
UNTRAINED = dict.fromkeys(("label", "kto_tag", "chosen"), ("false",)) | dict.fromkeys(
    ("loss", "train", "weight"), ("false", "0", "0.0"))  # values that forbid to train on an answer
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}
PARTS = {name: [part for part in KEYS if name in KEYS[part].split()]
         for names in KEYS.values() for name in names.split()}
RANK = {name: i for i, name in enumerate(PARTS)}
# "\nHuman: ", "### Human: ", "[|Human|]", "<|Human|>: ", "<human>: ", "<|im_start|>user\n"
NAMES = "|".join(sorted(ROLE_OF, key=len, reverse=True)).replace("_", "[ _]")
SPEAKER = re.compile(rf"(?:(?:^|\n)[ \t]*|###? ?)({NAMES})[ \t]*[:：]"
                     rf"|(?:<\|im_start\|>|[<\[]\|?)({NAMES})(?:\|?[>\]] ?[:：]?|\n)", re.I)
ENDS = re.compile(r"</?s>|<\|im_end\|>|<\|endoftext\|>|<eo[a-z]>")


# ---- files and records to dialogues ----

def read_chat(name, stream, evidence=False, chosen=False):
    """Yield (place, dialogue) of a file in any format that dialogues() knows.

    Records that are single messages form one dialogue: the whole file.
    """
    found = []
    for place, record in records(name, stream):
        if fields(record).get("role") in ROLES and "parent_id" not in record:  # that is a tree
            found.append((place, record))
        elif isinstance(record, Dropped):
            yield place, record
        else:
            yield from ((place, one) for one in dialogues(record, evidence, chosen))
    if found:
        yield found[0][0], dialogue([record for _, record in found])


def dialogues(record, evidence=False, chosen=False):
    """Yield the dialogues in a record, a Dropped for each that can't be trained on; at least one.

    evidence: put the text that a question is about in front of the question.
    chosen: of a chosen and a rejected answer take the chosen one.
    """
    try:
        yield from (dialogue(item, chosen) for item in items(record, evidence))
    except (RecursionError, ValueError):  # ValueError: an integer of too many digits
        yield Dropped("no messages", "nested too deeply, or a number is too long")


def items(record, evidence, outer={}):
    """Yield for each dialogue in a record its fields, or the list of its messages. A record is one
    dialogue or holds several: a list, {"train": [...]}, SQuAD's data, WebQA's {id: question}.

    outer: the fields around it that belong to it, and as "key" where it stands in the record.
    """
    record, inside = parsed(record), []
    item = outer | fields(record)
    if isinstance(record, list):
        one = all(isinstance(v, str) or "role" in fields(parsed(v)) for v in record)
        inside = [] if one else list(enumerate(record, 1))
    elif isinstance(record, dict) and not item.keys() & {"messages", "answer", "chosen"}:
        ids = all(isinstance(v, dict) for v in record.values())
        inside = [(k, v) for k, v in record.items()
                  if ids or "inside" in PARTS.get(normal(k), ()) and rows(v)]
    for key, value in inside:
        shared = {k: item[k] for k in ("instruction", "system", "context") if k in item}
        yield from items(value, evidence, shared | dict(key=f"{item.get('key', '')}{key}: "))
    if not inside:
        yield from with_evidence(item, evidence) if isinstance(record, dict) else [record]


def with_evidence(item, evidence):
    """Yield the fields of a question; with evidence the text that it is about stands in front of
    it, and each passage of WebQA gives one. (The context of an instruction is always read.)"""
    passages = [fields(p) for p in rows(item.get("passages")) if "answer" not in item]
    if passages and not evidence:
        passages = [dict(answer=[p.get("answer") for p in passages])]
    for one in (dict(question="") | p | item for p in passages) if passages else [item]:
        context = (text(one.get("context"), first=True) or best_paragraph(one)) if evidence else ""
        if context and one.get("question") and "instruction" not in one:
            one |= dict(question=f"{context.strip()}\n\n{text(one['question'], first=True)}")
        yield one


def best_paragraph(item):
    """Return the best paragraph of the selected document of a DuReader question, if it has one."""
    with suppress(KeyError, IndexError, TypeError, AttributeError, StopIteration):
        document = next(d for d in item["documents"] if d.get("is_selected"))
        return text(document["paragraphs"][document.get("most_related_para", 0)])


def dialogue(item, chosen=False):
    """Return the dialogue of fields or of a list of messages; a Dropped if it can't be trained on.
    An answer that is marked as untrained becomes empty: cleaning ends the dialogue before it."""
    record = item if isinstance(item, dict) else {}
    found = from_fields(record) if record else messages(item)
    pair = found[-2:] if record and "messages" not in record else []  # its only question and answer
    answers = [m for m in found if m["role"] in ("assistant", "untrained")]
    unknown = {m["role"] for m in found} - {"system", "user", "assistant", "tool", "untrained"}
    reason = (
        "preference pair (see --chosen)" if "rejected" in record and not chosen else
        "marked as untrained" if "untrained" in [*record, *(m["role"] for m in answers[:1])] else
        "image or sound" if "images" in record or any("<image>" in m["content"] for m in found) else
        "unknown role" if unknown else
        "no question or no answer" if any(blank(m["content"]) for m in pair) else
        "no answer" if all(blank(m["content"]) for m in answers) else
        "too long" if sum(len(m["content"]) for m in found) > MAX_CHARS else "")
    if reason:
        names = ", ".join(sorted(unknown) or record.get("names", ()))[:200] or "none"
        where = record.get("key", "") + reason
        return Dropped(reason, f"{where}; {'roles' if unknown else 'keys'}: {names}")
    return [dict(role="assistant", content="") if m["role"] == "untrained" else m for m in found]


# ---- values of any form to messages ----

def messages(value, turn=0):
    """Return the messages in a value: a message, an object with a question and an answer, a text
    that names its speakers, or a list of these. In a list strings alternate between the user and
    the assistant; turn=1: the assistant is first."""
    value = parsed(value)
    if not rows(value):
        return from_fields(fields(value)) if isinstance(value, dict) else spoken(value)
    found = []
    for i, one in enumerate(rows(value), turn):
        item = fields(parsed(one))
        one = item.get("content", one) if item.keys() <= {"names", "content"} else one
        if isinstance(one, str) and not (item.keys() - {"names", "content"} or SPEAKER.match(one)):
            found.append(dict(role=("user", "assistant")[i % 2], content=one))
        elif one is not None:
            found += messages(one)
    return found


def spoken(value):
    """Return the messages of a text that names its speakers ("Human: ..."), [] of another value.
    What stands before the first is the system message. Other names than the first and, of the other
    roles, the last are part of the text: a message may quote a dialogue."""
    value = ENDS.sub("", value) if isinstance(value, str) else ""
    marks = [(ROLE_OF[normal(m[m.lastindex])], (m.lastindex, m[m.lastindex]), m.span())
             for m in SPEAKER.finditer(value)]
    names = {role: name for role, name, _ in [*marks, *marks[:1]]}
    marks = [(role, *span) for role, name, span in marks if name == names[role]]
    head, thought = value[:marks[0][1]].strip() if marks else "", ""
    found = [dict(role="system", content=head)] if head else []
    for (role, _, begin), (_, end, _) in zip(marks, [*marks[1:], ("", None, 0)]):
        content = value[begin:end].strip()
        if role == "thought":
            thought = "" if content == "None" else content
        elif content != "None":  # MOSS: no tool
            found.append(message(dict(role=role, content=content, thought=thought)))
            thought = ""
    return found[:-1] if found[-1:] == [dict(role="user", content="")] else found


def whole(value):
    """Return the messages of a question or an answer that is itself made of messages, else []."""
    first = (rows(value) or [parsed(value)])[0]
    return messages(value) if fields(first).keys() & {"role", "messages"} else []


def from_fields(item):
    """Return the messages of an object: one message, or a system message and a dialogue. A question
    or an answer that is missing is ""."""
    if "role" in item:
        return [message(item)]
    said = item.get("content", item.get("context"))
    if item.keys() & ASKS:
        item = dict(answer=item.get("content")) | item
    elif not {"title", "question"} & {*item, *item.get("names", ())}:  # a title: of an article
        item = item | {"history" if isinstance(said, list) else "question": said}
    question, answer = item.get("question"), item.get("chosen", item.get("answer"))
    found = messages(rows(item.get("messages")))
    if not found and (answer is None or not any(map(item.get, ASKS))):  # one text may be all
        texts = map(item.get, ("question", "more", "chosen", "content", "messages"))
        found = next((alone for alone in map(spoken, texts) if len(alone) > 1), [])
    if not found and type(question) is type(answer) is list and not whole(question):
        found = messages(dict(question=question, answer=answer))
    if not found or "messages" in item and "chosen" in item:
        answered = whole(answer) or [reply(item, text(answer, first=True))]
        repeated = any(m["role"] == "user" for m in answered)  # the answer repeats the question
        found = answered if repeated else [*(found or asked(item)), *answered]
    own = "system" not in item or found[0]["role"] == "system"
    return found if own else [dict(role="system", content=text(item["system"])), *found]


def asked(item):
    """Return the messages of the history and the question with all that belongs to it. The question
    of Belle holds all that was said before, and ends with "Assistant:"."""
    parts = ("instruction", "question", "more", "context") if "instruction" in item else (
        "question" if item.get("question") else "title", "more")
    question = "\n".join(text(item[part], first=True) for part in parts if item.get(part))
    belle = spoken(question) if question.rstrip()[-1:] in tuple(":：]>") else []
    belle = belle[:-1] if belle and blank(belle[-1]["content"]) else []
    now = whole(item.get("question")) or whole(item.get("more")) or belle or [
        dict(role="user", content=question)]
    history = parsed(item.get("history"))  # strings alternate up to the question, else the answer
    before = messages(history, (len(rows(history)) + blank(question)) % 2)
    return before if before and blank(question) else [*before, *now]


# ---- single messages ----

def message(item):
    """Return {"role", "content"} of the fields of a message."""
    role, content = item["role"], item.get("content")
    if role in ("assistant", "call"):
        return reply(item, as_calls(content) if role == "call" else text(content))
    return dict(role=role, content=text(content))


def reply(item, content):
    """Return the assistant's message of a content and, in Qwen's form, the thought before it and
    the tool calls after it. Its role is "untrained" if the item is marked so."""
    thought = text(item.get("thought")).strip()
    content = "\n".join(filter(None, (content, as_calls(item.get("calls")))))
    if thought and not blank(content) and "<think>" not in content:
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    return dict(role="untrained" if "untrained" in item else "assistant", content=content)


def as_calls(value):
    """Return the text of tool calls: an object {"name", "arguments"}, a string, a list of these."""
    value, calls = parsed(value), []
    for call in value if isinstance(value, list) else [value] if value else []:
        if isinstance(call, dict):
            call = call["function"] if isinstance(call.get("function"), dict) else call
            call = json.dumps(call | dict(arguments=parsed(call.get("arguments"))),
                              ensure_ascii=False, default=str)
        calls.append(f"<tool_call>\n{str(call).strip()}\n</tool_call>")
    return "\n".join(calls)


# ---- keys and values ----

def fields(record):
    """Return {part of KEYS: value} of a record's values that are not blank, its keys as "names",
    and "untrained" if it is marked so; {} of a value that is no object."""
    named, found = {}, dict(names=list(map(str, record))) if isinstance(record, dict) else {}
    for name, value in zip(map(normal, record), record.values()) if found else ():
        mark = value if name in UNTRAINED and not isinstance(value, (list, dict)) else None
        if str(mark).lower() in UNTRAINED.get(name, ()):
            found["untrained"] = True
        elif name in PARTS and not blank(value) or name == "desc":  # the content is an answer then
            named[name] = value
    for name in sorted(named, key=RANK.get, reverse=True):  # the first one is written last
        found |= dict.fromkeys(PARTS[name], named[name])
    role = normal(str(found.pop("role", "")))  # beside a question "from" is where it comes from
    if role and not found.keys() & {"question", "answer", "messages"}:
        found["role"] = ROLE_OF.get(role) or ROLE_OF.get(role.partition("_")[0]) or role  # "GPT-4"
    return found


@lru_cache(4096)
def normal(name):
    """Return a name in lower case and without signs: inner_thoughts for "Inner Thoughts"."""
    return re.sub(r"[\W_]+", "_", str(name).lower()).strip("_")


def blank(value):
    if isinstance(value, str):
        return value.strip().lower() in ("", "<noinput>", "<no input>", "no_answer")
    return isinstance(value, bool) or value in (None, [], {})


def rows(value):
    """Return the list in a value: itself, the values of an object of objects, the rows of a table
    {key: list}, a turn of MOSS {"Human": "<|Human|>: ...", ...} as one text; else []."""
    value = parsed(value)
    kinds = set(map(type, value.values())) if isinstance(value, dict) else ()
    turn = kinds == {str} and all(map(SPEAKER.match, value.values()))
    return (value if isinstance(value, list) else list(value.values()) if kinds == {dict} else
            [dict(zip(value, row)) for row in zip(*value.values())] if kinds == {list} else
            ["\n".join(value.values())] if turn else [])


def parsed(value):
    """Return the list or object that a string holds as JSON, or as Python writes it (tables that
    pandas saved); any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return parse(value.strip())
    return value


def text(value, first=False):
    """Return the text of a string or number, of a part {"type", "text"}, of a list of parts; with
    first=True, of a list of alternatives the first that is not blank."""
    if isinstance(value, dict):
        value = fields(value).get("content", "<image>" if "type" in value else "")
    if isinstance(value, list):
        texts = (text(v, first) for v in value)
        return next((t for t in texts if not blank(t)), "") if first else "".join(texts)
    return "" if value is None or isinstance(value, (bool, dict)) else str(value)

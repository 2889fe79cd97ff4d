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

from corpus.files import MAX_CHARS, Dropped, first_reason
from corpus.records import records

# ---- names, as normalize() writes them ----

ROLES = {  # of speakers; "thought", "call": what the assistant thinks, its call of a tool
    "system": "system developer 系统", "thought": "inner_thoughts",
    "user": "user human client patient usr question 用户 使用者 人类 客户 患者 病人 来访者 提问 问题 问",
    "assistant": "assistant gpt chatgpt bing bard claude gemini deepseek qwen model ai bot moss "
                 "sys agent counselor doctor answer 助手 助理 机器人 客服 医生 咨询师 模型 回答 答",
    "tool": "tool function observation tool_response function_response results ipython 工具",
    "call": "function_call tool_call tool_calls commands"}
KEYS = {  # of a record; of several names of a part the first that has a value counts
    "role": "role from speaker sender 角色", "history": "history 历史", "title": "title 标题",
    "content": "content value text utterance message answer_text plain_text parts 内容 內容",
    "messages": "messages conversations conversation dialogue dialog chat turns contents 对话 對話",
    "system": "system system_prompt system_instruction systeminstruction meta_instruction prefix",
    "documents": "documents",
    "instruction": "instruction_zh instruction 指令", "context": "context evidence passage",
    "question": "question questions prompt query ask q 问题 問題 提问 问 src inputs human user "
                "patient 用户 患者",
    "more": "input_zh input desc description 输入 輸入 描述", "calls": "tool_calls function_call",
    "answer": "output_zh output response answer answers target targets completion a 答案 参考答案 回答 "
              "回复 答 输出 輸出 tgt summary assistant bot gpt moss doctor chatgpt_answers "
              "human_answers 助手 医生",
    "thought": "reasoning_content reasoning thinking thought think cot complex_cot",
    "chosen": "chosen pos_resp response_chosen chosen_response accepted preferred_output",
    "rejected": "rejected neg_resp response_rejected rejected_response non_preferred_output",
    "inside": "data paragraphs qas instances items train valid validation dev test",
    "options": "options choices 选项", "images": "images image videos video audios audio",
    "passages": "evidences passages"}
ASKS = {"instruction", "question", "more"}  # the parts of a question
NO, ZERO = ("false",), ("false", "0", "0.0")  # marks that forbid to train on an answer
UNTRAINED = dict(label=NO, kto_tag=NO, chosen=NO, loss=ZERO, train=ZERO, weight=ZERO)
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}
PART_OF = {name: part for part, names in KEYS.items() for name in names.split()}
RANK = {name: i for i, name in enumerate(PART_OF)}
# "\nHuman: ", "### Human: ", "[|Human|]", "<|Human|>: ", "<human>: ", "<|im_start|>user\n", and the
# marks of Llama 3, Gemma and DeepSeek
NAMES = "|".join(sorted(ROLE_OF, key=len, reverse=True)).replace("_", "[ _]")
SPEAKER = re.compile(rf"(?:(?:^|\n)[ \t]*|###? ?)({NAMES})[ \t]*[:：]"
                     r"|(?:<\|(?:im_start|start_header_id)\|>|<start_of_turn>|(?<!<)[<\[][|｜]?)"
                     rf"({NAMES})(?:[|｜]?[>\]] ?[:：]?|<\|end_header_id\|>|\n)", re.I)
ENDS = re.compile(r"</?s>|<\|(?:im_end|endoftext|eot_id|begin_of_text)\|>|<eo[a-z]>|<bos>"
                  r"|<end_of_turn>|<｜(?:begin|end)▁of▁sentence｜>|\[Round \d+\]")
# of Llama 2, replaced in this order by names that SPEAKER finds
MARKS = {r"\[INST\]\s*<<SYS>>(.*?)<</SYS>>": r"<|system|>\1<|user|>", r"\[INST\]": "<|user|>",
         r"\[/INST\]": "<|assistant|>"}


# ---- files and records to dialogues ----

def read_chat(name, stream, evidence=False, chosen=False):
    """Yield (place, dialogue) of a file in any format that dialogues() knows.

    Records that are single messages form one dialogue: the whole file.
    """
    lines = []  # (place, message)
    for place, record in records(name, stream):
        if fields(record).get("role") in ROLES and "parent_id" not in record:  # else a tree
            lines.append((place, record))
        elif isinstance(record, Dropped):
            yield place, record
        else:
            yield from ((place, one) for one in dialogues(record, evidence, chosen))
    if lines:
        yield lines[0][0], make_dialogue([message for _, message in lines])


def dialogues(record, evidence=False, chosen=False):
    """Yield the dialogues in a record, a Dropped for each that can't be trained on; at least one.

    evidence: put the text that a question is about in front of the question.
    chosen: of a chosen and a rejected answer take the chosen one.
    """
    try:
        yield from (make_dialogue(item, chosen) for item in split_record(record, evidence, {}))
    except (RecursionError, ValueError):  # ValueError: an integer of too many digits
        yield Dropped("no messages", "nested too deeply, or a number is too long")


def split_record(record, evidence, outer):
    """Yield for each dialogue in a record its fields, or the list of its messages.

    outer: the fields around the record that belong to it, and as "key" where it stands.
    """
    record = parsed(record)
    item = outer | fields(record)
    inside = records_inside(record, item)
    for key, value in inside:
        shared = {k: item[k] for k in ("instruction", "system", "context") if k in item}
        shared["key"] = f"{item.get('key', '')}{key}: "
        yield from split_record(value, evidence, shared)
    if not inside:
        yield from questions(item, evidence) if isinstance(record, dict) else [record]


def records_inside(record, item):
    """Return [(key, record)] of the records in a record with the fields item; [] of one dialogue.
    """
    if isinstance(record, list):  # of strings or of messages: one dialogue
        is_one = all(isinstance(v, str) or "role" in fields(parsed(v)) for v in record)
        return [] if is_one else list(enumerate(record, 1))
    if not isinstance(record, dict) or item.keys() & {"messages", "answer", "chosen"}:
        return []
    by_id = all(isinstance(v, dict) for v in record.values())  # WebQA: {id: question}
    # {"train": [...]}; SQuAD: {"data": [{"paragraphs": [{"context": "...", "qas": [...]}]}]}
    return [(k, v) for k, v in record.items()
            if by_id or PART_OF.get(normalize(k)) == "inside" and as_list(v)]


def questions(item, evidence):
    """Yield the fields of a question; of WebQA's, with evidence, for each of its passages.

    evidence: put the text that a question is about in front of it. (The context of an instruction
    is always read.)
    """
    # {"question": "Q", "evidences": {"1": {"answer": ["A"], "evidence": "..."}, ...}}
    passages = [] if "answer" in item else [fields(p) for p in as_list(item.get("passages"))]
    if passages and not evidence:  # one question; the first answer that is not blank counts
        passages = [dict(answer=[p.get("answer") for p in passages])]
    for one in [dict(question="") | p | item for p in passages] or [item]:
        if evidence and one.get("question") and "instruction" not in one:
            context = text_of(one.get("context"), first=True) or best_paragraph(one)
            if context:
                one["question"] = f"{context.strip()}\n\n{text_of(one['question'], first=True)}"
        yield one


def best_paragraph(item):
    """Return the best paragraph of the selected document of a DuReader question, if it has one."""
    with suppress(KeyError, IndexError, TypeError, AttributeError, StopIteration):
        document = next(d for d in item["documents"] if d.get("is_selected"))
        return text_of(document["paragraphs"][document.get("most_related_para", 0)])


def make_dialogue(item, chosen=False):
    """Return the dialogue of fields or of a list of messages; a Dropped if it can't be trained on.
    An answer that is marked as untrained becomes empty: cleaning ends the dialogue before it."""
    record = item if isinstance(item, dict) else {}
    found = from_fields(record) if record else messages(item)
    pair = found[-2:] if record and "messages" not in record else []  # its only question and answer
    answers = [m for m in found if m["role"] in ("assistant", "untrained")]
    unknown = {m["role"] for m in found} - {"system", "user", "assistant", "tool", "untrained"}
    reason = first_reason({
        "preference pair (see --chosen)": "rejected" in record and not chosen,
        "marked as untrained": "untrained" in [*record, *(m["role"] for m in answers[:1])],
        "image or sound": "images" in record or any("<image>" in m["content"] for m in found),
        "unknown role": unknown,
        "no question or no answer": any(is_blank(m["content"]) for m in pair),
        "no answer": all(is_blank(m["content"]) for m in answers),
        "too long": sum(len(m["content"]) for m in found) > MAX_CHARS})
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
    turns = as_list(value)
    if not turns:
        return from_fields(fields(value)) if isinstance(value, dict) else transcript(value)
    found = []
    for i, one in enumerate(turns, turn):
        item = fields(parsed(one))
        no_role = item.keys() <= {"names", "content"}  # "Q", or {"message": "Q"}
        one = item.get("content", one) if no_role else one
        if no_role and isinstance(one, str) and not SPEAKER.match(one):
            found.append(dict(role=("user", "assistant")[i % 2], content=one))
        elif one is not None:
            found += messages(one)
    return found


def transcript(value):
    r"""Return the messages of a text that names its speakers, [] of another value.

    "You help.\nHuman: Q\nAssistant: A" gives a system, a user and an assistant message. Each role
    keeps one name, the first speaker the first and the other roles their last: other names are part
    of the text, because a message may quote a dialogue.
    """
    value = ENDS.sub("", value) if isinstance(value, str) else ""
    for mark, name in MARKS.items() if "[/INST]" in value else ():
        value = re.sub(mark, name, value, flags=re.S)
    marks = [(ROLE_OF[normalize(m[1] or m[2])], m) for m in SPEAKER.finditer(value)]
    names = {role: m.groups() for role, m in [*marks, *marks[:1]]}
    marks = [(role, m) for role, m in marks if m.groups() == names[role]]
    ends = [*(m.start() for _, m in marks), None]  # of the text before each mark; of the last one
    head, thought = value[:ends[0]].strip() if marks else "", ""
    found = [dict(role="system", content=head)] if head else []
    for (role, mark), end in zip(marks, ends[1:]):
        content = value[mark.end():end].strip()
        if role == "thought":
            thought = "" if content == "None" else content
        elif content != "None":  # MOSS: no tool
            found.append(make_message(dict(role=role, content=content, thought=thought)))
            thought = ""
    return found[:-1] if found[-1:] == [dict(role="user", content="")] else found


def nested_messages(value):
    """Return the messages of a question or an answer that is itself made of messages, else []."""
    first = (as_list(value) or [parsed(value)])[0]
    return messages(value) if fields(first).keys() & {"role", "messages"} else []


def from_fields(item):
    """Return the messages of an object: one message, or a system message and a dialogue. A question
    or an answer that is missing is ""."""
    if "role" in item:
        return [make_message(item)]
    text = item.get("content", item.get("context"))
    if item.keys() & ASKS:  # {"input": "Q", "content": "A"}
        item = dict(answer=item.get("content")) | item
    elif not {"title", "question"} & {*item, *item.get("names", ())}:  # a title: of an article
        part = "history" if "answer" in item or "chosen" in item else "messages"
        item = item | {part if isinstance(text, list) else "question": text}
    question, answer = item.get("question"), item.get("chosen", item.get("answer"))
    found = messages(as_list(item.get("messages")))
    if not found and (answer is None or not any(map(item.get, ASKS))):  # {"text": "Human: Q ..."}
        texts = [item.get(k) for k in ("question", "more", "chosen", "content", "messages")]
        found = next((said for said in map(transcript, texts) if len(said) > 1), [])
    # {"src": ["Q1", "Q2"], "tgt": ["A1", "A2"]}
    if not found and type(question) is type(answer) is list and not nested_messages(question):
        found = messages(dict(question=question, answer=answer))
    if not found or "messages" in item and "chosen" in item:  # of a pair messages end before it
        answered = nested_messages(answer) or [assistant_message(item, text_of(answer, first=True))]
        if not any(m["role"] == "user" for m in answered):  # else it repeats the question
            answered = [*(found or question_messages(item)), *answered]
        found = answered
    if "system" in item and found[0]["role"] != "system":
        found = [dict(role="system", content=text_of(item["system"])), *found]
    return found


def question_messages(item):
    """Return the messages of the history and of the question with all that belongs to it."""
    parts = ("instruction", "question", "more", "context")
    if "instruction" not in item:
        parts = ("question" if item.get("question") else "title", "more")
    texts = [text_of(item[part], first=True) for part in parts if item.get(part)]
    question = "\n".join(texts + option_lines(item.get("options")))
    # Belle's question holds the history: "Human: Q1\nAssistant: A1\nHuman: Q2\nAssistant:"
    belle = transcript(question) if question.rstrip().endswith((":", "：", "]", ">")) else []
    belle = belle[:-1] if belle and is_blank(belle[-1]["content"]) else []
    now = nested_messages(item.get("question")) or nested_messages(item.get("more")) or belle or [
        dict(role="user", content=question)]
    history = parsed(item.get("history"))  # strings alternate up to the question, else the answer
    before = messages(history, (len(as_list(history)) + is_blank(question)) % 2)
    return before if before and is_blank(question) else [*before, *now]


def option_lines(value):
    """Return the options of a question, a text, {letter: option} or a list, as lines "A. option".
    """
    value = parsed(value)
    if isinstance(value, str):
        return [value]
    options = as_list(value)
    by_letter = isinstance(value, dict) and not options
    lines = []
    for letter, option in value.items() if by_letter else zip("ABCDEFGHIJ", options):
        option = text_of(option)
        lines.append(option if re.match(rf"\W?{letter}\b", option) else f"{letter}. {option}")
    return lines


# ---- single messages ----

def make_message(item):
    """Return {"role", "content"} of the fields of a message."""
    role, content = item["role"], item.get("content")
    if role in ("assistant", "call"):
        return assistant_message(item, tool_calls(content) if role == "call" else text_of(content))
    return dict(role=role, content=text_of(content))


def assistant_message(item, content):
    """Return the assistant's message of a content and, in Qwen's form, the thought before it and
    the tool calls after it. Its role is "untrained" if the item is marked so."""
    thought = text_of(item.get("thought")).strip()
    content = "\n".join(filter(None, (content, tool_calls(item.get("calls")))))
    if thought and not is_blank(content) and "<think>" not in content:
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    return dict(role="untrained" if "untrained" in item else "assistant", content=content)


def tool_calls(value):
    """Return the text of tool calls: an object {"name", "arguments"}, a string, a list of these."""
    value, calls = parsed(value) or [], []
    for call in value if isinstance(value, list) else [value]:
        if isinstance(call, dict):
            call = call["function"] if isinstance(call.get("function"), dict) else call
            call = json.dumps(call | dict(arguments=parsed(call.get("arguments"))),
                              ensure_ascii=False, default=str)
        calls.append(f"<tool_call>\n{str(call).strip()}\n</tool_call>")
    return "\n".join(calls)


# ---- keys and values ----

def fields(record):
    """Return {part of KEYS: value} of a record's values that are not blank, its keys as "names",
    and "untrained" if it is marked so; {} of a value that is no object.

    {"input": "Q", "output": "A"} gives {"names": ["input", "output"], "more": "Q", "answer": "A"}.
    """
    if not isinstance(record, dict):
        return {}
    found, named = dict(names=list(map(str, record))), {}
    letters = {name: record[name] for name in "ABCDEFGHIJ" if name in record}
    if len(letters) > 1:  # {"question": "Q", "A": "one", "B": "two", "answer": "A"}
        record = {k: v for k, v in record.items() if k not in letters} | dict(options=letters)
    for key, value in record.items():
        name, is_scalar = normalize(key), not isinstance(value, (list, dict))
        if is_scalar and name in UNTRAINED and str(value).lower() in UNTRAINED[name]:
            found["untrained"] = True
        elif name in PART_OF and not is_blank(value) or name == "desc":  # then content is an answer
            named[name] = value
    for name in sorted(named, key=RANK.get, reverse=True):  # the first one is written last
        found[PART_OF[name]] = named[name]
    role = normalize(str(found.pop("role", "")))  # beside a question "from" is where it comes from
    if role and not found.keys() & {"question", "answer", "messages"}:
        found["role"] = ROLE_OF.get(role) or ROLE_OF.get(role.partition("_")[0]) or role  # "GPT-4"
    return found


@lru_cache(4096)
def normalize(name):
    """Return a name in lower case and without signs: inner_thoughts for "Inner Thoughts"."""
    return re.sub(r"[\W_]+", "_", str(name).lower()).strip("_")


def is_blank(value):
    """Return whether a value says nothing: None, a bool, an empty list, <noinput> ..."""
    if isinstance(value, (str, float)):  # nan: a missing field of pandas
        return str(value).strip().lower() in ("", "nan", "<noinput>", "<no input>", "no_answer")
    return isinstance(value, bool) or value in (None, [], {})


def as_list(value):
    """Return the list in a value, [] if there is none.

    {"turn_1": {...}, "turn_2": {...}} gives the objects; a table {"role": [...], "content": [...]}
    its rows; a turn of MOSS {"Human": "<|Human|>: Q", "MOSS": "<|MOSS|>: A"} one text of both.
    """
    value = parsed(value)
    if not isinstance(value, dict):
        return value if isinstance(value, list) else []
    values = list(value.values())
    kinds = set(map(type, values))
    if kinds == {list}:
        return [dict(zip(value, row)) for row in zip(*values)]
    if kinds == {str} and all(map(SPEAKER.match, values)):
        return ["\n".join(values)]
    return values if kinds == {dict} else []


def parsed(value):
    """Return the list or object that a string holds as JSON, or as Python writes it (tables that
    pandas saved); any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return parse(value.strip())
    return value


def text_of(value, first=False):
    """Return the text of a string or number, of a part {"type", "text"}, of a list of parts; with
    first=True, of a list of alternatives the first that is not blank."""
    if isinstance(value, dict):
        value = fields(value).get("content", "<image>" if "type" in value else "")
    if isinstance(value, list):
        texts = (text_of(v, first) for v in value)
        return next((t for t in texts if not is_blank(t)), "") if first else "".join(texts)
    return "" if value is None or isinstance(value, (bool, dict)) else str(value)

"""Multiple-choice questions, read from tables like CMMLU's and C-Eval's or made from documents, and
their prompts.
"""
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from common.command_line import UserError
from corpus.files import Dropped, find_files, read_each, refuse_pipe, suffix
from corpus.records import RECORDS, records


@dataclass
class Question:
    text: str
    options: list
    answer: int            # index of the right option
    description: str = ""  # begins the prompt


# ---- prompts ----

def letter_prompt(q):
    """Return (prompt, answers): the prompt shows the options, the answers are their letters.

    The text is that of lm-eval 0.4 for CMMLU without examples, including the space before a letter.
    """
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, q.options)]
    return q.description + "\n".join([q.text, *lines, "答案："]), [f" {line[0]}" for line in lines]


def answer_prompt(q):
    """Return (prompt, answers): the prompt shows no options, the answers are their texts.

    Small models are above chance in this format first.
    """
    return f"{q.text}\n答案：", q.options


def sentence_prompt(q):
    """Return (prompt, answers): the beginning of a document, and sentences that may follow."""
    return q.text, q.options


PROMPTS = dict(letters=letter_prompt, answers=answer_prompt, sentences=sentence_prompt)


# ---- reading ----

def read_questions(paths, description, names_file=""):
    """Return {file: (Questions, Counter of why rows were skipped)}; each file is one subject.

    description: begins each prompt, with the file's subject in place of {subject}.
    UserError: a file can't be read, or is not a table of questions.
    """
    names, subjects = read_names(names_file), {}
    files = find_files(paths, is_table, RECORDS)
    for where, record in read_each(files, is_table, records):
        file = where.rpartition(":")[0]
        questions, skipped = subjects.setdefault(file, ([], Counter()))
        question = question_of(record, where)
        if isinstance(question, str):
            skipped[question] += 1
            continue
        if description:
            subject = subject_of(file, names)
            question.description = description.replace("{subject}", subject) + "\n\n"
        questions.append(question)
    for file in files:  # a .zip holds several subjects
        if not any(subject.startswith(file) for subject in subjects):
            raise UserError(f"{file}: it contains no question")
    if not any(questions for questions, _ in subjects.values()):
        reasons = sum((skipped for _, skipped in subjects.values()), Counter())
        raise UserError(f"no usable question: {list_reasons(reasons)}")
    return subjects


def list_reasons(reasons):
    """Return a Counter of reasons as text."""
    return ", ".join(f"{n:,} x {reason}" for reason, n in reasons.items())


def is_table(name):
    """Return whether records can be read from a file of this name."""
    return suffix(name) in RECORDS


def read_names(file):
    """Return {file name: subject} of a JSON file; C-Eval's has [English, Chinese, kind] as subject.
    """
    refuse_pipe(file)
    try:
        table = json.loads(Path(file).read_text(encoding="utf-8-sig")) if file else {}
        return {k: v if isinstance(v, str) else str(v[1]) for k, v in table.items()}
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: not JSON like {{\"law\": \"法学\"}} ({type(e).__name__})") from e


def subject_of(file, names):
    """Return the subject that names gives to a file; without names, the file's own name."""
    stem = Path(file).name.partition(".")[0]
    short = re.sub("_(val|dev|test)$", "", stem)  # C-Eval's law_val.csv
    if names and stem not in names and short not in names:
        raise UserError(f"{file}: --subjects does not name {short}")
    return names.get(stem) or names.get(short) or stem


def question_of(record, where):
    """Return the Question in a row, or the reason (str) to skip it.

    UserError: the file can't be read further, or columns are missing.
    """
    if isinstance(record, Dropped):
        if record.reason in ("unreadable file", "unknown encoding"):
            raise UserError(f"{where}: {record.details}")
        return record.reason
    row = record if isinstance(record, dict) else {}
    row = {str(key).strip().lower(): value for key, value in row.items()}
    needed = ("question", "answer", *(["choices"] if "choices" in row else "abcd"))
    if missing := [key for key in needed if key not in row]:
        found = ", ".join(row)[:80] or f"a {type(record).__name__}, not an object"
        raise UserError(f"{where}: no {' '.join(missing)}; found: {found}. A row needs question, "
                        "answer, and A, B, C, D or choices")
    options = row["choices"] if "choices" in row else [row[key] for key in "abcd"]
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        return "not 2 to 26 options"
    texts = ["" if t is None else str(t) for t in (row["question"], *options)]
    if not all(t.strip() for t in texts):
        return "a question or option is empty"
    if re.search("[\ud800-\udfff]", "".join(texts)):
        return "not Unicode text"
    indices = dict(zip(ascii_uppercase, range(len(options))))
    answer = indices.get(str(row["answer"]).strip().upper(), row["answer"])
    if type(answer) is not int or answer not in range(len(options)):
        return "the answer is not one of the options"
    return Question(texts[0].strip(), texts[1:], answer)


def sentence_questions(texts, seed):
    """Return (Questions, Counter of why texts were skipped): which sentence follows the title, or
    where there is none the first sentence, of a text?

    texts: a title is a line above a blank one. The options are the sentence that follows and those
    of three other texts, chosen by seed.
    """
    end = "[。！？][”’」』）]*"
    two = re.compile(rf"([^。！？\n]+(?:{end}|\n\n)\s*)([^。！？\n]+{end})")
    matches = [two.match(text) for text in texts]
    entries = [match.groups() for match in matches if match]
    skipped = Counter(["no two sentences"] * matches.count(None))
    if len(entries) < 4:
        raise UserError(f"{len(entries)} documents have a title or a sentence that a sentence "
                        "follows; a question needs 4")
    rng, questions = random.Random(seed), []
    for i, (beginning, sentence) in enumerate(entries):
        others = rng.sample(range(len(entries) - 1), 3)
        options = [entries[n + (n >= i)][1] for n in others]  # from all entries except i
        answer = rng.randrange(4)
        options.insert(answer, sentence)
        questions.append(Question(beginning, options, answer))
    return questions, skipped

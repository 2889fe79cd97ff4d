"""Multiple-choice questions: from tables like CMMLU's and C-Eval's, from titled documents, and the
forms in which a model is asked them.
"""
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from config import UserError
from data.files import Dropped, find_files, read_each, suffix
from data.records import RECORDS, records


@dataclass
class Question:
    text: str
    options: list
    answer: int     # number of the right option
    lead: str = ""  # what the prompt says first


# ---- asking: Question -> (prompt, its possible endings) ----

def letters(q):
    """As lm-eval 0.4 asks CMMLU without examples, its space before the letter included."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, q.options)]
    return q.lead + "\n".join([q.text, *lines, "答案："]), [f" {line[0]}" for line in lines]


def answers(q):
    """The options' own words, not shown before: what a small model can tell apart sooner."""
    return f"{q.text}\n答案：", q.options


def sentences(q):
    """A document's title, and what may come below it."""
    return f"{q.text}\n\n", q.options


# ---- reading ----

def read_questions(paths, description, names_file=""):
    """{file: (Questions, Counter of the rows that are none)}; each file is about one subject.

    description: leads each prompt, with the file's subject in place of {subject}.
    UserError: a file can't be read, or is no such table.
    """
    names, subjects = read_names(names_file), {}
    for path in find_files(paths, is_table, RECORDS):
        before = len(subjects)
        for item in read_each([path], is_table, records):
            if isinstance(item, Dropped):
                raise UserError(item.where)
            where, record = item
            file = where.rpartition(":")[0]
            questions, skipped = subjects.setdefault(file, ([], Counter()))
            question = record.reason if isinstance(record, Dropped) else question_of(record, where)
            if isinstance(question, str):
                skipped[question] += 1
                continue
            if description:
                subject = subject_of(file, names)
                question.lead = description.replace("{subject}", subject) + "\n\n"
            questions.append(question)
        if len(subjects) == before:
            raise UserError(f"{path}: there is no question in it")
    if not any(questions for questions, _ in subjects.values()):
        reasons = sum((skipped for _, skipped in subjects.values()), Counter())
        shown = ", ".join(f"{n:,} x {reason}" for reason, n in reasons.items())
        raise UserError(f"no question can be asked: {shown}")
    return subjects


def is_table(name):
    return suffix(name) in RECORDS


def read_names(file):
    """{name of a file: subject} from JSON, where C-Eval's [English, Chinese, kind] is one, too."""
    try:
        table = json.loads(Path(file).read_text(encoding="utf-8-sig")) if file else {}
        return {k: v if isinstance(v, str) else v[1] for k, v in table.items()}
    except (ValueError, AttributeError, LookupError, TypeError) as e:
        raise UserError(f"{file}: not JSON like {{\"law\": \"法学\"}} ({type(e).__name__})") from e


def subject_of(file, names):
    """A file's subject: by names, where they are given, else its own name."""
    stem = Path(file).name.partition(".")[0]
    short = re.sub("_(val|dev|test)$", "", stem)  # C-Eval's law_val.csv
    if names and stem not in names and short not in names:
        raise UserError(f"{file}: the subjects have no name for {short}")
    return names.get(stem) or names.get(short) or stem


def question_of(record, where):
    """The Question in a row, or a str that says why it can't be asked. UserError: other columns."""
    row = record if isinstance(record, dict) else {}
    row = {str(key).strip().lower(): value for key, value in row.items()}
    needed = ("question", "answer", *(["choices"] if "choices" in row else "abcd"))
    if missing := [key for key in needed if key not in row]:
        found = ", ".join(row)[:80] or f"no object but a {type(record).__name__}"
        raise UserError(f"{where}: no {' '.join(missing)}; there is: {found}. A row needs "
                        "question, answer, and A, B, C, D or choices")
    options = row["choices"] if "choices" in row else [row[key] for key in "abcd"]
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        return "not 2 to 26 options"
    texts = ["" if t is None else str(t) for t in (row["question"], *options)]
    if not all(t.strip() for t in texts):
        return "a question or option is empty"
    numbers = dict(zip(ascii_uppercase, range(len(options))))
    answer = numbers.get(str(row["answer"]).strip().upper(), row["answer"])
    if type(answer) is not int or answer not in range(len(options)):
        return "the answer is none of the options"
    return Question(texts[0].strip(), texts[1:], answer)


def title_questions(texts, seed):
    """(Questions, Counter of the texts that make none): a title, the first sentence below it and
    three of others, drawn by seed. A text is a title, a blank line and sentences."""
    entries, skipped = [], Counter()
    for text in texts:
        title, _, rest = text.partition("\n\n")
        sentence = re.match("[^。！？\n]+[。！？]", rest.strip())
        if sentence and title.strip() and "\n" not in title:
            entries.append((title, sentence[0]))
        else:
            skipped["no title with a sentence below it"] += 1
    if len(entries) < 4:
        raise UserError(f"{len(entries)} documents have a title with a sentence below it; 4 make a "
                        "question")
    rng, questions = random.Random(seed), []
    for i, (title, sentence) in enumerate(entries):
        drawn = rng.sample(range(len(entries) - 1), 3)
        options = [entries[n + (n >= i)][1] for n in drawn]  # all but its own
        answer = rng.randrange(4)
        options.insert(answer, sentence)
        questions.append(Question(title, options, answer))
    return questions, skipped

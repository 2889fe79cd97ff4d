"""The greedy answers of a chat model: asked alone, reworded and within a chat; how many are right.

    read_facts        questions, and keys one of which a right answer contains
    known_questions   questions of a prepared set, and the set's own answers
"""
import random
import re
from collections import Counter, defaultdict
from statistics import mean, stdev

import torch

from common.command_line import UserError
from corpus.files import Dropped, find_files, read_each
from corpus.records import RECORDS, records
from evaluation.likelihood import bar
from evaluation.questions import is_table

GREETING = "你好"
MAX_TOKENS = 64        # of an answer
SAME = 0.8             # character F1 from which an answer counts as the set's own


# ---- questions ----

def read_facts(paths):
    """Return [(messages up to the last question, keys of its answer)] of records {"messages",
    "keys"}. UserError: a record has another form, or there are fewer than three."""
    facts = []
    for place, record in read_each(find_files(paths, is_table, RECORDS), is_table, records):
        try:
            (*asked, answer), keys = record["messages"], record["keys"]
            "".join(m["role"] + m["content"] for m in asked).encode()
            good = (asked[-1]["role"] == "user" and isinstance(keys, list) and all(keys)
                    and sum(key in answer["content"] for key in keys))  # sum: checks all types
        except (LookupError, TypeError, ValueError):
            good = False
        if not good:
            raise UserError(f"{place}: " + (record.details if isinstance(record, Dropped) else (
                'a record needs "messages", a dialogue that ends with a question and its answer, '
                'and "keys", a list of texts one of which the answer contains')))
        facts.append((asked, keys))
    return at_least_three(facts, paths[0])


def known_questions(bins, split, n, seed):
    """Return [(messages up to the first question, the set's answers to it)] of n dialogues of a
    split of a chat set, chosen by seed; answers of more than MAX_TOKENS are left out. UserError: it
    has fewer than three questions."""
    tok, answers = bins.tokenizer, defaultdict(list)
    for ids in bins.documents(split):
        messages = tok.decode_chat(ids)
        at = next((i for i, m in enumerate(messages) if i and m["role"] == "assistant"), 0)
        if at and messages[at - 1]["role"] == "user" and (
                len(tok.encode(messages[at]["content"])) <= MAX_TOKENS):
            asked = tuple((m["role"], m["content"]) for m in messages[:at])
            answers[asked].append(messages[at]["content"])
    known = [([dict(role=role, content=content) for role, content in asked], texts)
             for asked, texts in answers.items()]
    at_least_three(known, f"{bins.folder}, {split}")
    return random.Random(seed).sample(known, min(n, len(known)))


def at_least_three(questions, where):
    """Return questions; UserError if they are too few to be asked after each other."""
    if len(questions) < 3:
        raise UserError(f"{where}: {len(questions)} questions; at least 3 are needed, because they "
                        "are asked after each other")
    return questions


# ---- asking: answer is greedy_answers with its first three arguments ----

def greedy_answers(model, tok, batch_size, dialogues):
    """Return the most likely answer to each dialogue, of at most MAX_TOKENS tokens."""
    ends, of_length, answers = (tok.eot, tok.im_end, tok.im_start), defaultdict(list), {}
    for i, dialogue in enumerate(dialogues):
        ids = prompt(model, tok, dialogue)
        of_length[len(ids)].append((i, ids))
    batches = [same[n:n + batch_size] for same in of_length.values()
               for n in range(0, len(same), batch_size)]
    for batch in bar(batches, " batches"):
        numbers, rows = zip(*batch)
        ids = torch.tensor(rows, device=model.device)
        new = torch.stack([*model.generate(ids, MAX_TOKENS, temperature=0, stop_ids=ends)], dim=1)
        for i, row in zip(numbers, new.tolist()):
            answers[i] = tok.decode([t for t in row if t not in (-1, *ends)])
    return [answers[i] for i in range(len(dialogues))]


def prompt(model, tok, messages):
    """Return the ids of a dialogue and of its answer's header, without the oldest turns where they
    leave no room for the answer; the system message and the question stay."""
    n_system, room = messages[0]["role"] == "system", model.config.block_size - MAX_TOKENS
    while len(ids := tok.encode_chat(messages) + tok.role_header("assistant")) > room and (
            len(messages) > n_system + 2):
        messages = messages[:n_system] + messages[n_system + 2:]
    return ids


def ask_in_chats(answer, dialogues, seed):
    """Yield (how the dialogues were begun, answers to them): as they are, after a greeting, after
    two of the others, chosen by seed. All earlier answers are the model's own."""
    def turn(question, text):
        return [*question, dict(role="assistant", content=text)]

    alone = answer(dialogues)
    yield "alone", alone
    greeting = [dict(role="user", content=GREETING)]
    greeting = turn(greeting, *answer([greeting]))
    yield f"after {GREETING}", answer([greeting + d for d in dialogues])
    order = random.Random(seed).sample(range(len(dialogues)), len(dialogues))
    before = {i: (order[place - 2], order[place - 1]) for place, i in enumerate(order)}
    yield "after two other turns", answer([
        [m for j in before[i] for m in turn(dialogues[j], alone[j])] + d
        for i, d in enumerate(dialogues)])


def ask_reworded(answer, dialogues):
    """Yield (how the last question was changed, answers): a polite word before it, no mark after
    it."""
    for name, change in (("请问 before it", lambda q: q if q[:1] == "请" else f"请问{q}"),
                         ("without its mark", lambda q: q.rstrip("？?。.！!") or q)):
        yield name, answer([[*before, last | dict(content=change(last["content"]))]
                            for *before, last in dialogues])


# ---- scoring ----

def contains_key(answers, keys):
    """Return two lists, a number for each answer: 1 if it contains one of its keys, else 0; and
    chance, the share of the other questions of which it contains a key."""
    found = [[any(key in answer for key in of_one) for of_one in keys] for answer in answers]
    right = [int(row[i]) for i, row in enumerate(found)]
    chance = [(sum(row) - r) / (len(keys) - 1) for row, r in zip(found, right)]
    return right, chance


def compare(answer, references):
    """Return (exact match, character F1, ROUGE-L), each from 0 to 1, of an answer with the
    reference that is nearest to it by that measure; punctuation and spaces do not count.

    The F1 is that of SQuAD (arXiv:1606.05250), of characters for words. Exact match is that of
    CMRC 2018 (arXiv:1810.07366), ROUGE-L that of DuReader (arXiv:1711.05073).
    """
    a, *others = (re.sub(r"[\W_]", "", text) for text in (answer, *references))
    scores = [(float(a == b), character_f1(a, b), rouge_l(a, b)) for b in others]
    return tuple(map(max, zip(*scores)))


def character_f1(a, b):
    """Return the F1 of the characters of two texts, in any order."""
    return 2 * (Counter(a) & Counter(b)).total() / max(1, len(a) + len(b))


def rouge_l(a, b, beta=1.2):
    """Return the F of the longest common subsequence of characters of an answer and its reference;
    recall counts beta times as much as precision."""
    row = [0] * (len(b) + 1)  # row[j]: of the characters of a so far and of b[:j]
    for x in a:
        above = row[:]
        for j, y in enumerate(b):
            row[j + 1] = above[j] + 1 if x == y else max(above[j + 1], row[j])
    p, r = row[-1] / max(1, len(a)), row[-1] / max(1, len(b))
    return (1 + beta**2) * p * r / (r + beta**2 * p) if p else 0.0


def mean_and_error(values):
    """Return the mean of values and its standard error."""
    return mean(values), stdev(values) / len(values) ** 0.5

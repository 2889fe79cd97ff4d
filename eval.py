"""Evaluate a model: bits per byte, Chinese multiple choice, knowledge, memorised text.

    python eval.py bpb demo            # of a prepared set's val split, or of a text file
    python eval.py choice cmmlu/test   # .csv or .jsonl tables of questions; a file is a subject
    python eval.py cloze demo          # which of four sentences follows that of a held-out text?
    python eval.py overlap demo        # how much of the model's samples is copied from the set
    python eval.py facts [FILE]        # a chat model: do its answers contain the right key words?
    python eval.py answers demo_chat   # a chat model: how near are its answers to those of a set?

--model= names any model folder or hub id: ours, or one that training can start from.
"""
# ---- model ----
model = ""             # folder, checkpoint, hub id or xiaoyu; "" = the newest base run (facts and
#                        answers: chat run) under out/, or where there is none xiaoyu
block_size = 4096      # context in tokens; the model's own where that is shorter
batch_size = 8         # rows per forward pass
# ---- bpb ----
stride = 0             # tokens from one window to the next; 0 = the context, as in training. With
#                        less, windows overlap: each token has more context, but it takes longer
by = ""                # a key of the file's records, such as source: a line for each of its values
# ---- choice ----
description = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。"  # begins each prompt
subjects = ""          # JSON file {file's name: subject}, such as C-Eval's subject_mapping.json
endoftext = False      # begin with <|endoftext|>, as our documents do; lm-eval does not
# ---- cloze, overlap, facts, answers ----
seed = 1337            # chooses the wrong sentences of cloze, the questions of answers and the
#                        turns before a question; sample i of overlap has the seed seed + i
# ---- answers ----
num_questions = 60     # of each split; those whose answer has over 64 tokens are left out
# ---- overlap ----
num_samples = 20
max_new_tokens = 256   # of each sample
starts = ""            # texts to continue, "|" between them: each sample takes the next one
temperature = 0.7      # 0 = always the most likely token
top_k = 50             # sample among the k most likely tokens; 0 = all
top_p = 0.9            # sample among the most likely tokens with this total probability; 1 = all
min_p = 0.0            # drop tokens below this share of the highest probability; 0 = none
repetition_penalty = 1.2  # above 1 makes tokens that occurred already less likely; 1 = off
stop = ""              # end before any of these texts, "|" between them
# ---- device ----
device = "auto"        # cuda, mps, cpu
dtype = "auto"         # to compute in: float32, bfloat16, float16; auto: as in training

import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path

from common.command_line import UserError, run_main  # first: reports Ctrl-C

import torch

from common.device import autocast, choose_device, choose_dtype
from common.settings import check_ranges, configure
from corpus.clean import Rules, clean_document
from corpus.files import Dropped, find_files
from corpus.sources import SOURCES, record_text
from evaluation.answers import (
    SAME, ask_in_chats, ask_reworded, compare, contains_key, greedy_answers, known_questions,
    mean_and_error, read_facts)
from evaluation.likelihood import bits_per_byte, choose, standard_error, total_of
from evaluation.questions import PROMPTS, list_reasons, read_questions, sentence_questions
from models.folders import RANGES, check_chat_tokens, find_model, load_model
from sampling.text import continue_texts
from tokens.bins import SPLITS, Bins, set_folder

FACTS = Path(__file__).parent / "data" / "raw" / "demo" / "dialogues_val.jsonl"
NUMBERS = RANGES | dict(block_size=(2, 2**40), batch_size=(1, 2**40), stride=(0, 2**40),
                        seed=(0, 2**62), num_samples=(1, 2**40), num_questions=(3, 2**40),
                        max_new_tokens=(1, 2**40))


@contextmanager
def load(cfg, kind="base"):
    """Provide (model, its tokenizer); inside, the model computes as in training's evaluations."""
    path = find_model(cfg.model, kind)
    model, tok = load_model(path, block_size=cfg.block_size)
    if kind == "chat":
        check_chat_tokens(model, tok)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device.type)
    print(f"[{path}, {device}, {str(dtype)[6:]}]")
    with torch.no_grad(), autocast(device, dtype):
        yield model.to(device).eval(), tok


def read_texts(bins, split):
    """Yield the text of each document of a prepared set."""
    for ids in bins.documents(split):
        yield bins.tokenizer.plain_text(ids).decode(errors="replace")


def single_argument(arguments, what):
    """Return the only one of arguments; UserError(what to name) if there is not exactly one."""
    if len(arguments) != 1 or not arguments[0].strip():
        raise UserError(f"name one {what}, not: {' '.join(arguments) or 'nothing'}")
    return arguments[0]


def print_skipped(reasons):
    """Print each reason with its number."""
    for reason, n in reasons.items():
        print(f"skipped {n:,}: {reason}")


# ---- bits per byte ----

def texts_to_score(name, skipped, by=""):
    """Yield (value of the key `by`, text) of each document of a set's val split, or of a file or
    folder; the value of a document without that key is "-".

    Files are read and cleaned as prepare.py text does it: each record of a .jsonl (.csv ...) file
    is a document, any other file is one (several, if it has over 4 million characters). skipped, a
    Counter, gets the reasons of documents and lines that are left out. UserError, after the last
    document: no record has the key.
    """
    if (set_folder(name) / "meta.json").is_file():
        bins = Bins(name)
        if bins.kind != "text":
            raise UserError(f"{bins.folder} holds dialogues; bits per byte are for texts")
        if by:
            raise UserError(f"by={by}: a prepared set has no records with keys; name a file")
        yield from (("-", text) for text in read_texts(bins, "val"))
        return
    if not Path(name).exists():
        raise UserError(f"{name} is neither a prepared set under data/ nor a file")
    source, rules, keys = SOURCES["text"], Rules(), Counter()

    def labelled(record, field):
        entries = record if isinstance(record, dict) else {}
        keys.update(entries.keys())
        value = "-" if entries.get(by) is None else str(entries[by])
        return " ".join(value.split())[:80], record_text(record, field)

    files = find_files([name], source.wanted, source.endings)
    for place, doc in source.documents(files, document_of=labelled):
        label, doc = doc if isinstance(doc, tuple) else ("-", doc)
        text, reason, trimmed = (("", doc.details or doc.reason, {}) if isinstance(doc, Dropped)
                                 else clean_document(doc, rules))
        skipped += trimmed
        if reason:
            skipped[f"{place}: {reason}"] += 1
        else:
            yield label, text
    if by and not keys[by]:
        raise UserError(f"no record of {name} has the key {by}; keys: {', '.join(keys)[:80]}")


def bpb(cfg, arguments):
    """Print the bits per byte of one set or file; with cfg.by a line for each value of that key.
    """
    name, skipped = single_argument(arguments, "prepared set or text file"), Counter()
    with load(cfg) as (model, tok):
        context = model.config.block_size
        if cfg.stride > context:
            raise UserError(f"stride={cfg.stride} is more than the context, {context} tokens")
        groups = defaultdict(list)
        for label, text in texts_to_score(name, skipped, cfg.by):
            groups[label if cfg.by else ""].append(text)
        if not groups:
            raise UserError(f"no text in {name}: {list_reasons(skipped) or 'no document'}")
        scores = {label: bits_per_byte(model, tok, texts, cfg.stride, cfg.batch_size)
                  for label, texts in sorted(groups.items())}
    print_skipped(skipped)
    if cfg.by:
        print(f"documents  nats/token  bits/byte  bits/character  {cfg.by}")
    for label, s in scores.items() if cfg.by else ():
        print(f"{s['documents']:9,}  {s['nats']:10.4f}  {s['bpb']:9.4f}  {s['bpc']:14.4f}  {label}")
    s = total_of(scores.values())
    print(f"{name}: {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes, "
          f"{s['characters']:,} characters; context {context:,}, stride {cfg.stride or context:,}\n"
          f"nats per token {s['nats']:.4f}  bits per byte {s['bpb']:.4f}  "
          f"bits per character {s['bpc']:.4f}")


# ---- multiple choice ----

def choice(cfg, arguments):
    """Print how many questions of tables are answered correctly, in two prompt formats."""
    if not arguments:
        raise UserError("name files or folders with questions: python eval.py choice FILES...")
    subjects = read_questions(arguments, cfg.description, cfg.subjects)
    with load(cfg) as (model, tok):
        begin = [tok.eot] if cfg.endoftext else []
        print_accuracy(model, tok, subjects, ("letters", "answers"), begin, cfg.batch_size)


def cloze(cfg, arguments):
    """Print how often the model finds the second sentence of a held-out text among four."""
    bins = Bins(single_argument(arguments or ["demo"], "prepared set"))
    questions = sentence_questions(read_texts(bins, "val"), cfg.seed)
    with load(cfg) as (model, tok):
        subjects = {bins.folder: questions}
        print_accuracy(model, tok, subjects, ("sentences",), [tok.eot], cfg.batch_size)


def print_accuracy(model, tok, subjects, formats, begin, batch_size):
    """Print a table of accuracies: a line for each subject, and their means.

    subjects: {name: (Questions, Counter of skipped rows)}; formats: keys of PROMPTS; begin: ids
    before each prompt.
    """
    print("  read  scored  chance", *(f"{name:>9} ±  error" for name in formats), " subject")
    all_results, subject_means, n_read = [], [], 0
    for subject, (questions, skipped) in subjects.items():
        columns = [[1 / len(q.options) for q in questions]]
        for name in formats:
            prompts = [PROMPTS[name](q) for q in questions]
            chosen, n_cut = choose(model, tok, prompts, begin, batch_size)
            columns.append([n == q.answer for n, q in zip(chosen, questions)])
            if n_cut:
                print(f"{subject}: {n_cut:,} prompts ({name}) are longer than the context of "
                      f"{model.config.block_size:,} tokens; their beginning was cut off")
        results = list(zip(*columns))  # of each question: (chance, correct in each format)
        n_rows = len(results) + skipped.total()
        n_read, all_results = n_read + n_rows, all_results + results
        if results:
            subject_means.append(print_line(subject, n_rows, results))
        print_skipped(skipped)
    if len(subject_means) > 1:
        print_line("all questions", n_read, all_results)
        means = [sum(column) / len(subject_means) for column in zip(*subject_means)]
        print(" " * 22, *(f"{mean:9.2%}" + " " * 9 for mean in means[1:]),
              f" mean of {len(subject_means)} subjects")


def print_line(name, n_read, results):
    """Print a line of the table; return the mean of each column of results."""
    n, means = len(results), [sum(column) / len(results) for column in zip(*results)]
    errors = [f"{standard_error(p, n):6.2%}" if n > 1 else "     -" for p in means]
    shown = [f"{p:9.2%} ± {error}" for p, error in zip(means[1:], errors[1:])]
    print(f"{n_read:6,} {n:7,} {means[0]:7.2%}", *shown, f" {name}")
    return means


# ---- memorisation ----

def ngrams(text, n):
    """Return the set of all substrings of n characters."""
    return {text[i:i + n] for i in range(len(text) - n + 1)}


def overlap_with(docs, texts):
    """Return (longest passage that a text shares with a document, share of the texts' 4-grams of
    Han characters that occur in the documents, number of those 4-grams).

    It is exact and reads docs once: a document is searched for passages that are longer than the
    longest one so far, by one character more each time.
    """
    han = [run[i:i + 4] for text in texts for run in re.findall("[\u4e00-\u9fff]{4,}", text)
           for i in range(len(run) - 3)]
    wanted, found, passage = set(han), set(), ""
    longer = set().union(*(ngrams(text, 1) for text in texts))  # what would be a longer passage
    for doc in docs:
        found |= wanted & ngrams(doc, 4)
        while shared := longer & ngrams(doc, len(passage) + 1):
            passage = min(shared)  # min: the same one in every run
            longer = set().union(*(ngrams(text, len(passage) + 1) for text in texts))
    return passage, sum(gram in found for gram in han) / max(1, len(han)), len(han)


def overlap(cfg, arguments):
    """Print how much of the model's samples, and of held-out text, occurs in the train split."""
    bins = Bins(single_argument(arguments, "prepared set"))
    with load(cfg) as (model, tok):
        samples = [text for _, text in continue_texts(model, tok, cfg.starts.split("|"), cfg)]
    val = chain.from_iterable(text + "\0" for text in read_texts(bins, "val"))
    held_out = ["".join(islice(val, sum(map(len, samples))))]  # as many characters, to compare with
    for name, texts in ((f"{len(samples)} samples", samples), ("held-out text", held_out)):
        passage, share, n = overlap_with(read_texts(bins, "train"), texts)
        print(f"{name}, {sum(map(len, texts)):,} characters: {share:.1%} of {n:,} Han 4-grams "
              f"occur in the train split of {bins.folder}\n  longest passage that occurs there, "
              f"{len(passage):,} characters: {passage!r}")


# ---- answers ----

def facts(cfg, arguments):
    """Print how many greedy answers of a chat model contain a key of the right answer, in three
    kinds of chat; chance: a key of another question."""
    dialogues, keys = zip(*read_facts(arguments or [FACTS]))
    with load(cfg, "chat") as (model, tok):
        answer = partial(greedy_answers, model, tok, cfg.batch_size)
        print("  asked    right ±  error   chance ±  error")
        for name, given in ask_in_chats(answer, dialogues, cfg.seed):
            shown = (mean_and_error(values) for values in contains_key(given, keys))
            print(f"{len(given):7,}", *(f"{p:8.2%} ± {e:6.2%}" for p, e in shown), f" {name}")


def answers(cfg, arguments):
    """Print how near greedy answers of a chat model are to those of a chat set, to trained and to
    held-out questions: alone, in chats and reworded."""
    bins = Bins(single_argument(arguments or ["demo_chat"], "prepared set of dialogues"))
    if bins.kind != "chat":
        raise UserError(f"{bins.folder} holds texts; answers are compared with those of dialogues")
    with load(cfg, "chat") as (model, tok):
        answer = partial(greedy_answers, model, tok, cfg.batch_size)
        print(f"  asked  F1>={SAME}    exact ±  error       F1 ±  error  ROUGE-L ±  error")
        for split in SPLITS:
            dialogues, references = zip(*known_questions(bins, split, cfg.num_questions, cfg.seed))
            for name, given in chain(ask_in_chats(answer, dialogues, cfg.seed),
                                     ask_reworded(answer, dialogues)):
                columns = list(zip(*map(compare, given, references)))  # exact, F1, ROUGE-L
                shown = (mean_and_error(values) for values in columns)
                print(f"{len(given):7,} {sum(f >= SAME for f in columns[1]):8,}",
                      *(f"{p:8.2%} ± {e:6.2%}" for p, e in shown), f" {split}, {name}")


TASKS = dict(bpb=bpb, choice=choice, cloze=cloze, overlap=overlap, facts=facts, answers=answers)


def main():
    """Run the task that the command line names."""
    cfg, arguments = configure(__file__, files=False)
    if not arguments or arguments[0] not in TASKS:
        raise UserError(f"name a task: {', '.join(TASKS)} (--help explains them)")
    check_ranges(cfg, NUMBERS)
    TASKS[arguments[0]](cfg, arguments[1:])


if __name__ == "__main__":
    run_main(main, __file__)

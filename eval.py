"""How good a model is: bits per byte, Chinese multiple choice, and how much of it is recital.

    python eval.py bpb demo            # of a prepared set's val split, or of a text file
    python eval.py choice cmmlu/test   # .csv or .jsonl tables of questions; a file is a subject
    python eval.py cloze demo          # title -> which of four first sentences, all held out
    python eval.py overlap demo        # the longest passage of its samples that it has read

--model= names any model folder or hub id: ours, or Hugging Face's GPT-2 and Qwen3.
"""
# ---- what ----
model = ""             # folder or hub id; "" = the newest base run under out/
block_size = 4096      # longest context in tokens; the model's own where that is shorter
batch_size = 8         # rows read at once
# ---- bpb ----
stride = 0             # tokens from window to window; 0 = side by side, as in training. Less than
#                        the context makes them overlap: more to go by for each token, but slower
# ---- choice ----
description = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。"  # leads each question
subjects = ""          # JSON file {file's name: subject}; C-Eval's subject_mapping.json will do
endoftext = False      # begin with <|endoftext|>, as our documents do; lm-eval does not
# ---- cloze, overlap ----
seed = 1337            # draws the wrong sentences; sample i has seed + i
# ---- overlap ----
num_samples = 20
max_new_tokens = 256   # of each
starts = ""            # texts to continue, "|" between them: each sample takes the next
temperature = 0.7      # 0 = always the likeliest; this and the next as in training's samples
top_k = 50             # choose among so many of the likeliest; 0 = all
top_p = 0.9            # choose among the likeliest that make up this mass; 1 = all
repetition_penalty = 1.2  # above 1 discourages what was said already
# ---- machine ----
device = "auto"        # cuda, mps, cpu
dtype = "auto"         # to compute in: float32, bfloat16, float16; auto as training does

import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

from config import UserError, configure, newest_model, run_main
from data.bins import Bins
from data.files import MARK, Dropped, find_files, read_each, suffix
from data.questions import answers, letters, read_questions, sentences, title_questions
from data.records import RECORDS
from data.sources import read_text
from engine.machine import choose_device, choose_dtype
from engine.rundir import RANGES, check_range, load_model
from engine.score import bits_per_byte, choose, standard_error
from sample import continue_starts

NUMBERS = RANGES | dict(block_size=(2, 2**40), batch_size=(1, 2**40), stride=(0, 2**40),
                        seed=(0, 2**62), num_samples=(1, 2**40), max_new_tokens=(1, 2**40))


@contextmanager
def loaded(cfg):
    """(model, its tokenizer), computing inside as training's evaluations do."""
    path = cfg.model or newest_model("base")
    if not path:
        raise UserError("no base model under out/ yet. Run: python pretrain.py config/demo.py, "
                        "or name one: --model=FOLDER_OR_HUB_ID")
    model, tok = load_model(Path(path).as_posix(), block_size=cfg.block_size)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device.type)
    print(f"[{Path(path).as_posix()}, {device}, {str(dtype)[6:]}]")
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield model.to(device).eval(), tok


def documents(bins, split):
    """(text, ids) of each document of a prepared set; the ids end with <|endoftext|>."""
    tokens, starts = bins.tokens(split), bins.starts(split)
    for first, end in zip(starts, starts[1:]):
        yield bins.tokenizer.visible(tokens[first:end]).decode(errors="replace"), tokens[first:end]


def one_word(words, what):
    if len(words) != 1 or not words[0].strip():
        raise UserError(f"name one {what}; this is: {' '.join(words) or 'none'}")
    return words[0]


def print_skipped(reasons):
    for reason, n in reasons.items():
        print(f"skipped {n:,}: {reason}")


# ---- bits per byte ----

def texts_to_score(name, tok, dropped):
    """(text, ids) of each document of a set's val split or of files; dropped counts the others.

    A .jsonl (.csv ...) file has a document a record, as prepare.py text reads it; others are one,
    or where they are over 4 million characters long several.
    """
    if (Path("data") / name.removeprefix("data/") / "meta.json").is_file():
        bins = Bins(name)
        if bins.kind != "text":
            raise UserError(f"{bins.folder} holds dialogues; bits per byte are for texts")
        own = bins.tokenizer.fingerprint == tok.fingerprint
        for text, ids in documents(bins, "val"):
            yield text, ids if own else [*tok.encode(text), tok.eot]
        return
    if not Path(name).exists():
        raise UserError(f"{name} is neither a prepared set under data/ nor a file")
    endings = (*RECORDS, ".txt", ".md")
    for doc in read_each(find_files([name], lambda file: suffix(file) in endings, endings),
                         lambda file: suffix(file) in endings, read_text):
        if isinstance(doc, Dropped):
            dropped[f"{doc.reason} ({doc.where})"] += 1
        elif MARK in doc or not doc:
            dropped["empty" if not doc else "bytes that are no text"] += 1
        else:
            yield doc, [*tok.encode(doc), tok.eot]


def bpb(cfg, words):
    """Print the bits per byte of one set or file."""
    name, dropped = one_word(words, "prepared set or text file"), Counter()
    with loaded(cfg) as (model, tok):
        context = model.config.block_size
        if cfg.stride > context:
            raise UserError(f"stride={cfg.stride} is more than the context, {context} tokens")
        docs = texts_to_score(name, tok, dropped)
        s = bits_per_byte(model, tok, docs, cfg.stride, cfg.batch_size)
    print_skipped(dropped)
    print(f"{name}: {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes, "
          f"{s['characters']:,} characters; context {context:,}, stride {cfg.stride or context:,}\n"
          f"nats per token {s['nats']:.4f}  bits per byte {s['bpb']:.4f}  "
          f"bits per character {s['bpc']:.4f}")


# ---- multiple choice ----

def choice(cfg, words):
    """Ask the questions in tables both by letter and by the answer's own words."""
    if not words:
        raise UserError("name files or folders with questions: python eval.py choice FILES...")
    subjects = read_questions(words, cfg.description, cfg.subjects)
    with loaded(cfg) as (model, tok):
        begin = [tok.eot] if cfg.endoftext else []
        print_scores(model, tok, subjects, (letters, answers), begin, cfg)


def cloze(cfg, words):
    """Ask which of four first sentences stands under a title, all from a set's val split."""
    bins = Bins(one_word(words or ["demo"], "prepared set"))
    made = title_questions((text for text, _ in documents(bins, "val")), cfg.seed)
    with loaded(cfg) as (model, tok):
        print_scores(model, tok, {bins.folder: made}, (sentences,), [tok.eot], cfg)


def print_scores(model, tok, subjects, ways, begin, cfg):
    """Score and print. subjects: {name: (Questions, Counter of the rows that are none)}."""
    print("  read  scored  chance", *(f"{way.__name__:>9} ±  error" for way in ways), " subject")
    all_marks, means, n_read = [], [], 0
    for name, (questions, skipped) in subjects.items():
        marks = [[1 / len(q.options) for q in questions]]
        for way in ways:
            asked = [way(q) for q in questions]
            chosen, n_cut = choose(model, tok, asked, begin, cfg.batch_size)
            marks.append([n == q.answer for n, q in zip(chosen, questions)])
            if n_cut:
                print(f"{name}: {n_cut:,} prompts ({way.__name__}) are longer than the context of "
                      f"{model.config.block_size:,} tokens; their beginning was cut off")
        marks = list(zip(*marks))
        n_read, all_marks = n_read + len(marks) + skipped.total(), all_marks + marks
        if marks:
            means.append(print_line(name, len(marks) + skipped.total(), marks))
        print_skipped(skipped)
    if len(means) > 1:
        print_line("all questions", n_read, all_marks)
        shares = (f"{sum(column) / len(means):9.2%}" + " " * 9 for column in list(zip(*means))[1:])
        print(" " * 22, *shares, f" mean of {len(means)} subjects")


def print_line(name, n_read, marks):
    """A line of the table -> the means in it. marks: of each scored question its chance, and
    whether each way was right."""
    n, means = len(marks), [sum(column) / len(marks) for column in zip(*marks)]
    shown = [f"{p:9.2%} ± {standard_error(p, n):6.2%}" for p in means[1:]]
    print(f"{n_read:6,} {n:7,} {means[0]:7.2%}", *shown, f" {name}")
    return means


# ---- memorisation ----

def ngrams(text, n):
    return {text[i:i + n] for i in range(len(text) - n + 1)}


def overlap_with(docs, texts):
    """(longest passage that one of docs shares with one of texts, share of the texts' 4-grams of
    Han characters that stand in docs, number of those 4-grams).

    Exact, in one pass: while a document shares anything longer than the best so far, look for that.
    """
    han = [run[i:i + 4] for text in texts for run in re.findall("[\u4e00-\u9fff]{4,}", text)
           for i in range(len(run) - 3)]
    wanted, found, passage = set(han), set(), ""
    longer = set().union(*(ngrams(text, 1) for text in texts))
    for doc in docs:
        found |= wanted & ngrams(doc, 4)
        while shared := longer & ngrams(doc, len(passage) + 1):
            passage = min(shared)  # any of them; the same in every run
            longer = set().union(*(ngrams(text, len(passage) + 1) for text in texts))
    return passage, sum(gram in found for gram in han) / max(1, len(han)), len(han)


def overlap(cfg, words):
    """Print how much of the model's samples, and of held-out text, a set's train split holds."""
    bins = Bins(one_word(words, "prepared set"))
    with loaded(cfg) as (model, tok):
        samples = [text for _, text in continue_starts(model, tok, cfg.starts.split("|"), cfg)]
    left, held_out = sum(map(len, samples)), []
    for text, _ in documents(bins, "val"):  # as much of it, to compare with
        held_out.append(text[:left])
        left -= len(held_out[-1])
        if not left:
            break
    for name, texts in ((f"{len(samples)} samples", samples), ("held-out text", held_out)):
        docs = (text for text, _ in documents(bins, "train"))
        passage, share, n = overlap_with(docs, texts)
        print(f"{name}, {sum(map(len, texts)):,} characters: {share:.1%} of {n:,} Han 4-grams "
              f"stand in what {bins.folder} trains on\n  longest passage that does, "
              f"{len(passage):,} characters: {passage!r}")


# ---- starting ----

TASKS = dict(bpb=bpb, choice=choice, cloze=cloze, overlap=overlap)


def main():
    cfg, words = configure(__file__, files=False)
    if not words or words[0] not in TASKS:
        raise UserError(f"say what to measure: {', '.join(TASKS)} (--help tells how)")
    cfg.min_p, cfg.stop = 0.0, ""  # which sample.py has beside those above
    for name, (low, high) in NUMBERS.items():
        check_range(name, getattr(cfg, name), low, high)
    TASKS[words[0]](cfg, words[1:])


if __name__ == "__main__":
    run_main(main, __file__)

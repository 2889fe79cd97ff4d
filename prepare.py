"""Prepare a training set from raw text: read, clean, drop duplicates, encode, split, write.

    python prepare.py demo                        # the embedded text: data/demo, data/demo_chat
    python prepare.py wiki [PATH ...]             # or tinystories, fineweb, text, chat, belle ...
    python prepare.py wiki thucnews --name=zh     # several sources in one set
    python prepare.py tokenizer PATH ... --vocab_size=16384      # only train a tokenizer
    python prepare.py inspect NAME                # describe data/NAME

The set is written to data/<name>/. Without PATH a source reads data/raw/<source>/. Files may be
.gz .bz2 .xz .zip .tar, in UTF-8, UTF-16, GB18030 or Big5. Files named train, dev, test and the
like keep their splits. The set is the same, byte for byte, for any number of workers and any order
of paths.
"""
# ---- output ----
name = ""            # folder under data/; "" = the names of the sources
# ---- tokenizer ----
tokenizer = ""       # bytebpe (trained here), qwen, gpt2, a hub id or a path; "" = xiaoyu's, so
#                      that training can start from it; of 50 MB of text and more qwen; for chat
#                      sources that of the newest base model
vocab_size = 0       # ids of a new bytebpe; 0 = by the size of the text, 512 to 16,384; demo 4,096
split_rule = ""      # gpt2, cl100k, o200k or qwen, for vocab.json or .tiktoken files of other sizes
# ---- input ----
field = ""           # key of the text in .jsonl .json .csv .parquet; "" = text, content, completion
lines = False        # each line of a .txt is a document
evidence = False     # put the text that a question is about in front of it (webqa, dureader, SQuAD)
chosen = False       # read the chosen answers of preference pairs (DPO); else they are dropped
sample = 1.0         # share of the documents to use, chosen by their hash
max_docs = 0         # documents to read of each source; 0 = all
# ---- cleaning of texts ----
min_chars = 10       # drop shorter texts
min_chinese = 0.1    # drop texts with a smaller share of Chinese characters
simplify = False     # convert traditional to simplified characters (pip install opencc)
near_duplicates = 0.0  # drop texts at least this similar to an earlier one, e.g. 0.8; 0 = off
#                      (pip install datasketch)
# ---- split and speed ----
val = ""             # file or folder to validate on; "" = files named dev, val ..., else a share
val_fraction = 0.0   # share of documents held out, chosen by their hash; 0 = 0.05, of 50 MB and
#                      more 0.005
workers = 0          # processes that clean and encode; 0 = one per core, fewer for little text
# ---- inspect ----
plot = False         # also draw data/NAME/inspect.png (pip install matplotlib)

import difflib
import hashlib
import heapq
import itertools
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from common.command_line import UserError, run_main  # first: reports Ctrl-C

import numpy as np
from tqdm import tqdm

from common.cpu import cpu_count
from common.settings import check_ranges, configure
from corpus.clean import Rules, clean_document, identity, simplifier
from corpus.counts import Counts, format_counts
from corpus.files import Dropped, find_files, first_reason
from corpus.hub import download
from corpus.near_duplicates import signature
from corpus.pool import map_batches
from corpus.records import RECORDS
from corpus.sources import SOURCES, WikiPage
from tokens.bin_writer import BinWriter, check_replaceable
from tokens.bins import SPLITS, id_dtype
from tokens.describe import inspect
from tokens.splits import (
    MIN_DOCUMENTS, SMALL, SMALL_FRACTION, Encoded, SplitWriter, held_out_before, named_splits,
    split_of)
from tokens.tokenizer_files import load_tokenizer, train_bytebpe

DEMO = Path(__file__).parent / "data" / "raw" / "demo"
XIAOYU = Path(__file__).parent / "data" / "xiaoyu" / "base"
BATCH_CHARS = 500_000          # size of the batches that are sent to the workers
TOKENIZER_CHARS = 8_000_000    # text that a tokenizer is trained on at most; takes 2 GB of memory
FEW_TOKENS = 100_000           # in a training split; with fewer, say what can be expected
WIKI_FOLDERS = ("wiki_zh_2019", "wiki_zh", "wiki_zh*.zip", "[A-Z][A-Z]/wiki_[0-9]*")  # in ./
RANGES = dict(vocab_size=(0, 2**20), sample=(1e-9, 1), max_docs=(0, 2**31), min_chars=(0, 2**31),
              min_chinese=(0, 1), near_duplicates=(0, 0.95), val_fraction=(0, 0.99),
              workers=(0, 256))
RECORDED = ("val_fraction", "sample", "max_docs", "field", "lines", "evidence", "chosen",
            "near_duplicates")


# ---- sources: [(name in SOURCES, files, their given split: "val", "test", "train" or "")] ----

def parse_sources(words, val="", default=""):
    """Return the sources of words, which are names of sources, each followed by its paths.

    A word that is both the name of a source and an existing path is taken as a path after its own
    name, and directly after the name of another source.
    val: path of the validation split; default: the source of paths that come first.
    """
    paths = {}
    for word in words:
        may_be_path = default and (word == default or not paths.get(default))
        if word in SOURCES and not (may_be_path and os.path.exists(word)):
            default = word
            paths.setdefault(default, [])
        elif not default:
            near = difflib.get_close_matches(word, SOURCES, n=1)
            hint = (f"; did you mean {near[0]}?" if near else "") + (
                f"; for a file or folder: python prepare.py text {word}" * os.path.exists(word))
            raise UserError(f"name a source: demo, {', '.join(SOURCES)}"
                            + (f" ('{word}' is not one{hint})" if word else ""))
        elif not word:
            raise UserError("a path is empty; is a shell variable not set?")
        else:
            paths.setdefault(default, []).append(word)
    reader = default if len(paths) == 1 else kind_of(paths)  # kinds are names of sources, too
    held_out = dict.fromkeys(find_files([val], SOURCES[reader].wanted) if val else ())
    sources = [(reader, list(held_out), "val")] if val else []
    for source in sorted(paths):
        files = [f for f in source_files(source, paths[source]) if f not in held_out]
        # in a set of texts, the chat set of the same dialogues decides their split
        rest = "train" if val and SOURCES[source].kind == SOURCES[reader].kind else ""
        sources += [(source, part, split or rest)
                    for split, part in named_splits(source, files).items()]
    # what is held out comes first, because a training document equal to it is dropped
    return sorted(sources, key=lambda source: source[2] in ("train", ""))


def kind_of(names):
    """Return the kind of a set of these sources: dialogues among texts are read as texts."""
    return "text" if any(SOURCES[name].kind == "text" for name in names) else "chat"


def source_files(source, paths):
    """Return the files of a source: in paths, else in data/raw/<source>/, else from the hub."""
    raw, known = Path("data") / "raw" / source, SOURCES[source]
    if not paths and known.is_missing(raw):
        for pattern in WIKI_FOLDERS if source == "wiki" else ():
            paths = paths or sorted(map(str, Path().glob(pattern)))
        advice = f"put {known.what} there, or run: python prepare.py {source} PATH"
        if paths:
            print(f"{raw} is empty; reading {', '.join(paths[:3])}")
        elif known.hub:
            download(*known.hub, raw, advice)
        else:
            raise UserError(f"no path given and {raw.absolute()} is empty; {advice}")
    other = f"; {' '.join(RECORDS)}: python prepare.py text PATH" if source == "thucnews" else ""
    return find_files(paths or [raw], known.wanted, (" ".join(known.endings) + other,))


# ---- batches: (source, split, [(place, document)]) ----

def batches(sources, cfg, count_dropped):
    """Yield (source, split, [(place, document)]) of about BATCH_CHARS characters, in input order.

    count_dropped(source, reason, place, details) is called for each document that can't be read.
    """
    for source, files, split in sources:
        chat = SOURCES[source].kind == "chat"
        options = (dict(evidence=cfg.evidence, chosen=cfg.chosen) if chat else
                   dict(field=cfg.field, lines=cfg.lines))
        documents = SOURCES[source].documents(files, **options)
        batch, size = [], 0
        for place, doc in itertools.islice(documents, cfg.max_docs or None):
            if isinstance(doc, Dropped):
                count_dropped(source, doc.reason, place, doc.details)
                continue
            batch.append((place, doc))
            size += len(raw_text(doc)) + 100
            if size >= BATCH_CHARS:
                yield source, split, batch
                batch, size = [], 0
        if batch:
            yield source, split, batch


def raw_texts(sources, cfg):
    """Yield the text of each document as it was read, but for characters that are no Unicode."""
    for *_, batch in batches(sources, cfg, lambda *_: None):
        yield from (raw_text(doc).encode(errors="replace").decode() for _, doc in batch)


def measure(sources, cfg):
    """Return (number of documents, bytes of their texts), counted up to SMALL bytes."""
    documents = size = 0
    for text in raw_texts(sources, cfg):
        documents, size = documents + 1, size + len(text.encode())
        if size >= SMALL:
            break
    return documents, size


def raw_text(doc):
    """Return the text of a document, as it was read."""
    return doc.raw if isinstance(doc, WikiPage) else plain_text(doc)


def plain_text(doc):
    """Return a str as it is, and of a dialogue the contents of its messages, joined by newlines."""
    return doc if isinstance(doc, str) else "\n".join(m["content"] for m in doc)


# ---- cleaning and encoding, in the workers ----

def worker_settings(cfg, sources, **more):
    """Return what the functions below need, in a form that can be sent to a process. Without the
    setting, .workers is one per core and 4 MB of files, because a start takes 0.5 s."""
    if cfg.simplify:
        simplifier()  # raises its UserError here, not in a worker, if opencc is missing
    size = sum(os.path.getsize(f) for _, files, _ in sources for f in files)
    more |= dict(rules=Rules(cfg.min_chars, cfg.min_chinese, cfg.simplify),
                 threshold=int(cfg.val_fraction * 2**64),
                 workers=cfg.workers or max(1, min(cpu_count(), size // 4_000_000)))
    return SimpleNamespace(**dict(small=False, few=False, before=frozenset()) | vars(cfg) | more)


def digest(doc):
    """Return a cleaned document's 64-bit hash, by which duplicates are found and split and sample
    are chosen."""
    hashed = hashlib.blake2b(identity(doc).encode(), digest_size=8)
    return int.from_bytes(hashed.digest(), "little")


def clean_batch(documents, settings):
    """Yield (place, cleaned document, reason to drop it or "", trimmed, digest) of each."""
    for place, doc in documents:
        doc, reason, trimmed = clean_document(doc, settings.rules)
        key = digest(doc)
        # by the lower half of the hash, because the upper half decides the split
        if not reason and key % 2**32 >= settings.sample * 2**32:
            reason = "not in the sample"
        yield place, doc, reason, trimmed, key


def encode_batch(batch, settings):
    """Return (source, split, dropped, encoded, ids): (reason, place) of dropped documents, the
    Encoded of the others, and their ids one after the other, each with its <|endoftext|>."""
    source, split, documents = batch
    tok, dropped, encoded, pieces = settings.tokenizer, [], [], [np.array([], settings.dtype)]
    for place, doc, reason, trimmed, key in clean_batch(documents, settings):
        if reason:
            dropped.append((reason, place))
            continue
        text = plain_text(doc)
        ids = tok.encode_chat(doc) if settings.kind == "chat" else tok.encode(text)
        ids.append(tok.eot)
        pieces.append(np.array(ids, settings.dtype))
        encoded.append(Encoded(place, key, len(ids), len(text), len(text.encode()), trimmed,
                               signature(text) if settings.near_duplicates else None))
    return source, split, dropped, encoded, np.concatenate(pieces)


def text_batch(batch, settings):
    """Return [(reason not to train a tokenizer on it or "", digest, text)] of the documents."""
    _, split, documents = batch
    return [(reason or "held out" * (split_of(
        split, key, settings.threshold, settings.before) != "train"), key,
             plain_text(doc)) for _, doc, reason, _, key in clean_batch(documents, settings)]


# ---- writing ----

def prepare(sources, kind, name, tok, cfg):
    """Write data/<name>, a set of kind "text" or "chat", with the Tokenizer tok."""
    folder, counts = Path("data") / name, Counts(sources)
    if (folder / "meta.json").exists():
        print(f"replacing {folder}")
    settings = worker_settings(cfg, sources, kind=kind, tokenizer=tok,
                               dtype=id_dtype(tok.vocab_size))
    with BinWriter(folder, tok.vocab_size) as out, tqdm(
            unit=" documents", delay=2, disable=None, leave=False) as progress:
        writer = SplitWriter(out, kind, tok, counts, settings)
        for source, split, dropped, encoded, ids in map_batches(
                encode_batch, batches(sources, cfg, counts.drop), settings, settings.workers):
            for reason, place in dropped:
                counts.drop(source, reason, place)
            writer.add(source, split, encoded, ids)
            counts.add_time(source)
            progress.update(len(dropped) + len(encoded))
        if writer.seen:
            writer.hold_out_enough()
        if empty := [split for split in SPLITS if not out.n_docs(split)]:
            others = format_counts(counts.dropped() + Counter({"written": len(writer.seen)}))
            raise UserError(f"no document is left for the {' and the '.join(empty)} split of "
                            f"{folder}: {others or 'the files are empty'}")
        seconds = counts.seconds.total()
        run = dict(command=" ".join(sys.argv).encode(errors="backslashreplace").decode(),
                   time=time.strftime("%Y-%m-%d %H:%M:%S"), seconds=round(seconds, 2),
                   workers=settings.workers, tokens_per_second=counts.speeds())
        recorded = {key: getattr(cfg, key) for key in RECORDED} | vars(settings.rules)
        out.finish(tok, dict(kind=kind, settings=recorded, splits=writer.splits,
                             sources=counts.sources, run=run))
    speed = sum(s["bytes"] for s in writer.splits.values()) / 1e6 / max(seconds, 1e-3)
    print(f"{folder}: {seconds:.1f} s, {speed:.1f} MB/s, {tok.vocab_size:,} ids ({out.dtype.name})")
    counts.print(writer.splits)
    if kind == "text" and out.starts["train"][-1] < FEW_TOKENS:
        print(f"  under {FEW_TOKENS:,} training tokens: a model can learn the style of so little "
              "text, not its facts; more text helps most")


# ---- tokenizers ----

def suitable_tokenizer(sources, kind, cfg):
    """Return the setting `tokenizer` for sources where it is not given, and print the reason."""
    if kind == "chat":
        from models.folders import find_model  # here, because it imports torch
        found = find_model("", "base", "tokenizer")
        reason = f"that of {found}; for another base model --tokenizer=ITS_FOLDER"
    elif not cfg.small:
        found, reason = "qwen", "qwen, for 50 MB and more; without a network --tokenizer=bytebpe"
    else:
        text = "".join(itertools.islice(raw_texts(sources, cfg), 1000))[:100_000]
        fits = len(load_tokenizer(XIAOYU).encode(text)) <= len(text)
        found, reason = "bytebpe", (
            "trained on these texts, because xiaoyu's needs over a token a character")
        if fits:
            found, reason = XIAOYU, "that of xiaoyu, so that training can start from it"
    print(f"tokenizer: {reason}")
    return found


def suitable_vocab_size(characters):
    """Return how many ids a tokenizer for so many characters of text gets: 2,048 for 33,000 and
    4,096 for 340,000 were the best of four sizes each (LOG.md, "Own texts")."""
    return min(16384, max(512, 2 ** round(math.log2(62 * characters ** (1 / 3)))))


def make_tokenizer(wanted, sources, cfg, vocab_size=0):
    """Return the Tokenizer that the setting names, trained on the sources if it is "bytebpe".
    vocab_size: that of a new one; 0 = by the size of the text. The setting comes first."""
    if wanted != "bytebpe":
        return load_tokenizer(wanted, cfg.split_rule, lossless=True)
    dropped = Counter()
    batch_iter = batches(sources, cfg, lambda source, reason, *_: dropped.update([reason]))
    settings = worker_settings(cfg, sources)
    settings.threshold *= not settings.few  # of few texts the ends are held out instead
    results = map_batches(text_batch, batch_iter, settings, settings.workers)
    texts = sample_texts(itertools.chain.from_iterable(results), TOKENIZER_CHARS, dropped)
    n_chars, others = sum(map(len, texts)), format_counts(dropped)
    if not n_chars:
        raise UserError(f"no document is left to train a tokenizer on: {others or 'no files'}")
    if n_chars > 1_000_000 or dropped:
        print(f"training a tokenizer on {len(texts):,} documents, {n_chars:,} characters"
              + f" (others: {others})" * bool(others), flush=True)
    n_ids = cfg.vocab_size or vocab_size or suitable_vocab_size(n_chars)
    tok = train_bytebpe(texts, n_ids)
    if tok.vocab_size < n_ids:
        print(f"the tokenizer has {tok.vocab_size:,} ids, not {n_ids:,}: no other pieces occur "
              "twice in the text")
    return tok


def sample_texts(rows, max_chars, dropped):
    """Return texts of [(reason, digest, text)] with at most max_chars characters in all.

    The texts with the smallest digests are kept: the result does not depend on their order, and
    memory is bounded. dropped: Counter of the reasons, which is updated. A text that was held out
    before is never kept.
    """
    kept, largest, size, limit, held_out = {}, [], 0, 2**64, set()
    for reason, key, text in rows:
        if reason == "held out":
            held_out.add(key)
        reason = reason or first_reason({
            "held out": key in held_out, "not in the sample": key >= limit})
        if reason:
            dropped[reason] += 1
        elif key not in kept:
            kept[key] = text
            heapq.heappush(largest, -key)
            size += len(text)
        while size > max_chars and len(kept) > 1:
            limit = -heapq.heappop(largest)
            size -= len(kept.pop(limit))
            dropped["not in the sample"] += 1
    return [kept[key] for key in sorted(kept)]


# ---- the commands ----

def prepare_tokenizer(words, cfg):
    """Train a tokenizer and write it to data/<name>/."""
    if not words:
        raise UserError("name the texts: python prepare.py tokenizer PATH ... --vocab_size=16384")
    folder = Path("data") / (cfg.name or "tokenizer")
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} is a prepared set with its tokenizer. Choose another --name")
    tok = make_tokenizer("bytebpe", parse_sources(words, cfg.val, "text"), cfg)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(folder)
    print(f"{folder}: {tok.vocab_size:,} ids. Use it with --tokenizer={folder.as_posix()}")


def prepare_demo(words, cfg):
    """Prepare data/demo (texts, and the training dialogues as plain text) and data/demo_chat, which
    share one tokenizer."""
    if given := words[0] if words else cfg.val:
        raise UserError(f"demo is the embedded text and takes no path ({given})")
    name = cfg.name or "demo"
    texts, chats = (parse_sources([source, *map(str, DEMO.glob(files))])
                    for source, files in (("text", "texts_*.jsonl"), ("chat", "dialogues_*.jsonl")))
    texts += [source for source in chats if source[2] == "train"]
    sets = (texts, "text", name), (chats, "chat", f"{name}_chat")
    for _, _, set_name in sets:
        check_replaceable(Path("data") / set_name)
    tok = make_tokenizer(cfg.tokenizer or "bytebpe", texts, cfg, 4096)
    for sources, kind, set_name in sets:
        prepare(sources, kind, set_name, tok, cfg)


def prepare_sources(words, cfg):
    """Prepare one set of the sources that words name."""
    sources = parse_sources(words or [""], cfg.val)
    names = sorted({source for source, _, _ in sources})
    name, kind = cfg.name or "_".join(names), kind_of(names)
    folder = Path("data") / name
    check_replaceable(folder)
    documents, size = measure(sources, cfg)
    cfg.small, cfg.few = size < SMALL, kind == "text" and documents < MIN_DOCUMENTS
    cfg.before = held_out_before(folder, kind, digest)
    cfg.val_fraction = cfg.val_fraction or (SMALL_FRACTION if cfg.small else 0.005)
    wanted = cfg.tokenizer or suitable_tokenizer(sources, kind, cfg)
    prepare(sources, kind, name, make_tokenizer(wanted, sources, cfg), cfg)


def main(argv=None):
    """Run the command that the command line names, or prepare a set of sources."""
    cfg, words = configure(__file__, argv, files=False)
    check_ranges(cfg, RANGES)
    if cfg.name in (".", "..", "raw") or Path(cfg.name).name != cfg.name or (
            set(cfg.name) & set(",:") or cfg.name.endswith((".part", ".replaced"))):
        raise UserError(f"name={cfg.name} must be the name of a folder in data/ other than raw, "
                        "without , and : and not ending in .part or .replaced")
    commands = dict(demo=prepare_demo, tokenizer=prepare_tokenizer,
                    inspect=lambda names, cfg: inspect(names, cfg.plot))
    if words and words[0] in commands:
        commands[words[0]](words[1:], cfg)
    else:
        prepare_sources(words, cfg)


if __name__ == "__main__":
    run_main(main, __file__)

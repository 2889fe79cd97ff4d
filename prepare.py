"""Raw text to bins: read, clean, drop duplicates, tokenise, split, write data/<name>/.

    python prepare.py demo                        # the embedded text: data/demo, data/demo_chat
    python prepare.py wiki [PATH ...]             # thucnews, text, chat, belle, webqa ... likewise
    python prepare.py wiki thucnews --name=zh     # several sources in one set
    python prepare.py tokenizer PATH ... --vocab_size=16384      # a tokenizer alone
    python prepare.py inspect NAME                # what is in data/NAME

Without PATH a source reads data/raw/<source>/. Files may be .gz .bz2 .xz .zip, in UTF-8, UTF-16 or
GB18030. The set is the same, byte for byte, for any number of workers and any order of paths.
"""
# ---- output ----
name = ""            # folder under data/; "" = the names of the sources
# ---- tokenizer ----
tokenizer = ""       # bytebpe (trained here), qwen, gpt2, a hub id or a path; "" = qwen, but demo:
#                      bytebpe, and chat: that of the newest base model under out/
vocab_size = 0       # ids of a new bytebpe; 0 = 16,384, demo: 4,096
# ---- what is read ----
field = ""           # key of the text in .jsonl .json .csv .parquet; "" = text, content, completion
evidence = False     # questions about a text (webqa, dureader, SQuAD's form) with it in front
sample = 1.0         # share of the documents that is taken, chosen by their hash
max_docs = 0         # documents read of each source; 0 = all
# ---- cleaning of texts ----
min_chars = 10       # shorter texts are dropped
min_chinese = 0.1    # texts with a smaller share of Chinese characters are dropped
simplify = False     # traditional to simplified characters (pip install opencc)
near_duplicates = 0.0  # drop texts as similar as this to an earlier one: 0.8, say (pip install
#                      datasketch)
# ---- split and speed ----
val_fraction = 0.0   # share of documents held out, chosen by their hash; 0 = 0.005, demo: 0.05
workers = 0          # processes that clean and tokenise; 0 = one a core, fewer for little text
# ---- inspect ----
plot = False         # also draw data/NAME/inspect.png (pip install matplotlib)

import difflib
import hashlib
import heapq
import itertools
import os
import sys
import time
from array import array
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from config import UserError, configure, newest_model, run_main
from data.bins import SPLITS, BinWriter, id_dtype
from data.clean import Rules, clean_document, identity, to_simplified
from data.files import Dropped, find_files
from data.hub import fetch
from data.near import NearDuplicates, signature
from data.pool import cpu_count, map_batches
from data.receipts import Receipts, listed
from data.sources import SOURCES, WikiPage
from data.tokenizer import load_tokenizer, train_bytebpe

DEMO = Path(__file__).parent / "data" / "demo" / "raw"
BATCH = 500_000      # characters that travel to a worker at once
MIN_DOCUMENTS = 20   # with fewer, whole documents are too coarse a split
LARGE = 50_000_000   # tokens; the few documents held out of so many are long ones
RECORDED = ("val_fraction", "sample", "max_docs", "field", "evidence", "near_duplicates")
TRAINING_TEXT = 8_000_000  # characters a tokenizer learns from at most: 2 GB of memory


# ---- reading ----

def choose_jobs(words, default=""):
    """Words of the command line, sources each with their paths -> sorted [(source, files)]."""
    paths = {}
    for word in words:
        if word in SOURCES:
            default = word
            paths.setdefault(default, [])
        elif not default:
            near = difflib.get_close_matches(word, SOURCES, n=1)
            hint = f"'{word}' is none" + (f"; did you mean {near[0]}?" if near else "") + (
                f"; for a file or folder: python prepare.py text {word}" * os.path.exists(word))
            raise UserError(f"name a source: demo, {', '.join(SOURCES)}. --help tells more"
                            + (f" ({hint})" if word else ""))
        elif not word:
            raise UserError("an empty path; is a shell variable unset?")
        else:
            paths.setdefault(default, []).append(word)
    return [(source, files_of(source, paths[source])) for source in sorted(paths)]


def files_of(source, paths):
    """The source's files: under paths, else in data/raw/<source>/, else fetched from the hub."""
    raw, wanted = Path("data") / "raw" / source, SOURCES[source].wanted
    if not paths and not (raw.is_dir() and any(p.name[0] != "." for p in raw.iterdir())):
        if not SOURCES[source].hub:
            raise UserError(f"no path given and nothing in {raw}. Put there {SOURCES[source].what};"
                            f" or run: python prepare.py {source} PATH")
        fetch_from_hub(source, raw)
    return find_files(paths or [raw], wanted, SOURCES[source].endings)


def fetch_from_hub(source, folder):
    """Download the source's file into folder; a download that breaks off is taken up again."""
    dataset, file = SOURCES[source].hub
    print(f"fetching {dataset} from the hub into {folder} (goes on where it broke off)", flush=True)
    try:
        fetch(dataset, file, folder)
    except Exception as e:  # the hub client raises errors of four libraries
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(
            f"{dataset} can't be fetched ({type(e).__name__}: {reason}). Set HF_ENDPOINT to a "
            f"mirror and start again; or put into {folder} {SOURCES[source].what}; or run: "
            f"python prepare.py {source} PATH") from e


def read(jobs, cfg):
    """(source, document or Dropped) of every document in the sources' files, in order."""
    for source, files in jobs:
        chat = SOURCES[source].kind == "chat"
        options = dict(evidence=cfg.evidence) if chat else dict(field=cfg.field)
        documents = SOURCES[source].documents(files, **options)
        for doc in itertools.islice(documents, cfg.max_docs or None):
            yield source, doc


def size_of(doc):
    if isinstance(doc, list):
        return sum(len(m["content"]) for m in doc)
    return len(doc.raw if isinstance(doc, WikiPage) else doc)


def batches(documents, count_dropped):
    """Lists of (source, document) of one source, of about BATCH characters; what is Dropped is
    counted instead."""
    batch, size = [], 0
    for source, doc in documents:
        if batch and source != batch[-1][0]:
            yield batch
            batch, size = [], 0
        if isinstance(doc, Dropped):
            count_dropped(source, doc.reason, doc.where)
            continue
        batch.append((source, doc))
        size += size_of(doc) + 100
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- work on one batch, in any process ----

def digest(data):
    """64-bit hash of a cleaned document: finds exact duplicates and decides split and sample."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def clean_batch(batch, job):
    """Yields (source, cleaned document, reason to drop it or "", trimmed, digest)."""
    for source, doc in batch:
        doc, reason, trimmed = clean_document(doc, job.rules)
        key = digest(identity(doc).encode())
        if not reason and key % 2**32 >= job.sample * 2**32:  # the split looks at the upper half
            reason = "not in the sample"
        yield source, doc, reason, trimmed, key


def contents(doc):
    """What a reader sees of a document: in a dialogue the contents of its messages, a line each."""
    return doc if isinstance(doc, str) else "\n".join(m["content"] for m in doc)


def encode_batch(batch, job):
    """-> (rows, ids): for each document (source, reason, trimmed, digest, tokens, characters,
    bytes, signature), and the ids of all that have no reason to be dropped, end tokens included.
    """
    rows, pieces, tok = [], [], job.tokenizer
    for source, doc, reason, trimmed, key in clean_batch(batch, job):
        if reason:
            rows.append((source, reason, trimmed, key, 0, 0, 0, None))
            continue
        text = contents(doc)
        ids = tok.dialogue(doc) if job.kind == "chat" else tok.encode(text)
        ids.append(tok.eot)
        pieces.append(np.array(ids, dtype=job.dtype))
        rows.append((source, "", trimmed, key, len(ids), len(text), len(text.encode()),
                     signature(text) if job.near else None))
    return rows, np.concatenate(pieces) if pieces else np.array([], dtype=job.dtype)


def text_batch(batch, job):
    """[(reason why it is no training text or "", digest, text)]: for a new tokenizer."""
    return [(reason or ("held out" if key < job.threshold else ""), key, contents(doc))
            for _, doc, reason, _, key in clean_batch(batch, job)]


# ---- a prepared set ----

class Keeper:
    """Takes what the workers made, in the order of reading: drops duplicates, splits, writes."""

    def __init__(self, kind, cfg, receipts, out):
        self.kind, self.receipts, self.out = kind, receipts, out
        self.threshold, self.seen = int(cfg.val_fraction * 2**64), set()
        self.train_keys = array("Q")  # in the order of writing; the largest for one never held out
        self.near = NearDuplicates(cfg.near_duplicates) if cfg.near_duplicates else None
        self.splits = {split: dict(characters=0, bytes=0) for split in SPLITS}

    def take(self, rows, ids):
        """The result of one encode_batch."""
        chosen = []  # the split of each document in ids; "" = none
        for source, reason, trimmed, key, tokens, chars, n_bytes, sign in rows:
            split = "val" if key < self.threshold else "train"
            dropped = reason or self.refuse(source, split, key, sign)
            if dropped:
                self.receipts.drop(source, dropped)
            else:
                self.seen.add(key)
                if split == "train":
                    same = self.kind == SOURCES[source].kind
                    self.train_keys.append(key if same else 2**64 - 1)
                self.receipts.write(source, tokens, chars, n_bytes, trimmed)
                self.splits[split]["characters"] += chars
                self.splits[split]["bytes"] += n_bytes
            if not reason:
                chosen.append("" if dropped else split)
        lengths = np.array([row[4] for row in rows if not row[1]], dtype=np.int64)
        for split in SPLITS:
            wanted = np.array(chosen) == split
            if wanted.any():
                self.out.add(split, ids[np.repeat(wanted, lengths)], lengths[wanted])

    def refuse(self, source, split, key, sign):
        """Why a document that is good in itself is not written; "" if it is."""
        if key in self.seen:
            return "duplicate"
        if split == "val" and self.kind != SOURCES[source].kind:
            return "held out for the chat set"  # its val split must not be trained on here
        return "near duplicate" if self.near and self.near.has(key, sign) else ""


def prepare(jobs, kind, name, tok, cfg):
    """Write data/<name> from jobs [(source, files)] with the Tokenizer tok."""
    folder, receipts = Path("data") / name, Receipts(jobs)
    if (folder / "tokenizer.json").exists() and not (folder / "train.bin").exists():
        raise UserError(f"{folder} is a tokenizer alone. Choose another --name")
    if (folder / "meta.json").exists():
        print(f"replacing {folder}")
    n_workers, began = choose_workers(cfg.workers, jobs), time.time()
    job = make_job(cfg, kind=kind, tokenizer=tok, dtype=id_dtype(tok.n_ids))
    with BinWriter(folder, tok.n_ids) as out, tqdm(
            unit=" documents", delay=2, disable=None, leave=False) as progress:
        keeper = Keeper(kind, cfg, receipts, out)
        batch_iter = batches(read(jobs, cfg), receipts.drop)
        for rows, ids in map_batches(encode_batch, batch_iter, job, n_workers):
            keeper.take(rows, ids)
            receipts.lap(rows[-1][0])
            progress.update(len(rows))
        if not keeper.seen:
            raise UserError(f"no document is left for {folder}: "
                            f"{listed(receipts.dropped()) or 'the files are empty'}")
        hold_out_enough(out, keeper, tok, cfg.val_fraction)
        seconds = time.time() - began
        command = " ".join(sys.argv).encode(errors="backslashreplace").decode()
        run = dict(command=command, time=time.strftime("%Y-%m-%d %H:%M:%S"),
                   seconds=round(seconds, 2), workers=n_workers,
                   tokens_per_second=receipts.speeds())
        settings = {k: getattr(cfg, k) for k in RECORDED} | vars(job.rules)
        out.finish(tok, dict(kind=kind, settings=settings, splits=keeper.splits,
                             sources=receipts.sources, run=run))
    speed = sum(s["bytes"] for s in keeper.splits.values()) / 1e6 / seconds
    print(f"{folder}: {seconds:.1f} s, {speed:.1f} MB/s, {tok.n_ids:,} ids ({out.dtype.name})")
    receipts.print(keeper.splits)


def make_job(cfg, **more):
    """What every worker process needs to know."""
    if cfg.simplify:
        to_simplified("")  # refuses here, not in a worker, where opencc is not installed
    rules = Rules(cfg.min_chars, cfg.min_chinese, cfg.simplify)
    return SimpleNamespace(rules=rules, sample=cfg.sample, near=cfg.near_duplicates > 0,
                           threshold=int(cfg.val_fraction * 2**64), **more)


def choose_workers(wanted, jobs):
    """As many as asked for, or one a core and 4 MB of files: starting one takes half a second."""
    size = sum(os.path.getsize(f) for _, files in jobs for f in files)
    return wanted or max(1, min(cpu_count(), size // 4_000_000))


def hold_out_enough(out, keeper, tok, fraction):
    """Split anew where the share is too small: the documents with the smallest hashes, so that 20
    or a twentieth of all are held out; with fewer than MIN_DOCUMENTS texts, the end of each.

    What has LARGE tokens stays as it is: all of it is read for this.
    """
    n_train, n_val = map(out.n_docs, SPLITS)
    total = n_train + n_val
    if n_val and out.starts["train"][-1] > LARGE:
        return
    few_texts = total < MIN_DOCUMENTS and keeper.kind == "text"
    more = 0 if few_texts else max(0, min(20, max(1, total // 20), total - 1) - n_val)
    held = np.argsort(np.array(keeper.train_keys), kind="stable")[:more]
    held = {int(i) for i in held if keeper.train_keys[i] < 2**64 - 1}
    if held:
        parts = [(doc[:0], doc) if i in held else (doc, doc[:0])
                 for i, doc in enumerate(out.documents("train"))]
        parts += [(doc[:0], doc) for doc in out.documents("val")]
        print(f"  the share val_fraction={fraction} is {n_val} documents: {n_val + len(held)} are "
              "held out")
    elif n_val and not few_texts:
        return
    elif keeper.kind == "chat":
        raise UserError("one dialogue can't be split into training and validation; give more")
    else:
        docs = out.documents("train") + out.documents("val")
        parts = [cut_end(doc, fraction, tok.eot) for doc in docs]
        print(f"  few documents: the last {fraction:.1%} of each of the {len(docs)} is the "
              "validation split")
    rewrite(out, parts, keeper.splits, tok)


def cut_end(doc, fraction, eot):
    """(training part, held-out part): the end token and at least four more, or half of it."""
    cut = len(doc) - max(round(fraction * len(doc)), min(5, len(doc) // 2))
    return np.append(doc[:cut], eot)[:cut + (cut > 0)], doc[cut:]


def rewrite(out, parts, splits, tok):
    """Write the set anew from (training part, held-out part) of each document; splits' counts of
    characters and bytes follow."""
    raw = b"".join(tok.visible(part) for _, part in parts)
    held = dict(characters=len(raw.decode("utf-8", errors="ignore")), bytes=len(raw))
    totals = {key: splits["train"][key] + splits["val"][key] for key in held}
    if not 0 < held["characters"] < totals["characters"]:
        raise UserError("there is too little text to hold any out for validation; give more")
    out.restart()
    for split, part in zip(SPLITS, zip(*parts)):
        for ids in part:
            if len(ids):
                out.add(split, ids)
    for key, value in held.items():
        splits["val"][key], splits["train"][key] = value, totals[key] - value


# ---- tokenizers ----

def make_tokenizer(wanted, jobs, cfg, vocab_size=16384):
    """The Tokenizer that is wanted, trained on jobs' texts if that is "bytebpe"."""
    if wanted != "bytebpe":
        return load_tokenizer(wanted)
    refused = Counter()
    batch_iter = batches(read(jobs, cfg), lambda source, reason, where: refused.update([reason]))
    results = map_batches(text_batch, batch_iter, make_job(cfg), choose_workers(cfg.workers, jobs))
    texts = sample_texts(itertools.chain.from_iterable(results), TRAINING_TEXT, refused)
    n_chars, rest = sum(map(len, texts)), listed(refused)
    if not n_chars:
        raise UserError(f"no document is left to train a tokenizer on: {rest or 'no files'}")
    if n_chars > 1_000_000 or refused:
        print(f"training a tokenizer on {len(texts):,} documents, {n_chars:,} characters"
              + f" (others: {rest})" * bool(rest), flush=True)
    return train_bytebpe(texts, cfg.vocab_size or vocab_size)


def sample_texts(rows, most, refused):
    """Texts of [(reason, digest, text)], at most so many characters; refused counts the reasons.

    Those with the smallest digests are kept: one pass, bounded memory, the same texts whatever
    their order.
    """
    kept, largest, size, limit = {}, [], 0, 2**64
    for reason, key, text in rows:
        if reason:
            refused[reason] += 1
        elif key >= limit:
            refused["not in the sample"] += 1
        elif key not in kept:
            kept[key] = text
            heapq.heappush(largest, -key)
            size += len(text)
        while size > most and len(kept) > 1:
            limit = -heapq.heappop(largest)
            size -= len(kept.pop(limit))
            refused["not in the sample"] += 1
    return [kept[key] for key in sorted(kept)]


def prepare_tokenizer(words, cfg):
    """A tokenizer alone, in data/<name>/."""
    if not words:
        raise UserError("name the texts: python prepare.py tokenizer PATH ... --vocab_size=16384")
    folder = Path("data") / (cfg.name or "tokenizer")
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} is a prepared set, with the tokenizer that made it. Choose "
                        "another --name")
    tok = make_tokenizer("bytebpe", choose_jobs(words, "text"), cfg)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(folder)
    print(f"{folder}: {tok.n_ids:,} ids. Use it with --tokenizer={folder.as_posix()}")


# ---- the commands ----

def prepare_demo(cfg):
    """data/demo (entries, and the dialogues as plain text) and data/demo_chat, one tokenizer."""
    chat = ("chat", [str(DEMO / "chat.jsonl")])
    text = [("wiki", find_files([DEMO / "wiki_zh"], SOURCES["wiki"].wanted)), chat]
    cfg.val_fraction = cfg.val_fraction or 0.05
    tok = make_tokenizer(cfg.tokenizer or "bytebpe", text, cfg, 4096)
    base = cfg.name or "demo"
    for jobs, kind, name in ((text, "text", base), ([chat], "chat", base + "_chat")):
        prepare(jobs, kind, name, tok, cfg)


def check_settings(cfg):
    for name in ("val_fraction", "near_duplicates", "min_chinese"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)} is not a share between 0 and 1")
    if not 0 < cfg.sample <= 1:
        raise UserError(f"sample={cfg.sample} is not a share: more than 0, at most 1")
    if not 0 <= cfg.workers <= 256:
        raise UserError(f"workers={cfg.workers} must be between 0 and 256")
    for name in ("max_docs", "min_chars", "vocab_size"):
        if not 0 <= getattr(cfg, name) < 2**31:
            raise UserError(f"{name}={getattr(cfg, name)} must be 0 or more")
    if cfg.name in (".", "..", "raw") or Path(cfg.name).name != cfg.name:
        raise UserError(f"name={cfg.name} is to be one folder under data/")


def main(argv=None):
    cfg, words = configure(__file__, argv, files=False)
    check_settings(cfg)
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command == "demo":
        if rest:
            raise UserError(f"demo is the embedded text and takes no path ({rest[0]})")
        return prepare_demo(cfg)
    if command == "inspect":
        from data.inspect import inspect
        return inspect(rest, cfg.plot)
    if command == "tokenizer":
        return prepare_tokenizer(rest, cfg)
    jobs = choose_jobs(words or [""])
    sources = [source for source, _ in jobs]
    kind = "text" if any(SOURCES[s].kind == "text" for s in sources) else "chat"
    cfg.val_fraction = cfg.val_fraction or 0.005
    base = newest_model("base") if kind == "chat" and not cfg.tokenizer else None
    if base:
        print(f"tokenizer: that of {base}")
    tok = make_tokenizer(cfg.tokenizer or str(base or "qwen"), jobs, cfg)
    prepare(jobs, kind, cfg.name or "_".join(sources), tok, cfg)


if __name__ == "__main__":
    run_main(main, __file__)

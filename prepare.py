"""Raw text to bins: read, clean, drop duplicates, tokenise, split, write data/<name>/.

    python prepare.py demo                          # the embedded text: data/demo, data/demo_chat
    python prepare.py wiki PATH                     # wiki_zh_2019, folders AA/, AB/, ...
    python prepare.py text PATH ... --name=novels   # .txt or .jsonl with a key 'text'; also .gz .xz
    python prepare.py chat PATH ... --tokenizer=out/pretrain_zh/final

Without PATH a source reads data/raw/<source>/. The set is the same, byte for byte, for any number
of workers and any order of paths.
"""
# ---- output ----
name = ""            # folder under data/; "" = the source's name
# ---- tokenizer ----
tokenizer = ""       # bytebpe (trained here), qwen, gpt2, a hub id or a path; "" = qwen, but demo:
#                      bytebpe, and chat: that of the newest base model under out/
vocab_size = 0       # ids of a new bytebpe; 0 = 16,384, demo: 4,096
# ---- split and speed ----
val_fraction = 0.0   # share of documents held out, chosen by their hash; 0 = 0.005, demo: 0.05
workers = 0          # processes that tokenise; 0 = one a core, fewer for little text

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, configure, newest_model, run_main
from data.bins import SPLITS, BinWriter
from data.sources import SOURCES, Dropped, clean_document, find_files
from data.tokenizer import Tokenizer, load_tokenizer, train_bytebpe

DEMO = Path(__file__).parent / "data" / "demo" / "raw"
BATCH = 1_000_000    # characters that travel to a worker at once
MIN_DOCUMENTS = 20   # with fewer, whole documents are too coarse a split
SHOWN = 5            # dropped documents whose place is printed, by reason


def digest(identity):
    """64-bit hash of a cleaned document: finds exact duplicates and decides the split."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")


def read(jobs):
    """(source, document or Dropped) of every document in the sources' files, in order."""
    for source, files in jobs:
        for doc in SOURCES[source][1](files):
            yield source, doc


def encode_batch(batch, tok, kind):
    """[(source, document)] -> [(source, digest, ids with <|endoftext|>, characters, bytes)].

    In a text set a dialogue is its contents, a line each. ids is None where cleaning left nothing.
    """
    rows = []
    for source, doc in batch:
        doc, identity = clean_document(doc)
        contents = [doc] if isinstance(doc, str) else [m["content"] for m in doc]
        text = "\n".join(contents)
        answers = text if kind == "text" else "".join(
            m["content"] for m in doc if m["role"] == "assistant")
        ids = tok.encode(text) if kind == "text" else tok.dialogue(doc)
        ids = np.array([*ids, tok.eot], dtype=np.uint32) if answers.strip() else None
        rows.append((source, digest(identity), ids, len(text), len(text.encode())))
    return rows


def start_worker(spec, kind):
    global worker_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    worker_state = Tokenizer(spec), kind


def work(batch):
    return encode_batch(batch, *worker_state)


def batches(documents, count_dropped):
    """Lists of (source, document) of about BATCH characters; what is Dropped is counted instead."""
    batch, size = [], 0
    for source, doc in documents:
        if isinstance(doc, Dropped):
            count_dropped(source, doc)
            continue
        batch.append((source, doc))
        size += len(doc) if isinstance(doc, str) else sum(len(m["content"]) for m in doc)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(batch_iter, tok, kind, n_workers):
    """encode_batch over all batches, in their order, with a bounded number under way."""
    if n_workers == 1:
        for batch in batch_iter:
            yield from encode_batch(batch, tok, kind)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
    with ProcessPoolExecutor(n_workers, context, start_worker, (tok.spec, kind)) as pool:
        pending = deque()
        try:
            for batch in batch_iter:
                pending.append(pool.submit(work, batch))
                if len(pending) > 2 * n_workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool as e:
            raise UserError("a worker was killed, perhaps for memory. Try --workers=1") from e
        finally:
            pool.shutdown(cancel_futures=True)


class Receipts:
    """Counts by source: read = written + dropped, always."""

    def __init__(self, jobs):
        self.sources = {s: dict(files=len(files), read=0, written=0, dropped=Counter())
                        for s, files in jobs}

    def drop(self, source, dropped):
        counts = self.sources[source]
        counts["read"] += 1
        counts["dropped"][dropped.reason] += 1
        if dropped.where and counts["dropped"][dropped.reason] <= SHOWN:
            tqdm.write(f"prepare.py: {dropped.where}; skipped", file=sys.stderr)

    def write(self, source):
        self.sources[source]["read"] += 1
        self.sources[source]["written"] += 1

    def print(self, splits):
        for source, c in self.sources.items():
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(c["dropped"].items()))
            print(f"  {source}: {c['files']:,} files, {c['read']:,} documents read = "
                  f"{c['written']:,} written + {c['dropped'].total():,} dropped"
                  + (f" ({reasons})" if reasons else ""))
        for split, s in splits.items():
            print(f"  {split}: {s['documents']:,} documents, {s['characters']:,} characters, "
                  f"{s['bytes']:,} bytes, {s['tokens']:,} tokens "
                  f"({s['characters'] / max(1, s['tokens']):.2f} characters per token)")


def train_texts(jobs, threshold):
    """Cleaned texts of the training split, for a new tokenizer."""
    for _, doc in read(jobs):
        if not isinstance(doc, Dropped):
            doc, identity = clean_document(doc)
            if digest(identity) >= threshold:
                yield doc if isinstance(doc, str) else "\n".join(m["content"] for m in doc)


def split_finer(out, kind, fraction, tok, splits):
    """Split anew where the hash does not do: the end of each text, or the last dialogues."""
    docs = out.documents("train") + out.documents("val")
    out.restart()
    totals = {k: splits["train"][k] + splits["val"][k] for k in ("characters", "bytes")}
    if kind == "chat":
        n_val = min(len(docs) - 1, max(1, round(fraction * len(docs))))
        if len(docs) < 2:
            raise UserError("one dialogue can't be split into training and validation; give more")
        first = len(docs) - n_val
        parts = [(doc, doc[:0]) if i < first else (doc[:0], doc) for i, doc in enumerate(docs)]
        print(f"  few dialogues: the last {n_val} of {len(docs)} are the validation split")
    else:
        # the end token and at least four more, or half of what there is
        cuts = [len(doc) - max(round(fraction * len(doc)), min(5, len(doc) // 2)) for doc in docs]
        parts = [(np.append(doc[:cut], tok.eot)[:cut + (cut > 0)], doc[cut:])
                 for doc, cut in zip(docs, cuts)]
        print(f"  few documents: the last {fraction:.1%} of each of the {len(docs)} is the "
              "validation split")
    raw = b"".join(visible_bytes(part, kind, tok) for _, part in parts)
    held = dict(characters=len(raw.decode("utf-8", errors="ignore")), bytes=len(raw))
    if not 0 < held["characters"] < totals["characters"]:
        raise UserError("there is too little text to hold any out for validation; give more")
    for split, part in zip(SPLITS, zip(*parts)):
        for ids in part:
            if len(ids):
                out.add(split, ids)
    for key, value in held.items():
        splits["val"][key], splits["train"][key] = value, totals[key] - value


def visible_bytes(ids, kind, tok):
    """UTF-8 of a document's text, or of its messages a line each, without control tokens."""
    if kind == "text":
        return tok.decode_bytes(ids[ids != tok.eot])
    heads = np.flatnonzero(ids == tok.im_start)
    messages = [tok.decode(ids[a + 1:]).split("<|im_end|>")[0] for a in heads]
    return "\n".join(m.partition("\n")[2] for m in messages).encode()


def prepare(jobs, kind, name, tok, fraction, n_workers):
    """Write data/<name> from jobs [(source, files)] with the Tokenizer tok; returns its meta."""
    began, folder = time.time(), Path("data") / name
    receipts, seen, threshold = Receipts(jobs), set(), int(fraction * 2**64)
    splits = {s: dict(characters=0, bytes=0) for s in SPLITS}
    with BinWriter(folder, tok.n_ids) as out, tqdm(
            unit=" documents", delay=2, disable=None, leave=False) as progress:
        batch_iter = batches(read(jobs), receipts.drop)
        for source, key, ids, chars, n_bytes in encode_all(batch_iter, tok, kind, n_workers):
            progress.update()
            split = "val" if key < threshold else "train"
            reason = "empty" if ids is None else "duplicate" if key in seen else ""
            if split == "val" and kind != SOURCES[source][0]:
                reason = "held out for the chat set"  # its val split must not be trained on here
            if reason:
                receipts.drop(source, Dropped(reason, ""))
                continue
            seen.add(key)
            receipts.write(source)
            out.add(split, ids)
            splits[split]["characters"] += chars
            splits[split]["bytes"] += n_bytes
        if not seen:
            dropped = sum((c["dropped"] for c in receipts.sources.values()), Counter())
            why = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items())
            raise UserError(f"no document is left for {folder}: {why or 'the files are empty'}")
        if len(seen) < MIN_DOCUMENTS or not all(map(out.n_docs, SPLITS)):
            split_finer(out, kind, fraction, tok, splits)
        seconds = time.time() - began
        run = dict(command=" ".join(sys.argv), time=time.strftime("%Y-%m-%d %H:%M:%S"),
                   seconds=round(seconds, 2), workers=n_workers)
        meta = dict(kind=kind, val_fraction=fraction, splits=splits, sources=receipts.sources)
        out.finish(tok, meta | dict(run=run))
    print(f"{folder}: {seconds:.1f} s, {tok.n_ids:,} ids ({out.dtype.name})")
    receipts.print(splits)
    return meta


def choose_workers(wanted, jobs):
    """As many as asked for, or one a core and 8 MB of files: starting one takes a second."""
    if wanted < 0:
        raise UserError(f"workers={wanted} is negative")
    size = sum(f.stat().st_size for _, files in jobs for f in files)
    return wanted or max(1, min(os.cpu_count() or 1, size // 8_000_000))


def make_tokenizer(wanted, vocab_size, jobs, fraction):
    if wanted != "bytebpe":
        return load_tokenizer(wanted)
    return train_bytebpe(train_texts(jobs, int(fraction * 2**64)), vocab_size)


def prepare_demo(cfg):
    """data/demo (entries, and the dialogues as plain text) and data/demo_chat, one tokenizer."""
    chat = ("chat", [DEMO / "chat.jsonl"])
    text = [("wiki", find_files([DEMO / "wiki_zh"], SOURCES["wiki"][2])), chat]
    fraction = cfg.val_fraction or 0.05
    tok = make_tokenizer(cfg.tokenizer or "bytebpe", cfg.vocab_size or 4096, text, fraction)
    base = cfg.name or "demo"
    for jobs, kind, name in ((text, "text", base), ([chat], "chat", base + "_chat")):
        prepare(jobs, kind, name, tok, fraction, choose_workers(cfg.workers, jobs))


def main(argv=None):
    cfg, words = configure(__file__, argv, files=False)
    if not 0 <= cfg.val_fraction < 1:
        raise UserError(f"val_fraction={cfg.val_fraction} is not a share between 0 and 1")
    if not words or words[0] not in ("demo", *SOURCES):
        raise UserError(f"name a source: demo, {', '.join(SOURCES)}. --help tells more"
                        + (f" ('{words[0]}' is none)" if words else ""))
    source, *paths = words
    if "" in paths:
        raise UserError("an empty path; is a shell variable unset?")
    if cfg.name in (".", "..") or Path(cfg.name).name != cfg.name:
        raise UserError(f"name={cfg.name} is to be one folder under data/")
    if source == "demo":
        if paths:
            raise UserError(f"demo is the embedded text and takes no path ({paths[0]})")
        return prepare_demo(cfg)
    kind, _, wanted, what = SOURCES[source]
    raw = Path("data") / "raw" / source
    if not paths and not raw.is_dir():
        raise UserError(f"no path given and no folder {raw}. Put there {what}; or run: "
                        f"python prepare.py {source} PATH")
    jobs = [(source, find_files(paths or [raw], wanted))]
    fraction = cfg.val_fraction or 0.005
    base = newest_model("base") if kind == "chat" and not cfg.tokenizer else None
    if base:
        print(f"tokenizer: that of {base}")
    wanted = cfg.tokenizer or str(base or "qwen")
    tok = make_tokenizer(wanted, cfg.vocab_size or 16384, jobs, fraction)
    prepare(jobs, kind, cfg.name or source, tok, fraction, choose_workers(cfg.workers, jobs))


if __name__ == "__main__":
    run_main(main, __file__)

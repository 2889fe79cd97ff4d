"""What is in a prepared set: python prepare.py inspect NAME [--plot]

Answers "is my mask right?" and "what is in my bin?" from the bins themselves.
"""
import os
import sys
from collections import Counter

import numpy as np

from config import UserError
from data.bins import SPLITS, Bins

SHOWN = 3             # documents shown as tokens
SHOWN_TOKENS = 120    # of each at most
MEASURED = 2_000_000  # characters in which lines and words are counted
CHUNK = 2**22         # tokens looked at at once


def inspect(words, plot):
    """Print all there is to say of data/NAME; plot also draws data/NAME/inspect.png."""
    if len(words) != 1:
        raise UserError("name one prepared set: python prepare.py inspect NAME")
    bins = Bins(words[0])
    starts = {split: bins.starts(split) for split in SPLITS}
    counts = sum(count_ids(bins.tokens(split), bins.tokenizer.n_ids) for split in SPLITS)
    lengths = np.concatenate([np.diff(starts[split]) for split in SPLITS])
    show_sources(bins.meta)
    show_documents(bins, starts["train"])
    if bins.kind == "chat":
        show_trained(bins, starts["train"])
    show_tokens(bins.tokenizer, counts)
    show_lengths(lengths)
    show_longest(bins, starts["train"])
    texts = sample_texts(bins, starts["train"])
    show_repetition(bins.meta, texts)
    show_words(texts)
    if plot:
        draw(bins.folder / "inspect.png", lengths, counts)


def count_ids(tokens, n_ids):
    counts = np.zeros(n_ids, dtype=np.int64)
    for i in range(0, len(tokens), CHUNK):
        some = np.bincount(tokens[i:i + CHUNK], minlength=n_ids)
        if len(some) > n_ids:
            raise UserError(f"id {len(some) - 1:,} in a set of {n_ids:,} ids: the bins are "
                            "damaged. Prepare them again")
        counts += some
    return counts


def show_sources(meta):
    print(f"{meta['kind']} set, {meta['n_ids']:,} ids, {meta['dtype']}")
    for split in SPLITS:
        s = meta["splits"][split]
        print(f"  {split}: {s['documents']:,} documents, {s['tokens']:,} tokens, "
              f"{s['characters']:,} characters, {s['bytes']:,} bytes")
    for source, c in meta["sources"].items():
        rate = c.get("tokens", 0) / max(1, c.get("characters", 0))
        print(f"  {source}: {c['written']:,} of {c['read']:,} documents, "
              f"{rate:.3f} tokens per character "
              f"({c.get('characters_per_token', 0):.2f} characters per token)")


# ---- documents as tokens ----

def pieces(tok, ids):
    """What each token shows; bytes that are no whole character as <E6>."""
    for i in ids:
        raw = tok.decode_bytes([i])
        try:
            yield raw.decode()
        except UnicodeDecodeError:
            yield "".join(f"<{b:02X}>" for b in raw)


def bordered(tok, ids, trained):
    """One document as tokens with borders; what is trained is green, or between { } in a file."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[32m", "\033[0m") if colour else ("{", "}")
    shown, inside = [], False
    for piece, now in zip(pieces(tok, ids), trained):
        mark = (off if inside else "") + (on if now else "") if now != inside else ""
        shown.append(mark + piece.replace("\n", "\\n"))
        inside = now
    return "|".join(shown) + (off if inside else "")


def show_documents(bins, starts):
    """The first, the middle and the last document; in a chat set, what is trained marked."""
    tok, tokens, n = bins.tokenizer, bins.tokens("train"), len(starts) - 1
    for i in sorted({0, n // 2, n - 1})[:SHOWN]:
        ids = tokens[starts[i]:starts[i + 1]][:SHOWN_TOKENS]
        trained = tok.trained(ids) if bins.kind == "chat" else np.zeros(len(ids), dtype=bool)
        more = int(starts[i + 1] - starts[i]) - len(ids)
        print(f"\ndocument {i:,}:\n{bordered(tok, ids, trained)}"
              + (f" ... {more:,} more" if more else ""))


def show_trained(bins, starts):
    """Share of trained tokens, and turns, in the first dialogues."""
    tok, tokens, n = bins.tokenizer, bins.tokens("train"), min(len(starts) - 1, 5000)
    masks = [tok.trained(tokens[a:b]) for a, b in zip(starts[:n], starts[1:n + 1])]
    turns = int((tokens[:starts[n]] == tok.im_start).sum())
    share = sum(int(m.sum()) for m in masks) / max(1, int(starts[n]))
    print(f"\ntrained: {share:.1%} of the tokens (answers and their ends), "
          f"{turns / n:.1f} messages a dialogue, "
          f"{sum(not m.any() for m in masks):,} dialogues with none")


# ---- counts ----

def show_tokens(tok, counts):
    """Most and least used tokens, unused ones, and those that are parts of characters."""
    order, total = np.argsort(-counts, kind="stable"), int(counts.sum())
    used = order[:np.count_nonzero(counts)]
    broken = [i for i in used if "\ufffd" in tok.decode([i])]
    print(f"\ntokens: {len(used):,} of {len(counts):,} ids are used; "
          f"{int(counts[broken].sum()) / total:.2%} of the tokens are bytes of characters that the "
          "vocabulary spells in several tokens")
    for name, ids in (("most", used[:25]), ("least", used[-25:])):
        shown = "  ".join(f"{p!r} {counts[i]:,}" for p, i in zip(pieces(tok, ids), ids))
        print(f"  {name} used: {shown}")


def show_lengths(lengths):
    """Histogram of document lengths, each bar twice as long as the one before."""
    print("\ndocument length in tokens:")
    bars = np.bincount(np.log2(lengths).astype(int))
    for power, n in enumerate(bars):
        if n:
            print(f"  {2 ** power:>9,} to {2 ** (power + 1) - 1:>9,} {n:>9,} "
                  + "#" * -(-50 * int(n) // int(bars.max())))


def show_longest(bins, starts):
    lengths, tokens = np.diff(starts), bins.tokens("train")
    print("longest:")
    for i in np.argsort(-lengths, kind="stable")[:5]:
        head = " ".join(bins.tokenizer.decode(tokens[starts[i]:starts[i] + 40]).split())[:40]
        print(f"  document {i:,}: {lengths[i]:,} tokens: {head}")


def sample_texts(bins, starts):
    """About MEASURED characters of whole documents from all over the training split."""
    tok, tokens, texts, size = bins.tokenizer, bins.tokens("train"), [], 0
    for i in np.random.default_rng(0).permutation(len(starts) - 1):
        ids = tokens[starts[i]:min(starts[i + 1], starts[i] + MEASURED)]
        texts.append(tok.visible(ids).decode("utf-8", "ignore"))
        size += len(texts[-1])
        if size > MEASURED:
            break
    return texts


def show_repetition(meta, texts):
    """Duplicates that preparing dropped, and lines that stand more than once."""
    read = sum(c["read"] for c in meta["sources"].values())
    dropped = sum(c["dropped"].get(k, 0) for c in meta["sources"].values()
                  for k in ("duplicate", "near duplicate"))
    lines = Counter(line for text in texts for line in text.split("\n") if len(line) >= 10)
    repeated = sum(n - 1 for n in lines.values())
    print(f"\nduplicates: {dropped / max(1, read):.2%} of the documents read were dropped as such; "
          f"{repeated / max(1, lines.total()):.2%} of the lines stand elsewhere too")
    for line, n in lines.most_common(3):
        if n > 1:
            print(f"  {n:,} times: {line[:60]}")


def show_words(texts):
    try:
        import jieba
    except ImportError:
        print("no word statistics: pip install jieba")
        return
    jieba.setLogLevel("ERROR")
    words = Counter(w for text in texts for w in jieba.cut(text[:MEASURED // 10]) if w.strip())
    longer = [f"{w} {n:,}" for w, n in words.most_common(1000) if len(w) > 1 and w.isalpha()]
    print(f"words: {words.total():,}, {len(words):,} different; "
          f"most used: {', '.join(longer[:20])}")


def draw(file, lengths, counts):
    """Document lengths, and how often tokens are used by rank."""
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("plot needs matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.hist(lengths, bins=np.logspace(0, np.log10(lengths.max() + 1), 60))
    left.set(xscale="log", xlabel="document length (tokens)", ylabel="documents")
    used = np.sort(counts[counts > 0])[::-1]
    right.loglog(np.arange(1, len(used) + 1), used)
    right.set(xlabel="rank of the token", ylabel="times used")
    part = file.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    plt.close(figure)
    os.replace(part, file)
    print(f"drew {file}")

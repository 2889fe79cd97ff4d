"""Print what a prepared set holds: python prepare.py inspect NAME [--plot]

Everything is computed from the bins, so that a wrong loss mask or a wrong token becomes visible.
"""
import os
import sys
from collections import Counter

import numpy as np

from common.command_line import UserError, optional_package
from common.files import atomic_file
from tokens.bins import SPLITS, Bins

SHOWN_TOKENS = 120        # of a document at most
SAMPLE_CHARS = 2_000_000  # size of the sample in which lines and words are counted
CHUNK = 2**22             # tokens counted at once


def inspect(names, plot):
    """Print a description of data/NAME; plot: also draw data/NAME/inspect.png."""
    if len(names) != 1:
        raise UserError("name one prepared set: python prepare.py inspect NAME")
    bins = Bins(names[0])
    starts = {split: bins.starts(split) for split in SPLITS}
    counts = sum(count_ids(bins.tokens(split), bins.tokenizer.vocab_size) for split in SPLITS)
    lengths = np.concatenate([np.diff(starts[split]) for split in SPLITS])
    texts = sample_texts(bins, starts["train"])
    print_sources(bins.meta)
    print_documents(bins, starts["train"])
    if bins.kind == "chat":
        print_mask_share(bins, starts["train"])
    print_tokens(bins.tokenizer, counts)
    print_lengths(lengths)
    print_longest(bins, starts["train"])
    print_repetition(bins.meta, texts)
    print_words(texts)
    if plot:
        draw(bins.folder / "inspect.png", lengths, counts)


def count_ids(tokens, vocab_size):
    """Return how often each id occurs, (vocab_size,) int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for i in range(0, len(tokens), CHUNK):
        counts += np.bincount(tokens[i:i + CHUNK], minlength=vocab_size)
    return counts


def print_sources(meta):
    """Print the size of the set, of each split and of each source."""
    print(f"{meta['kind']} set, {meta['vocab_size']:,} ids, {meta['dtype']}")
    for split in SPLITS:
        s = meta["splits"][split]
        print(f"  {split}: {s['documents']:,} documents, {s['tokens']:,} tokens, "
              f"{s['characters']:,} characters, {s['bytes']:,} bytes")
    for source, c in meta["sources"].items():
        rate = c.get("tokens", 0) / max(1, c.get("characters", 0))
        print(f"  {source}: {c['written']:,} of {c['read']:,} documents, {rate:.3f} tokens per "
              f"character ({c.get('characters_per_token', 0):.2f} characters per token)")


# ---- documents as tokens ----

def token_texts(tok, ids):
    """Yield each token as text; the bytes of an incomplete character as <E6>."""
    for i in ids:
        raw = tok.decode_bytes([i])
        try:
            yield raw.decode()
        except UnicodeDecodeError:
            yield "".join(f"<{b:02X}>" for b in raw)


def format_tokens(tok, ids, mask):
    """Return ids as tokens with | between them; what mask covers is green, or between { } if the
    output is not a terminal."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[32m", "\033[0m") if colour else ("{", "}")
    shown, inside = [], False
    for text, covered in zip(token_texts(tok, ids), mask):
        change = (on if covered else off) if covered != inside else ""
        shown.append(change + text.replace("\n", "\\n"))
        inside = covered
    return "|".join(shown) + (off if inside else "")


def print_documents(bins, starts):
    """Print the beginning of the first, the middle and the last document as tokens, the loss mask
    marked in a chat set."""
    tok, tokens, n = bins.tokenizer, bins.tokens("train"), len(starts) - 1
    for i in sorted({0, n // 2, n - 1}):
        ids = tokens[starts[i]:starts[i + 1]][:SHOWN_TOKENS]
        mask = tok.loss_mask(ids) if bins.kind == "chat" else np.zeros(len(ids), dtype=bool)
        more = int(starts[i + 1] - starts[i]) - len(ids)
        print(f"\ndocument {i:,}:\n{format_tokens(tok, ids, mask)}"
              + (f" ... {more:,} more" if more else ""))


def print_mask_share(bins, starts):
    """Print the share of tokens in the loss mask, and the messages, of the first dialogues."""
    tok, tokens, n = bins.tokenizer, bins.tokens("train"), min(len(starts) - 1, 5000)
    masks = [tok.loss_mask(tokens[a:b]) for a, b in zip(starts[:n], starts[1:n + 1])]
    messages = int((tokens[:starts[n]] == tok.im_start).sum())
    share = sum(int(m.sum()) for m in masks) / max(1, int(starts[n]))
    print(f"\nloss mask: {share:.1%} of the tokens (answers and their <|im_end|>), "
          f"{messages / n:.1f} messages a dialogue, "
          f"{sum(not m.any() for m in masks):,} dialogues with none")


# ---- statistics ----

def print_tokens(tok, counts):
    """Print the most and the least used tokens, the number of used ones, and the share of tokens
    that are parts of characters."""
    order, total = np.argsort(-counts, kind="stable"), int(counts.sum())
    used = order[:np.count_nonzero(counts)]
    partial = [i for i in used if "\ufffd" in tok.decode([i])]
    print(f"\ntokens: {len(used):,} of {len(counts):,} ids are used; "
          f"{int(counts[partial].sum()) / total:.2%} of the tokens are parts of characters for "
          "which the vocabulary has no token")
    for name, ids in (("most", used[:25]), ("least", used[-25:])):
        shown = "  ".join(f"{p!r} {counts[i]:,}" for p, i in zip(token_texts(tok, ids), ids))
        print(f"  {name} used: {shown}")


def print_lengths(lengths):
    """Print a histogram of document lengths, each range twice as wide as the one before."""
    print("\ndocument length in tokens:")
    bars = np.bincount(np.log2(lengths).astype(int))
    for power, n in enumerate(bars):
        if n:
            print(f"  {2 ** power:>9,} to {2 ** (power + 1) - 1:>9,} {n:>9,} "
                  + "#" * -(-50 * int(n) // int(bars.max())))


def print_longest(bins, starts):
    """Print the beginning of the five longest documents."""
    lengths, tokens = np.diff(starts), bins.tokens("train")
    print("longest:")
    for i in np.argsort(-lengths, kind="stable")[:5]:
        head = " ".join(bins.tokenizer.decode(tokens[starts[i]:starts[i] + 40]).split())[:40]
        print(f"  document {i:,}: {lengths[i]:,} tokens: {head}")


def sample_texts(bins, starts):
    """Return the texts of random training documents, about SAMPLE_CHARS characters in all."""
    tok, tokens, texts, size = bins.tokenizer, bins.tokens("train"), [], 0
    for i in np.random.default_rng(0).permutation(len(starts) - 1):
        ids = tokens[starts[i]:min(starts[i + 1], starts[i] + SAMPLE_CHARS)]
        texts.append(tok.plain_text(ids).decode("utf-8", "ignore"))
        size += len(texts[-1])
        if size > SAMPLE_CHARS:
            break
    return texts


def print_repetition(meta, texts):
    """Print the share of documents dropped as duplicates, and of lines that occur several times."""
    read = sum(c["read"] for c in meta["sources"].values())
    dropped = sum(c["dropped"].get(k, 0) for c in meta["sources"].values()
                  for k in ("duplicate", "near duplicate"))
    lines = Counter(line for text in texts for line in text.split("\n") if len(line) >= 10)
    repeated = sum(n - 1 for n in lines.values())
    print(f"\nduplicates: {dropped / max(1, read):.2%} of the documents read were dropped as "
          f"duplicates; {repeated / max(1, lines.total()):.2%} of the lines repeat another one")
    for line, n in lines.most_common(3):
        if n > 1:
            print(f"  {n:,} times: {line[:60]}")


def print_words(texts):
    """Print the most used words, segmented by jieba if it is installed."""
    try:
        import jieba
    except ImportError:
        print("no word statistics: pip install jieba")
        return
    jieba.setLogLevel("ERROR")
    words = Counter(w for text in texts for w in jieba.cut(text[:SAMPLE_CHARS // 10]) if w.strip())
    longer = [f"{w} {n:,}" for w, n in words.most_common(1000) if len(w) > 1 and w.isalpha()]
    print(f"words: {words.total():,}, {len(words):,} different; "
          f"most used: {', '.join(longer[:20])}")


def draw(file, lengths, counts):
    """Draw the document lengths, and how often tokens are used by rank."""
    with optional_package("plot", "matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(lengths, bins=np.logspace(0, np.log10(lengths.max() + 1), 60))
    left.set(xscale="log", xlabel="document length (tokens)", ylabel="documents")
    used = np.sort(counts[counts > 0])[::-1]
    right.loglog(np.arange(1, len(used) + 1), used)
    right.set(xlabel="rank of the token", ylabel="times used")
    with atomic_file(file) as f:
        figure.savefig(f, format="png", dpi=120)
    print(f"drew {file}")

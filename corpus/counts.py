"""The books of a prepared set: for each source, documents read = written + dropped, always."""
import sys
import time
from collections import Counter

from tqdm import tqdm

SHOWN = 5  # dropped documents whose place is printed, by reason
COLUMNS = ("files", "read", "written", "dropped", "characters", "bytes", "tokens")


class Receipts:
    """.sources: {source: its counts}, which meta.json holds too."""

    def __init__(self, jobs):
        self.sources = {source: dict(
            files=len(files), read=0, written=0, dropped=Counter(), trimmed=Counter(),
            characters=0, bytes=0, tokens=0, characters_per_token=0.0) for source, files in jobs}
        self.seconds, self.mark = Counter(), time.time()

    def drop(self, source, reason, where=""):
        """Count a document that is not written; the first places of each reason are printed."""
        counts = self.sources[source]
        counts["read"] += 1
        counts["dropped"][reason] += 1
        if where and counts["dropped"][reason] <= SHOWN:
            where = "".join(c if c.isprintable() else "?" for c in where)
            tqdm.write(f"prepare.py: {where}; skipped", file=sys.stderr)

    def write(self, source, tokens, characters, n_bytes, trimmed):
        counts = self.sources[source]
        for key, n in (("read", 1), ("written", 1), ("tokens", tokens), ("characters", characters),
                       ("bytes", n_bytes)):
            counts[key] += n
        counts["trimmed"] += trimmed
        counts["characters_per_token"] = round(counts["characters"] / counts["tokens"], 4)

    def lap(self, source):
        """The time since the last call went into this source."""
        now = time.time()
        self.seconds[source] += now - self.mark
        self.mark = now

    def speeds(self):
        """{source: tokens per second}"""
        return {s: round(c["tokens"] / max(self.seconds[s], 1e-3)) for s, c in self.sources.items()}

    def dropped(self):
        """Reasons and counts of all sources together."""
        return sum((c["dropped"] for c in self.sources.values()), Counter())

    def print(self, splits):
        rows, speeds = [("source", *COLUMNS, "chars/token", "tokens/s")], self.speeds()
        for source, c in self.sources.items():
            counts = [c[k].total() if k == "dropped" else c[k] for k in COLUMNS]
            rows.append((source, *counts, f"{c['characters_per_token']:.2f}", speeds[source]))
        print_table(rows)
        for source, c in self.sources.items():
            for what in ("dropped", "trimmed"):
                if +c[what]:
                    print(f"  {source}: {what} {listed(c[what])}")
        for split, s in splits.items():
            print(f"  {split}: {s['documents']:,} documents, {s['characters']:,} characters, "
                  f"{s['tokens']:,} tokens")


def listed(counts):
    """"3 empty, 1 not JSON" of a Counter."""
    return ", ".join(f"{n:,} {key}" for key, n in sorted(counts.items()) if n)


def print_table(rows):
    """Rows of strings and numbers, in columns; the first is left-aligned."""
    rows = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:]))
        print("  " + "  ".join([first.ljust(widths[0]), *cells]))

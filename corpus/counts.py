"""Counts of a prepared set: for each source, documents read = written + dropped."""
import sys
import time
from collections import Counter

from tqdm import tqdm

MAX_MESSAGES = 5  # dropped documents reported one by one, for each reason
COLUMNS = ("files", "read", "written", "dropped", "characters", "bytes", "tokens")


class Counts:
    """.sources: {source: its counts}, as in meta.json; sources: [(source, files, split)].
    .seconds: {source: the time it took}."""

    def __init__(self, sources):
        self.sources = {source: dict(
            files=0, read=0, written=0, dropped=Counter(), trimmed=Counter(), characters=0,
            bytes=0, tokens=0, characters_per_token=0.0) for source, _, _ in sources}
        for source, files, _ in sources:
            self.sources[source]["files"] += len(files)
        self.seconds, self.last_time = Counter(), time.perf_counter()

    def drop(self, source, reason, place, details=""):
        """Count a document that is not written; print the places of the first of each reason."""
        counts = self.sources[source]
        counts["read"] += 1
        counts["dropped"][reason] += 1
        if counts["dropped"][reason] <= MAX_MESSAGES:
            message = f"{place}: {details or reason}"
            message = "".join(c if c.isprintable() else "?" for c in message)
            tqdm.write(f"prepare.py: {message}; skipped", file=sys.stderr)

    def write(self, source, doc):
        """Count a document (tokens.splits.Encoded) that is written."""
        counts = self.sources[source]
        counts["read"] += 1
        counts["written"] += 1
        for key in ("tokens", "characters", "bytes", "trimmed"):
            counts[key] += getattr(doc, key)
        counts["characters_per_token"] = round(counts["characters"] / counts["tokens"], 4)

    def add_time(self, source):
        """Add the time since the last call to this source."""
        now = time.perf_counter()
        self.seconds[source] += now - self.last_time
        self.last_time = now

    def speeds(self):
        """Return {source: tokens per second}."""
        return {s: round(c["tokens"] / max(self.seconds[s], 1e-3)) for s, c in self.sources.items()}

    def dropped(self):
        """Return {reason: documents} over all sources."""
        return sum((c["dropped"] for c in self.sources.values()), Counter())

    def print(self, splits):
        """Print a table of the sources, what was dropped and trimmed, and the splits."""
        rows, speeds = [("source", *COLUMNS, "chars/token", "tokens/s")], self.speeds()
        for source, c in self.sources.items():
            counts = [c[k].total() if k == "dropped" else c[k] for k in COLUMNS]
            rows.append((source, *counts, f"{c['characters_per_token']:.2f}", speeds[source]))
        print_table(rows)
        for source, c in self.sources.items():
            for what in ("dropped", "trimmed"):
                if +c[what]:
                    print(f"  {source}: {what} {format_counts(c[what])}")
        for split, s in splits.items():
            print(f"  {split}: {s['documents']:,} documents, {s['characters']:,} characters, "
                  f"{s['tokens']:,} tokens")


def format_counts(counts):
    """Return a Counter as text: "3 empty, 1 not JSON"."""
    return ", ".join(f"{n:,} {key}" for key, n in sorted(counts.items()) if n)


def print_table(rows):
    """Print rows of strings and numbers in columns: the first left-aligned, the others right."""
    rows = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:]))
        print("  " + "  ".join([first.ljust(widths[0]), *cells]))

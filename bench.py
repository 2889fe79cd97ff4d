"""Compare speed and memory with nanoGPT and transformers, in alternating turns.

    python bench.py train --vs=PATH_TO_NANOGPT    # a training step; without --vs only ours
    python bench.py train --profile               # where a step's time goes
    python bench.py sample --vs=PATH_TO_NANOGPT   # tokens a second, transformers too
    python bench.py prepare --vs=others --corpus=FILE.jsonl --tokenizer=FOLDER
    python bench.py gpu --vs=PATH_TO_NANOGPT --minutes=8    # all GPU measurements, in parts
    python bench.py gpu train decode              # only these parts

Each contender runs in its own process, so that its peak memory is measured apart, and only one
works at a time. Weights and tokens are random: the work is the same as with real ones. The parts of
`gpu`, in order of value: numerics, train, train_large_vocab, decode, fsdp, pretrain.
"""
# ---- comparison ----
vs = ""               # folder of a nanoGPT checkout to compare with (prepare: any word)
vs_dtype = ""         # nanoGPT's; "" = float32 on a CPU, where its scripts have no autocast
rounds = 5            # turns of each
# ---- model ----
arch = "gpt2"         # gpt2; qwen3 for ours only
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 151_680
block_size = 256
# ---- train ----
batch_size = 8        # rows; 0 = the fastest of each contender, found by doubling (GPU)
steps = 2             # steps in a turn
optimizer = "adamw"   # ours: adamw or muon
profile = False       # instead: a table of where a step of ours spends its time
# ---- sample ----
max_new_tokens = 200  # tokens in a turn
# ---- prepare ----
corpus = ""           # JSON lines with a "text"
tokenizer = ""        # folder with a tokenizer.json
# ---- gpu ----
minutes = 8.0         # for all parts together; what does not fit is skipped
dataset = ""          # of the part pretrain: a prepared set such as data/wiki; "" = the demo
# ---- results ----
out = "out/bench.json"  # every number; the run of the part pretrain goes to out/bench/
# ---- device ----
device = "auto"
dtype = "auto"        # of ours, and of the others but for vs_dtype
compile = False       # a training step; the command gpu always compiles on a GPU

import math
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

from common.command_line import UserError, run_main  # first: reports Ctrl-C

import torch

from benchmarks.contenders import (
    Contender, contender_dtype, describe, make_trainer, prepare, pretrain, print_profile, sample,
    train)
from benchmarks.numerics import numeric_checks, numerics
from common.device import choose_device
from common.files import write_json
from common.settings import check_ranges, configure

MAX = 2**31 - 1
RANGES = dict(  # both ends included; GPTConfig checks the shape further
    rounds=(1, MAX), n_layer=(1, 1000), n_embd=(1, 2**20), batch_size=(0, MAX), steps=(1, MAX),
    max_new_tokens=(1, MAX), minutes=(0, MAX))
MIN_SECONDS = 5  # a part with less time is skipped: starting Python and torch takes as long
MARGIN = 12  # seconds for importing torch before the clock starts and for ending the children
EQUAL_TOKENS = 32_768  # of the micro-batch at which memory is compared
TABLE_HEAD = """
| measured | contender | speed (range) | GiB | ours: times as fast (range), share of GiB | more |
|---|---|---|---|---|---|"""
# work: a function of contenders.py; contenders: their names; turns: {size: number of turns}, where
# the docstring of the work says what a size is; settings: values for the settings that the user has
# not set; share: weight of the part in the division of the time
Part = namedtuple("Part", "work contenders turns settings share", defaults=({}, 1))


# ---- what is measured ----

def list_commands(cfg):
    """Return {command: Part} of all commands but gpu."""
    others = ["nanoGPT", "transformers"] if cfg.vs else []
    return {"train": Part(train, ["ours", *others[:1]], {0: cfg.rounds}),
            "sample": Part(sample, [*our_dtypes(cfg), *others], {1: cfg.rounds}),
            "prepare": Part(prepare, ["ours", *others], {0: cfg.rounds})}


def list_gpu_parts(cfg, on_gpu):
    """Return {name: Part} of the command gpu."""
    compiled = dict(compile=True) if on_gpu else {}
    fast = compiled | dict(batch_size=0, steps=20) if on_gpu else {}
    large = compiled | dict(batch_size=256) if on_gpu else {}
    gpt2 = dict(vocab_size=50_304, block_size=1024)
    sharded = dict(batch_size=8, compile=False, arch="qwen3", optimizer="muon")
    both, few = ["ours", "nanoGPT"] if cfg.vs else ["ours"], min(cfg.rounds, 2)
    turns = {0: cfg.rounds, EQUAL_TOKENS: 1} if on_gpu else {0: cfg.rounds}
    n_checks = len(list(numeric_checks("cpu", on_gpu or cfg.compile)))
    return {
        "numerics": Part(numerics, ["ours"], {0: n_checks}, compiled, 70),
        "train": Part(train, both, turns, gpt2 | fast, 190),
        "train_large_vocab": Part(train, both, turns, fast, 130),
        "decode": Part(sample, [*our_dtypes(cfg), "transformers"], {1: few, 64: few}, {}, 50),
        "fsdp": Part(train, ["ours", "ours fsdp"], {0: few}, gpt2 | fast | sharded, 30),
        "pretrain": Part(pretrain, ["ours"], {30: 1, 0: 1}, large, 120)}


def our_dtypes(cfg):
    """Return the names of ours, in each dtype worth comparing."""
    both = cfg.dtype == "auto" and choose_device(cfg.device).type == "cpu"
    return ["ours float32", "ours bfloat16"] if both else ["ours"]


# ---- measuring ----

def run_parts(cfg, parts, end):
    """Run the parts in order, at most until the time `end`; write cfg.out after each.

    Time that an early part does not use goes to the later ones. After an error in a part the others
    still run; it is raised at the end.
    """
    device = choose_device(cfg.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__,
                   date=time.strftime("%Y-%m-%d"), command=" ".join(["bench.py", *sys.argv[1:]]))
    results, rows = {}, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the children, prints the table
    try:
        for i, (name, part) in enumerate(parts.items()):
            now = time.monotonic()
            seconds = (end - now) * part.share / sum(p.share for p in [*parts.values()][i:])
            results[name], more = try_part(cfg, name, part, now, seconds)
            rows += more
            Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
            write_json(cfg.out, dict(machine=machine, parts=results))
    finally:
        print(f"\n{describe(machine)}", TABLE_HEAD, *rows, sep="\n", flush=True)
    errors = [result["error"] for result in results.values() if result["error"]]
    if errors:
        raise UserError(errors[0])


def try_part(cfg, name, part, now, seconds):
    """Run a part for at most so many seconds from now; return what run_part returns. With fewer
    than MIN_SECONDS the part is skipped."""
    if seconds < MIN_SECONDS:
        print(f"\n{name}: skipped, {max(0, seconds):.0f} s are left for it", flush=True)
        return dict(skipped="no time", error=""), []
    limit = f", at most {seconds:.0f} s" * (seconds < math.inf)
    print(f"\n{name}: {', '.join(part.contenders)}{limit}", flush=True)
    try:
        return run_part(cfg, name, part, now + seconds)
    except Exception as e:
        traceback.print_exc()
        return dict(error=f"{name}: {type(e).__name__}: {e}"), []


def run_part(cfg, name, part, end):
    """Run all turns of the contenders; return (results for the JSON file, rows of the table)."""
    default = configure(__file__, [])[0]
    settings = vars(cfg) | {key: value for key, value in part.settings.items()
                            if getattr(cfg, key) == getattr(default, key)}
    cfg = SimpleNamespace(**settings, end=end)
    os.environ |= {  # children that wait must not spin on the cores; killed ones leave semaphores
        "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore:resource_tracker"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        contenders = [Contender(who, part.work, cfg, folder) for who in part.contenders]
        try:
            for size, n_turns in part.turns.items():
                for contender in contenders * n_turns:
                    contender.turn(size)
        finally:
            for contender in contenders:
                contender.kill()
    result = dict(settings=settings, error="; ".join(
        f"{name}: {c.name}: {c.error}" for c in contenders if c.error))
    result["contenders"] = {c.name: dict(turns=c.turns, error=c.error) for c in contenders}
    return result, make_rows(name, part, cfg, contenders)


# ---- the table ----

def make_rows(name, part, cfg, contenders):
    """Return the results of a part as rows of a Markdown table with TABLE_HEAD."""
    if part.work in (train, sample):
        name += (f", {cfg.arch} {cfg.n_layer}/{cfg.n_head}/{cfg.n_embd}, {cfg.vocab_size:,} words, "
                 f"context {cfg.block_size:,}" + ", compiled" * cfg.compile)
    rows = []
    for size in part.turns:
        done = [c for c in contenders if c.turns.get(size)]
        others = [c for c in done if not c.name.startswith("ours")]
        for c in done:
            compared = [compare(c, other, size) for other in others if c not in others]
            rows.append((c.name, *summarize(c.turns[size], "; ".join(compared))))
    rows += [(c.name, "", "", "", c.error) for c in contenders if c.error]
    return [f"| {' | '.join((name, *row))} |" for row in rows]


def compare(ours, other, size):
    """Return how many times as fast ours is (median, lowest and highest over pairs of turns), and
    its share of the memory, where that is known."""
    pairs = [*zip(ours.turns[size], other.turns[size])]
    times = [a["rate"] / b["rate"] for a, b in pairs]
    a, b = (turn.get("gib") for turn in pairs[-1])
    return (f"{other.name} {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
            + (f", {a / b:.2f}" if a and b else ""))


def summarize(turns, compared):
    """Return the cells of the table for turns of one size; compared: the cell of compare()."""
    if "rate" not in turns[0]:  # numeric checks
        failed = "; ".join(turn["check"] for turn in turns if not turn["ok"])
        return "", "", "", f"{len(turns)} checks, failed: {failed or 'none'}"
    rates, gib = [turn["rate"] for turn in turns], turns[-1].get("gib", 0)
    speed = f"{statistics.median(rates):,.1f} {turns[-1]['unit']}"
    spread = f" ({min(rates):,.1f} to {max(rates):,.1f})" * (len(rates) > 1)
    others = {key: value for key, value in turns[-1].items() if key not in ("rate", "gib")}
    return speed + spread, f"{gib:.2f}" * (gib > 0), compared, describe(others)


# ---- starting ----

def check_settings(cfg, words):
    """Validate the settings before anything is measured."""
    check_ranges(cfg, RANGES)
    device = choose_device(cfg.device)
    if not cfg.batch_size and device.type != "cuda":
        raise UserError("batch_size=0, the best one, is looked for on a GPU alone")
    if words[0] == "gpu" and device.type == "cpu" and cfg.device == "auto":
        raise UserError("there is no GPU here. --device=cpu and a small shape try the command")
    contender_dtype("nanoGPT", cfg, device)
    try:
        with torch.device("meta"):
            make_trainer("ours", cfg, torch.device("meta"))
    except ValueError as e:
        raise UserError(e) from e
    if not cfg.out.endswith(".json"):
        raise UserError(f"out={cfg.out} must end in .json")
    if "prepare" in words and not (Path(cfg.corpus).is_file() and Path(cfg.tokenizer).exists()):
        raise UserError("name what to read: --corpus=FILE.jsonl --tokenizer=FOLDER")
    if words != ["prepare"] and cfg.vs and not (Path(cfg.vs) / "model.py").is_file():
        raise UserError(f"vs={cfg.vs} is no nanoGPT checkout: it has no model.py")
    if cfg.dataset and not (Path(cfg.dataset) / "meta.json").is_file():
        raise UserError(f"dataset={cfg.dataset} is no prepared set such as data/wiki")


def main():
    """Run the command that the command line names."""
    began = time.monotonic()
    cfg, words = configure(__file__)
    if not words:
        return print(__doc__)
    known, wanted, end = list_commands(cfg), words, math.inf
    if words[0] == "gpu":
        known, wanted = list_gpu_parts(cfg, choose_device(cfg.device).type == "cuda"), words[1:]
        end = began + 60 * cfg.minutes - MARGIN
    for word in wanted:
        if word not in known:
            raise UserError(f"'{word}' is none of {', '.join(known)}" + ", gpu" * (wanted is words))
    check_settings(cfg, words)
    for name in ("vs", "corpus", "tokenizer", "out", "dataset"):  # contenders work elsewhere
        if getattr(cfg, name):
            setattr(cfg, name, str(Path(getattr(cfg, name)).resolve()))
    if cfg.profile:
        return print_profile(cfg)
    run_parts(cfg, {name: known[name] for name in wanted or known}, end)


if __name__ == "__main__":
    run_main(main, __file__)

"""Compare speed and memory with nanoGPT and transformers, in alternating turns.

    python bench.py train --vs=PATH_TO_NANOGPT    # a training step; without --vs ours alone
    python bench.py train --profile               # where a step's time goes
    python bench.py sample --vs=PATH_TO_NANOGPT   # tokens a second, transformers too
    python bench.py prepare --vs=others --corpus=FILE.jsonl --tokenizer=FOLDER
    python bench.py gpu --vs=PATH_TO_NANOGPT --minutes=8    # all that a GPU should show, in parts
    python bench.py gpu train decode              # these parts alone

Each contender is a process of its own, so that its peak memory is its own, and works only in its
turn. Weights and tokens are random: the work is the same as with real ones. The parts of `gpu`,
in order of value: numerics, train, train_large_vocab, decode, fsdp, pretrain.
"""
# ---- what ----
vs = ""               # folder of a nanoGPT checkout to compare with (prepare: any word)
rounds = 5            # turns of each
# ---- model ----
arch = "gpt2"         # ours alone can be qwen3
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 151_680
block_size = 256
# ---- train ----
batch_size = 8        # rows; 0 = the best of each, doubled until memory is full (GPU)
steps = 2             # steps a turn
optimizer = "adamw"   # ours: adamw or muon
profile = False       # instead: a table of where a step of ours spends its time
# ---- sample ----
max_new_tokens = 200  # a turn
# ---- prepare ----
corpus = ""           # JSON lines with a "text"
tokenizer = ""        # folder with a tokenizer.json
# ---- gpu ----
minutes = 8.0         # for all parts together; what does not fit is skipped
dataset = ""          # set of the part pretrain: a folder in data/ or bench_data/data/; "" = the
#                       first text set in bench_data/data/, else the demo
out = "out/bench_gpu.json"  # results; the run of the part pretrain goes to out/bench_gpu/
# ---- device ----
device = "auto"
dtype = "auto"        # ours, and nanoGPT's on a GPU: on a CPU it knows float32 only
compile = False       # gpu: always on a GPU

import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.contenders import make_trainer, our_model, our_optimizers, serve, train_step
from benchmarks.numerics import numeric_checks
from common.command_line import UserError, run_main
from common.device import choose_device, synchronize
from common.files import write_file
from common.settings import configure

ROOT = Path(__file__).parent
OTHERS = {"train": ("nanoGPT",), "sample": ("nanoGPT", "transformers"),
          "prepare": ("transformers", "nanoGPT")}
NEEDS = {"transformers": ("transformers", "safetensors"),
         "pretrain": ("numpy", "safetensors", "tiktoken", "tokenizers", "tqdm")}
MIN_SECONDS = 5  # a part with less time is skipped: starting Python and torch takes as long
MARGIN = 12  # seconds for importing torch before the clock starts and for ending the children
EQUAL_TOKENS = 32_768  # of the micro-batch at which memory is compared


# ---- the parent: turns, and what came of them ----

class Contender:
    """A child process that does a turn of work when it is told to, until the time `end`."""

    def __init__(self, name, what, cfg, folder, end=math.inf):
        self.name, self.what, self.cfg, self.end = name, what, cfg, end
        self.facts, self.turns, self.error = {}, [], ""
        # a contender that waits must not spin on the cores of the one at work
        env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1",
                            "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench.py"), f"--as={name}"], cwd=folder, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            start_new_session=True)  # so that kill() ends its own children too
        self.lines = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def ask(self, message):
        """Send a message, return the answer; None, with .error set, if there is none in time."""
        left = None if self.end == math.inf else max(0, self.end - time.monotonic())
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            return json.loads(self.lines.get(timeout=left))
        except queue.Empty:
            self.error = f"{self.name} was stopped at the time limit"
        except (OSError, ValueError):
            self.error = f"{self.name} ended; the reason stands above"
        self.kill()
        print(self.error, flush=True)

    def start(self):
        settings = vars(self.cfg)
        if self.end < math.inf:
            settings = settings | dict(seconds=self.end - time.monotonic())
        self.facts = self.ask(dict(what=self.what, settings=settings)) or {}
        if self.facts:
            print(f"  {self.name}: {describe(self.facts)}", flush=True)

    def turn(self, batch_size):
        """Do a turn with that many rows (0 = the best), unless the contender has failed."""
        result = None if self.error else self.ask(batch_size)
        if result is not None:
            self.turns.append(result)
            print(f"  {self.name}: {describe(result)}", flush=True)

    def kill(self):
        with suppress(OSError, AttributeError):  # Windows has no process groups
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver may hold it
            self.process.wait(3)

    def at(self, batch):
        """The turns at a batch size; None = at that of the first turn."""
        batch = self.turns[0].get("batch") if batch is None and self.turns else batch
        return [turn for turn in self.turns if turn.get("batch") == batch]

    def median(self, batch=None):
        return statistics.median(turn["rate"] for turn in self.at(batch))

    def memory(self, batch=None):
        return max((turn.get("memory", 0) for turn in self.at(batch)), default=0)

    def ratio(self, other, batch=None):
        """How many times as fast as other: (of the medians, lowest of a pair, highest)."""
        pairs = [a["rate"] / b["rate"] for a, b in zip(self.at(batch), other.at(batch))]
        return self.median(batch) / other.median(batch), min(pairs), max(pairs)

    def report(self, others, batch=None):
        """Print the median, its range, and the comparison with each of the others."""
        rates, last = [turn["rate"] for turn in self.at(batch)], self.at(batch)[-1]
        print(f"{self.name:15} {describe(last | dict(rate=self.median(batch)))}  "
              f"({min(rates):,.1f} to {max(rates):,.1f})")
        for other in others:
            ratio, low, high = self.ratio(other, batch)
            mine, theirs = self.memory(batch), other.memory(batch)
            print(f"{'':15} {ratio:.2f} times as fast as {other.name} ({low:.2f} to {high:.2f})"
                  + (f", with {mine / theirs:.2f} of the memory" if mine and theirs else ""))


def describe(facts):
    """The numbers of a turn, or the facts of a contender, in one line."""
    shown = []
    for key, value in facts.items():
        if key == "rate":
            shown.append(f"{value:,.1f} {facts['unit']}")
        elif key == "memory" and value:
            shown.append(f"{value / 2**30:.2f} GiB")
        elif key == "mfu":
            shown.append(f"MFU {value:.1%}")
        elif key not in ("unit", "memory", "curve", "samples"):
            value = f"{value:.4g}" if isinstance(value, float) else value
            shown.append(f"{key} {value}")
    return ", ".join(shown)


def measure(contenders, batches):
    """Take {batch size: rounds} turns of each; a contender that fails is left out from then on.

    Each gets ready just before its first turn: the first has a result before others may fail.
    """
    waiting = list(contenders)
    try:
        for batch, rounds in batches.items():
            for i in range(rounds):
                for contender in contenders:
                    if contender in waiting:
                        contender.start()
                        waiting.remove(contender)
                    if not batch or len(contender.at(batch)) <= i:  # else its best batch was this
                        contender.turn(batch)
    finally:
        for contender in contenders:
            contender.kill()


def our_kinds(cfg, what):
    """Ours, in each dtype worth comparing."""
    if what != "sample" or cfg.dtype != "auto":
        return ["ours"]
    on_cpu = choose_device(cfg.device).type == "cpu"
    return [f"ours {dtype}" for dtype in (("float32", "bfloat16") if on_cpu else ("bfloat16",))]


def report_all(contenders, batch=None):
    good = [c for c in contenders if c.at(batch)]
    others = [c for c in good if not c.name.startswith("ours")]
    for contender in good:
        contender.report([] if contender in others else others, batch)


def compare(cfg, what):
    names = [*our_kinds(cfg, what), *(OTHERS[what] if cfg.vs else ())]
    print(f"{what}: {', '.join(names)}; {cfg.rounds} turns each; torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(name, what, cfg, folder) for name in names]
        measure(contenders, {1 if what == "sample" else 0: cfg.rounds})
    report_all(contenders)
    for contender in contenders:
        if contender.error:
            raise UserError(contender.error)


# ---- gpu: parts, each with its share of the time ----

def list_parts(cfg, on_gpu):
    """{name: (share of the time, kind of work, contenders, {batch size: turns}, settings)}."""
    compiled = dict(compile=on_gpu or cfg.compile)
    speed = compiled | dict(batch_size=0, steps=20) if on_gpu else {}
    gpt2, few = dict(vocab_size=50_304, block_size=1024), min(cfg.rounds, 2)
    checks = len(list(numeric_checks("cpu", **compiled)))
    return {
        "numerics": (70, "numerics", ["ours"], {0: checks}, compiled),
        "train": (190, "train", ["ours", "nanoGPT"], {0: cfg.rounds}, gpt2 | speed),
        "train_large_vocab": (130, "train", ["ours", "nanoGPT"], {0: cfg.rounds}, speed),
        "decode": (50, "sample", [*our_kinds(cfg, "sample"), "transformers"], {1: few, 64: few},
                   {}),
        "fsdp": (30, "train", ["ours", "ours fsdp"], {0: few},
                 gpt2 | speed | dict(batch_size=8, compile=False, arch="qwen3", optimizer="muon")),
        "pretrain": (120, "pretrain", ["ours"], {0: 2}, compiled)}


def run_gpu(cfg, wanted):
    """Run the parts in order; what an early one leaves of its time goes to the later ones."""
    end = time.monotonic() + 60 * cfg.minutes - MARGIN
    device = choose_device(cfg.device)
    if device.type == "cpu" and cfg.device == "auto":
        raise UserError("there is no GPU here. --device=cpu and a small shape try the command")
    # SIGTERM ends the children and prints the rows
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts = list_parts(cfg, device.type == "cuda")
    parts = {name: part for name, part in parts.items() if not wanted or name in wanted}
    machine = dict(
        card=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__, cuda=torch.version.cuda, date=time.strftime("%Y-%m-%d"))
    result, rows = dict(machine=machine, command=sys.argv[1:], parts={}), []
    print(describe(machine | dict(numbers_to=cfg.out)), flush=True)
    try:
        for i, (name, part) in enumerate(parts.items()):
            left = end - time.monotonic()
            seconds = left * part[0] / sum(share for share, *_ in [*parts.values()][i:])
            try:
                result["parts"][name], row = run_part(cfg, name, part, device, seconds)
                rows += row
            except Exception:  # a part must not end the others
                traceback.print_exc()
                result["parts"][name] = dict(error=traceback.format_exc()[-1000:])
            Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
            write_file(cfg.out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    finally:
        signal.signal(signal.SIGTERM, handler)
        title = "、".join(str(value) for value in machine.values() if value)
        print(f"\n{title}\n\n| 性质 | 结果 | 命令 |\n|---|---|---|", *rows, sep="\n", flush=True)


def run_part(cfg, name, part, device, seconds):
    """(what to keep of the part, rows of README's table)."""
    _, what, names, batches, changes = part
    began = time.monotonic()
    if seconds < MIN_SECONDS:
        print(f"\n{name}: skipped, {max(0, seconds):.0f} s are left for it", flush=True)
        return dict(skipped="no time"), []
    print(f"\n{name}: at most {seconds:.0f} s", flush=True)
    default = configure(__file__, [])[0]  # what the user has set stays
    cfg = SimpleNamespace(**vars(cfg) | {
        key: value for key, value in changes.items() if getattr(cfg, key) == getattr(default, key)})
    if what == "train" and not cfg.batch_size:
        batches = batches | {EQUAL_TOKENS // cfg.block_size: 1}
    names = [n for n in names if not why_missing(n, what, cfg)]
    if not names:
        return dict(skipped="packages missing"), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if what == "pretrain":
            cfg.dataset = str(find_dataset(cfg.dataset, folder))
        contenders = [Contender(n, what, cfg, folder, began + seconds) for n in names]
        measure(contenders, batches)
    kept = dict(settings=vars(cfg), seconds=time.monotonic() - began, contenders={
        c.name: dict(facts=c.facts, turns=c.turns, error=c.error) for c in contenders})
    for batch in dict(sample=list(batches), train=[None]).get(what, ()):
        report_all(contenders, batch)
    if name == "train":
        kept["targets"] = compare_with_targets(contenders, EQUAL_TOKENS // cfg.block_size)
    return kept, make_rows(name, what, cfg, contenders)


def why_missing(name, what, cfg):
    """Print and return why a contender can't take part; "" if it can."""
    packages = NEEDS.get(name, NEEDS.get(what, ()))
    missing = [package for package in packages if find_spec(package) is None]
    why = f"{', '.join(missing)} is not installed" if missing else (
        "--vs= names no folder" if name == "nanoGPT" and not cfg.vs else "")
    if why:
        print(f"  {name} is left out: {why}", flush=True)
    return why


def find_dataset(name, folder):
    """Path of a prepared set; without any, of the demo in `folder`, where pretrain.py makes it."""
    for root in (Path("data"), ROOT / "data", ROOT / "bench_data" / "data"):
        if name and (root / name / "meta.json").is_file():
            return (root / name).resolve()
    if name:
        raise UserError(f"dataset={name} is neither in data/ nor in bench_data/data/")
    for meta in sorted((ROOT / "bench_data" / "data").glob("*/meta.json")):
        if json.loads(meta.read_text(encoding="utf-8"))["kind"] == "text":
            return meta.parent
    return Path(folder) / "data" / "demo"


def compare_with_targets(contenders, equal):
    """Print ours beside the targets of a GPU -> {target: [value, met]}."""
    ours, nano = [*contenders, None][:2]
    both, targets = ours.turns and nano and nano.turns, {}
    if both:
        ratio = ours.ratio(nano)[0]
        targets["1.25 times the tokens/s of nanoGPT"] = ratio, ratio >= 1.25
    if ours.turns and "mfu" in ours.turns[0]:
        mfu = statistics.median(turn["mfu"] for turn in ours.at(None))
        targets["MFU of 0.45"] = mfu, mfu >= 0.45
    if both and ours.at(equal) and nano.at(equal):
        ratio = ours.memory(equal) / nano.memory(equal)
        targets[f"0.5 times its memory at {EQUAL_TOKENS:,} tokens"] = ratio, ratio <= 0.5
    for target, (value, met) in targets.items():
        print(f"target {target}: {value:.3f}, {'met' if met else 'not met'}", flush=True)
    return targets


# ---- rows of README's table ----

def make_rows(name, what, cfg, contenders):
    """The part's results as Markdown."""
    shape = (f"{cfg.n_layer} 层 {cfg.n_head} 头 {cfg.n_embd} 维、{cfg.vocab_size:,} 词、"
             f"上下文 {cfg.block_size:,}")
    if what == "numerics":
        turns = contenders[0].turns
        bad = [turn["check"] for turn in turns if not turn["ok"]]
        title = "分块损失、缓存、打包、恢复、compile 与 CPU 上 fp32 的训练步"
        results = [f"{len(turns)} 项核对，" + (f"未通过：{'、'.join(bad)}" if bad else "全部通过")]
        results = results if turns else []
    elif what == "pretrain":
        title = f"训练一次，`config/pretrain_zh_modern.py` 的形状，{Path(cfg.dataset).name}"
        results = [f"{t['seconds']:.0f} 秒到第 {t['step']:,} 步（{t['tokens'] / 1e6:,.1f} 百万词元）："
                   f"{numbers(t)}，验证损失 {t['val_loss']:.3f}（{t['bpb']:.3f} 比特/字节）"
                   for t in contenders[0].turns[-1:]]
    else:
        title = {"sample": "生成", "train": "训练"}[what] + f"，{shape}" + "，compile" * cfg.compile
        if name == "fsdp":
            title = f"一个进程的 `--fsdp`，{cfg.arch}，{cfg.optimizer}，{shape}"
        batches = {turn["batch"] for c in contenders for turn in c.turns}
        results = [result for batch in sorted(batches) if what == "sample" or name == "fsdp"
                   for result in batch_results(contenders, batch)]
        results = results or batch_results(contenders, None)
        equal = EQUAL_TOKENS // cfg.block_size
        memory = [f"{c.memory(equal) / 2**30:.2f}" for c in contenders if c.at(equal)]
        if len(memory) == len(contenders) and what == "train" and not cfg.batch_size:
            results.append(f"微批 {EQUAL_TOKENS:,} 词元时内存 {' / '.join(memory)} GiB")
    results += [f"{c.name.replace('ours', '本项目')} 没有做完" for c in contenders if c.error]
    command = f"`python bench.py gpu {name}{' --vs=nanoGPT所在文件夹' * bool(cfg.vs)}`"
    return [f"| {title} | {'；'.join(results)} | {command} |"]


def numbers(turn):
    """Speed and memory of a turn, in Chinese."""
    mfu = f"、MFU {turn['mfu']:.1%}" if "mfu" in turn else ""
    memory = f"、{turn['memory'] / 2**30:.2f} GiB" if turn["memory"] else ""
    return f"{turn['rate']:,.0f} 词元/秒{mfu}{memory}"


def batch_results(contenders, batch):
    """Of each contender at a batch size, None = its best, and how ours compares with the others."""
    good, results = [c for c in contenders if c.at(batch)], []
    fsdp = any(c.name == "ours fsdp" for c in good)
    for c in good:
        last, largest = c.at(batch)[-1], c.facts.get("largest")
        results.append(
            f"{c.name.replace('ours', '本项目')} {numbers(last | dict(rate=c.median(batch)))}，"
            f"{last['batch']} 行" + (f"（最多 {largest}）" if largest else "")
            + (f"，损失 {last['loss']:.4f}" if fsdp else ""))
    for other in good[1:]:
        if not other.name.startswith("ours"):
            ratio, low, high = good[0].ratio(other, batch)
            results.append(f"{other.name} 的 {ratio:.2f} 倍（{low:.2f} 到 {high:.2f}）")
    return results


# ---- starting ----

def print_profile(cfg):
    """The operators that take most of a training step of ours, by their own time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    device = choose_device(cfg.device)
    model, optimizers, dtype = make_trainer("ours", cfg, device)
    model.compile_parts() if cfg.compile else None
    ids = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), device=device)
    train_step(model, optimizers, ids, dtype)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profiler(activities=activities) as result:
        for _ in range(cfg.steps):
            train_step(model, optimizers, ids, dtype)
        synchronize(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(result.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    for row in rows[:14]:
        print(f"{getattr(row, key) / total:6.1%}  {getattr(row, key) / 1e3 / cfg.steps:9.1f} ms  "
              f"{row.count // cfg.steps:5} calls  {row.key[:60]}")


def check(cfg, what):
    """Refuse numbers that no contender could work with."""
    for name in ("rounds", "steps", "block_size", "max_new_tokens"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)} must be greater than 0")
    if cfg.batch_size < (what != "train" or choose_device(cfg.device).type == "cpu"):
        raise UserError("batch_size=0, the best one, is looked for on a GPU alone")
    try:
        with torch.device("meta"):
            our_optimizers(our_model(cfg), cfg.optimizer)
    except ValueError as e:
        raise UserError(e) from e
    if not cfg.out.endswith(".json"):
        raise UserError(f"out={cfg.out} must end in .json")
    if what == "prepare" and not (Path(cfg.corpus).is_file() and Path(cfg.tokenizer).exists()):
        raise UserError("name what to read: --corpus=FILE.jsonl --tokenizer=FOLDER")


def main():
    if len(sys.argv) == 2 and sys.argv[1].startswith("--as="):
        return serve(sys.argv[1][5:])
    cfg, words = configure(__file__)
    if not words:
        return print(__doc__)
    what, *parts = words
    if what not in (*OTHERS, "gpu") or parts and what != "gpu":
        raise UserError(f"'{' '.join(words)}' is none of {', '.join(OTHERS)}, gpu")
    check(cfg, what)
    known = list_parts(cfg, on_gpu=False) if parts else {}
    for part in parts:
        if part not in known:
            raise UserError(f"'{part}' is none of the parts {', '.join(known)}")
    for name in ("vs", "corpus", "tokenizer", "out"):  # contenders work in a folder of their own
        path = getattr(cfg, name)
        setattr(cfg, name, str(Path(path).resolve()) if path else "")
    if what == "gpu":
        run_gpu(cfg, parts)
    else:
        print_profile(cfg) if cfg.profile else compare(cfg, what)


if __name__ == "__main__":
    run_main(main, __file__)

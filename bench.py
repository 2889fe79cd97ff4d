"""How fast and how lean, beside others, in turns within one run: ratios of medians, not of luck.

    python bench.py train --vs=PATH_TO_NANOGPT    # a training step; without --vs ours alone
    python bench.py train --profile               # where a step's time goes
    python bench.py sample --vs=PATH_TO_NANOGPT   # tokens a second, transformers too
    python bench.py prepare --vs=others --corpus=FILE.jsonl --tokenizer=FOLDER

Each contender lives in a process of its own, so that its peak memory is its own, and works only in
its turn. Weights and tokens are random: the work is the same as with real ones.
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
batch_size = 8        # rows; 0 = each at its own best, doubled until memory is full (GPU)
steps = 2             # steps a turn
optimizer = "adamw"   # ours: adamw or muon
profile = False       # instead: a table of where a step of ours spends its time
# ---- sample ----
max_new_tokens = 200  # a turn
# ---- prepare ----
corpus = ""           # JSON lines with a "text"
tokenizer = ""        # folder with a tokenizer.json
# ---- machine ----
device = "auto"
dtype = "auto"        # ours, and nanoGPT's on a GPU: on a CPU it knows float32 only
compile = False

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from config import UserError, configure, is_out_of_memory, run_main
from engine.machine import (
    choose_device, choose_dtype, peak_flops, peak_memory, wait_for)
from gpt import GPT, GPTConfig

ROOT = Path(__file__).parent
OTHERS = {"train": ("nanoGPT",), "sample": ("nanoGPT", "transformers"),
          "prepare": ("transformers", "nanoGPT")}


# ---- the parent: turns, and what came of them ----

class Contender:
    """A child process that does a turn of work when it is told to."""

    def __init__(self, name, what, cfg, folder):
        self.name, self.turns = name, []
        # a contender that waits must not spin on the cores of the one at work
        env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench.py"), f"--as={name}"], cwd=folder, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        self.hello = self.ask(dict(what=what, settings=vars(cfg)))

    def ask(self, message):
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as e:
            raise UserError(f"{self.name} ended; why, stands above") from e

    def turn(self):
        self.turns.append(self.ask("turn"))

    def median(self):
        return statistics.median(turn["rate"] for turn in self.turns)

    def report(self):
        """A line of the table: the median, its range, and what else is known."""
        rates, last = [turn["rate"] for turn in self.turns], self.turns[-1]
        more = self.hello | {k: v for k, v in last.items() if k not in ("rate", "unit", "memory")}
        if last.get("memory"):
            more["peak"] = f"{last['memory'] / 2**30:.2f} GiB"
        print(f"{self.name:15} {self.median():12,.1f} {last['unit']}  ({min(rates):,.1f} to "
              f"{max(rates):,.1f})  {', '.join(f'{k} {v}' for k, v in more.items())}")

    def compare(self, other):
        pairs = [a["rate"] / b["rate"] for a, b in zip(self.turns, other.turns)]
        memory, theirs = (c.turns[-1].get("memory") for c in (self, other))
        print(f"{self.name} is {self.median() / other.median():.2f} times as fast as {other.name} "
              f"({min(pairs):.2f} to {max(pairs):.2f})"
              + (f", with {memory / theirs:.2f} of the memory" if memory and theirs else ""))


def our_kinds(cfg, what):
    """Ours, in each number type worth comparing."""
    if what != "sample" or cfg.dtype != "auto":
        return ["ours"]
    on_cpu = choose_device(cfg.device).type == "cpu"
    return [f"ours {dtype}" for dtype in (("float32", "bfloat16") if on_cpu else ("bfloat16",))]


def compare(cfg, what):
    ours, others = our_kinds(cfg, what), OTHERS[what] if cfg.vs else ()
    print(f"{what}: {', '.join([*ours, *others])}; {cfg.rounds} turns each; torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(name, what, cfg, folder) for name in [*ours, *others]]
        for _ in range(cfg.rounds):
            for contender in contenders:
                contender.turn()
        for contender in contenders:
            contender.report()
            contender.process.kill()
        for one in contenders[:len(ours)]:
            for other in contenders[len(ours):]:
                one.compare(other)


def serve(name):
    """The child: say what is ready, then do a turn for every line that comes."""
    out, sys.stdout = sys.stdout, sys.stderr  # others print as they like; only JSON goes back
    task = json.loads(sys.stdin.readline())
    ready = {"train": training, "sample": sampling, "prepare": preparing}[task["what"]]
    hello, turn = ready(name, SimpleNamespace(**task["settings"]))
    print(json.dumps(hello), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=out, flush=True)


# ---- training ----

def nanogpt_model(cfg, **changes):
    sys.path.insert(0, cfg.vs)
    try:
        import model as nano
    except ImportError as e:
        raise UserError(f"vs={cfg.vs} is no nanoGPT checkout: it has no model.py") from e
    shape = {k: getattr(cfg, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return nano.GPT(nano.GPTConfig(**shape, block_size=cfg.block_size, bias=True, **changes))


def our_model(cfg):
    names = ("arch", "n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    return GPT(GPTConfig(**{name: getattr(cfg, name) for name in names}))


def our_optimizers(model, cfg):
    return model.configure_optimizers(cfg.optimizer, 6e-4, 2e-3, 0.1, (0.9, 0.95))


def trainer(name, cfg, device):
    """One training step as a function of ids (rows, block_size + 1)."""
    dtype = choose_dtype(cfg.dtype, device.type)
    torch.set_float32_matmul_precision("high")
    if name == "ours":
        model = our_model(cfg).to(device)
        optimizers = our_optimizers(model, cfg)
        model.compile_parts() if cfg.compile else None
    else:
        dtype = torch.float32 if device.type == "cpu" else dtype  # its train.py's nullcontext()
        model = nanogpt_model(cfg).to(device)
        optimizers = [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)]
        model = torch.compile(model) if cfg.compile else model

    def step(ids):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss = out[0] / ids[:, 1:].numel() if name == "ours" else out[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)

    return step, dtype


def training(name, cfg):
    device = choose_device(cfg.device)
    step, dtype = trainer(name, cfg, device)

    def run(batch_size, n):
        """Seconds of n steps."""
        ids = torch.randint(cfg.vocab_size, (batch_size, cfg.block_size + 1), device=device)
        wait_for(device)
        began = time.perf_counter()
        for _ in range(n):
            step(ids)
        wait_for(device)
        return time.perf_counter() - began

    hello = dict(dtype=str(dtype)[6:])
    batch_size = cfg.batch_size
    if not batch_size:
        batch_size, hello["largest batch"] = best_batch(run)
        torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
    hello["batch"] = batch_size
    run(batch_size, 2)  # the first makes the optimizer's states, and compiles
    flops = our_model_flops(cfg)
    peak = peak_flops(SimpleNamespace(device=device, dtype=dtype, world=1))

    def turn():
        rate = cfg.steps * batch_size * cfg.block_size / run(batch_size, cfg.steps)
        more = dict(mfu=f"{rate * flops / peak:.1%}") if peak else dict(
            GFLOPs=round(rate * flops / 1e9))
        return dict(rate=rate, unit="tokens/s", memory=peak_memory(device), **more)

    return hello, turn


def our_model_flops(cfg):
    with torch.device("meta"):
        return our_model(cfg).flops_per_token(cfg.block_size)


def best_batch(run):
    """(the fastest, the largest) number of rows, doubling until memory is full."""
    rates, rows = {}, 4
    while True:
        try:
            run(rows, 2)
            rates[rows] = rows / run(rows, 3)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            break
        rows *= 2
    torch.cuda.empty_cache()
    return max(rates, key=rates.get), max(rates)


def print_profile(cfg):
    """The operators that take most of a training step of ours, by their own time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    device = choose_device(cfg.device)
    step, _ = trainer("ours", cfg, device)
    ids = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), device=device)
    step(ids)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profiler(activities=activities) as result:
        for _ in range(cfg.steps):
            step(ids)
        wait_for(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(result.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    for row in rows[:14]:
        print(f"{getattr(row, key) / total:6.1%}  {getattr(row, key) / 1e3 / cfg.steps:9.1f} ms  "
              f"{row.count // cfg.steps:5} calls  {row.key[:60]}")


# ---- sampling ----

def sampling(name, cfg):
    device, n = choose_device(cfg.device), cfg.max_new_tokens
    name, _, wanted = name.partition(" ")
    dtype = choose_dtype(wanted or cfg.dtype, device.type)
    ids = torch.zeros((1, 1), dtype=torch.long, device=device)
    how = dict(temperature=0.8, top_k=200)  # those of nanoGPT's sample.py
    if name == "ours":
        model = our_model(cfg).to(device, dtype).eval()
        model.compile_parts() if cfg.compile else None
        draw = torch.inference_mode()(lambda: sum(1 for _ in model.generate(ids, n, **how)))
    elif name == "nanoGPT":
        model = nanogpt_model(cfg).to(device).eval()
        model = torch.compile(model) if cfg.compile else model
        dtype = torch.float32 if device.type == "cpu" else dtype
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

        def draw():
            with torch.no_grad(), autocast:
                model.generate(ids, n, **how)
    else:
        from transformers import AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            our_model(cfg).save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        draw = lambda: model.generate(ids, min_new_tokens=n, max_new_tokens=n, do_sample=True,
                                      pad_token_id=0, **how)

    def turn():
        wait_for(device)
        began = time.perf_counter()
        draw()
        wait_for(device)
        return dict(rate=n / (time.perf_counter() - began), unit="tokens/s",
                    memory=peak_memory(device))

    draw()
    return dict(dtype=str(dtype)[6:]), turn


# ---- preparing ----

def preparing(name, cfg):
    """Text to .bin: prepare.py with two workers; the fast tokenizer of transformers, a document at
    a time; and the way of nanoGPT's data/openwebtext/prepare.py, datasets.map with tiktoken on two
    processes, then 1,024 batches into a memmap."""
    file, tok = Path(cfg.corpus), cfg.tokenizer
    size = file.stat().st_size / 1e6
    convert = {"ours": prepare_ours, "transformers": prepare_hf, "nanoGPT": prepare_nanogpt}[name]
    return {}, lambda: dict(rate=size / convert(file, tok), unit="MB/s")


def prepare_ours(file, tok):
    command = [sys.executable, str(ROOT / "prepare.py"), "text", str(file), f"--tokenizer={tok}",
               "--workers=2", "--name=speed"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(Path("data/speed/meta.json").read_text(encoding="utf-8"))["run"]["seconds"]


def prepare_hf(file, tok):
    import numpy as np
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(tok)
    eot, began = tok.convert_tokens_to_ids("<|endoftext|>"), time.time()
    with open(file, encoding="utf-8") as lines, open("hf.bin", "wb") as out:
        for line in lines:
            ids = tok(json.loads(line)["text"], split_special_tokens=True)["input_ids"]
            out.write(np.array([*ids, eot], dtype=np.uint32).tobytes())
    return time.time() - began


def prepare_nanogpt(file, tok):
    import datasets
    import numpy as np
    from data.tokenizer import load_tokenizer
    tok = load_tokenizer(tok)
    datasets.disable_progress_bars()
    texts = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir="cache")

    def process(example):
        ids = tok.fast.encode_ordinary(example["text"])
        ids.append(tok.eot)
        return dict(ids=ids, len=len(ids))

    began = time.time()
    tokenized = texts.map(process, remove_columns=texts.column_names, num_proc=2,
                          load_from_cache_file=False)
    total = np.sum(tokenized["len"], dtype=np.uint64)
    arr, at = np.memmap("nanogpt.bin", dtype=np.uint32, mode="w+", shape=(int(total),)), 0
    for i in range(1024):
        batch = tokenized.shard(num_shards=1024, index=i, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        arr[at:at + len(ids)] = ids
        at += len(ids)
    arr.flush()
    return time.time() - began


def check(cfg, what):
    """Refuse numbers that no contender could work with."""
    for name in ("rounds", "steps", "block_size", "max_new_tokens"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)} must be greater than 0")
    if cfg.batch_size < (what != "train" or choose_device(cfg.device).type == "cpu"):
        raise UserError("batch_size=0, the best one, is looked for on a GPU alone")
    try:
        with torch.device("meta"):
            our_optimizers(our_model(cfg), cfg)
    except ValueError as e:
        raise UserError(e) from e
    if what == "prepare" and not (Path(cfg.corpus).is_file() and Path(cfg.tokenizer).exists()):
        raise UserError("name what to read: --corpus=FILE.jsonl --tokenizer=FOLDER")


def main():
    if len(sys.argv) == 2 and sys.argv[1].startswith("--as="):
        return serve(sys.argv[1][5:])
    cfg, words = configure(__file__)
    what = words[0] if words else "train"
    if what not in OTHERS or len(words) > 1:
        raise UserError(f"'{' '.join(words)}' is none of {', '.join(OTHERS)}")
    check(cfg, what)
    for name in ("vs", "corpus", "tokenizer"):  # contenders work in a folder of their own
        path = getattr(cfg, name)
        setattr(cfg, name, str(Path(path).resolve()) if path else "")
    print_profile(cfg) if cfg.profile else compare(cfg, what)


if __name__ == "__main__":
    run_main(main, __file__)

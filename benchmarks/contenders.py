"""The contenders of bench.py: the child processes and the work they do in their turns.

A kind of work is a function (name, cfg) that runs in the child, prepares a model or a script and
returns a function turn(size), which does the work once and returns its numbers, a dict: "rate" with
its "unit", "gib" (peak memory, 0 = unknown) and others to be shown. Weights and tokens are random.
"""
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from common.command_line import UserError, first_line, is_out_of_memory
from common.device import (
    DTYPES, autocast, choose_device, choose_dtype, peak_flops, peak_memory, synchronize)
from gpt import GPT, GPTConfig
from models.hf import save_pretrained
from training.optim import configure_optimizers

ROOT = Path(__file__).parent.parent
SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
SPAWN = multiprocessing.get_context("spawn")


# ---- processes ----

class Contender:
    """A child process that does a turn of work when asked, until the time cfg.end.

    turns: {size: [results]}; error: why it does no more turns, "" while it does.
    """

    def __init__(self, name, work, cfg, folder):
        self.name, self.end, self.turns, self.error = name, cfg.end, {}, ""
        self.pipe, pipe_of_child = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(pipe_of_child, work, name, cfg, folder))
        self.process.start()
        pipe_of_child.close()  # so that recv() fails when the child has ended

    def turn(self, size):
        """Do a turn of that size, unless the contender has failed."""
        if self.error:
            return
        try:
            self.pipe.send(size)
            left = max(0, min(self.end - time.monotonic(), 10**6))  # poll() takes no infinity
            self.error = "stopped at the time limit"
            if self.pipe.poll(left):
                self.error, result = self.pipe.recv()
        except (EOFError, OSError):
            self.error = "the process ended"
        if self.error:
            self.kill()
        else:
            self.turns.setdefault(size, []).append(result)
        print(f"  {self.name}: {self.error or describe(result)}", flush=True)

    def kill(self):
        """End the child and the processes that it has started."""
        with suppress(OSError, AttributeError):  # Windows has no process groups
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(3)  # a GPU driver may hold it longer


def serve(pipe, work, name, cfg, folder):
    """Run in the child: do a turn for each size received from the pipe; send (error, result)."""
    os.chdir(folder)
    with suppress(AttributeError):  # not on Windows
        os.setsid()  # a process group of its own, for kill()
    try:
        size = pipe.recv()
        turn = work(name, cfg)  # not before its first turn: it takes memory that others may need
        while True:
            pipe.send(("", turn(size)))
            size = pipe.recv()
    except Exception as e:
        if not isinstance(e, (UserError, ImportError)) and not is_out_of_memory(e):
            traceback.print_exc()
        pipe.send((" ".join(str(e).split())[:300] or type(e).__name__, None))


def run_script(script, *words, cwd=".", seconds=None):
    """Run a script of this project and tell it to stop after so many seconds."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, words)], cwd=cwd)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # pretrain.py saves a checkpoint first
        process.wait()
        return
    if code:
        raise UserError(f"{script} ended with code {code}; its message is above")


def describe(result):
    """Return the numbers of a turn as one line: 1,200.5 tokens/s, 3.20 GiB, batch 8, loss 9.3."""
    formats = dict(rate=f"{{:,.1f}} {result.get('unit')}", gib="{:.2f} GiB", mfu="MFU {:.1%}")
    texts = []
    for key, value in result.items():
        usual = f"{key} {{:.4g}}" if isinstance(value, float) else f"{key} {{}}"
        if key != "unit" and (value or key not in ("gib", "mfu")):  # 0: unknown
            texts.append(formats.get(key, usual).format(value))
    return ", ".join(texts)


def take_peak(device):
    """Return the peak memory in GiB: of a GPU since the last call, of a CPU since the start."""
    gib = peak_memory(device) / 2**30
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return gib


# ---- models ----

def make_nanogpt(cfg):
    """Return nanoGPT's model, from the checkout in cfg.vs."""
    sys.path.insert(0, cfg.vs)
    import model as nanogpt
    return nanogpt.GPT(nanogpt.GPTConfig(**pick(cfg, SHAPE), bias=True))


def make_ours(cfg):
    """Return our model of the same shape."""
    return GPT(GPTConfig(**pick(cfg, SHAPE), arch=cfg.arch))


def pick(cfg, names):
    """Return {name: value} of these settings."""
    return {name: getattr(cfg, name) for name in names}


def contender_dtype(name, cfg, device):
    """Return the dtype that a contender computes in: that in its name, else that of cfg."""
    dtype = cfg.dtype
    if name == "nanoGPT":  # its train.py and sample.py use autocast on a GPU only
        dtype = cfg.vs_dtype or ("float32" if device.type == "cpu" else dtype)
    return DTYPES.get(name.split()[-1]) or choose_dtype(dtype, device.type)


# ---- train ----

def make_trainer(name, cfg, device):
    """Return (model, optimizers, dtype) of "ours", "ours fsdp" or "nanoGPT"."""
    dtype = contender_dtype(name, cfg, device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)
    if name == "nanoGPT":
        model = make_nanogpt(cfg).to(device)
        return model, [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)], dtype
    model = make_ours(cfg).to(device)
    if name == "ours fsdp":
        model = shard_alone(model, device, dtype)
    return model, configure_optimizers(model, cfg.optimizer, 6e-4, 2e-3, 0.1, (0.9, 0.95)), dtype


def shard_alone(model, device, dtype):
    """Shard the model with FSDP over a group of this one process."""
    import torch.distributed as dist

    from training.distributed import shard
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")  # there may be no network
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1,
                            store=dist.TCPStore("127.0.0.1", 0, 1, is_master=True))
    return shard(model, dtype)


def train_step(model, optimizers, ids, dtype):
    """Train ours or nanoGPT's model on ids (rows, T + 1); return the mean loss."""
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with autocast(ids.device, dtype):
        out = model(x, y)  # ours: (sum of the loss, tokens); nanoGPT's: (logits, mean loss)
    loss = out[0] / y.numel() if out[0].dim() == 0 else out[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in optimizers:
        opt.step()
        opt.zero_grad(set_to_none=True)
    return loss.detach()


def make_steps(trainer, cfg, device):
    """Return run(rows, n) -> (seconds of n training steps, loss of the last)."""
    model, optimizers, dtype = trainer

    def run(rows, n):
        ids = torch.randint(cfg.vocab_size, (rows, cfg.block_size + 1), device=device)
        synchronize(device)
        began = time.perf_counter()
        for _ in range(n):
            loss = train_step(model, optimizers, ids, dtype)
        synchronize(device)
        return time.perf_counter() - began, loss.item()

    return run


def train(name, cfg):
    """Time training steps; the size of a turn is the tokens of a step, 0 = those of cfg.batch_size
    or of the fastest batch size."""
    device = choose_device(cfg.device)
    if device.type == "cuda":  # the same limit for all; waiting contenders hold their weights
        torch.cuda.set_per_process_memory_fraction(0.9, device)
    model, _, dtype = trainer = make_trainer(name, cfg, device)
    run = make_steps(trainer, cfg, device)
    best, more, warm = cfg.batch_size, dict(dtype=str(dtype)[6:]), set()
    if not best:
        best, more["largest_batch"] = find_best_batch(run, cfg.block_size, device)
        model.zero_grad(set_to_none=True)
    if cfg.compile:
        torch._dynamo.config.automatic_dynamic_shapes = False  # each batch size is compiled apart
        model.compile() if name == "nanoGPT" else model.compile_parts()
    with torch.device("meta"):
        flops = make_ours(cfg).flops_per_token(cfg.block_size)
    peak = peak_flops(device, dtype)

    def turn(size):
        rows = size // cfg.block_size or best
        if device.type == "cuda" or rows not in warm:
            run(rows, 2)  # compiles, makes the optimizer's state, takes memory from the GPU again
            warm.add(rows)
        take_peak(device)
        seconds, loss = run(rows, cfg.steps)
        rate, gib = cfg.steps * rows * cfg.block_size / seconds, take_peak(device)
        torch.cuda.empty_cache()  # room for the others
        used = dict(mfu=rate * flops / peak) if peak else {"GFLOP/s": rate * flops / 1e9}
        return dict(rate=rate, unit="tokens/s", gib=gib, batch=rows, loss=loss) | used | more

    return turn


def find_best_batch(run, block_size, device):
    """Double the rows, from 4,096 tokens on, until memory is full; return (the fewest rows whose
    rate is within 2 % of the highest, the most rows that fit)."""
    rates, rows = {}, max(1, 4096 // block_size)
    while True:
        try:
            run(rows, 2)
            rates[rows] = 3 * rows * block_size / run(rows, 3)[0]
        except RuntimeError as e:  # memory is full, or a kernel has reached its limit
            print(f"    {rows} rows: {first_line(e)}", flush=True)
            if not rates:
                raise
            break
        print(f"    {rows} rows, not compiled: {rates[rows]:,.0f} tokens/s, "
              f"{take_peak(device):.2f} GiB", flush=True)
        rows *= 2
    return min(n for n, rate in rates.items() if rate >= 0.98 * max(rates.values())), max(rates)


def print_profile(cfg):
    """Print the operators that take most time in our training step, without those they call."""
    turn = train("ours", cfg)
    turn(0)  # the first step allocates the optimizer's state
    with torch.profiler.profile() as result:
        turn(0)
    kind = "device" if choose_device(cfg.device).type == "cuda" else "cpu"
    print(result.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=14))


# ---- sample ----

def sample(name, cfg):
    """Time sampling; the size of a turn is its rows."""
    device = choose_device(cfg.device)
    dtype = contender_dtype(name, cfg, device)
    draw, warm = make_sampler(name, cfg, device, dtype), set()

    def turn(size):
        ids = torch.ones((size, 1), dtype=torch.long, device=device)  # 0 is the padding
        if size not in warm:
            draw(ids)
            warm.add(size)
        take_peak(device)
        synchronize(device)
        began = time.perf_counter()
        draw(ids)
        synchronize(device)
        return dict(rate=cfg.max_new_tokens * size / (time.perf_counter() - began),
                    unit="tokens/s", gib=take_peak(device), batch=size, dtype=str(dtype)[6:])

    return turn


def make_sampler(name, cfg, device, dtype):
    """Return a function that continues ids (rows, 1) by cfg.max_new_tokens tokens."""
    n, how = cfg.max_new_tokens, dict(temperature=0.8, top_k=200)  # those of nanoGPT's sample.py
    if name.startswith("ours"):
        model = make_ours(cfg).to(device, dtype).eval()
        return torch.inference_mode()(lambda ids: list(model.generate(ids, n, **how)))
    if name == "nanoGPT":
        model = make_nanogpt(cfg).to(device).eval()
        return torch.no_grad()(autocast(device, dtype)(lambda ids: model.generate(ids, n, **how)))
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(make_ours(cfg), folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return lambda ids: model.generate(ids, min_new_tokens=n, max_new_tokens=n, do_sample=True,
                                      pad_token_id=0, **how)


# ---- prepare ----

def prepare(name, cfg):
    """Time the conversion of text to a .bin: prepare.py with two workers; the fast tokenizer of
    transformers, a document at a time; and nanoGPT's data/openwebtext/prepare.py, which is
    datasets.map with tiktoken in two processes, then 1,024 batches into a memmap."""
    size = Path(cfg.corpus).stat().st_size / 1e6
    convert = dict(ours=prepare_ours, transformers=prepare_hf, nanoGPT=prepare_nanogpt)[name]
    return lambda _: dict(rate=size / convert(cfg.corpus, cfg.tokenizer), unit="MB/s")


def prepare_ours(file, tok):
    """Return the seconds of prepare.py, by its own clock."""
    run_script("prepare.py", "text", file, f"--tokenizer={tok}", "--workers=2", "--name=speed")
    return json.loads(Path("data/speed/meta.json").read_text(encoding="utf-8"))["run"]["seconds"]


def prepare_hf(file, tok):
    """Return the seconds of transformers' tokenizer, document by document."""
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
    """Return the seconds of the code in nanoGPT's data/openwebtext/prepare.py."""
    import datasets
    import numpy as np

    from tokens.tokenizer_files import load_tokenizer
    tok = load_tokenizer(tok)
    datasets.disable_progress_bars()
    texts = datasets.load_dataset("json", data_files=file, split="train", cache_dir="cache")

    def process(example):
        ids = [*tok.fast.encode_ordinary(example["text"]), tok.eot]
        return dict(ids=ids, len=len(ids))

    began = time.time()
    tokenized = texts.map(process, remove_columns=texts.column_names, num_proc=2,
                          load_from_cache_file=False)
    total, at = sum(tokenized["len"]), 0
    arr = np.memmap("nanogpt.bin", dtype=np.uint32, mode="w+", shape=(total,))
    for i in range(1024):
        batch = tokenized.shard(num_shards=1024, index=i, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        arr[at:at + len(ids)] = ids
        at += len(ids)
    arr.flush()
    return time.time() - began


# ---- pretrain ----

def pretrain(name, cfg):
    """Run pretrain.py with the shape of config/pretrain_zh_modern.py. The size of a turn is its
    steps; 0 = as many as fit in the time that is left, at the speed of the turn before."""
    tokens, out = cfg.batch_size * cfg.block_size, Path(cfg.out).with_suffix("")
    dataset = Path(cfg.dataset or "data/demo").resolve()  # pretrain.py prepares the demo
    settings = pick(cfg, (
        "n_layer", "n_head", "n_embd", "block_size", "batch_size", "device", "dtype", "compile"))
    settings |= dict(
        n_kv_head=cfg.n_head // (1 if cfg.n_head % 3 else 3), gradient_accumulation_steps=1,
        dataset=dataset.name, out_dir=out, warmup_iters=100, max_iters=0,
        checkpoint_interval=10**6)  # one checkpoint, at the end of each turn
    speed, other_seconds = 0.0, 0.0  # tokens a second; start, compilation and evaluations

    def turn(steps):
        nonlocal speed, other_seconds
        began = time.monotonic()
        left, first = cfg.end - began, settings["max_iters"]
        steps = steps or max(10, int((0.8 * left - other_seconds) * speed / tokens))
        settings.update(
            overwrite=not first, max_iters=first + steps,
            eval_interval=max(1, (first + steps) // 4), log_interval=max(10, steps // 30))
        run_script("pretrain.py", ROOT / "config/pretrain_zh_modern.py",
                   *(f"--{key}={value}" for key, value in settings.items()),
                   cwd=dataset.parents[1], seconds=0.9 * left)
        result, seconds = read_log(out / "log.jsonl"), time.monotonic() - began
        speed = result["rate"]
        other_seconds = seconds - steps * tokens / speed
        return result | dict(tokens=result["step"] * tokens, seconds=seconds, data=dataset.name)

    return turn


def read_log(file):
    """Return speed, memory and last scores of a run."""
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    logs = [entry for entry in entries if "loss" in entry]
    last = {key: value for entry in entries for key, value in entry.items()}
    rate = statistics.median(entry["tokens_per_second"] for entry in logs)
    mfu = statistics.median(entry.get("mfu", 0) for entry in logs)
    return dict(rate=rate, unit="tokens/s", gib=last["memory_gib"], mfu=mfu) | {
        key: last[key] for key in ("step", "loss", "val_loss", "bpb")}

"""The work of bench.py's child processes: train, sample, prepare, check numbers, a real run.

Each kind of work is a function (name, cfg) -> (facts, turn): it gets ready, tells what it knows,
and turn(batch_size) does a turn of work and returns its numbers.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.numerics import numeric_checks
from common.command_line import UserError, is_out_of_memory
from common.device import choose_device, choose_dtype, peak_flops, peak_memory, synchronize
from gpt import GPT, GPTConfig
from models.hf import save_pretrained
from training.distributed import Context, wrap_model
from training.optim import configure_optimizers

ROOT = Path(__file__).parent.parent


def serve(name):
    """Answer the parent: a line of JSON when ready, then one for every turn it asks for."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed, by children too, goes to stderr
    task = json.loads(sys.stdin.readline())
    ready = {"train": training, "sample": sampling, "prepare": preparing, "numerics": numerics,
             "pretrain": pretraining}[task["what"]]
    facts, turn = ready(name, SimpleNamespace(**task["settings"]))
    print(json.dumps(facts), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(json.loads(line))), file=out, flush=True)


# ---- training ----

def nanogpt_model(cfg):
    sys.path.insert(0, cfg.vs)
    try:
        import model as nano
    except ImportError as e:
        raise UserError(f"vs={cfg.vs} is no nanoGPT checkout: it has no model.py") from e
    shape = {k: getattr(cfg, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return nano.GPT(nano.GPTConfig(**shape, block_size=cfg.block_size, bias=True))


def our_model(cfg):
    names = ("arch", "n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    return GPT(GPTConfig(**{name: getattr(cfg, name) for name in names}))


def our_optimizers(model, optimizer):
    return configure_optimizers(model, optimizer, 6e-4, 2e-3, 0.1, (0.9, 0.95))


def make_trainer(name, cfg, device):
    """(model, optimizers, dtype) of "ours", "ours fsdp" or nanoGPT."""
    dtype = choose_dtype(cfg.dtype, device.type)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)
    if name == "nanoGPT":
        dtype = torch.float32 if device.type == "cpu" else dtype  # its train.py's nullcontext()
        model = nanogpt_model(cfg).to(device)
        return model, [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)], dtype
    model = our_model(cfg).to(device)
    if name == "ours fsdp":
        model = shard_alone(model, device, dtype)
    return model, our_optimizers(model, cfg.optimizer), dtype


def shard_alone(model, device, dtype):
    """fully_shard the model over a group of this one process."""
    import torch.distributed as dist
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")  # there may be no network
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1,
                            store=dist.TCPStore("127.0.0.1", 0, 1, is_master=True))
    # wrap_model returns the model as it is when world_size is 1
    return wrap_model(model, Context(device, dtype, world_size=2, fsdp=True))


def train_step(model, optimizers, ids, dtype):
    """Train ours or nanoGPT's model on ids (rows, block_size + 1); return the mean loss."""
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        out = model(x, y)  # ours: (sum of the loss, tokens); nanoGPT's: (logits, mean loss)
    loss = out[0] / y.numel() if out[0].dim() == 0 else out[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in optimizers:
        opt.step()
        opt.zero_grad(set_to_none=True)
    return loss.detach()


def training(name, cfg):
    device = choose_device(cfg.device)
    on_gpu = device.type == "cuda"
    if on_gpu:  # the same limit for all; waiting contenders hold their weights
        torch.cuda.set_per_process_memory_fraction(0.9, device)
    model, optimizers, dtype = make_trainer(name, cfg, device)

    def run(rows, n):
        """(seconds of n steps, loss of the last)."""
        ids = torch.randint(cfg.vocab_size, (rows, cfg.block_size + 1), device=device)
        synchronize(device)
        began = time.perf_counter()
        for _ in range(n):
            loss = train_step(model, optimizers, ids, dtype)
        synchronize(device)
        return time.perf_counter() - began, loss.item()

    facts, best, warm = dict(dtype=str(dtype)[6:]), cfg.batch_size, set()
    if not best:
        sizes = try_batch_sizes(run, cfg.block_size, device)
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        best = best_batch(sizes)
        facts |= dict(best=best, largest=max(sizes), not_compiled=sizes)
    if cfg.compile:
        from torch._dynamo import config as dynamo
        dynamo.automatic_dynamic_shapes = False  # each batch size is compiled apart
        model.compile() if name == "nanoGPT" else model.compile_parts()
    flops = our_model_flops(cfg)
    peak = peak_flops(device, dtype)

    def turn(batch_size):
        rows = batch_size or best
        if rows not in warm:
            run(rows, 2)  # the first makes the optimizer's states, and compiles
            warm.add(rows)
        if on_gpu:
            reset_peak(device)
            run(rows, 1)  # allocates again what was given back
        seconds, loss = run(rows, cfg.steps)
        rate, memory = cfg.steps * rows * cfg.block_size / seconds, peak_memory(device)
        torch.cuda.empty_cache() if on_gpu else None  # room for the others
        more = dict(mfu=rate * flops / peak) if peak else dict(GFLOPs=round(rate * flops / 1e9))
        return dict(rate=rate, unit="tokens/s", memory=memory, batch=rows, loss=loss, **more)

    return facts, turn


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def our_model_flops(cfg):
    with torch.device("meta"):
        return our_model(cfg).flops_per_token(cfg.block_size)


def try_batch_sizes(run, block_size, device):
    """{rows: [tokens a second, peak GiB]}, doubled from 4,096 tokens on until memory is full."""
    sizes, rows = {}, max(1, 4096 // block_size)
    while True:
        try:
            reset_peak(device)
            run(rows, 2)
            rate = 3 * rows * block_size / run(rows, 3)[0]
            sizes[rows] = [round(rate), round(peak_memory(device) / 2**30, 2)]
        except RuntimeError as e:
            if not sizes:
                raise
            if not is_out_of_memory(e):  # a kernel's own limit: the sizes below it still count
                traceback.print_exc()
            return sizes
        rows *= 2


def best_batch(sizes):
    """The smallest batch whose rate is within 2 % of the highest."""
    highest = max(rate for rate, _ in sizes.values())
    return min(rows for rows, (rate, _) in sizes.items() if rate >= 0.98 * highest)


# ---- sampling ----

def sampling(name, cfg):
    device, n = choose_device(cfg.device), cfg.max_new_tokens
    name, _, wanted = name.partition(" ")
    dtype = choose_dtype(wanted or cfg.dtype, device.type)
    how = dict(temperature=0.8, top_k=200)  # those of nanoGPT's sample.py
    if name == "ours":
        model = our_model(cfg).to(device, dtype).eval()
        model.compile_parts() if cfg.compile else None
        draw = torch.inference_mode()(lambda ids: sum(1 for _ in model.generate(ids, n, **how)))
    elif name == "nanoGPT":
        model = nanogpt_model(cfg).to(device).eval()
        model.compile() if cfg.compile else None
        dtype = torch.float32 if device.type == "cpu" else dtype
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

        def draw(ids):
            with torch.no_grad(), autocast:
                model.generate(ids, n, **how)
    else:
        from transformers import AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(our_model(cfg), folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        draw = lambda ids: model.generate(ids, min_new_tokens=n, max_new_tokens=n, do_sample=True,
                                          pad_token_id=0, **how)
    warm = set()

    def turn(batch_size):
        ids = torch.ones((batch_size, 1), dtype=torch.long, device=device)  # 0 is the padding
        if batch_size not in warm:
            draw(ids)
            warm.add(batch_size)
        reset_peak(device)
        began = time.perf_counter()
        draw(ids)
        synchronize(device)
        return dict(rate=n * batch_size / (time.perf_counter() - began), unit="tokens/s",
                    memory=peak_memory(device), batch=batch_size)

    return dict(dtype=str(dtype)[6:]), turn


# ---- preparing ----

def preparing(name, cfg):
    """Text to .bin: prepare.py with two workers; the fast tokenizer of transformers, a document at
    a time; and the way of nanoGPT's data/openwebtext/prepare.py, datasets.map with tiktoken on two
    processes, then 1,024 batches into a memmap."""
    file, tok = Path(cfg.corpus), cfg.tokenizer
    size = file.stat().st_size / 1e6
    convert = {"ours": prepare_ours, "transformers": prepare_hf, "nanoGPT": prepare_nanogpt}[name]
    return {}, lambda _: dict(rate=size / convert(file, tok), unit="MB/s")


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

    from tokens.tokenizer import load_tokenizer
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


# ---- numeric checks ----

def numerics(name, cfg):
    """A turn is one check; one that fails leaves the others to do."""
    torch.set_float32_matmul_precision("highest")
    checks = iter(numeric_checks(choose_device(cfg.device), cfg.compile))

    def turn(_):
        name, limit, check = next(checks)
        try:
            error = check()
        except Exception as e:
            traceback.print_exc()
            return dict(check=name, ok=False, why=str(e).strip()[-300:])
        return dict(check=name, ok=error <= limit, error=error, limit=limit)

    return {}, turn


# ---- a real run ----

def pretraining(name, cfg):
    """pretrain.py with the shape of config/pretrain_zh_modern.py: the first turn takes 30 steps and
    measures their speed, the second resumes and takes as many as the time allows."""
    end, n_steps = time.monotonic() + cfg.seconds, 30
    on_gpu = choose_device(cfg.device).type == "cuda"
    rows = max(1, 65_536 // cfg.block_size) if on_gpu else cfg.batch_size
    tokens, out = rows * cfg.block_size, Path(cfg.out).with_suffix("")
    folder, dataset = Path(cfg.dataset).parents[1], Path(cfg.dataset).name
    words = {name: getattr(cfg, name) for name in (
        "n_layer", "n_head", "n_embd", "block_size", "device", "dtype", "compile")}
    words |= dict(n_kv_head=cfg.n_head // 3 if cfg.n_head % 3 == 0 else cfg.n_head, batch_size=rows,
                  gradient_accumulation_steps=1, dataset=dataset, out_dir=out, warmup_iters=100,
                  checkpoint_interval=10**6)  # one at the end of each turn
    words = [f"--{name}={value}" for name, value in words.items()] + ["--overwrite"]

    def turn(_):
        nonlocal n_steps
        began = time.monotonic()
        command = [ROOT / "pretrain.py", ROOT / "config/pretrain_zh_modern.py", *words,
                   f"--max_iters={n_steps}", f"--eval_interval={max(1, n_steps // 4)}",
                   f"--log_interval={max(10, n_steps // 30)}"]
        code, lines = run_until(end - 0.1 * (end - began), command, folder)
        log = out / "log.jsonl"
        if code not in (0, 143, -15) or not log.is_file():
            raise UserError(f"pretrain.py ended with code {code}")
        result = read_log(log) | dict(samples=[s for s in lines if " > " in s][-2:])
        seconds = time.monotonic() - began
        others = seconds - n_steps * tokens / result["rate"]  # start, compilation, evaluations
        n_steps += max(10, int((0.8 * (end - time.monotonic()) - others) * result["rate"] / tokens))
        words[-1] = "--overwrite=False"
        return result | dict(tokens=result["step"] * tokens, seconds=seconds)

    return dict(dataset=dataset, tokens_per_step=tokens), turn


def run_until(end, command, folder):
    """Run a script and print what it prints -> (exit code, lines); at `end` it is told to stop."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder,
                               stdout=subprocess.PIPE, text=True, encoding="utf-8")
    timer = threading.Timer(end - time.monotonic(), process.terminate)
    timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    timer.cancel()
    return process.wait(), lines


def read_log(file):
    """Speed, last scores and curve of a run."""
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    logs = [e for e in entries if "loss" in e]
    scores = [e for e in entries if "val_loss" in e][-1]
    curve = [(e["step"], round(e["loss"], 4)) for e in logs]
    return dict(
        step=entries[-1]["step"], rate=statistics.median(e["tokens_per_second"] for e in logs),
        unit="tokens/s", memory=int(logs[-1]["memory_gib"] * 2**30), loss=logs[-1]["loss"],
        val_loss=scores["val_loss"], bpb=scores["bpb"], curve=curve[::-(-len(curve) // 30)],
        **({"mfu": statistics.median(e["mfu"] for e in logs)} if "mfu" in logs[-1] else {}))

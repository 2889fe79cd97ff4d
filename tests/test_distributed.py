"""Several processes equal one, memory, what a run keeps and refuses."""
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, one_line, run
from test_scripts import TINY, curve, settings, train, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pretrain
from common import device
from common.command_line import is_out_of_memory
from gpt import GPT, GPTConfig
from models.load import from_pretrained
from tokens.bins import Bins
from training import distributed, estimate
from training.checkpoint import checkpoint_files
from training.runlog import RunLog

torch.set_num_threads(1)


def torchrun(place, n, *words, script=ROOT / "pretrain.py", code=0, torchrun_words=()):
    """Run a script in n processes -> its text; it must end with this code."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
         *torchrun_words, str(script), *[str(w) for w in words]],
        cwd=place, env=ENV, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert bool(done.returncode) == bool(code), done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def same_curve(a, b, rel=1e-5):
    assert [e[0] for e in a] == [e[0] for e in b]
    for x, y in zip(a, b):
        assert (x[1] or x[2]) == pytest.approx(y[1] or y[2], rel=rel)


# ---- many processes ----

@pytest.mark.parametrize("words, sharded", [
    (["--arch=gpt2"], ["--fsdp"]),
    (["--optimizer=muon", "--n_kv_head=1"], ["--fsdp", "--recompute"])])
def test_a_sharded_run_equals_one_process_and_goes_on_in_it(words, sharded, place):
    words = [*TINY, *words, "--max_iters=12", "--log_interval=1"]
    done = run(place, "pretrain.py", *words, "--out_dir=out/one")
    assert done.returncode == 0, done.stderr
    said = torchrun(place, 2, *words, *sharded, "--out_dir=out/two")
    assert "2 processes, sharded" in said
    same_curve(curve(place / "out/one"), curve(place / "out/two"), 1e-3)
    one, two = (from_pretrained(place / f"out/{n}/best") for n in ("one", "two"))
    one, two = (torch.cat([p.flatten() for p in m.parameters()]) for m in (one, two))
    assert (one - two).norm() < 1e-3 * one.norm()
    # the same checkpoint, taken up by one process and by two
    newest, older = checkpoint_files(place / "out/two")
    newest.unlink()
    for name, start in (("three", ()), ("four", (2, "--fsdp"))):
        (place / "out" / name).mkdir()
        (place / "out" / name / older.name).write_bytes(older.read_bytes())
        if start:
            torchrun(place, *[start[0], *words, *start[1:]], f"--out_dir=out/{name}")
        else:
            assert run(place, "pretrain.py", *words, f"--out_dir=out/{name}").returncode == 0
        same_curve(curve(place / "out/two")[-4:], curve(place / f"out/{name}")[-4:], 1e-3)


@pytest.mark.parametrize("more", [[], ["--lora_rank=4"]])
def test_fine_tuning_in_two_processes_equals_one(more, base, place):
    (place / "out").symlink_to(base / "out")
    words = ["--dataset=demo_chat", "--max_iters=10", "--eval_interval=5", "--batch_size=4",
             "--gradient_accumulation_steps=2", "--log_interval=1", "--checkpoint_interval=10",
             f"--init_from={base / 'out/tiny/best'}", "--dtype=float32", *more]
    one, two = place / "one", place / "two"
    assert run(place, "sft.py", *words, f"--out_dir={one}").returncode == 0
    torchrun(place, 2, *words, "--recompute", f"--out_dir={two}", script=ROOT / "sft.py")
    assert len(curve(one)) == 13
    same_curve(curve(one), curve(two))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker through /proc")
def test_a_worker_killed_under_torchrun_comes_back(place):
    train(place, "--out_dir=out/one", "--dropout=0")
    words = [*TINY, "--out_dir=out/two", "--dropout=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--max-restarts=3", str(ROOT / "pretrain.py"), *words], cwd=place, env=ENV,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
    assert any(line.startswith("step 8/") for line in process.stdout)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "resuming from" in said, said
    same_curve(curve(place / "out/one"), curve(place / "out/two"))


def test_batches_come_out_even_for_all_processes():
    batches = [(torch.full((2, 3), i), torch.full((2, 3), i), None) for i in range(5)]
    ctx = SimpleNamespace(world_size=3, rank=0)
    parts = []
    for ctx.rank in range(3):
        parts.append(list(distributed.DistributedContext.share(ctx, batches)))
    assert [len(part) for part in parts] == [2, 2, 2]
    targets = sorted(int(t[0, 0]) for part in parts for _, t, _ in part)
    assert targets == [-1, 0, 1, 2, 3, 4]  # each once, and one with nothing to predict


def test_a_signal_to_any_process_stops_all_and_the_second_to_one_ends_it(place, monkeypatch):
    monkeypatch.chdir(place)
    cfg, bins = settings("--out_dir=out/x"), Bins("demo", place / "data")
    ctx = pretrain.init_context(cfg)
    trainer = pretrain.Trainer(cfg, ctx, pretrain.make_model(cfg, bins),
                               pretrain.TextData(bins, cfg), "base", None)
    ctx.max = lambda number: signal.SIGTERM  # another process received it
    assert trainer.run() == signal.SIGTERM and trainer.step == 0
    assert not trainer.stop.received  # not counted as this process's own first signal
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for _ in range(2):
        trainer.stop.record(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]


def test_processes_without_torchrun_are_told_of_it(place):
    env = ENV | dict(RANK="0", WORLD_SIZE="2")
    done = subprocess.run([sys.executable, str(ROOT / "pretrain.py"), *TINY], cwd=place, env=env,
                          capture_output=True, text=True, encoding="utf-8", timeout=300)
    one_line(done, "torchrun", "MASTER_ADDR")


# ---- memory ----

LIMITED = """
import os, sys
sys.path.insert(0, {root!r})
import torch, pretrain
from gpt import GPT
plain = GPT.forward
def forward(self, ids, *more, **words):
    if len(ids) > 2 and torch.is_grad_enabled() and os.environ.get("RANK", "1") == "1":
        raise torch.OutOfMemoryError("out of memory")
    return plain(self, ids, *more, **words)
GPT.forward = forward
from common.command_line import run_main
run_main(pretrain.main, pretrain.__file__)
"""


def test_a_batch_too_large_for_one_process_is_halved_by_all(place):
    script = place / "limited.py"
    script.write_text(LIMITED.format(root=str(ROOT)), encoding="utf-8")
    words = ("--dropout=0", "--batch_size=8")
    train(place, *words, "--out_dir=out/one")
    said = torchrun(place, 2, *TINY, *words, "--out_dir=out/two", script=script)
    assert "continuing with --batch_size=2 --gradient_accumulation_steps=8" in said
    same_curve(curve(place / "out/one"), curve(place / "out/two"))


def test_memory_that_runs_out_later_is_one_line_and_the_run_goes_on(place):
    train(place, "--out_dir=out/a")
    plain, calls = GPT.forward, itertools.count()

    def forward(self, *words, **more):
        if self.training and next(calls) > 2 * 7:  # one call to try, two each step: in the eighth
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return plain(self, *words, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", forward)
        one_line(run(place, "pretrain.py", *TINY, "--out_dir=out/b"),
                 "pretrain.py: cpu is out of memory: halve batch_size=4 and double "
                 "gradient_accumulation_steps=2; the same command resumes from the last checkpoint")
        one_line(run(place, "pretrain.py", *TINY, "--out_dir=out/c"),
                 "pretrain.py: not even one row of 32 tokens fits in the memory of cpu")
    assert not (place / "out/c").exists()
    assert [f.stem for f in checkpoint_files(place / "out/b")] == ["ckpt_step_6", "ckpt_step_3"]
    assert "ckpt_step_6.pt" in train(place, "--out_dir=out/b").stdout
    assert weights(place / "out/a") == weights(place / "out/b")
    assert curve(place / "out/a") == curve(place / "out/b")


@pytest.mark.parametrize("arch, n_kv_head, qk_norm", [
    ("gpt2", 4, True), ("qwen3", 4, True), ("qwen3", 2, True), ("qwen3", 2, False)])
def test_the_plan_knows_what_a_forward_keeps(arch, n_kv_head, qk_norm):
    config = GPTConfig(arch=arch, vocab_size=256, block_size=128, n_layer=3, n_head=4,
                       n_kv_head=n_kv_head, n_embd=128, qk_norm=qk_norm)
    model, ids, kept = GPT(config), torch.randint(256, (4, 128)), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(ids, ids)
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    planned = estimate.activation_bytes(config, ids.numel(), torch.float32)
    assert planned == pytest.approx(real, rel=0.1)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still exist: now, and at most."""

    def __init__(self, model):
        super().__init__()
        self.now = self.most = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, name, size):
        self.known.remove(name)
        self.now -= size


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_recomputing_takes_a_third_of_the_memory_and_the_plan_knows_it(arch):
    config = GPTConfig(arch=arch, vocab_size=256, block_size=128, n_layer=12, n_head=4, n_embd=128)
    model, ids, peaks = GPT(config), torch.randint(256, (4, 128)), []
    for p in model.parameters():  # gradients are freed at once: they are counted elsewhere
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for model.recompute in (False, True):
        with LiveBytes(model) as live:
            model(ids, ids)[0].backward()
        peaks.append(live.most)
        planned = estimate.activation_bytes(config, ids.numel(), torch.float32, model.recompute)
        planned += estimate.logits_bytes(model, ids.numel(), torch.float32)
        assert planned == pytest.approx(live.most, rel=0.2)
    assert peaks[1] < peaks[0] / 3


def test_torch_compile_without_a_compiler_is_one_line(place, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def forward(*words, **more):
        raise InvalidCxxCompiler
    monkeypatch.setattr(GPT, "forward", forward)
    one_line(run(place, "pretrain.py", *TINY, "--out_dir=out/x"), "No working C++ compiler",
             "leave out --compile")


@pytest.mark.parametrize("text, memory", [("4096", 4096), ("max", 2**40), ("9" * 15, 2**40)])
def test_the_memory_of_a_container_is_that_of_its_limit(text, memory, monkeypatch):
    monkeypatch.setattr(device.os, "sysconf", lambda name: 2**20, raising=False)
    monkeypatch.setattr(device, "Path", lambda name: SimpleNamespace(
        read_text=lambda encoding: text))
    assert device.main_memory() == memory


def test_a_batch_beyond_the_memory_of_a_cpu_is_never_tried(place, monkeypatch):
    monkeypatch.chdir(place)
    cfg, bins = settings("--batch_size=16"), Bins("demo", place / "data")
    model, rows, plain = pretrain.make_model(cfg, bins), [], GPT.forward
    enough = sum(estimate.memory_plan(model, cfg, pretrain.init_context(cfg),
                                      cfg.block_size).values())
    monkeypatch.setattr(estimate, "main_memory", lambda: enough)
    monkeypatch.setattr(GPT, "forward", lambda self, ids, *more: rows.append(len(ids))
                        or plain(self, ids, *more))
    done = train(place, "--dry_run", "--batch_size=64")
    assert "continuing with --batch_size=16 --gradient_accumulation_steps=8" in done.stdout
    assert set(rows) == {16}


def test_a_dry_run_tells_the_cost_and_writes_nothing(place):
    done = train(place, "--dry_run", "--out_dir=out/x", "--max_iters=1000")
    for part in ("M parameters", "M tokens", "epochs", "FLOPs", "memory a process", "to finish"):
        assert part in done.stdout, part
    assert not (place / "out").exists() and "next:" not in done.stdout


# ---- what is kept ----

def test_best_is_never_replaced_by_a_worse_model(place):
    train(place, "--out_dir=out/a", "--max_iters=10", "--checkpoint_interval=4")
    config = place / "out/a/best/config.json"
    best = json.loads(config.read_text(encoding="utf-8"))["val_loss"]
    for file in checkpoint_files(place / "out/a")[:-1]:  # back to before that best was reached
        file.unlink()
    train(place, "--out_dir=out/a", "--max_iters=10", "--learning_rate=1e-6", "--min_lr=0")
    worse = [e[2] for e in curve(place / "out/a") if e[2]][-1]
    assert worse > best and json.loads(config.read_text(encoding="utf-8"))["val_loss"] == best


@pytest.mark.parametrize("name", ["best", "final", "log.jsonl", "wandb"])
def test_what_another_run_left_is_not_removed_unasked(name, place):
    (place / "out/x" / name).mkdir(parents=True)
    one_line(run(place, "pretrain.py", *TINY, "--out_dir=out/x"), name, "--overwrite")
    assert (place / "out/x" / name).is_dir()
    # nor where run.json tells of another run
    facts = dict(settings=vars(settings("--seed=3", "--out_dir=out/x")))
    (place / "out/x/run.json").write_text(json.dumps(facts), encoding="utf-8")
    one_line(run(place, "pretrain.py", *TINY, "--out_dir=out/x"), name, "--overwrite")


def test_two_runs_never_share_a_folder(place):
    words = [*TINY, "--out_dir=out/x", "--max_iters=100000"]
    first = subprocess.Popen([sys.executable, str(ROOT / "pretrain.py"), *words], cwd=place,
                             env=ENV, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert any(line.startswith("step 2/") for line in first.stdout)
    for more in ((), ("--overwrite",)):
        one_line(run(place, "pretrain.py", *words, *more), "another run is writing to out/x")
    first.send_signal(signal.SIGINT)
    assert "stopped at step" in first.communicate()[0]


def test_a_checkpoint_with_a_changed_byte_or_foreign_content_is_not_trained_on(place):
    train(place, "--out_dir=out/a")
    newest, older = checkpoint_files(place / "out/a")
    whole = newest.read_bytes()
    middle = len(whole) // 2
    newest.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    done = train(place, "--out_dir=out/a")
    assert "damaged" in done.stderr and older.name in done.stdout
    whole = newest.read_bytes()
    for name, value in (("exp_avg", torch.zeros(3)), ("step", torch.zeros(3)), ("step", None),
                        ("step", torch.tensor(math.nan)), ("step", torch.tensor(21.0))):
        state = torch.load(newest, weights_only=True)
        state["optimizers"][0]["state"][0][name] = value
        if value is None:
            del state["optimizers"][0]["state"][0][name]
        torch.save(state, newest)
        one_line(run(place, "pretrain.py", *TINY, "--out_dir=out/a", "--max_iters=30"),
                 "was not written by this program", name if value is not None else "exp_avg",
                 "--overwrite")
        newest.write_bytes(whole)


def test_a_damaged_newer_checkpoint_does_not_push_out_the_new_ones(place):
    train(place, "--out_dir=out/a", "--max_iters=10")
    for step in (500, 600):
        (place / f"out/a/ckpt_step_{step}.pt").write_bytes(b"")
    train(place, "--out_dir=out/a")
    assert [f.stem[10:] for f in checkpoint_files(place / "out/a")] == ["600", "500", "20", "18"]


def test_a_folder_that_another_run_filled_meanwhile_is_left_alone(place, monkeypatch):
    train(place, "--out_dir=out/a", "--max_iters=4")
    files = RunLog(settings("--out_dir=out/a"), "base")
    monkeypatch.chdir(place)
    with pytest.raises(pretrain.UserError, match="another run has written to out/a meanwhile"):
        files.start(0, {})
    assert checkpoint_files(place / "out/a") and (place / "out/a/final").is_dir()


@pytest.mark.parametrize("max_iters, said", [(2, "val loss after step 2 is nan"),
                                             (9, "after step 2 wte.weight is not finite")])
def test_a_model_that_the_last_step_broke_is_not_kept(max_iters, said, place, monkeypatch):
    monkeypatch.chdir(place)
    plain = pretrain.Trainer.update

    def update(self):
        norm = plain(self)
        self.model.wte.weight.data[5] = math.nan if self.step == 1 else 0
        return norm
    monkeypatch.setattr(pretrain.Trainer, "update", update)
    cfg = settings("--out_dir=out/x", f"--max_iters={max_iters}", "--checkpoint_interval=2",
                   "--eval_interval=100")
    with pytest.raises(pretrain.UserError, match=said):
        pretrain.train(cfg, pretrain.make_model, pretrain.TextData, "base")
    assert not checkpoint_files(place / "out/x") and not (place / "out/x/final").exists()


def test_a_run_may_go_on_in_another_number_type(place):
    train(place, "--out_dir=out/x", "--max_iters=4")
    train(place, "--out_dir=out/x", "--max_iters=6", "--dtype=float16")
    assert curve(place / "out/x")[-1][0] == 6


def test_memory_that_a_cpu_refuses_is_known_as_such():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_a_run_makes_exactly_max_iters_steps(place, monkeypatch):
    monkeypatch.chdir(place)
    steps, plain = [], pretrain.Trainer.update

    def update(self):
        steps.append(self.step)
        return plain(self)
    monkeypatch.setattr(pretrain.Trainer, "update", update)
    for max_iters in (7, 7, 9):
        cfg = settings("--out_dir=out/x", f"--max_iters={max_iters}")
        pretrain.train(cfg, pretrain.make_model, pretrain.TextData, "base")
        state = torch.load(checkpoint_files(place / "out/x")[0], weights_only=True)
        assert state["step"] == max_iters and steps == list(range(max_iters))
        counts = {int(s["step"]) for s in state["optimizers"][0]["state"].values()}
        assert counts == {max_iters}


def test_a_loss_that_explodes_stops_the_run_and_is_not_kept(place):
    words = (*TINY, "--out_dir=out/x", "--grad_clip=0", "--checkpoint_interval=2",
             "--eval_interval=100", "--warmup_iters=8", "--max_iters=200", "--min_lr=0")
    done = run(place, "pretrain.py", *words, "--learning_rate=300")
    one_line(done, "diverged", "gradient norm", "demo[", "Lower learning_rate")
    step = int(done.stderr.rpartition("step ")[0].rpartition("step ")[2].split()[0])
    for file in checkpoint_files(place / "out/x"):
        state = torch.load(file, weights_only=True)
        assert state["step"] < step + 2
        assert all(t.isfinite().all() for t in state["model"].values())


def test_the_windows_named_are_those_that_were_read(demo):
    data = pretrain.TextData(Bins("demo", demo / "data"), settings())
    places = [int(p) for p in re.findall(r"demo\[(\d+)\]", data.describe(3))]
    rows = torch.cat([data.batch(3, micro)[0] for micro in range(2)])
    tokens = data.train[0]
    assert len(places) == 8
    assert all(np.array_equal(tokens[p:p + 32], row) for p, row in zip(places, rows.numpy()))


@pytest.mark.slow
def test_a_run_killed_thirty_times_ends_with_the_same_weights(place):
    words = ("--max_iters=400", "--optimizer=muon", "--checkpoint_interval=5")
    train(place, *words, "--out_dir=out/a")
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "big"))
    for _ in range(30):
        process = subprocess.Popen([sys.executable, str(ROOT / "pretrain.py"), *TINY, *words,
                                    "--out_dir=out/b"], cwd=place, env=ENV,
                                   stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.5, 8))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    train(place, *words, "--out_dir=out/b")
    assert weights(place / "out/a") == weights(place / "out/b")
    assert curve(place / "out/a") == curve(place / "out/b")


# ---- watching ----

def test_the_log_has_speed_memory_and_waiting(base):
    lines = (base / "out/tiny/log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [e for e in map(json.loads, lines) if "loss" in e]
    assert len(entries) == 6
    for e in entries:
        assert e["tokens_per_second"] > 0 and 0 <= e["data_wait"] < 1
        assert e["memory_gib"] > 0.1 or sys.platform == "win32"


def test_wandb_and_tensorboard_get_the_log(place):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain.py"), *TINY, "--max_iters=6", "--wandb_log",
         "--tensorboard", "--out_dir=out/x"], cwd=place, env=ENV | {"WANDB_MODE": "offline"},
        capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    (record,) = (place / "out/x").glob("wandb/offline-run-*/*.wandb")
    assert record.stat().st_size > 1000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(place / "out/x/tensorboard"))
    events.Reload()
    shown = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("loss")]
    assert shown == [(e[0], e[1]) for e in curve(place / "out/x") if e[1]]


def test_the_schedule_warms_up_and_ends_at_the_floor():
    cfg = SimpleNamespace(warmup_iters=10, max_iters=110, learning_rate=1.0, min_lr=0.1)
    factors = [pretrain.lr_factor(step, cfg) for step in range(120)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55) and factors[110] == factors[119] == 0.1
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))
    assert math.isclose(factors[109], 0.1, rel_tol=0.01)


@pytest.mark.parametrize("min_lr, floor", [(6e-6, 0.6), (0.0, 0.0), (-1.0, 0.1), (6e-5, 0.1)])
def test_min_lr_is_a_tenth_of_a_learning_rate_that_is_lowered_below_it(min_lr, floor):
    cfg = SimpleNamespace(warmup_iters=0, max_iters=100, learning_rate=1e-5, min_lr=min_lr)
    assert pretrain.lr_factor(0, cfg) == 1.0
    assert pretrain.lr_factor(100, cfg) == pytest.approx(floor)

"""Runs that are stopped, made longer, started again, watched and refused."""
import contextlib
import itertools
import json
import shutil
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, one_line, run, run_process, succeed
from test_scripts import TINY, back_to_the_checkpoint_before, chat_settings, curve, settings, train

import pretrain
import sample
import sft
from common import cpu, device, files
from common.command_line import UserError, run_main
from common.settings import configure
from gpt import GPT, Cache, linear_cross_entropy
from models import folders
from models.hf import from_pretrained
from test_gpt import make, random_ids
from tokens.bins import Bins
from training import checkpoint, estimate, optim, runlog
from training.checkpoint import checkpoint_files

torch.set_num_threads(1)


# ---- final/ ----

def config_of(model):
    return json.loads((model / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", ["pretrain.py", "sft.py"])
def test_a_longer_run_that_ends_before_final_is_whole_is_not_finished(script, base, place,
                                                                      monkeypatch):
    words = [script, *TINY] if script == "pretrain.py" else [
        script, f"--init_from={base / 'out/tiny/best'}", "--dataset=demo_chat", "--batch_size=2",
        "--gradient_accumulation_steps=1", "--eval_interval=4", "--checkpoint_interval=4"]
    succeed(run(place, *words, "--out_dir=out/x", "--max_iters=4"))
    plain = pretrain.save_model

    def full(folder, *more):
        if folder.name == "final":
            raise UserError("Is the disk full?")
        plain(folder, *more)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_model", full)
        one_line(run(place, *words, "--out_dir=out/x", "--max_iters=8"), "Is the disk full?")
    assert config_of(place / "out/x/final")["step"] == 4
    done = succeed(run(place, *words, "--out_dir=out/x", "--max_iters=8"))
    assert "is finished" not in done.stdout
    config = config_of(place / "out/x/final")
    assert config["step"] == 8 and config["val_loss"] == [e for e in curve(place / "out/x")
                                                          if e[2]][-1][2]
    final = from_pretrained(place / "out/x/final").state_dict()
    last = torch.load(checkpoint_files(place / "out/x")[0], weights_only=True)["model"]
    assert all(torch.equal(last[name], final[name]) for name in last)
    done = succeed(run(place, *words, "--out_dir=out/x", "--max_iters=8"))
    assert "is finished at step 8" in done.stdout


def test_a_model_made_before_its_first_checkpoint_is_kept_from_other_settings(place):
    train(place, "--out_dir=out/x", "--max_iters=10", "--checkpoint_interval=100")
    for file in checkpoint_files(place / "out/x"):  # as if killed before
        file.unlink()
    shutil.rmtree(place / "out/x/final")
    words = [*TINY, "--out_dir=out/x", "--max_iters=10", "--checkpoint_interval=100"]
    for other in ("--batch_size=2", "--dropout=0.1", "--weight_decay=0.2"):
        one_line(run(place, "pretrain.py", *words, other), "out/x holds best, log.jsonl",
                 "--overwrite")
    # the same tokens per step in other micro-batches, and what is shown, make no other run
    same = ("--batch_size=8", "--gradient_accumulation_steps=1", "--log_interval=5")
    succeed(run(place, "pretrain.py", *words, *same))


def test_a_run_killed_before_its_first_step_does_not_refuse_itself(place, monkeypatch):
    def killed(cfg, path):
        (path / "tensorboard").mkdir()
        raise KeyboardInterrupt
    words = ("pretrain.py", *TINY, "--out_dir=out/x", "--max_iters=2")
    with monkeypatch.context() as patch:
        patch.setattr(runlog, "open_trackers", killed)
        assert run(place, *words).returncode == 130
    one_line(run(place, *words, "--dropout=0"), "out/x holds tensorboard")  # another run
    succeed(run(place, *words))


def test_the_old_model_is_read_while_the_new_one_is_not_in_place(base, place):
    shutil.copytree(base / "out/tiny", place / "out/x")
    (place / "out/x/best").rename(place / "out/x/best.replaced")
    (place / "out/x/final").rename(place / "out/x/final.replaced")
    words = ("sample.py", "--start=数学", "--max_new_tokens=4")
    for more in ((), ("--model=out/x/best",)):
        assert "out/x/best" in succeed(run(place, *words, *more)).stderr
    done = train(place, "--out_dir=out/x", "--block_size=128", "--max_iters=12")
    assert "is finished at step 12" in done.stdout
    train(place, "--out_dir=out/x", "--block_size=128", "--max_iters=14")
    assert not list((place / "out/x").glob("*.replaced"))
    assert config_of(place / "out/x/final")["step"] == 14


def test_a_run_finished_by_an_older_version_stays_as_it_is(base, place):
    shutil.copytree(base / "out/tiny", place / "out/x")
    file = place / "out/x/final/config.json"
    config = config_of(place / "out/x/final")
    del config["step"]  # older versions did not write it
    file.write_text(json.dumps(config), encoding="utf-8")
    words = ("--out_dir=out/x", "--block_size=128", "--max_iters=12")
    assert "is finished at step 12" in train(place, *words).stdout
    assert config_of(place / "out/x/final") == config


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_resumed_run_does_not_keep_its_checkpoint_open(place):
    train(place, "--out_dir=out/x", "--max_iters=3")
    (file,) = checkpoint_files(place / "out/x")
    cfg, bins = settings(f"--out_dir={place / 'out/x'}"), Bins("demo", place / "data")
    ctx = pretrain.init_context(cfg)
    found = checkpoint.find_checkpoint(cfg, bins, ctx)
    trainer = pretrain.Trainer(cfg, ctx, checkpoint.restore_model(cfg, found),
                               pretrain.TextData(bins, cfg), "base", found)
    assert trainer.step == 3
    del found
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(file.resolve()) not in maps.read()


def test_a_backup_beside_a_model_or_a_set_is_left_alone(place):
    for folder in ("out/x/best.old", "data/own.old"):
        (place / folder).mkdir(parents=True)
        (place / folder / "mine.txt").write_text("mine", encoding="utf-8")
    train(place, "--out_dir=out/x", "--max_iters=10")
    for _ in range(2):
        succeed(run(place, "prepare.py", "wiki", ROOT / "data/raw/demo/wiki_zh/AA/wiki_00",
                    "--tokenizer=data/demo", "--name=own"))
        (place / "data/own/.DS_Store").write_bytes(b"")  # a file manager has looked at it
    assert (place / "out/x/best.old/mine.txt").exists()
    assert (place / "data/own.old/mine.txt").exists()


# ---- a chat that is stopped ----

@pytest.mark.parametrize("arch", ["gpt2", "qwen3 grouped"])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("next_is", ["the interrupted one", "the one before"])
def test_a_prompt_or_token_that_is_interrupted_leaves_the_cache_right(arch, step, next_is):
    model = make(arch, block_size=64)
    ids, calls = random_ids(model, 1, 40), itertools.count()
    cache = Cache(len(model.blocks), 64)
    list(model.generate(ids[:, :10], 4, temperature=0, cache=cache))

    def interrupt(*words):
        if next(calls) == step:
            raise KeyboardInterrupt
    hook = model.blocks[1].register_forward_pre_hook(interrupt)  # the first has read them already
    other = torch.cat((ids[:, 20:], ids[:, :20]), dim=1)
    with contextlib.suppress(KeyboardInterrupt):
        list(model.generate(other, 8, temperature=0, cache=cache))
    hook.remove()
    again = other if next_is == "the interrupted one" else ids
    kept = torch.stack(list(model.generate(again, 8, temperature=0, cache=cache)))
    assert torch.equal(kept, torch.stack(list(model.generate(again, 8, temperature=0))))


def test_a_question_that_is_refused_is_not_remembered(base):
    cfg = configure(sample.__file__, [f"--model={base / 'out/tiny/best'}", "--max_new_tokens=4"],
                    files=False)[0]
    model, tok = sample.load(cfg)
    cfg.system = "很长" * 500
    chat = sample.Chat(model, tok, cfg)
    with pytest.raises(UserError, match="the system message has"):
        next(chat.ask("你好"))
    assert chat.messages == []


# ---- several processes ----

SHARDED = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import pretrain
from training import optim
from common.command_line import run_main
done, plain, plain_step = [0], optim.orthogonalize, pretrain.Trainer.update
def count(g, steps=5):
    done[0] += len(g)
    return plain(g, steps)
def update(self):
    done[0] = 0
    norm = plain_step(self)
    matrices = [p for p in self.model.blocks.parameters() if p.dim() == 2]
    assert done[0] * dist.get_world_size() == len(matrices), (done, len(matrices))
    return norm
class Waited(pretrain.TextData):
    def batch(self, step, micro):
        if micro >= dist.get_world_size():  # after this process's first micro-batch
            assert all(hasattr(p.grad, "to_local") for p in model[0].parameters())
        return super().batch(step, micro)
model, plain_wrap = [], pretrain.wrap_model
def wrap_model(m, ctx):
    model.append(m)
    return plain_wrap(m, ctx)
optim.orthogonalize, pretrain.Trainer.update = count, update
pretrain.TextData, pretrain.wrap_model = Waited, wrap_model
run_main(pretrain.main, pretrain.__file__)
"""


@pytest.mark.numeric
def test_a_sharded_run_shares_gradients_muon_and_the_losses_it_keeps(place):
    script = place / "sharded.py"
    script.write_text(SHARDED.format(root=str(ROOT)), encoding="utf-8")
    words = [*TINY, "--dropout=0", "--optimizer=muon", "--gradient_accumulation_steps=4",
             "--max_iters=10"]
    succeed(run_process(place, script, *words, "--fsdp", "--out_dir=out/two",
                        torchrun=("--nproc_per_node=2",)))
    back_to_the_checkpoint_before(place / "out/two", place / "out/one")
    succeed(run(place, "pretrain.py", *words, "--out_dir=out/one"))
    # the last line of the log has a step from before the checkpoint and one from after it
    two, one = ([e for e in curve(place / "out" / name) if e[1]][-1] for name in ("two", "one"))
    assert one[0] == two[0] == 10 and one[1] == pytest.approx(two[1], rel=1e-6)
    done = succeed(run_process(place, "pretrain.py", *words, "--fsdp", "--out_dir=out/two",
                               torchrun=("--nproc_per_node=2",)))
    assert "is finished at step 10" in done.stdout and "terminate called" not in done.stderr


def test_the_main_process_alone_checks_a_checkpoint_for_all(place, monkeypatch):
    train(place, "--out_dir=out/x", "--max_iters=4")
    monkeypatch.chdir(place)
    ctx = SimpleNamespace(is_main=False, world_size=2, launches=[])
    # 4: what the main process found
    monkeypatch.setattr(checkpoint, "all_reduce_max",
                        lambda number, ctx: number if isinstance(number, bool) else 4)
    monkeypatch.setattr("zipfile.ZipFile", None)
    cfg, bins = settings("--out_dir=out/x"), Bins("demo", place / "data")
    assert checkpoint.find_checkpoint(cfg, bins, ctx)["step"] == 4
    cfg.out_dir = "out/elsewhere"
    with pytest.raises(UserError, match="ckpt_step_4.pt is not there for every process"):
        checkpoint.find_checkpoint(cfg, bins, ctx)


def test_a_refusal_under_torchrun_is_one_line(place):
    train(place, "--out_dir=out/x", "--max_iters=2")
    done = run_process(place, "pretrain.py", *TINY, "--out_dir=out/x", "--seed=2",
                       torchrun=("--nproc_per_node=2",))
    assert done.returncode and done.stderr.count("was made with seed=1337, not 2") == 1
    assert "Gloo" not in done.stderr and "Connection closed" not in done.stderr
    assert "pretrain.py\", line" not in done.stderr  # no traceback of ours


def test_a_restart_with_overwrite_goes_on_with_its_own_run_alone(place, monkeypatch):
    def attempt(launch, number, *words):
        file = f"/tmp/{launch}/attempt_{number}/0/error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        return train(place, "--out_dir=out/a", *words).stdout
    attempt("first", 0, "--max_iters=4")
    for words in (("--overwrite",), ("--init_from=scratch", "--overwrite")):
        # this attempt is the first that came as far as to remove the old run
        assert "resuming from" not in attempt("second", 1, *words, "--max_iters=4")
        assert "resuming from" in attempt("second", 2, *words, "--max_iters=6")
        assert "resuming from" not in attempt("first", 1, *words, "--max_iters=4")


# ---- Muon in slices ----

@pytest.mark.numeric
def test_muon_in_slices_equals_muon_at_once_and_keeps_to_its_size(monkeypatch):
    sizes, plain = [], optim.orthogonalize

    def note(g, steps=5):
        sizes.append(g.numel())
        return plain(g, steps)
    monkeypatch.setattr(optim, "orthogonalize", note)
    results = []
    for slice_numel in (2**24, 2 * 32 * 32):
        monkeypatch.setattr(optim.Muon, "slice_numel", slice_numel)
        model = make("qwen3")
        opt = optim.Muon([p for p in model.blocks.parameters() if p.dim() == 2], 0.01, 0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            del sizes[:]
            opt.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    largest = max(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert max(sizes) <= max(largest, 2 * 32 * 32)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that the tensors made inside have held at one time."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref
        out = func(*args, **kwargs or {})
        old = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(args)
               if isinstance(t, torch.Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in old:
                n = t.untyped_storage().nbytes()
                self.live += n
                self.most = max(self.most, self.live)
                weakref.finalize(t, self.free, n)
        return out

    def free(self, n):
        self.live -= n


@pytest.mark.parametrize("n_embd, n_layer", [(32, 8), (64, 2)])
def test_the_plan_knows_what_a_step_of_muon_holds(n_embd, n_layer, monkeypatch):
    monkeypatch.setattr(optim.Muon, "slice_numel", 2**14)
    model = make("qwen3", n_embd=n_embd, n_layer=n_layer)
    opt = optim.Muon([p for p in model.blocks.parameters() if p.dim() == 2], 0.01, 0.1)
    for _ in range(2):  # the first makes the momentum, which is planned elsewhere
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with LiveBytes() as held:
            opt.step()
    planned = estimate.muon_bytes(model, "muon")
    assert 0.8 * planned < held.most < 1.05 * planned
    assert estimate.muon_bytes(model, "adamw") == 0


# ---- speed and time ----

def test_speed_and_time_to_go_are_of_training_alone(place, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: now[0])
    for owner, name, seconds in ((pretrain.Trainer, "train_step", 2), (GPT, "generate", 50),
                                 (pretrain.Trainer, "val_loss", 100),
                                 (pretrain, "save_checkpoint", 1000),
                                 (pretrain, "save_model", 500)):
        def slow(*words, plain=getattr(owner, name), seconds=seconds, **more):
            now[0] += seconds
            return plain(*words, **more)
        monkeypatch.setattr(owner, name, slow)
    # an evaluation and a checkpoint fall into the steps that the first estimate times
    done = train(place, "--out_dir=out/x", "--eval_interval=3", "--checkpoint_interval=2")
    assert "measured: 128 tokens/s" in done.stdout and "0:32 to finish" in done.stdout
    lines = (place / "out/x/log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert {e["tokens_per_second"] for e in entries if "loss" in e} == {128.0}
    facts = json.loads((place / "out/x/run.json").read_text(encoding="utf-8"))
    assert facts["tokens_per_second"] == 128.0


def test_tokens_of_dialogues_are_counted_without_padding(demo):
    cfg = chat_settings("--gradient_accumulation_steps=2")
    data = sft.ChatData(Bins("demo_chat", demo / "data"), cfg)
    steps, read = len(data.steps) + 3, 0
    for step in range(steps):
        for micro in range(2):
            doc_ids = data.batch(step, micro)[2]
            read += int((doc_ids < doc_ids.shape[1]).sum())  # padding has the id of the width
    assert data.tokens_read(steps) == read < steps * 2 * 4 * 128


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H20", 148e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA TITAN", None)])
def test_the_peak_of_a_card_is_that_of_its_variant(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    got = device.peak_flops(torch.device("cuda"), torch.bfloat16, world_size=2)
    assert got == (peak and 2 * peak)


def test_cores_that_the_container_does_not_have_are_not_counted(monkeypatch):
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for quota, cores in (("150000 100000", 2), ("max 100000", 64), ("", 64), ("1000 100000", 1)):
        monkeypatch.setattr(cpu, "Path", lambda name, text=quota: SimpleNamespace(
            read_text=lambda encoding: text))
        assert cpu.cpu_count() == cores


def test_sampling_in_a_compiled_run_compiles_nothing(demo, tmp_path):
    cfg, bins = settings(f"--out_dir={tmp_path}", "--sample_start=数学|长江以南"), Bins(
        "demo", demo / "data")
    model = pretrain.make_model(cfg, bins)
    for block in model.blocks:
        block.compile(backend="eager")
    data = pretrain.TextData(bins, cfg)
    trainer = pretrain.Trainer(cfg, pretrain.init_context(cfg), model, data, "base", None)
    trainer.runlog.is_main = False
    stats = torch._dynamo.utils.counters["stats"]
    trainer.train_step()
    prompts, data.prompts = data.prompts, lambda: ()
    trainer.evaluate()
    graphs = stats["unique_graphs"]
    assert graphs > 0
    data.prompts = prompts
    trainer.evaluate()
    assert stats["unique_graphs"] == graphs


# ---- places where it runs ----

def test_a_second_derivative_of_the_loss_is_refused():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.arange(4)) ** 2
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_notebook_may_call_the_scripts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel-1.json"])
    cfg, words = configure(pretrain.__file__)
    assert cfg.n_layer == 12 and words == []
    for name in ("stdin", "stdout", "stderr"):  # a kernel's streams: write and flush, little else
        monkeypatch.setattr(sys, name, SimpleNamespace(write=lambda text: None, flush=print))
    ran = []
    run_main(lambda: ran.append(1), "pretrain.py")
    assert ran == [1]


def test_windows_locks_and_waits_for_a_reader(tmp_path, monkeypatch):
    calls, slept = itertools.count(), []
    plain = files.os.replace

    def busy(source, target):
        if next(calls) < limit:
            raise PermissionError(13, "Access is denied", str(source))
        plain(source, target)
    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(files.os, "replace", busy)
    monkeypatch.setattr(files.time, "sleep", slept.append)
    (tmp_path / "a").write_text("new", encoding="utf-8")
    limit = 3
    files.replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "new" and len(slept) == 3
    limit = 1000
    with pytest.raises(PermissionError, match="does another program have it open"):
        files.replace(tmp_path / "b", tmp_path / "c")
    assert sum(slept) < 3
    with pytest.raises(UserError) as error, folders.atomic_write(tmp_path / "b"):
        files.replace(tmp_path / "b", tmp_path / "c")
    assert "another program" in str(error.value) and "disk full" not in str(error.value)

    def locking(fd, mode, size):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    with pytest.raises(UserError, match="taken"):
        files.lock(tmp_path / "lock", "taken")

"""Runs that are stopped, made longer, started again, watched and refused."""
import contextlib
import itertools
import json
import shutil
import sys
import types
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, ROOT, one_line, run, run_process, succeed
from test_scripts import TINY, back_to_the_checkpoint_before, chat_settings, curve, settings, train

import pretrain
import sample
import sft
from common import cpu, device, files
from common.command_line import UserError, run_main
from common.settings import configure
from gpt import GPT, KVCache, GPTConfig, linear_cross_entropy
from models import hf
from models.load import from_pretrained
from test_gpt import make, random_ids
from tokens.bins import Bins
from training import checkpoint, distributed, estimate, muon, trackers
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
        patch.setattr(pretrain, "find_spec", lambda package: True)
        patch.setattr(trackers, "open_trackers", killed)
        assert run(place, *words, "--tensorboard").returncode == 130
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


def test_a_run_stopped_early_is_evaluated_where_it_ends(place):
    words = ("--out_dir=out/x", "--checkpoint_interval=7", "--eval_interval=5")
    train(place, *words, "--max_iters=10")
    checkpoint_files(place / "out/x")[0].unlink()  # as if stopped at step 7, after an evaluation
    shutil.rmtree(place / "out/x/final")           # at step 5
    train(place, *words, "--max_iters=7")
    last = [e for e in curve(place / "out/x") if e[2]][-1]
    config = config_of(place / "out/x/final")
    assert last[0] == 7 == config["step"] and config["val_loss"] == last[2]


def run_json(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_run_killed_before_it_said_that_it_is_finished_says_so_later(place):
    words = ("--out_dir=out/x", "--max_iters=4")
    train(place, *words)
    whole, config = run_json(place / "out/x"), config_of(place / "out/x/final")
    assert whole["finished"] == 4 and config["val_loss"] > 0
    plain = {name: value for name, value in whole.items() if name != "finished"}
    (place / "out/x/run.json").write_text(json.dumps(plain), encoding="utf-8")
    train(place, *words)
    assert run_json(place / "out/x")["finished"] == 4
    assert config_of(place / "out/x/final") == config
    assert "is finished at step 4" in train(place, *words).stdout


def test_what_a_killed_run_left_is_removed_and_nothing_else(place):
    train(place, "--out_dir=out/x", "--max_iters=4")
    left = ["best.replaced/a", "final.part/a", "final.replaced/a", "ckpt_step_5.pt.part",
            "log.jsonl.part", "loss.png.part", "run.json.part"]
    for name in [*left, "mine.part"]:
        (place / "out/x" / name).parent.mkdir(exist_ok=True)
        (place / "out/x" / name).write_bytes(b"")
    train(place, "--out_dir=out/x", "--max_iters=6")
    found = {p.name for p in (place / "out/x").iterdir() if p.suffix in (".part", ".replaced")}
    assert found == {"mine.part"}


def test_the_checkpoints_of_keep_steps_are_never_removed(place):
    words = ("--out_dir=out/x", "--keep_steps=4|6", "--checkpoint_interval=3")

    def steps():
        return [int(f.stem[10:]) for f in checkpoint_files(place / "out/x")]
    train(place, *words, "--max_iters=13")
    assert steps() == [13, 12, 6, 4]  # 4 is no multiple of checkpoint_interval
    train(place, *words, "--keep_checkpoints=0", "--max_iters=20")
    assert steps() == [20, 18, 15, 13, 12, 6, 4]
    train(place, *words, "--keep_checkpoints=1", "--max_iters=21")
    assert steps() == [21, 6, 4]
    saved = torch.load(checkpoint_files(place / "out/x")[-1], weights_only=True)
    assert saved["kind"] == "base" and saved["cfg"]["dataset"] == "demo"
    model = GPT(GPTConfig(**saved["model_config"]))
    model.load_state_dict(saved["model"])


def test_a_run_is_not_resumed_on_changed_data(place):
    def prepare(file):
        succeed(run(place, "prepare.py", "text", DEMO / file, "--max_docs=200",
                    "--tokenizer=data/demo", "--name=own", "--val_fraction=0.1"))
    words = ("--dataset=own", "--out_dir=out/x")
    prepare("texts_train.jsonl")
    train(place, *words, "--max_iters=4")
    before = (place / "out/x/ckpt_step_4.pt").read_bytes()
    prepare("texts_val.jsonl")
    refused = run(place, "pretrain.py", *TINY, *words, "--max_iters=6")
    one_line(refused, "dataset=own as it was then, not own", "--overwrite")
    assert (place / "out/x/ckpt_step_4.pt").read_bytes() == before


EXPLODING = ("--out_dir=out/x", "--grad_clip=0", "--eval_interval=100", "--warmup_iters=8",
             "--max_iters=40")


@pytest.mark.parametrize("good_steps, then", [
    (0, "the same command then starts again"), (4, "resumes from the last checkpoint in out/x")])
def test_a_run_that_diverged_goes_on_with_a_lower_rate(good_steps, then, place):
    words = (*EXPLODING, "--checkpoint_interval=100")
    if good_steps:
        train(place, *words, f"--max_iters={good_steps}")
    done = run(place, "pretrain.py", *TINY, *words, "--learning_rate=300")
    one_line(done, "diverged", "Lower learning_rate", then)
    done = train(place, *words, "--learning_rate=1e-3")
    assert ("resuming from" in done.stdout) == bool(good_steps)
    lines = (place / "out/x/log.jsonl").read_text(encoding="utf-8").splitlines()
    rates = {e["step"]: e["lr"] for e in map(json.loads, lines) if "lr" in e}
    assert rates[40] == pytest.approx(1e-4, rel=0.05)  # min_lr is a tenth of it


def test_a_backup_beside_a_model_or_a_set_is_left_alone(place):
    for folder in ("out/x/best.old", "data/own.old"):
        (place / folder).mkdir(parents=True)
        (place / folder / "mine.txt").write_text("mine", encoding="utf-8")
    train(place, "--out_dir=out/x", "--max_iters=10")
    for _ in range(2):
        succeed(run(place, "prepare.py", "text", DEMO / "texts_val.jsonl",
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
    cache = KVCache(len(model.blocks), 64)
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
from training import distributed, muon
from common.command_line import run_main
done, plain, plain_step = [0], muon.orthogonalize, pretrain.Trainer.update
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
model, plain_shard = [], distributed.shard
def shard(m, dtype):
    model.append(m)
    return plain_shard(m, dtype)
muon.orthogonalize, pretrain.Trainer.update = count, update
pretrain.TextData, distributed.shard = Waited, shard
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
    ctx = SimpleNamespace(is_main=False, max=lambda number: 4)  # what the main process found
    monkeypatch.setattr("zipfile.ZipFile", None)
    cfg, bins = settings("--out_dir=out/x"), Bins("demo", place / "data")
    assert checkpoint.find_checkpoint(cfg, bins, ctx)["step"] == 4
    cfg.out_dir = "out/elsewhere"
    with pytest.raises(UserError, match="ckpt_step_4.pt is not there for every process"):
        checkpoint.find_checkpoint(cfg, bins, ctx)


@pytest.mark.parametrize("words, said", [
    (("--out_dir=out/x", "--seed=2"), "was made with seed=1337, not 2"),  # the main process alone
    (("--out_dir=out/file",), "out/file"),     # the main process, after the choice of a checkpoint
    (("--batch_size=0",), "batch_size=0 is"),  # all processes
])
def test_a_refusal_under_torchrun_is_one_line(words, said, place):
    train(place, "--out_dir=out/x", "--max_iters=2")
    (place / "out/file").write_bytes(b"")
    done = run_process(place, "pretrain.py", *TINY, *words, torchrun=("--nproc_per_node=2",))
    assert done.returncode and done.stderr.count("pretrain.py: ") == 1
    assert said in done.stderr.partition("pretrain.py: ")[2].splitlines()[0]
    assert "Gloo" not in done.stderr and "Connection closed" not in done.stderr
    assert "pretrain.py\", line" not in done.stderr  # no traceback of ours


def test_an_error_of_one_process_ends_all_and_is_printed_once(monkeypatch):
    counts = Counter()

    def add(key, n):
        counts[key] += n
        return counts[key]

    def ends_with(error):
        def main():
            raise error
        with pytest.raises((UserError, RuntimeError, SystemExit)) as raised:
            distributed.run_together(main)
        return raised.value
    monkeypatch.setattr(distributed, "rendezvous", lambda: (SimpleNamespace(add=add), 0, 2))
    bug, lost, refusal = RuntimeError("bug"), RuntimeError("connection closed"), UserError("disk")
    assert ends_with(bug) is bug          # nobody refused: a bug keeps its traceback
    assert ends_with(refusal) is refusal  # the first is printed
    for error in (lost, UserError("disk")):
        assert ends_with(error).code == 2 and isinstance(ends_with(error), SystemExit)


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
    sizes, plain = [], muon.orthogonalize

    def note(g, steps=5):
        sizes.append(g.numel())
        return plain(g, steps)
    monkeypatch.setattr(muon, "orthogonalize", note)
    results = []
    for slice_numel in (2**24, 2 * 32 * 32):
        monkeypatch.setattr(muon.Muon, "slice_numel", slice_numel)
        model = make("qwen3")
        opt = muon.Muon([p for p in model.blocks.parameters() if p.dim() == 2], 0.01, 0.1)
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
    monkeypatch.setattr(muon.Muon, "slice_numel", 2**14)
    model = make("qwen3", n_embd=n_embd, n_layer=n_layer)
    opt = muon.Muon([p for p in model.blocks.parameters() if p.dim() == 2], 0.01, 0.1)
    for _ in range(2):  # the first makes the momentum, which is planned elsewhere
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with LiveBytes() as held:
            opt.step()
    planned = estimate.update_bytes(model, "muon")
    assert 0.8 * planned < held.most < 1.05 * planned
    assert estimate.update_bytes(model, "adamw") == 0


# ---- speed and time ----

def test_speed_and_time_to_go_are_of_training_alone(place, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: now[0])
    for owner, name, seconds in ((pretrain.TextData, "batch", 1), (GPT, "generate", 50),
                                 (pretrain.Trainer, "val_loss", 100),
                                 (pretrain, "save_checkpoint", 1000),
                                 (pretrain, "save_model", 500), (pretrain.RunLog, "start", 5000)):
        def slow(*words, plain=getattr(owner, name), seconds=seconds, **more):
            now[0] += seconds
            return plain(*words, **more)
        monkeypatch.setattr(owner, name, slow)
    # an evaluation and a checkpoint fall among the micro-batches that the first estimate times
    done = train(place, "--out_dir=out/x", "--eval_interval=1", "--checkpoint_interval=1")
    assert "measured: 128 tokens/s" in done.stdout and "0:40 to finish" in done.stdout
    lines = (place / "out/x/log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert {e["tokens_per_second"] for e in entries if "loss" in e} == {128.0}
    assert run_json(place / "out/x")["tokens_per_second"] == 128.0


def test_a_clock_that_stands_still_divides_nothing_by_zero(place, monkeypatch):
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: 5.0)
    done = train(place, "--out_dir=out/x", "--max_iters=4")
    assert "measured: " in done.stdout and run_json(place / "out/x")["finished"] == 4


def test_a_dry_run_times_micro_batches_and_makes_no_step(place, monkeypatch):
    calls, plain = [], pretrain.TextData.batch
    monkeypatch.setattr(pretrain.TextData, "batch", lambda *words: calls.append(1) or plain(*words))
    monkeypatch.setattr(pretrain.Trainer, "update", None)
    done = train(place, "--dry_run", "--gradient_accumulation_steps=1000")
    assert "to finish" in done.stdout and len(calls) <= 6


def test_samples_show_no_control_token(demo, tmp_path, capsys, monkeypatch):
    cfg, bins = settings(f"--out_dir={tmp_path}", "--sample_start="), Bins("demo", demo / "data")
    tok = bins.tokenizer

    def generate(self, ids, n, stop_ids, **sampling):
        asked.append(ids[0].tolist())
        for i in (*tok.encode("水\x1b[1m\n"), tok.im_start):
            yield torch.tensor([i])
            if i in stop_ids:
                return
    for data in (pretrain.TextData(bins, cfg), sft.ChatData(
            Bins("demo_chat", demo / "data"), chat_settings("--sample_start="))):
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(GPT, "generate", generate)
            trainer = pretrain.Trainer(cfg, pretrain.init_context(cfg),
                                       pretrain.make_model(cfg, bins), data, "base", None)
            trainer.print_samples()
        lines = capsys.readouterr().out.splitlines()[-2:]
        assert len(asked) == 2 and all(line.endswith(" > 水[1m") for line in lines)
        assert "<|" not in "".join(lines)
        for line, (shown, ids), bins_of in zip(lines, data.prompts(), (data.bins,) * 2):
            starts, val = bins_of.starts("val"), bins_of.tokens("val")
            assert any(tok.plain_text(val[a:b]).decode().startswith(shown)
                       for a, b in itertools.pairwise(starts[:3]))  # a val document begins so


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
    with pytest.raises(UserError) as error, hf.write_errors_as_user_error(tmp_path / "b"):
        files.replace(tmp_path / "b", tmp_path / "c")
    assert "another program" in str(error.value) and "disk full" not in str(error.value)

    def locking(fd, mode, size):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    with pytest.raises(UserError, match="taken"):
        files.lock(tmp_path / "lock", "taken")

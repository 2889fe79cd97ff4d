"""The scripts: training that resumes exactly, fine-tuning, sampling, refusals in one line."""
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import torch
from conftest import (
    DEMO, ENV, ROOT, one_line, read_until, run, run_process, start, succeed, with_sets)
from hypothesis import given
from hypothesis import strategies as st

import pretrain
import sample
import sft
from common.command_line import UserError
from common.device import choose_dtype
from common.settings import configure
from gpt import GPT, GPTConfig
from models import folders
from models.load import from_pretrained
from sampling.text import decode_stream
from tokens.batches import CYCLE, MixtureSampler, TextData
from tokens.bins import Bins, open_sets
from tokens.chat_batches import pack
from tokens.tokenizer import IM_END, IM_START
from training.checkpoint import checkpoint_files

torch.set_num_threads(1)
TINY = ["--dataset=demo", "--arch=qwen3", "--n_layer=2", "--n_head=2", "--n_embd=32",
        "--block_size=32", "--batch_size=4", "--gradient_accumulation_steps=2", "--max_iters=20",
        "--eval_interval=5", "--checkpoint_interval=3", "--log_interval=2", "--eval_tokens=1000",
        "--dropout=0.2", "--warmup_iters=3", "--learning_rate=0.01", "--sample_start=数学",
        "--dtype=float32"]  # exact numbers on every processor


def settings(*words):
    return configure(pretrain.__file__, [*TINY, *words])[0]


def chat_settings(*words):
    words = ["--dataset=demo_chat", "--batch_size=4", "--max_iters=10", "--block_size=128", *words]
    return configure(sft.__file__, words, base=pretrain.__file__, fixed=sft.FIXED)[0]


def weights(folder):
    return (folder / "final" / "model.safetensors").read_bytes()


def curve(folder):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [(e["step"], e.get("loss"), e.get("val_loss"), e.get("grad_norm")) for e in entries]


def back_to_the_checkpoint_before(run, copy):
    """Copy a finished run as it was at its last checkpoint but one."""
    shutil.copytree(run, copy)
    checkpoint_files(copy)[0].unlink()
    shutil.rmtree(copy / "final")


def train(place, *words):
    return succeed(run(place, "pretrain.py", *TINY, *words))


# ---- pretraining ----

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_killed_three_times_ends_with_the_same_weights(optimizer, place):
    train(place, f"--optimizer={optimizer}", "--out_dir=out/a")
    words = (f"--optimizer={optimizer}", "--out_dir=out/b")
    for at in ("step 2/", "step 8/", "step 16/"):
        process = start(place, "pretrain.py", *TINY, *words)
        read_until(process, at)
        process.kill()
        process.communicate()
    assert "resuming from" in train(place, *words).stdout
    assert weights(place / "out/a") == weights(place / "out/b")
    assert curve(place / "out/a") == curve(place / "out/b")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_exactly(number, code, place):
    train(place, "--out_dir=out/a", "--checkpoint_interval=100")
    words = [*TINY, "--out_dir=out/b", "--checkpoint_interval=100", "--overwrite"]
    process = start(place, "pretrain.py", *words)
    read_until(process, "step 8/")
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == code and "stopped at step" in said, said
    assert shlex.split(said.partition("Resume with:  python ")[2])[1:] == words[:-1]
    (saved,) = checkpoint_files(place / "out/b")
    assert "resuming from" in train(place, *words[-3:-1]).stdout and int(saved.stem[10:]) >= 8
    assert weights(place / "out/a") == weights(place / "out/b")
    assert curve(place / "out/a") == curve(place / "out/b")


def test_two_processes_stop_together(place):
    process = start(place, "pretrain.py", *TINY, "--max_iters=100000", "--out_dir=out/two",
                    "--checkpoint_interval=100000", torchrun=["--nproc_per_node=2"],
                    stderr=subprocess.DEVNULL)
    read_until(process, "step 4/")
    process.send_signal(signal.SIGTERM)  # torchrun passes it to both
    said = process.communicate()[0]
    assert "stopped at step" in said
    (saved,) = checkpoint_files(place / "out/two")
    assert torch.load(saved, weights_only=True)["step"] == int(saved.stem[10:])


def test_a_checkpoint_cut_short_gives_way_to_the_one_before(place):
    train(place, "--out_dir=out/a")
    shutil.copytree(place / "out/a", place / "out/b")
    newest, older = checkpoint_files(place / "out/b")
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = train(place, "--out_dir=out/b")
    assert newest.name in done.stderr and "damaged" in done.stderr
    assert f"resuming from out/b/{older.name}" in done.stdout.replace("\\", "/")
    assert weights(place / "out/a") == weights(place / "out/b")
    for file in checkpoint_files(place / "out/b"):
        file.write_bytes(b"")
    one_line(run(place, "pretrain.py", *TINY, "--out_dir=out/b"), "every checkpoint is damaged")


def test_a_finished_run_says_so_and_may_be_made_longer(base, place):
    shutil.copytree(base / "out/tiny", place / "out/tiny")
    words = ("--out_dir=out/tiny", "--block_size=128", "--max_iters=12")
    assert "is finished at step 12" in train(place, *words).stdout
    assert "steps 12 to 14" in train(place, *words[:2], "--max_iters=14").stdout
    assert [e[0] for e in curve(place / "out/tiny") if e[1]] == list(range(2, 15, 2))


def test_only_two_checkpoints_are_kept_and_the_models_load(base):
    out = base / "out/tiny"
    assert [f.name for f in checkpoint_files(out)] == ["ckpt_step_12.pt", "ckpt_step_9.pt"]
    assert not list(out.glob("*.part"))
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for name in ("best", "final"):
        ours = from_pretrained(out / name).eval()
        theirs = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
        ids = AutoTokenizer.from_pretrained(out / name)("数学是", return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
        assert theirs.generation_config.do_sample is True
    run_json = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run_json["kind"] == "base" and run_json["finished"] == 12


@pytest.mark.numeric
def test_best_is_the_evaluation_with_the_lowest_loss(base):
    from safetensors.torch import load_file
    out = base / "out/tiny"
    losses = [e[2] for e in curve(out) if e[2]]
    assert losses.index(min(losses)) == len(losses) - 1  # so early, the last is the best
    best, final = (load_file(out / n / "model.safetensors") for n in ("best", "final"))
    assert all(torch.equal(best[k], final[k]) for k in final)


def test_an_epoch_holds_every_window_once_and_the_next_is_cut_elsewhere(demo):
    data = pretrain.TextData(Bins("demo", demo / "data"), settings())
    T, (order,) = 32, data.orders
    W = order.n
    epochs = [[order.at(e * W + i) for i in range(W)] for e in (0, 1)]
    assert [sorted(w for w, _ in e) for e in epochs] == [list(range(W))] * 2
    assert epochs[0] != epochs[1] and epochs[0][0][1] != epochs[1][0][1]
    assert all(len(data.window(i)) == T + 1 for i in range(2 * W))
    again = pretrain.TextData(Bins("demo", demo / "data"), settings())
    for step in (0, 900, 7):  # in any order
        for a, b in zip(data.batch(step, 1)[:2], again.batch(step, 1)[:2]):
            assert torch.equal(a, b)


# ---- mixtures ----

@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(0, 99))
@hypothesis.settings(max_examples=50, deadline=None)
def test_a_mixture_deals_each_set_by_weight_and_in_order(weights, seed):
    weights = [w / sum(weights) for w in weights]
    deck, dealt = MixtureSampler(weights, seed), {}
    for i in range(2 * CYCLE):
        k, n = deck.at(i)
        assert n == dealt.get(k, 0)  # no sample of a set is passed over
        dealt[k] = n + 1
    for k, w in enumerate(weights):
        assert abs(dealt[k] - 2 * CYCLE * w) <= 2
    again = [MixtureSampler(weights, seed).at(i) for i in (7, 1999, 7)]
    assert again == [deck.at(i) for i in (7, 1999, 7)]


@pytest.mark.numeric
def test_a_run_on_a_mixture_says_its_epochs_and_resumes_exactly(two_sets, tmp_path):
    place = with_sets(tmp_path, two_sets)
    words = ["--dataset=a:3,b:1", "--max_iters=12"]
    done = train(place, *words, "--out_dir=out/x")
    windows = {n: (Bins(n, place / "data").meta["splits"]["train"]["tokens"] - 32) // 32
               for n in "ab"}
    epochs = {n: 12 * 8 * share / windows[n] for n, share in (("a", 0.75), ("b", 0.25))}
    assert f"a {epochs['a']:.1f}, b {epochs['b']:.1f} epochs" in done.stdout, done.stdout
    back_to_the_checkpoint_before(place / "out/x", place / "out/y")
    one_line(run(place, "pretrain.py", *TINY, "--dataset=a:1,b:1", "--out_dir=out/y"),
             "dataset=a:3,b:1, not a:1,b:1")
    assert "ckpt_step_9.pt" in train(place, *words, "--out_dir=out/y").stdout
    assert weights(place / "out/x") == weights(place / "out/y")
    assert curve(place / "out/x") == curve(place / "out/y")


def test_a_set_that_is_read_too_often_is_named(two_sets):
    done = train(two_sets, "--dataset=a:1,b:9", "--max_iters=400", "--dry_run", "--out_dir=out/z")
    assert "b will be read" in done.stdout and "a will be read" not in done.stdout


@pytest.mark.numeric
def test_a_mixture_is_evaluated_on_every_set_in_its_share(two_sets):
    bins = open_sets("a:3,b:1", two_sets / "data")
    data = TextData(bins, settings("--eval_tokens=400"))
    targets = torch.cat([y.flatten() for _, y, _ in data.val_batches()])
    want = [part.tokens("val")[:n].astype(np.int64) for (part, _), n in zip(bins.parts, (300, 100))]
    assert targets[targets >= 0].tolist() == np.concatenate(want).tolist()
    one = [TextData(part, settings("--eval_tokens=0")).scores(2.0)["bpb"] for part, _ in bins.parts]
    assert min(one) <= data.scores(2.0)["bpb"] <= max(one)


def test_dialogues_in_a_mixture_are_trained_with_their_headers_and_not_evaluated(two_sets):
    bins = open_sets("demo_chat:1,a:3", two_sets / "data")
    data = TextData(bins, settings("--eval_tokens=400"))
    rows = torch.cat([data.batch(step, 0)[0] for step in range(10)])
    assert 0 < (rows == data.tokenizer.im_start).any(1).float().mean() < 0.5
    targets = torch.cat([y.flatten() for _, y, _ in data.val_batches()])
    (_, _), (texts, _) = bins.parts
    assert targets[targets >= 0].tolist() == texts.tokens("val")[:400].tolist()
    assert data.scores(2.0) == TextData(texts, settings("--eval_tokens=400")).scores(2.0)
    assert data.prompts() == TextData(texts, settings()).prompts()


@pytest.mark.parametrize("text, what", [
    ("a:0.7,b", "'b' is not one set"), ("a:x", "'a:x'"), ("a:0", "'a:0'"), ("a:1,a:1", "'a:1'"),
    ("a:1,,b:1", "''"), ("a:1,none:1", "none is not prepared"), ("demo_chat", "holds dialogues"),
    ("a:1,b:0.0001", "under 1/1,000")])
def test_a_mixture_that_cannot_be_is_one_line(text, what, two_sets):
    with pytest.raises(UserError, match=what):
        TextData(open_sets(text, two_sets / "data"), settings())


@pytest.mark.numeric
def test_accumulated_gradients_equal_one_batch(demo):
    grads = []
    for words in (("--batch_size=8", "--gradient_accumulation_steps=1"), ()):
        cfg = settings("--dropout=0", *words)
        bins = Bins("demo", demo / "data")
        torch.manual_seed(0)
        model, data = pretrain.make_model(cfg, bins), pretrain.TextData(bins, cfg)
        trainer = pretrain.Trainer(cfg, pretrain.init_context(cfg), model, data, "base", None)
        kept = {}
        trainer.update = lambda: kept.update(
            {n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        loss, _ = trainer.train_step()
        grads.append((loss, kept))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-6, atol=0)
    norm = math.sqrt(sum(g.square().sum() for g in grads[0][1].values()))
    for name, g in grads[0][1].items():
        assert (g - grads[1][1][name]).norm() <= 1e-6 * norm, name


@pytest.mark.numeric
def test_val_loss_predicts_every_token_once_in_bits_per_byte(demo):
    cfg, bins = settings("--eval_tokens=0"), Bins("demo", demo / "data")
    data, val = pretrain.TextData(bins, cfg), bins.tokens("val")
    batches = list(data.val_batches())
    targets = torch.cat([y.flatten() for _, y, _ in batches])
    assert targets[targets >= 0].tolist() == val.tolist()
    inputs = torch.cat([x.flatten() for x, _, _ in batches])
    assert inputs[0] == bins.tokenizer.eot and inputs[1:len(val)].tolist() == val[:-1].tolist()
    text = bins.tokenizer.decode(val[val != bins.tokenizer.eot])
    scores = data.scores(2.0)
    assert scores["bpb"] == pytest.approx(2 / math.log(2) * len(val) / len(text.encode()))
    assert scores["bpc"] == pytest.approx(2 / math.log(2) * len(val) / len(text))


@pytest.mark.numeric
def test_two_processes_train_as_one_and_one_goes_on_for_them(place):
    words = ["--checkpoint_interval=7", "--log_interval=5"]  # a log spans the checkpoint
    train(place, *words, "--out_dir=out/one")
    succeed(run_process(place, "pretrain.py", *TINY, *words, "--out_dir=out/two",
                        torchrun=["--nproc_per_node=2"]))
    back_to_the_checkpoint_before(place / "out/two", place / "out/three")
    assert "ckpt_step_14.pt" in train(place, *words, "--out_dir=out/three").stdout
    one = curve(place / "out/one")
    assert len(one) == 9
    for name in ("two", "three"):
        for a, b in zip(one, curve(place / "out" / name), strict=True):
            assert a[0] == b[0]
            assert (a[1] or a[2]) == pytest.approx(b[1] or b[2], rel=1e-5), (name, a[0])


@pytest.mark.numeric
def test_float16_skips_both_optimizers_where_a_gradient_overflows(demo):
    cfg, bins = settings("--optimizer=muon"), Bins("demo", demo / "data")
    trainer = pretrain.Trainer(cfg, pretrain.init_context(cfg), pretrain.make_model(cfg, bins),
                               pretrain.TextData(bins, cfg), "base", None)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.scaler.scale(trainer.model(*trainer.data.batch(0, 0))[0]).backward()
    trainer.model.wte.weight.grad[3] = math.inf
    trainer.update()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert trainer.scaler.get_scale() == 2.0
    trainer.train_step()
    for name in ("wte.weight", "blocks.1.mlp.down_proj.weight"):  # one of each optimizer
        assert not torch.equal(trainer.model.state_dict()[name], before[name])


def test_the_environment_decides_what_auto_means_and_nothing_else(monkeypatch):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        monkeypatch.setenv("AUTO_DTYPE", name)
        assert choose_dtype("auto", "cpu") == dtype
        assert choose_dtype("float16", "cpu") == torch.float16
    monkeypatch.setenv("AUTO_DTYPE", "int8")
    with pytest.raises(UserError, match="int8"):
        choose_dtype("auto", "cpu")


# ---- fine-tuning ----

def test_packed_rows_are_full():
    lengths = np.random.default_rng(0).integers(1, 60, 500).tolist()
    assert sum(lengths) / (len(pack(lengths, 128)) * 128) > 0.995


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 60))
@hypothesis.settings(max_examples=100, deadline=None)
def test_packing_puts_every_item_once_into_the_fullest_row_with_room(lengths, size):
    rows, sums = pack(lengths, size), []
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for n in sorted(lengths, reverse=True):
        best = max((s for s in sums if s + n <= size), default=0)  # 0: a new row
        if best:
            sums.remove(best)
        sums.append(best + n)
    assert sorted(sums) == sorted(sum(lengths[i] for i in row) for row in rows)


@pytest.mark.parametrize("epoch", [None, 0, 5])
def test_packed_rows_train_exactly_the_answers(epoch, demo):
    bins = Bins("demo_chat", demo / "data")
    cfg, tok = chat_settings(), bins.tokenizer
    data = sft.ChatData(bins, cfg)
    trained = []
    for n in range(len(data.rows["train"])):
        x, y, doc_ids = data.packed_row("train", n, epoch)
        assert len(x) == data.row_lengths["train"][n] <= 128 and (np.diff(doc_ids) >= 0).all()
        for k in range(doc_ids.max() + 1):
            a, b = np.flatnonzero(doc_ids == k)[[0, -1]]
            kept = y[a:b + 1] >= 0
            assert x[a] == tok.im_start and kept.any()
            assert (y[a:b][kept[:-1]] == x[a + 1:b + 1][kept[:-1]]).all()
        trained.append(y[y >= 0])
    tokens = bins.tokens("train")
    assert sorted(np.concatenate(trained)) == sorted(tokens[tok.loss_mask(tokens)])


CUT = "长" * 300  # no message of this length fits whole


@pytest.fixture(scope="module")
def chats(demo, tmp_path_factory):
    """A folder with data/chat: dialogues under two system messages and under none, some cut."""
    folder = with_sets(tmp_path_factory.mktemp("chats"), demo)
    with open(folder / "c.jsonl", "w", encoding="utf-8") as f:
        for n in range(120):
            system = [dict(role="system", content=f"系统{n % 3}")] * (n % 3 > 0)
            asked = [dict(role="user", content=f"问{n}"), dict(role="assistant", content=f"答{n}")]
            more = [dict(role="user", content=CUT), dict(role="assistant", content="无")]
            f.write(json.dumps(dict(messages=system + asked + more * (n % 10 == 0))) + "\n")
    succeed(run(folder, "prepare.py", "chat", "c.jsonl", "--tokenizer=data/demo", "--name=chat"))
    return folder


def conversations(data, epoch):
    """Return the (role, content) pairs of each document of each training row of an epoch."""
    tok, rows = data.tokenizer, []
    for n in range(len(data.rows["train"])):
        x, y, doc_ids = data.packed_row("train", n, epoch)
        assert tok.eot not in x and tok.eot not in y and len(x) <= data.row_lengths["train"][n]
        docs = [x[doc_ids == k] for k in range(doc_ids[-1] + 1)]
        assert sum(map(len, docs)) == len(x)
        messages = [tok.decode(doc).split(IM_START) for doc in docs]
        for first, *others in messages:
            assert first == "" and all(text.endswith(f"{IM_END}\n") for text in others[:-1])
        rows.append([[tuple(text.removesuffix("\n").removesuffix(IM_END).split("\n"))
                      for text in others] for _, *others in messages])
    return rows


@pytest.mark.parametrize("multi_turn", [0, 1])
def test_joined_rows_are_conversations_under_one_system_message(multi_turn, chats):
    data = sft.ChatData(Bins("chat", chats / "data"), chat_settings(f"--multi_turn={multi_turn}"))
    for epoch in (0, 1):
        seen, longest = [], 0
        for row in conversations(data, epoch):
            for messages in row:
                system = [content for role, content in messages if role == "system"]
                assert messages[0][0] == "system" or not system
                turns = messages[len(system):]
                assert len(system) <= 1 and [role for role, _ in turns] == [
                    "user", "assistant"] * (len(turns) // 2)
                for (_, question), (_, answer) in zip(turns[::2], turns[1::2]):
                    if question in CUT:  # a window of its own, which continues none
                        assert answer == "无" and len(turns) == 2
                        continue
                    n = int(question[1:])
                    assert answer == f"答{n}" and system == [f"系统{n % 3}"] * (n % 3 > 0)
                    seen.append(n)
                    # a dialogue that goes on in another window is the last of its document
                    assert n % 10 or question == turns[-2][1]
                longest = max(longest, len(turns) // 2)
        assert len(seen) == len(set(seen)) == len(data.bins.starts("train")) - 1
        assert longest == 1 if multi_turn == 0 else longest > 3


def test_which_rows_are_joined_depends_on_seed_and_epoch_alone(demo):
    def rows(epoch, *words):
        data = sft.ChatData(Bins("demo_chat", demo / "data"), chat_settings(*words))
        return [[array.tolist() for array in data.packed_row("train", n, epoch)]
                for n, items in enumerate(data.rows["train"][:100]) if len(items) > 1]
    half = rows(3, "--multi_turn=0.3")
    for other in (rows(4, "--multi_turn=0.3"), rows(3, "--multi_turn=0.3", "--seed=7")):
        assert half != other and len(half) == len(other) > 90
    assert half == rows(3, "--multi_turn=0.3")
    assert 0.2 < sum(doc_ids[-1] == 0 for _, _, doc_ids in half) / len(half) < 0.4


def test_an_epoch_of_dialogues_is_every_row_once_and_hardly_padded(demo):
    data = sft.ChatData(Bins("demo_chat", demo / "data"), chat_settings())
    rows = np.concatenate([data.rows_of_step(s) for s in range(len(data.steps))])
    assert sorted(rows) == list(range(len(data.rows["train"])))
    filled = total = 0
    for step in range(len(data.steps)):
        micros = [data.batch(step, micro) for micro in range(4)]
        assert data.n_trained(step) == sum(int((y >= 0).sum()) for _, y, _ in micros) > 0
        total += sum(x.numel() for x, _, _ in micros)
        filled += int(data.row_lengths["train"][data.rows_of_step(step)].sum())
    assert 0.98 < filled / total <= 1
    ids, targets, doc_ids = data.collate("train", [])  # a micro-batch that gets no row
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=4096, block_size=128, n_layer=1, n_head=1, n_embd=8))
    loss, n = model(ids, targets, doc_ids)
    loss.backward()
    assert n == 0 and loss == 0 and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.numeric
def test_fine_tuning_goes_from_base_to_chat_and_resumes_exactly(base, place):
    shutil.copytree(base / "out", place / "out")
    words = ["--dataset=demo_chat", "--max_iters=8", "--eval_interval=4", "--checkpoint_interval=3",
             "--batch_size=4", "--gradient_accumulation_steps=2", "--dropout=0.2",
             "--log_interval=1"]
    done = succeed(run(place, "sft.py", *words, "--out_dir=out/a"))
    assert "base model: out/tiny/best" in done.stdout.replace("\\", "/")
    process = start(place, "sft.py", *words, "--out_dir=out/b")
    read_until(process, "step 5/")
    process.kill()
    process.communicate()
    assert "resuming from" in succeed(run(place, "sft.py", *words, "--out_dir=out/b")).stdout
    assert weights(place / "out/a") == weights(place / "out/b")
    file = place / "out/a/best/generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8"))
    tok = Bins("demo_chat", place / "data").tokenizer
    assert generation["eos_token_id"] == [tok.im_end, tok.eot]
    answer = succeed(run(place, "sample.py", "--chat", "--max_new_tokens=5",
                         input="你好\n/new\n再见\n"))
    assert len(answer.stdout.splitlines()) >= 2 and "[out/b/best]" in answer.stderr
    one_line(run(place, "sft.py", *words, "--out_dir=out/b", "--multi_turn=0.25"),
             "was made with multi_turn=0.5, not 0.25")
    one_line(run(place, "sft.py", "--dataset=demo:1,demo_chat:1"), "sft.py takes one set")
    one_line(run(place, "sft.py", *words, "--n_layer=3"), "n_layer comes from the base model")


def test_a_set_of_another_vocabulary_is_refused(base, place):
    shutil.copytree(base / "out", place / "out")
    chat = DEMO / "dialogues_val.jsonl"
    succeed(run(place, "prepare.py", "chat", chat, "--tokenizer=bytebpe", "--vocab_size=500"))
    one_line(run(place, "sft.py", "--dataset=chat"), "another tokenizer",
             "--tokenizer=out/tiny/best")
    done = succeed(run(place, "prepare.py", "chat", chat))
    assert "tokenizer: that of out/tiny/best" in done.stdout.replace("\\", "/")


# ---- sampling ----

@pytest.mark.numeric
def test_sampling_takes_the_newest_model_and_repeats_with_its_seed(base):
    words = ("--start=数学是", "--max_new_tokens=20", "--seed=3")
    first, second = (succeed(run(base, "sample.py", *words, "--num_samples=2")) for _ in range(2))
    assert first.stdout == second.stdout and first.stdout.startswith("数学是")
    assert "out/tiny/best" in first.stderr.replace("\\", "/")
    one, two = first.stdout.split(f"\n{'-' * 20}\n")
    assert f"{one}\n" == run(base, "sample.py", *words).stdout  # a single sample is streamed
    assert f"{one}\n" == run(base, "sample.py", "--start", "数学是", *words[1:]).stdout
    assert two == run(base, "sample.py", *words[:2], "--seed=4").stdout != one


def test_a_text_longer_than_the_context_is_cut_with_a_warning(base, tmp_path):
    (tmp_path / "long.txt").write_text("长江" * 300, encoding="utf-8")
    done = run(base, "sample.py", f"--start=FILE:{tmp_path / 'long.txt'}", "--max_new_tokens=150")
    assert done.returncode == 0 and "only the last 64 are read" in done.stderr, done.stderr
    assert done.stdout.startswith("长江" * 300)


@pytest.fixture(scope="module")
def tok(demo):
    return Bins("demo", demo / "data").tokenizer


class Scripted:
    """A model that continues any text with the same ids."""
    device, config = "cpu", GPTConfig(block_size=64)

    def __init__(self, ids):
        self.ids = ids

    def generate(self, ids, max_new_tokens, **sampling):
        yield from (torch.full((len(ids),), i) for i in self.ids[:max_new_tokens])


def byte_ids(tok, data):
    """Return the ids of single bytes."""
    ids = {tok.decode_bytes([i]): i for i in range(256)}
    return [ids[data[i:i + 1]] for i in range(len(data))]


@given(st.text(max_size=8).map(str.encode) | st.binary(max_size=20))
@hypothesis.example(b"\xe4" + "数学".encode() + b"\xe5")  # a lone byte, two characters, half a one
@hypothesis.settings(max_examples=200, deadline=None)
def test_streamed_text_equals_the_text_decoded_at_once(tok, raw):
    model = Scripted([*byte_ids(tok, raw), tok.im_end])
    cfg = configure(sample.__file__, [], files=False)[0]
    text = "".join(sample.generate_text(model, tok, tok.encode("数学"), cfg, 1))
    assert text == raw.decode("utf-8", errors="ignore")


def test_a_stop_text_ends_a_sample(tok, demo, monkeypatch):
    model = Scripted(byte_ids(tok, "是一门学科。它很古老。".encode()))
    monkeypatch.setattr(sample, "load", lambda cfg: (model, tok))
    words = ("--start=它", "--stop=很远|它很|。它")  # the second would end it later
    assert run(demo, "sample.py", *words).stdout == "它是一门学科\n"
    done = run(demo, "sample.py", *words, "--num_samples=2")
    assert done.stdout.split("\n") == ["它是一门学科", "-" * 20, "它是一门学科", ""]


def test_control_characters_of_a_model_are_shown_and_not_obeyed(tok, demo, monkeypatch):
    emitted = "\x1b[2J\x1b]0;x\a\r\b\x00\x7f\x9b1m\u202e\t水\n火👩\u200d🚒"
    shown = r"\x1b[2J\x1b]0;x\x07\r\x08\x00\x7f\x9b1m\u202e" + "\t水\n火👩\u200d🚒"
    model = Scripted(byte_ids(tok, emitted.encode()))
    monkeypatch.setattr(sample, "load", lambda cfg: (model, tok))
    streamed = run(demo, "sample.py", "--start=\x1b它").stdout
    assert streamed == rf"\x1b它{shown}" + "\n"
    samples = run(demo, "sample.py", "--start=它", "--num_samples=2").stdout
    assert samples == f"它{shown}\n{'-' * 20}\n它{shown}\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "utf-16", "utf-16-le"])
def test_a_start_is_read_in_the_encodings_of_the_corpus(encoding, tmp_path):
    text = "长江是中国第一大河，全长约六千三百公里。\n它从西向东流。"
    (tmp_path / "start.txt").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert sample.read_start(f"FILE:{tmp_path / 'start.txt'}") == text


def test_a_start_that_cannot_be_read_is_one_line(base, tmp_path):
    (tmp_path / "bad.bin").write_bytes(bytes(range(256)) * 40)
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("bad.bin", "no known encoding"), ("no.txt", "No such file"), ("", ""),
                       ("pipe", "is a pipe or a device")):
        path = str(tmp_path / name)
        one_line(run(base, "sample.py", f"--start=FILE:{path}"), path, what)



@given(st.text("ab停", max_size=12), st.lists(st.text("ab停", min_size=1, max_size=4), max_size=3))
@hypothesis.settings(max_examples=200, deadline=None)
def test_text_ends_before_the_first_stop_however_it_is_cut(text, stops):
    raw = text.encode()
    shown = "".join(decode_stream([raw[i:i + 1] for i in range(len(raw))], "|".join(stops)))
    ends = [text.find(s, 0) + len(s) for s in stops if s in text]
    first = min(ends, default=0)  # the stop that is complete first
    found = [text.find(s) for s in stops if s in text[:first]]
    assert shown == (text[:min(found)] if found else text)


# ---- refusals ----

@pytest.mark.parametrize("words, what", [
    (("--learning_rat=1",), "Did you mean learning_rate?"), (("--n_layer=two",), "not of type int"),
    (("--n_layer=1.5",), "not of type int"), (("--bias=3",), "not of type bool"),
    (("--out_dir",), "--out_dir needs a value"), (("word",), "'word' is neither"),
    (("missing.py",), "no config file missing.py"), (("--dataset=none",), "none is not prepared"),
    (("--dataset=demo_chat",), "sft.py"), (("--block_size=1000000",), "too few for a window"),
    (("--batch_size=0",), "batch_size=0"), (("--n_head=3",), "not a multiple of n_head 3"),
    (("--arch=llama",), "'llama'"), (("--optimizer=sgd",), "sgd"), (("--dtype=int8",), "int8"),
    (("--device=tpu9",), "tpu9"), (("--device=meta",), "device=meta"),
    (("--max_iters=9223372036854775807",), "is not from 1 to"),
    (("--init_from=no/such",), "no/such"), (("--init_from=",), "init_from=''"),
    (("--dataset=",), "dataset=''"), (("--dataset=demo:0.5,demo:0.5",), "demo:0.5"),
    (("--n_layer=1000000",), "n_layer=1000000"), (("--batch_size=2147483647",), "batch_size="),
    (("--n_layer=1000", "--n_embd=131072"), "GiB for its weights alone"),
    (("--keep_steps=1|x",), "keep_steps=1|x"), (("--dropout=1",), "dropout")])
def test_what_pretrain_cannot_do_is_one_line(words, what, place):
    one_line(run(place, "pretrain.py", *TINY, *words), "pretrain.py: ", what)
    assert not list(place.glob("out/*/*"))


@pytest.mark.parametrize("script", ["prepare.py", "pretrain.py", "sft.py", "sample.py", "eval.py"])
def test_a_script_ends_with_code_2_and_one_line(script, tmp_path):
    done = run_process(tmp_path, script, "--sede=1")
    one_line(done, f"{script}: unknown setting 'sede'")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_a_run_is_not_resumed_with_other_settings(base, place):
    shutil.copytree(base / "out/tiny", place / "out/tiny")
    words = ["--out_dir=out/tiny", "--block_size=128", "--max_iters=30"]
    for change, what in (("--n_layer=3", "n_layer=2, not 3"), ("--seed=5", "seed="),
                         ("--batch_size=2", "rows per step=8, not 4"),
                         ("--optimizer=muon", "optimizer="),
                         ("--init_from=scratch", "--overwrite")):
        one_line(run(place, "pretrain.py", *TINY, *words, change), what)
    done = train(place, *words, "--n_layer=1", "--overwrite", "--max_iters=2")
    assert "steps 0 to 2" in done.stdout


def test_config_files_and_their_mistakes(place):
    (place / "a.py").write_text("import math\nbatch_size = 2 * 2\nlearning_rate = 1\n_x = 3\n",
                                encoding="utf-8")
    cfg, words = configure(pretrain.__file__, [str(place / "a.py"), "--batch_size=6", "--compile",
                                               "--sample_start=--x=1+1=", "--seed=-3"])
    assert (cfg.batch_size, cfg.learning_rate, cfg.compile, words) == (6, 1.0, True, [])
    assert (cfg.sample_start, cfg.seed) == ("--x=1+1=", -3)
    for text, what in (("batch_sise = 3", "Did you mean batch_size"), ("n_layer = 'x'", "type int"),
                       ("1/0", "ZeroDivisionError"), ("a b", "SyntaxError")):
        (place / "b.py").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=what):
            configure(pretrain.__file__, [str(place / "b.py")])
    shown = succeed(run(place, "pretrain.py", "a.py", "--help")).stdout
    assert "--batch_size=4 " in shown and "sequences per micro-batch" in shown
    for name in ("demo", "pretrain_zh"):
        configure(pretrain.__file__, [str(ROOT / f"config/{name}.py")])
    for name in ("demo_sft", "sft_zh"):
        configure(sft.__file__, [str(ROOT / f"config/{name}.py")], base=pretrain.__file__,
                  fixed=pretrain.SHAPE)


@pytest.mark.parametrize("words, what", [
    (("--start=x",), "no base model under out/ yet"), (("--chat",), "no chat model"),
    (("--model=nowhere",), "nowhere can't be loaded"), (("--start=FILE:no.txt",), "no base model"),
    (("x",), '--start="x"'), (("--seed=-2",), "seed"), (("--num_samples=0",), "num_samples")])
def test_what_sample_cannot_do_is_one_line(words, what, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHIPPED", tmp_path)
    one_line(run(tmp_path, "sample.py", *words), "sample.py: ", what)


def test_a_damaged_model_folder_is_one_line(base, tmp_path):
    for name, text in (("config.json", "{"), ("model.safetensors", "xx"), ("tokenizer.json", "{}"),
                       ("config.json", '{"model_type": "llama"}')):
        shutil.copytree(base / "out/tiny/best", tmp_path / "m")
        (tmp_path / "m" / name).write_text(text, encoding="utf-8")
        one_line(run(tmp_path, "sample.py", "--model=m"), "m")
        shutil.rmtree(tmp_path / "m")
    one_line(run(base, "sample.py", "--device=xla"), "device=xla can't be used", "'XLA' backend)")


def test_a_model_folder_says_how_it_is_sampled(base, tmp_path):
    shutil.copytree(base / "out/tiny/best", tmp_path / "m")
    file, words = tmp_path / "m/generation_config.json", ("--model=m", "--start=数", "--seed=3")
    greedy = run(tmp_path, "sample.py", *words, "--temperature=0", "--repetition_penalty=1").stdout
    for own in (dict(temperature=0.0), dict(do_sample=False, temperature=0.9)):
        file.write_text(json.dumps(own), encoding="utf-8")
        assert run(tmp_path, "sample.py", *words).stdout == greedy
    for own, what in ((dict(top_p=2), "top_p=2.0"), (dict(temperature="x"), "ValueError"),
                      (dict(temperature=float("nan")), "nan"),
                      (dict(eos_token_id={}), "TypeError")):
        file.write_text(json.dumps(own), encoding="utf-8")
        one_line(run(tmp_path, "sample.py", *words), "m/generation_config.json", what)


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
@pytest.mark.skipif(sys.platform == "win32", reason="of a POSIX shell")
def test_closed_streams_do_no_harm(closed, base):
    command = f'"{sys.executable}" "{ROOT / "sample.py"}" --max_new_tokens=3 {closed}'
    done = subprocess.run(command, shell=True, cwd=base, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr

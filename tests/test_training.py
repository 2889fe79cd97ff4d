"""The laws of a training step, its optimizers and schedule, of evaluation and of seeds."""
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import pretrain
import sample
import sft
from common.command_line import UserError
from common.settings import configure
from gpt import GPT, GPTConfig
from models.hf import save_pretrained
from models.load import from_pretrained
from tokens.batches import TextData
from tokens.bins import Bins
from training.checkpoint import checkpoint_files, restore_model

torch.set_num_threads(1)
SMALL = ["--arch=qwen3", "--batch_size=2", "--gradient_accumulation_steps=2", "--block_size=16",
         "--max_iters=100", "--warmup_iters=0", "--learning_rate=0.01", "--min_lr=0.01",
         "--muon_lr=0.02", "--grad_clip=0", "--device=cpu", "--dtype=float32"]
PLAIN = ["--temperature=1", "--top_k=0", "--top_p=1", "--min_p=0", "--repetition_penalty=1"]
both = pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
each_optimizer = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


class GivenData:
    """What a Trainer reads: the same micro-batches at every step, the same batches to evaluate."""
    tokenizer = base = None
    row_length = 16

    def __init__(self, micros, val=()):
        self.micros, self.val = micros, val

    def batch(self, step, micro):
        return self.micros[micro]

    def n_trained(self, step):
        return sum(int((targets >= 0).sum()) for _, targets, _ in self.micros)

    def tokens_read(self, steps):
        return steps * sum(ids.numel() for ids, _, _ in self.micros)

    def val_batches(self):
        return iter(self.val)

    def scores(self, loss):
        return dict(val_loss=loss)

    def prompts(self):
        return []


def random_batch(B, T, n_trained, seed):
    """ids, targets (B, T) of which n_trained count, two documents a row."""
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(100, (2, B, T), generator=generator)
    targets.view(-1)[torch.randperm(B * T, generator=generator)[n_trained:]] = -1
    return ids, targets, (torch.arange(T) >= T // 3).long().expand(B, T)


def uneven_batches():
    return [random_batch(2, 16, 29, 1), random_batch(1, 9, 3, 2)]


def make_trainer(folder, data, *words, dtype="float32", noise=0.1, **shape):
    """A Trainer of a small model whose weights are away from the initial ones."""
    cfg = configure(pretrain.__file__, [*SMALL, f"--out_dir={folder}", *words])[0]
    cfg.dtype = dtype
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(arch=cfg.arch, vocab_size=128, block_size=16, n_layer=2, n_head=2,
                                 n_embd=16, dropout=cfg.dropout) | shape))
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    return pretrain.Trainer(cfg, pretrain.init_context(cfg), model, data, "base", None)


def keep_gradients(trainer):
    """The dict that train_step fills with its gradients, instead of the update."""
    kept = {}

    def update():
        kept.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        trainer.model.zero_grad(set_to_none=True)
    trainer.update = update
    return kept


def plain_mean(model, batches):
    """Mean loss per trained token by F.cross_entropy, the whole logits in memory."""
    logits = [model(ids, doc_ids=doc_ids).flatten(0, 1) for ids, _, doc_ids in batches]
    targets = [targets.flatten() for _, targets, _ in batches]
    return F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=-1)


def assert_gradients_equal(kept, model):
    """kept's are those in model, each to 1e-5 of the whole gradient's norm."""
    norm = math.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    assert kept.keys() == {name for name, _ in model.named_parameters()} and norm > 0
    for name, p in model.named_parameters():
        assert (kept[name] - p.grad).norm() <= 1e-5 * norm, name


# ---- the gradient of a step ----

@both
def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_trained_tokens(arch, tmp_path):
    batches = uneven_batches()
    trainer = make_trainer(tmp_path, GivenData(batches), f"--arch={arch}")
    kept = keep_gradients(trainer)
    loss, _ = trainer.train_step()
    want = plain_mean(trainer.model, batches)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    want.backward()
    assert_gradients_equal(kept, trainer.model)


def chat_data(demo, *words):
    cfg = configure(sft.__file__, ["--dataset=demo_chat", "--batch_size=2",
                                   "--gradient_accumulation_steps=3", "--block_size=128", *words],
                    base=pretrain.__file__, fixed=sft.FIXED)[0]
    return sft.ChatData(Bins("demo_chat", demo / "data"), cfg)


def loss_of_answers(model, windows):
    """(sum of the loss, number) of the targets of windows (ids, targets); each is read alone."""
    total = n = 0
    for ids, targets in windows:
        ids, targets = torch.from_numpy(ids), torch.from_numpy(targets)[1:]
        total += F.cross_entropy(model(ids[None, :-1])[0], targets, reduction="sum",
                                 ignore_index=-1)
        n += int((targets >= 0).sum())
    return total, n


@both
@pytest.mark.parametrize("multi_turn", [0, 1])
def test_a_step_on_packed_dialogues_equals_the_dialogues_alone(multi_turn, arch, demo, tmp_path):
    data = chat_data(demo, f"--multi_turn={multi_turn}")
    step = len(data.steps) + 4  # of the second epoch
    trainer = make_trainer(tmp_path, data, f"--arch={arch}", "--gradient_accumulation_steps=3",
                           vocab_size=4096, block_size=128)
    kept, trainer.step = keep_gradients(trainer), step
    loss, _ = trainer.train_step()
    rows = data.steps[data.order.at(step)[0]]
    assert len(rows) == 6
    if multi_turn:  # a row is one conversation
        windows = [data.packed_row("train", n, 1)[:2] for n in rows]
        windows = [(np.append(ids, 0), np.append(-1, targets)) for ids, targets in windows]
    else:
        windows = [data.window("train", data.exchanged(1)[i])
                   for n in rows for i in data.rows["train"][n]]
        assert len(windows) > 6
    total, n = loss_of_answers(trainer.model, windows)
    assert data.n_trained(step) == n and loss.item() == pytest.approx((total / n).item(), rel=1e-5)
    (total / n).backward()
    assert_gradients_equal(kept, trainer.model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_blocks_compute_in_dtype_and_the_weights_stay_float32(dtype, tmp_path):
    trainer = make_trainer(tmp_path, GivenData(uneven_batches(), uneven_batches()), dtype=dtype)
    seen = []
    trainer.model.blocks[1].mlp.down_proj.register_forward_hook(
        lambda module, args, out: seen.append(out.dtype))
    kept = keep_gradients(trainer)
    loss, _ = trainer.train_step()
    trainer.evaluate()
    assert seen == [getattr(torch, dtype)] * 4  # two micro-batches, two batches evaluated
    assert loss.dtype == torch.float32
    assert {g.dtype for g in kept.values()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


# ---- dropout ----

@both
def test_a_step_trains_with_dropout_before_and_after_an_evaluation_without(arch, tmp_path):
    data = GivenData(uneven_batches(), uneven_batches())
    trainer = make_trainer(tmp_path, data, f"--arch={arch}", "--dropout=0.5")
    keep_gradients(trainer)  # the weights stay
    before, _ = trainer.train_step()
    trainer.evaluate()
    after, _ = trainer.train_step()
    assert torch.equal(before, after)
    plain = plain_mean(trainer.model.eval(), data.val).item()
    assert trainer.scores["val_loss"] == pytest.approx(plain, rel=1e-5)
    assert before.item() != pytest.approx(plain, rel=1e-4)


def test_dropout_is_a_function_of_seed_step_and_micro_batch(tmp_path):
    def masks(seed, step):
        trainer = make_trainer(tmp_path, GivenData([random_batch(2, 16, 29, 1)] * 2),
                               "--dropout=0.5", f"--seed={seed}")
        seen, trainer.step = [], step
        trainer.model.drop.register_forward_hook(lambda m, args, out: seen.append(out != 0))
        keep_gradients(trainer)
        torch.manual_seed(99 + step)  # what was drawn before has no influence
        trainer.train_step()
        return seen
    first = masks(3, 5)
    assert all(map(torch.equal, first, masks(3, 5)))
    every = [*first, *masks(3, 6), *masks(3, 4), *masks(4, 5)]
    for i, a in enumerate(every):
        assert not any(torch.equal(a, b) for b in every[:i])


def test_every_way_to_a_model_takes_the_dropout_of_the_settings(untrained, demo, tmp_path):
    model, tok = untrained
    save_pretrained(model, tmp_path)
    tok.save(tmp_path, False)
    cfg = configure(pretrain.__file__, [*SMALL, "--dropout=0.3"])[0]
    bins = Bins("demo", demo / "data")
    new = pretrain.make_model(cfg, bins)
    checkpoint = dict(model=new.state_dict(), model_config=asdict(new.config) | dict(dropout=0.9))
    cfg.init_from, cfg.lora_rank = str(tmp_path), 0
    for made in (new, pretrain.make_model(cfg, bins), sft.make_model(cfg, bins),
                 restore_model(cfg, checkpoint)):
        assert {m.p for m in made.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


# ---- the optimizers ----

def random_gradients(model, seed, size=1.0):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * size


def adamw(p, gradients, lr, decay, beta1, beta2, eps=1e-8):
    """p after AdamW's steps (arXiv:1711.05101, algorithm 2), in float64."""
    m = v = 0
    for t, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        p = p - lr * (step + decay * p)
    return p


def muon(p, gradients, lr, decay, momentum=0.95):
    """p after Muon's steps (https://kellerjordan.github.io/posts/muon), as large as AdamW's
    (arXiv:2502.16982), in float64."""
    average = 0
    for g in gradients:
        average = momentum * average + (1 - momentum) * g
        x = momentum * average + (1 - momentum) * g  # Nesterov
        x = x / x.norm()
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
        p = p - lr * (0.2 * max(p.shape)**0.5 * x + decay * p)
    return p


@pytest.mark.parametrize("shape", [dict(arch="gpt2"), dict(arch="qwen3", tie=False, n_kv_head=1)])
@each_optimizer
def test_three_updates_are_those_of_the_papers(optimizer, shape, tmp_path):
    words = ["--weight_decay=0.5", "--beta1=0.6", "--beta2=0.8", f"--optimizer={optimizer}"]
    trainer = make_trainer(tmp_path, GivenData([]), *words, **shape)
    start = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    gradients = {name: [] for name in start}
    for seed in range(3):
        random_gradients(trainer.model, seed)
        for name, p in trainer.model.named_parameters():
            gradients[name].append(p.grad.double())
        trainer.update()
        assert all(p.grad is None for p in trainer.model.parameters())
    for name, p in trainer.model.named_parameters():
        matrix = name.startswith("blocks.") and p.dim() == 2
        decay = 0.5 if matrix else 0.0  # no norm, bias or embedding decays
        if matrix and optimizer == "muon":
            want = muon(start[name], gradients[name], 0.02, decay)
        else:
            want = adamw(start[name], gradients[name], 0.01, decay, 0.6, 0.8)
        error = (p - want).norm() / (want - start[name]).norm()
        assert error < 1e-4, name  # float32 orthogonalizes to about 1e-5


@each_optimizer
def test_an_update_is_as_large_as_the_schedule_has_it_at_its_step(optimizer, tmp_path):
    moved = {}
    for step in (10, 0, 4, 9, 55, 100):
        trainer = make_trainer(tmp_path, GivenData([]), "--warmup_iters=10", "--min_lr=0.001",
                               "--weight_decay=0.1", f"--optimizer={optimizer}")
        trainer.step, before = step, [p.detach().double() for p in trainer.model.parameters()]
        random_gradients(trainer.model, 0)
        trainer.update()
        moved[step] = [p - q for p, q in zip(trainer.model.parameters(), before)]
    assert max(m.abs().max().item() for m in moved[10][:1]) == pytest.approx(0.01, rel=1e-3)
    # ten steps of warmup; half way from the peak to a tenth of it; the end
    for step, share in ((0, 0.1), (4, 0.5), (9, 1.0), (55, 0.55), (100, 0.1)):
        for full, m in zip(moved[10], moved[step]):
            assert (m - share * full).norm() < 1e-4 * full.norm(), step


@each_optimizer
@pytest.mark.parametrize("limit, norm, left", [(1.0, 5.0, 1.0), (1.0, 0.5, 0.5), (0.0, 5.0, 5.0)])
def test_a_gradient_longer_than_grad_clip_is_shortened(optimizer, limit, norm, left, tmp_path):
    trainer = make_trainer(tmp_path, GivenData([]), f"--grad_clip={limit}",
                           f"--optimizer={optimizer}")
    params = list(trainer.model.parameters())
    random_gradients(trainer.model, 0)
    whole = torch.nn.utils.get_total_norm([p.grad for p in params])
    for p in params:
        p.grad *= norm / whole
    before, seen = [p.grad.clone() for p in params], {}
    for opt in trainer.optimizers:
        opt.register_step_pre_hook(lambda opt, args, kwargs: seen.update(
            {id(p): p.grad.clone() for group in opt.param_groups for p in group["params"]}))
    assert trainer.update().item() == pytest.approx(norm, rel=1e-5)
    for p, g in zip(params, before):
        torch.testing.assert_close(seen[id(p)], g * (left / norm), rtol=1e-4, atol=1e-9)


def checkpoint_of(trainer):
    """The checkpoint that a Trainer of GivenData writes, as it is read."""
    trainer.data.bins = SimpleNamespace(fingerprint=lambda: "")
    trainer.save_checkpoint()
    return torch.load(checkpoint_files(trainer.runlog.path)[0], weights_only=True)


@pytest.mark.parametrize("optimizer, dtype", [
    ("adamw", "float32"), ("muon", "float32"), ("muon", "float16")])
def test_a_restored_trainer_goes_on_as_if_it_had_never_stopped(optimizer, dtype, tmp_path):
    def start():
        return make_trainer(tmp_path, GivenData(uneven_batches()), f"--optimizer={optimizer}",
                            "--dropout=0.2", "--warmup_iters=10", "--grad_clip=1", dtype=dtype)
    whole = start()
    for step in range(6):
        if step == 3:
            checkpoint = checkpoint_of(whole)
        whole.advance()
    again = start()
    again.model.load_state_dict(checkpoint["model"])
    again.restore(checkpoint)
    assert again.step == again.saved == 3
    for _ in range(3):
        again.advance()
    assert torch.equal(torch.stack(again.progress.losses), torch.stack(whole.progress.losses))
    for p, q in zip(again.model.parameters(), whole.model.parameters()):
        assert torch.equal(p, q)
    assert again.scaler.state_dict() == whole.scaler.state_dict()


def test_a_restored_trainer_takes_the_rates_and_decay_of_its_own_settings(tmp_path):
    old = make_trainer(tmp_path, GivenData(uneven_batches()), "--optimizer=muon")
    old.advance()
    words = ["--optimizer=muon", "--learning_rate=0.5", "--min_lr=0.5", "--muon_lr=0.25",
             "--weight_decay=0.125", "--beta2=0.75"]
    new = make_trainer(tmp_path, GivenData(uneven_batches()), *words)
    new.restore(checkpoint_of(old))
    (adamw,), (muon,) = (opt.param_groups for opt in new.optimizers)
    assert adamw["peak_lr"] == adamw["lr"] == 0.5 and adamw["betas"] == (0.9, 0.75)
    assert muon["peak_lr"] == 0.25 and muon["weight_decay"] == 0.125
    assert all(state["momentum_buffer"].any() for state in new.optimizers[1].state.values())


@each_optimizer
@both
def test_a_small_model_learns_one_batch_by_heart(arch, optimizer, tmp_path):
    ids = torch.randint(100, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = (ids[:, :-1], ids[:, 1:], None)
    trainer = make_trainer(tmp_path, GivenData([batch]), f"--arch={arch}", "--max_iters=120",
                           "--gradient_accumulation_steps=1", f"--optimizer={optimizer}",
                           "--warmup_iters=5", "--min_lr=0.001", "--grad_clip=1", noise=0)
    for _ in range(120):
        trainer.advance()
    first, last = trainer.progress.losses[0].item(), trainer.progress.losses[-1].item()
    assert first == pytest.approx(math.log(128), rel=0.02) and last < 0.1


# ---- what a step reads ----

def counting_bins(first, n):
    """A text set whose tokens are first, first + 1, ...: a window tells where it was read."""
    tokens = np.arange(first, first + n, dtype=np.uint32)
    bins = SimpleNamespace(kind="text", folder=Path(f"set{first}"), tokens=lambda split: tokens,
                           tokenizer=SimpleNamespace(eot=0))
    bins.parts = [(bins, 1.0)]
    return bins


def text_data(bins, *words):
    cfg = configure(pretrain.__file__, ["--block_size=8", "--batch_size=2",
                                        "--gradient_accumulation_steps=3", *words])[0]
    return TextData(bins, cfg)


def rows_read(data, n):
    """The first n rows (T,) that the micro-batches of a run read, in order."""
    rows = []
    for step in range(-(-n // 6)):
        batches = [data.batch(step, micro) for micro in range(3)]
        for ids, targets, doc_ids in batches:
            assert ids.shape == (2, 8) and torch.equal(targets, ids + 1) and doc_ids is None
            rows += ids
        assert data.n_trained(step) == sum(targets.numel() for _, targets, _ in batches)
        assert data.tokens_read(step + 1) == 8 * len(rows)
    return torch.stack(rows[:n])


def test_no_epoch_reads_a_token_twice_or_leaves_a_window_out():
    data, W = text_data(counting_bins(1000, 330)), (330 - 8) // 8
    epochs = rows_read(data, 3 * W).split(W)
    for rows in epochs:
        tokens = rows.flatten().unique()
        assert len(tokens) == W * 8  # none twice
        assert tokens.max() - tokens.min() == W * 8 - 1  # and no gap
    assert len({int(rows.min()) for rows in epochs}) > 1  # they are not all cut alike
    assert not torch.equal(epochs[0] - epochs[0].min(), epochs[1] - epochs[1].min())
    assert not torch.equal(epochs[0], rows_read(text_data(data.bins, "--seed=2"), W))


def test_no_epoch_of_a_mixed_set_reads_a_token_twice():
    a, b = counting_bins(10_000, 330), counting_bins(20_000, 130)
    a.parts = [(a, 0.75), (b, 0.25)]
    rows = rows_read(text_data(a), 150)
    for part, W in ((rows[rows[:, 0] < 20_000], 40), (rows[rows[:, 0] >= 20_000], 15)):
        assert len(part) >= 2 * W
        for epoch in part[:2 * W].split(W):
            assert len(epoch.flatten().unique()) == W * 8


def test_an_epoch_of_dialogues_trains_every_answer_once(demo):
    data = chat_data(demo)
    trained = [targets[targets >= 0] for step in range(len(data.steps))
               for _, targets, _ in (data.batch(step, micro) for micro in range(3))]
    tokens = data.bins.tokens("train")
    assert sorted(torch.cat(trained).tolist()) == sorted(tokens[data.tokenizer.loss_mask(tokens)])


# ---- evaluation ----

@both
def test_val_loss_is_the_mean_over_tokens_and_not_over_batches(arch, tmp_path):
    batches = uneven_batches()
    trainer = make_trainer(tmp_path, GivenData([], batches), f"--arch={arch}")
    trainer.evaluate()
    means = [plain_mean(trainer.model, [batch]).item() for batch in batches]
    want = plain_mean(trainer.model, batches).item()
    assert abs(want - sum(means) / 2) > 1e-3 * want
    assert trainer.scores["val_loss"] == pytest.approx(want, rel=1e-5)


def test_val_loss_of_packed_dialogues_equals_that_of_each_alone(demo, tmp_path):
    data = chat_data(demo, "--eval_tokens=0", "--sample_start=")
    trainer = make_trainer(tmp_path, data, vocab_size=4096, block_size=128)
    trainer.evaluate()
    with torch.no_grad():
        windows = [data.window("val", i) for i in range(len(data.windows["val"]))]
        total, n = loss_of_answers(trainer.model, windows)
    assert trainer.scores["val_loss"] == pytest.approx((total / n).item(), rel=1e-5)


def test_best_is_saved_where_val_loss_is_lower_than_ever_before(tmp_path):
    losses, saved = [2.0, 5.0, 4.0, 4.0, 4.5, 1.5, 3.0, 1.0], []
    trainer = make_trainer(tmp_path, GivenData([], uneven_batches()))
    trainer.save_model = lambda name: saved.append((name, trainer.step))
    for trainer.step, loss in enumerate(losses):
        trainer.data.scores = lambda _, loss=loss: dict(val_loss=loss)
        trainer.evaluate()
    assert saved == [("best", 5), ("best", 7)]  # the untrained model's 2.0 is to be beaten too
    assert trainer.best == 1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_val_loss_that_is_not_finite_ends_the_run_and_saves_nothing(loss, tmp_path):
    trainer = make_trainer(tmp_path, GivenData([], uneven_batches()))
    trainer.step, trainer.data.scores = 3, lambda _: dict(val_loss=loss)
    with pytest.raises(UserError, match=f"val loss after step 3 is {loss}"):
        trainer.evaluate()
    assert not list(tmp_path.iterdir())


def test_best_on_disk_is_never_replaced_by_a_worse_model(demo, tmp_path):
    words = ["--sample_start=", "--eval_tokens=200"]

    def start():
        trainer = make_trainer(tmp_path, None, *words, vocab_size=4096)
        trainer.data = TextData(Bins("demo", demo / "data"), trainer.cfg)
        return trainer
    trainer = start()
    trainer.step = 1
    trainer.evaluate()
    best = {f.name: f.read_bytes() for f in (tmp_path / "best").iterdir()}
    assert json.loads(best["config.json"])["val_loss"] == trainer.scores["val_loss"]
    assert torch.equal(from_pretrained(tmp_path / "best").wte.weight, trainer.model.wte.weight)
    trainer.save_checkpoint()
    checkpoint = torch.load(tmp_path / "ckpt_step_1.pt", weights_only=True)
    again = start()  # with the checkpoint, best/ moved away and back: each remembers the best
    again.restore(checkpoint)
    shutil.move(tmp_path / "best", tmp_path / "kept")
    alone = start()
    alone.restore(checkpoint)
    shutil.move(tmp_path / "kept", tmp_path / "best")
    blank = start()
    blank.restore(checkpoint | dict(best=math.inf))
    for worse in (trainer, again, alone, blank):
        worse.model.wte.weight.data *= 5
        worse.step = 2
        worse.evaluate()
        assert worse.scores["val_loss"] > worse.best
        assert {f.name: f.read_bytes() for f in (tmp_path / "best").iterdir()} == best


@pytest.mark.parametrize("losses, norm, said", [
    ([4.0, 2.0, 3.0], 1.0, None), ([4.0, math.nan, 3.0], 1.0, "step 9 diverged: loss nan"),
    ([4.0, 2.0, 90.0], 1.0, "step 10 diverged: loss 90, gradient norm at step 10 1;"),
    ([4.0, 2.0, 3.0], math.inf, "step 10 diverged: loss 3, gradient norm at step 10 inf;"),
    ([9.7, 9.7, 9.7], 1.0, None), ([9.8, 9.6, 9.8], 1.0, "step 8 diverged")])  # 2 ln 128 = 9.70
def test_the_mean_loss_is_logged_or_the_run_ends(losses, norm, said, tmp_path):
    trainer = make_trainer(tmp_path, GivenData([]))
    trainer.data.describe = lambda step: f"row {step}"
    progress = trainer.progress  # the losses are of steps 8, 9 and 10
    progress.losses, progress.norm = [torch.tensor(x) for x in losses], torch.tensor(norm)
    if said is None:
        assert progress.mean_loss(10) == pytest.approx(sum(losses) / 3)
        return
    with pytest.raises(UserError, match=said) as error:
        progress.mean_loss(10)
    assert f"it read row {int(said.split()[1]) - 1}." in str(error.value)
    trainer.ctx.dtype = torch.float16  # which has skipped a step with such a norm
    if norm == math.inf:
        progress.mean_loss(10)


# ---- seeds of sampling ----

@pytest.fixture(scope="module")
def untrained(demo):
    """(an untrained model, the demo's tokenizer): all ids are about equally likely."""
    tok = Bins("demo", demo / "data").tokenizer
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=tok.vocab_size, padded_vocab_size=-(-tok.vocab_size // 128) * 128,
                       block_size=64, n_layer=1, n_head=1, n_embd=8)
    return GPT(config).eval(), tok


def sample_settings(*words):
    return configure(sample.__file__, ["--max_new_tokens=10", *PLAIN, *words], files=False)[0]


def test_sample_i_is_drawn_with_the_seed_plus_i(untrained, monkeypatch):
    model, tok = untrained
    monkeypatch.setattr("sampling.text.BATCH_SIZE", 2)
    cfg = sample_settings("--num_samples=7", "--seed=5")
    texts = sample.continue_texts(model, tok, ["水", "长江"], cfg)
    for i, (start, text) in enumerate(texts):
        ids = sample.encode_start(tok, start, 64)
        assert start == ["水", "长江"][i % 2]
        assert text == "".join(sample.generate_text(model, tok, ids, cfg, 5 + i))
    assert len({text for _, text in texts}) == 7
    torch.manual_seed(1)  # nothing but the seed decides
    assert sample.continue_texts(model, tok, ["水", "长江"], cfg) == texts


def test_a_lone_sample_is_drawn_with_its_seed(untrained, capsys):
    def printed(seed):
        sample.print_samples(*untrained, sample_settings("--start=水", f"--seed={seed}"))
        return capsys.readouterr().out
    one = printed(5)
    torch.manual_seed(1)
    assert one == printed(5) != printed(6)
    ids = sample.encode_start(untrained[1], "水", 64)
    text = "".join(sample.generate_text(*untrained, ids, sample_settings(), 5))
    assert one == f"水{text}\n"


def test_every_answer_of_a_chat_has_a_seed_of_its_own(untrained):
    model, tok = untrained

    def answers(seed):
        chat = sample.Chat(model, tok, sample_settings("--chat", f"--seed={seed}"))
        said = []
        for turn in range(2):
            said.append("".join(chat.ask("好")))
            chat.messages = []  # so that the next turn has the same prompt
        return said
    first = answers(5)
    torch.manual_seed(1)
    assert first == answers(5) and first[0] != first[1]
    assert answers(6) == [first[1], answers(7)[0]]  # turn t has the seed plus t


def test_samples_during_training_depend_on_the_seed_alone(demo, tmp_path, capsys):
    def printed(seed, torch_seed):
        trainer = make_trainer(tmp_path, None, f"--seed={seed}", "--sample_start=水", noise=0,
                               vocab_size=4096, block_size=64)
        trainer.data = TextData(Bins("demo", demo / "data"), trainer.cfg)
        torch.manual_seed(torch_seed)
        trainer.print_samples()
        return capsys.readouterr().out
    assert "水 > " in printed(5, 0) == printed(5, 1) != printed(6, 1)


# ---- the runs in config/ ----

@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("[!_]*.py")), ids=lambda f: f.stem)
def test_every_config_file_is_a_run_of_its_script(file):
    if "sft" in file.stem:
        cfg, words = configure(sft.__file__, [str(file)], base=pretrain.__file__,
                               fixed=pretrain.SHAPE)
    else:
        cfg, words = configure(pretrain.__file__, [str(file)])
    if cfg.init_from == "auto" and "sft" not in file.stem:
        bins = SimpleNamespace(tokenizer=SimpleNamespace(
            vocab_size=16_000, padded_vocab_size=16_000))
        with torch.device("meta"):
            model = pretrain.make_model(cfg, bins)
            logits = model(torch.zeros(1, cfg.block_size, dtype=torch.long), last=True)
        assert logits.shape == (1, 1, 16_000) and len(model.blocks) == cfg.n_layer
    pretrain.check_settings(cfg, words)
    assert cfg.warmup_iters < cfg.max_iters and cfg.out_dir.endswith(file.stem)

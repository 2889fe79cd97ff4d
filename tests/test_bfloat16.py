"""The laws in bfloat16, within what its roundings allow, on any CPU.

bfloat16 keeps 8 significant bits: rounding changes a number by at most U = 2^-8 of itself, and by
0.4 U in the root mean square. Matrix products are summed in float32, so that only the rounding of
their result counts. K roundings one after the other are independent and add up as their squares do,
to 0.4 sqrt(K) U of the result's norm; the tests allow sqrt(K) U.
"""
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT
from test_distributed import torchrun
from test_scripts import curve, settings, weights
from test_training import GivenData, keep_gradients, make_trainer, uneven_batches

import pretrain
from gpt import LayerCache, linear_cross_entropy
from test_gpt import make, random_ids

pytestmark = pytest.mark.numeric
torch.set_num_threads(1)
U = 2.0**-8
FORWARD = 12  # roundings in a block: of two normed inputs, four weights and six results
both = pytest.mark.parametrize("arch", ["gpt2", "qwen3"])


def error(a, b):
    """Of a against b, as a share of b's norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- the chunked loss ----

@pytest.mark.parametrize("rows", [1, 7, 100])
def test_chunked_loss_and_both_gradients_are_within_their_roundings(rows):
    torch.manual_seed(0)
    x = torch.randn(40, 24).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(96, 24)).requires_grad_()
    targets = torch.randint(96, (40,))
    targets[5:12] = -1
    loss = linear_cross_entropy(x, weight, targets, rows * 96)
    (loss * 0.5).backward()  # a power of two: exact
    # the same of the same rounded matrices, in float64
    X, W, counts = x.detach().double(), weight.detach().bfloat16().double(), targets >= 0
    z = X @ W.T
    P = z.softmax(-1) * counts[:, None]
    G = P.clone()
    G[counts, targets[counts]] -= 1
    want = (z.logsumexp(-1) - z.gather(1, targets.clamp(min=0)[:, None])[:, 0])[counts].sum()
    # Each logit is off by U |z| at most, so a log-probability by 2 U max|z|, and a probability by
    # the factor e of that; the gradient of the logits is rounded, and so is each product with it.
    off = 2 * U * z.abs().amax(-1)
    assert abs(loss.item() - want.item()) <= off[counts].sum() + 1e-5 * want
    dG = off.expm1()[:, None] * P * (1 + U) + U * G.abs()
    for grad, exact, slack in (
            (weight.grad, G.T @ X, (dG + U * (G.abs() + dG)).T @ X.abs()),
            (x.grad, G @ W, (dG + U * (G.abs() + dG)) @ W.abs())):
        assert slack.norm() < 0.5 * exact.norm()  # a bound that says something
        assert ((2 * grad.double() - exact).abs() <= slack + 1e-6).all()
    assert weight.grad.dtype == torch.float32 and not x.grad[5:12].any()


def test_the_gradient_of_the_head_is_summed_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 24).bfloat16(), torch.randn(96, 24)
    grads = []
    for n in (1, 1000):  # a bfloat16 sum of equal terms would stop growing after 256 of them
        w = weight.clone().requires_grad_()
        linear_cross_entropy(x.expand(n, -1), w, torch.full((n,), 3), 96).backward()
        grads.append(w.grad)
    assert error(grads[1], 1000 * grads[0]) < 1000 * 2**-24


# ---- a training step ----

@both
def test_a_training_step_is_near_that_in_float32(arch, tmp_path):
    results = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(tmp_path, GivenData(uneven_batches()), f"--arch={arch}", dtype=dtype)
        kept = keep_gradients(trainer)
        loss, _ = trainer.train_step()
        results[dtype] = loss.item(), torch.cat([g.flatten() for g in kept.values()])
    (loss, g), (loss16, g16) = results["float32"], results["bfloat16"]
    K = 2 * (2 * FORWARD + 2)  # two blocks, the head and the logits; forward and backward
    assert abs(loss16 - loss) <= U * loss
    assert 0 < error(g16, g) <= math.sqrt(K) * U


# ---- the cache ----

def in_bfloat16(model, way):
    """Run model's blocks in bfloat16: by autocast, or with its weights in that type."""
    if way == "weights":
        model.to(torch.bfloat16)
    return torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast")


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3 grouped"])
@torch.no_grad()
def test_cached_logits_are_near_the_uncached_ones(arch, way):
    model = make(arch, scale=1)
    ids, caches = random_ids(model, 2, 20), [LayerCache(64) for _ in model.blocks]
    with in_bfloat16(model, way):
        parts = [model(part, caches=caches) for part in ids.split([7, 1, 2, 5, 5], dim=1)]
        whole = model(ids)
    assert caches[0].k.dtype == caches[0].v.dtype == whole.dtype == torch.bfloat16
    K = len(model.blocks) * FORWARD + 2
    assert error(torch.cat(parts, dim=1), whole) <= math.sqrt(K) * U


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3 grouped"])
@torch.no_grad()
def test_greedy_ids_are_the_likeliest_of_the_uncached_logits(arch, way):
    model = make(arch, scale=1)
    ids = random_ids(model, 2, 5)
    K = len(model.blocks) * FORWARD + 2
    with in_bfloat16(model, way):
        for new in model.generate(ids, 24, temperature=0):
            logits = model(ids)[:, -1, :model.config.vocab_size].float()
            chosen = logits.gather(1, new[:, None])[:, 0]
            noise = math.sqrt(K) * U * logits.square().mean(-1).sqrt()  # of one logit
            assert (chosen >= logits.max(-1).values - 6 * noise).all()  # 3 for each of the two
            ids = torch.cat((ids, new[:, None]), dim=1)


# ---- runs ----

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_with_the_same_weights(optimizer, place, monkeypatch):
    monkeypatch.chdir(place)

    def train(folder):
        cfg = settings("--dtype=bfloat16", f"--optimizer={optimizer}", f"--out_dir={folder}",
                       "--max_iters=6", "--log_interval=1", "--eval_tokens=200")
        pretrain.train(cfg, pretrain.make_model, pretrain.TextData, "base")
    train("out/a")
    (place / "out/b").mkdir()
    shutil.copy("out/a/ckpt_step_3.pt", "out/b")
    train("out/b")
    run_json = json.loads((place / "out/b/run.json").read_text(encoding="utf-8"))
    assert run_json["dtype"] == "torch.bfloat16"
    assert weights(place / "out/a") == weights(place / "out/b")
    last = [e for e in curve(place / "out/a") if e[0] > 3]
    assert len(last) == 5 and curve(place / "out/b") == last


# qwen3 and gpt2, each with DistributedDataParallel and with FSDP, in the processes of one torchrun
FOUR_RUNS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch.distributed as dist
import pretrain
from test_bfloat16 import train_briefly
for arch in ("qwen3", "gpt2"):
    for name, more in (("two", []), ("sharded", ["--fsdp"])):
        train_briefly(f"out/{{arch}}/{{name}}", f"--arch={{arch}}", *more)
dist.destroy_process_group()
"""


def train_briefly(folder, *words):
    cfg = settings("--dtype=bfloat16", f"--out_dir={folder}", "--max_iters=4", "--eval_interval=4",
                   "--log_interval=1", "--eval_tokens=200", "--sample_start=", "--batch_size=2",
                   "--gradient_accumulation_steps=4", *words)
    pretrain.train(cfg, pretrain.make_model, pretrain.TextData, "base")


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """A folder with out/<arch>/one, two and sharded: the curves of the same run."""
    place = tmp_path_factory.mktemp("runs")
    (place / "data").symlink_to(demo / "data")
    script = place / "four_runs.py"
    script.write_text(FOUR_RUNS.format(root=str(ROOT), tests=str(ROOT / "tests")), encoding="utf-8")
    torchrun(place, 2, script=script)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for arch in ("qwen3", "gpt2"):
            train_briefly(f"out/{arch}/one", f"--arch={arch}")
    return place


@both
def test_two_processes_and_sharded_ones_train_as_one(arch, runs):
    one, two, sharded = (curve(runs / "out" / arch / name) for name in ("one", "two", "sharded"))
    assert [entry[0] for entry in one] == [0, 1, 2, 3, 4, 4]  # val loss before and after four steps
    for a, b, c in zip(one, two, sharded, strict=True):
        assert a[0] == b[0] == c[0]
        # Two processes round the same micro-batches alike, and sum their gradients in float32.
        # After an update a weight that differs in its last bits may be rounded the other way.
        numbers = [(x, y, z) for x, y, z in zip(a[1:], b[1:], c[1:]) if x is not None]
        assert all(y == pytest.approx(x, rel=1e-5 if a[0] < 2 else U) for x, y, _ in numbers)
        assert all(z == pytest.approx(y, rel=U) for _, y, z in numbers)

"""LoRA: adapters begin as the base, end as an ordinary model, and train as the whole would."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import one_line, read_until, run, start, succeed
from test_gpt import make, random_ids
from test_scripts import curve, weights

from gpt import GPT
from models.load import from_pretrained
from training import estimate
from training.checkpoint import checkpoint_files
from training.context import Context
from training.lora import SCALE, add_adapters, merged_weights
from training.optim import configure_optimizers

torch.set_num_threads(1)
TOK = SimpleNamespace(im_start=7, im_end=9, vocab_size=120)
shapes = pytest.mark.parametrize("shape", ["gpt2", "qwen3 grouped", "qwen3 untied", "qwen2"])


def adapted(shape, changed=True, **changes):
    """A model with adapters of rank 3, and its base; changed: as training leaves it."""
    base, model = make(shape, scale=2.0, **changes), make(shape, scale=2.0, **changes)
    add_adapters(model, 3, TOK, "base")
    for p in model.parameters():
        if p.requires_grad and changed:
            p.data += 0.1 * torch.randn_like(p)
    return model, base


def merged(model):
    """The ordinary model that a model with adapters is saved as."""
    plain = GPT(model.config)
    plain.load_state_dict({name: t for name, t in merged_weights(model).items()
                           if name in plain.state_dict()})
    return plain.eval()


@shapes
def test_logits_are_the_bases_at_first_and_the_merged_models_later(shape):
    model, base = adapted(shape, changed=False)
    ids = random_ids(model, 2, 32) % 12  # the two trained rows are among them
    assert torch.equal(model(ids), base(ids))
    trained = {name: torch.rand_like(p) for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({n: p / 10 for n, p in trained.items()}, strict=False)
    torch.testing.assert_close(merged(model)(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert (model(ids) - base(ids)).abs().max() > 0.1


@shapes
def test_gradients_are_those_of_the_merged_model(shape):
    model, _ = adapted(shape)
    plain, gradients = merged(model), {}
    ids, targets = random_ids(model, 2, 32) % 12, random_ids(model, 2, 32, seed=1) % 12
    for m in (model, plain):
        m(ids, targets)[0].backward()
    whole = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        part, _, kind = name.rpartition(".")
        want = {"rows": lambda: whole[f"{part}.weight"][[7, 9]],
                "lora_a": lambda: SCALE * model.get_parameter(f"{part}.lora_b").T
                @ whole[f"{part}.weight"],
                "lora_b": lambda: SCALE * whole[f"{part}.weight"]
                @ model.get_parameter(f"{part}.lora_a").T}.get(kind)
        assert (p.grad is not None) == bool(want) == p.requires_grad, name
        if want:
            gradients[name] = kind
            torch.testing.assert_close(p.grad, want(), rtol=1e-3, atol=1e-3, msg=name)
    matrices = sum(p.dim() == 2 for p in plain.blocks.parameters())
    assert sorted(gradients.values()) == sorted(
        ["lora_a", "lora_b"] * matrices + ["rows"] * (1 + (model.lm_head is not None)))


@shapes
def test_training_changes_two_rows_and_the_matrices_and_tells_equal_rows_apart(shape):
    model, base = adapted(shape, changed=False)
    base.wte.weight.data[7] = base.wte.weight.data[9] = model.wte.rows.data[0]
    model.wte.rows.data[1] = model.wte.rows.data[0]  # as in a vocabulary that has grown
    ids, targets = random_ids(model, 2, 32) % 12, random_ids(model, 2, 32, seed=1) % 12
    (optimizer,) = configure_optimizers(model, "adamw", 1e-2, 0, 0.1, (0.9, 0.95))
    for _ in range(3):
        model(ids, targets)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    new, old = merged(model).state_dict(), base.state_dict()
    for name in new:
        differs = (new[name] != old[name]).flatten(1).any(1) if new[name].dim() == 2 else (
            new[name] != old[name])
        if name in ("wte.weight", "lm_head.weight"):
            assert differs.nonzero()[:, 0].tolist() == [7, 9], name
        else:
            assert differs.all() == (new[name].dim() == 2 and name != "wpe.weight"), name
            assert differs.any() == differs.all(), name
    assert not torch.equal(new["wte.weight"][7], new["wte.weight"][9])


@shapes
def test_a_base_of_16_bits_stays_so_and_is_merged_without_loss(shape):
    model, base = adapted(shape, changed=False)
    for p in [*model.parameters(), *base.parameters()]:
        p.data = p.data.bfloat16().float()
    Context(torch.device("cpu"), torch.bfloat16).store_frozen(model)
    assert model.blocks[0].attn.q_proj.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    for name, t in merged(model).state_dict().items():
        assert torch.equal(t, base.state_dict()[name]), name
    ids = random_ids(model, 2, 32) % 12
    losses = []
    for m in (model, base):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(m(ids, ids)[0])
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    torch.testing.assert_close(model.wte.rows.grad, base.wte.weight.grad[[7, 9]],
                               rtol=0.05, atol=0.05 * model.wte.rows.grad.abs().max().item())


def test_the_plan_counts_gradients_and_states_of_what_is_trained():
    model, base = adapted("qwen3 grouped")
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    all_bytes = sum(p.nbytes for p in model.parameters())
    assert estimate.state_bytes(model, "adamw") == (all_bytes, trained, 2 * trained)
    saved = estimate.logits_bytes(base, 9, torch.float32) - estimate.logits_bytes(
        model, 9, torch.float32)
    assert saved == base.head.nbytes  # the gradient of the head
    ids, kept = random_ids(model, 2, 64), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        model.hidden(ids)
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    planned = estimate.activation_bytes(model.config, ids.numel(), torch.float32)
    assert planned == pytest.approx(real, rel=0.2)


def test_flops_per_token_leave_out_the_gradients_of_frozen_matrices():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, _ = adapted("qwen3 grouped")
    ids = random_ids(model, 2, 24)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids)[0].backward()
    assert model.flops_per_token(24) * ids.numel() == pytest.approx(
        counter.get_total_flops(), rel=0.03)


# ---- runs ----

WORDS = ["--dataset=demo_chat", "--max_iters=9", "--eval_interval=3", "--batch_size=2",
         "--gradient_accumulation_steps=2", "--log_interval=1", "--checkpoint_interval=3",
         "--eval_tokens=1000", "--learning_rate=1e-2", "--warmup_iters=1", "--dropout=0.2",
         "--dtype=float32", "--lora_rank=4", "--init_from=base"]


@pytest.fixture
def tuned(base, place):
    """A folder with a base model and a finished LoRA run of it in out/a."""
    shutil.copytree(base / "out/tiny/final", place / "base")
    succeed(run(place, "sft.py", *WORDS, "--out_dir=out/a"))
    return place


def test_a_killed_run_resumes_bit_for_bit_from_a_small_checkpoint(tuned):
    process = start(tuned, "sft.py", *WORDS, "--out_dir=out/b")
    read_until(process, "step 5/")
    process.kill()
    process.communicate()
    again = succeed(run(tuned, "sft.py", *WORDS, "--out_dir=out/b", "--recompute"))
    assert "resuming from" in again.stdout
    assert weights(tuned / "out/a") == weights(tuned / "out/b")
    assert curve(tuned / "out/a") == curve(tuned / "out/b")
    file = checkpoint_files(tuned / "out/a")[0]
    names = torch.load(file, weights_only=True)["model"].keys()
    assert {name.rpartition(".")[2] for name in names} == {"rows", "lora_a", "lora_b"}
    assert file.stat().st_size < (tuned / "base/model.safetensors").stat().st_size / 2


def test_a_run_leaves_an_ordinary_model(tuned):
    config = json.loads((tuned / "out/a/final/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    from_pretrained(tuned / "out/a/final")  # refuses tensors that are no part of such a model
    answer = run(tuned, "sample.py", "--chat", "--model=out/a/best", input="你好\n")
    assert succeed(answer).stdout.strip()
    file = checkpoint_files(tuned / "out/a")[0].relative_to(tuned)
    one_line(run(tuned, "sample.py", f"--model={file}", "--start=x"), "best/ or final/ of its run")


def test_what_adapters_can_not_do_is_one_line(tuned):
    more = [*WORDS, "--out_dir=out/a", "--max_iters=12"]
    one_line(run(tuned, "sft.py", *more, "--lora_rank=8"), "lora_rank=4, not 8")
    one_line(run(tuned, "sft.py", *more, "--lora_rank=0"), "lora_rank=4, not 0")
    for words in (["--optimizer=muon"], ["--fsdp"], ["--lora_rank=-1"]):
        one_line(run(tuned, "sft.py", *more, *words), "lora_rank")
    model = from_pretrained(tuned / "base")
    model.blocks[1].norm2.weight.data[3] += 1e-3
    from models.hf import save_pretrained
    save_pretrained(model, tuned / "base")
    one_line(run(tuned, "sft.py", *more), "base is not what it was when this run started from it")
    shutil.rmtree(tuned / "base")
    one_line(run(tuned, "sft.py", *more), "base can't be loaded")

"""The model equals transformers', its parts equal their definitions."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpt import GPT, KVCache, GPTConfig, linear_cross_entropy
from models.hf import save_pretrained
from models.load import from_pretrained
from training.optim import configure_optimizers

ROOT = Path(__file__).parent
torch.set_num_threads(1)  # tiny matrices: a second thread only waits

SHAPES = {
    "gpt2": dict(arch="gpt2", vocab_size=250, padded_vocab_size=256, block_size=48, n_layer=3,
                 n_head=4, n_embd=32),
    "gpt2 without bias": dict(arch="gpt2", vocab_size=128, block_size=32, n_layer=2, n_head=2,
                              n_embd=48, bias=False),
    "gpt2 exact gelu": dict(arch="gpt2", vocab_size=128, block_size=32, n_layer=2, n_head=2,
                            n_embd=32, n_inner=80, activation="gelu"),
    "qwen3": dict(arch="qwen3", vocab_size=250, padded_vocab_size=256, block_size=48, n_layer=3,
                  n_head=4, n_embd=32, norm_eps=1e-6),
    "qwen3 grouped": dict(arch="qwen3", vocab_size=256, block_size=64, n_layer=2, n_head=6,
                          n_kv_head=2, head_dim=16, n_embd=48, rope_theta=1e6),
    "qwen3 untied": dict(arch="qwen3", vocab_size=384, block_size=32, n_layer=1, n_head=2,
                         n_kv_head=1, n_embd=64, n_inner=96, tie=False),
    "qwen2": dict(arch="qwen3", qkv_bias=True, qk_norm=False, vocab_size=250, n_layer=2, n_head=6,
                  padded_vocab_size=256, block_size=48, n_kv_head=2, head_dim=8, n_embd=36),
    "qwen2 untied": dict(arch="qwen3", qkv_bias=True, qk_norm=False, vocab_size=256, n_layer=2,
                         block_size=48, n_head=4, n_embd=48, rope_theta=1e6, tie=False),
    "llama": dict(arch="qwen3", qk_norm=False, vocab_size=250, padded_vocab_size=256, n_layer=2,
                  block_size=48, n_head=4, n_kv_head=2, head_dim=16, n_embd=48, rope_theta=1e5),
    "llama untied": dict(arch="qwen3", qk_norm=False, vocab_size=256, block_size=48, n_layer=3,
                         n_head=3, n_kv_head=1, n_embd=48, n_inner=80, norm_eps=1e-6, tie=False),
}
both = pytest.mark.parametrize("arch", ["gpt2", "qwen3 grouped"])


def make(shape, scale=8.0, **changes):
    """A model with random weights far from the initial ones, norms and biases included."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SHAPES[shape] | changes)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * (0.02 * scale)
    return model


def random_ids(model, B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator)


# ---- equal to transformers ----

@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(shape, tmp_path):
    from transformers import AutoModelForCausalLM
    model = make(shape)
    save_pretrained(model, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = random_ids(model, 3, model.config.block_size)
    with torch.no_grad():
        ours, want = model(ids), theirs.eval()(ids).logits
    assert want.std() > 0.5  # not near nothing
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3 grouped", "qwen2", "llama"])
def test_greedy_tokens_equal_those_of_transformers(arch, tmp_path):
    from transformers import AutoModelForCausalLM
    model = make(arch, block_size=128, vocab_size=256)
    if model.wpe is not None:
        model.wpe.weight.data *= 10  # else every token repeats itself
    save_pretrained(model, tmp_path, eos_token_id=None, bos_token_id=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(model, 2, 9)
    ours = torch.stack(list(model.generate(ids, 64, temperature=0)), dim=1)
    want = theirs.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)[:, 9:]
    assert len(ours.unique()) > 8
    assert torch.equal(ours, want)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_model_loads_as_the_same_model(shape, tmp_path):
    model = make(shape)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert again.config == model.config
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_model_made_by_transformers_loads(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=20, n_embd=24, n_layer=2, n_head=3))
    qwen = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=100, hidden_size=32, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=20))
    for i, theirs in enumerate((gpt2.eval(), qwen.eval())):
        theirs.save_pretrained(tmp_path / str(i))
        ours = from_pretrained(tmp_path / str(i)).eval()
        ids = random_ids(ours, 2, 20)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
def test_models_of_any_shape_that_transformers_made_have_its_logits(kind, tmp_path):
    import transformers
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=10, deadline=None)
    @given(st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (4, 4)]), st.sampled_from([2, 8, 14]),
           st.integers(1, 3), st.booleans(), st.sampled_from([1e-6, 1e-5]),
           st.sampled_from([1e4, 1e5, 1e6]), st.booleans(), st.integers(0, 9))
    def law(heads, head_dim, n_layer, tie, eps, theta, explicit, seed):
        n_head, n_kv_head = heads
        width = 5 * n_head if explicit else head_dim * n_head
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=99, hidden_size=width, intermediate_size=40, num_attention_heads=n_head,
            num_hidden_layers=n_layer, num_key_value_heads=n_kv_head, max_position_embeddings=32,
            rms_norm_eps=eps, rope_parameters=dict(rope_type="default", rope_theta=theta),
            tie_word_embeddings=tie, **dict(head_dim=head_dim) if explicit else {})
        torch.manual_seed(seed)
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for p in theirs.parameters():
            p.data = torch.randn_like(p) * 0.3
        theirs.save_pretrained(tmp_path)
        ours = from_pretrained(tmp_path).eval()
        ids = random_ids(ours, 2, 32)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        save_pretrained(ours, tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert saved["architectures"] == [f"{kind}ForCausalLM"]
    law()


def test_a_shape_of_no_known_format_is_refused():
    with pytest.raises(ValueError, match="qkv_bias .*and qk_norm .*: switch one off"):
        GPTConfig(arch="qwen3", qkv_bias=True)
    gpt2 = GPTConfig(bias=False, qkv_bias=True)  # follows bias
    assert not gpt2.qkv_bias and not gpt2.qk_norm


@pytest.mark.parametrize("change, what", [
    (dict(model_type="opt"), "opt"), (dict(attention_bias=True), "attention_bias"),
    (dict(model_type="llama", mlp_bias=True), "mlp_bias"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
    (dict(rope_scaling=dict(type="linear")), "linear"),
    (dict(model_type="llama", rope_parameters=dict(rope_type="llama3")), "llama3"),
    (dict(model_type="qwen2"), "missing"), (dict(model_type="llama"), "unknown"),
    (dict(use_sliding_window=True), "use_sliding_window"), (dict(hidden_size=64), "shape"),
    (dict(rope_parameters=dict(rope_type="yarn")), "yarn"),
    (dict(rope_scaling=dict(rope_type="yarn")), "yarn"),
    (dict(max_position_embeddings=1), "block"), (dict(num_hidden_layers=9), "missing"),
    (dict(num_hidden_layers=1), "unknown"), (dict(hidden_size="x"), "config.json"),
    (dict(num_hidden_layers=10**9), "layers"), (dict(num_attention_heads=0), "n_head"),
    (dict(vocab_size=True), "vocab_size"), (dict(rms_norm_eps=float("nan")), "norm_eps"),
    (dict(head_dim=2**40), "head_dim"), (dict(tie_word_embeddings=3), "tie")])
def test_a_folder_that_does_not_fit_is_refused(change, what, tmp_path):
    save_pretrained(make("qwen3"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(ValueError, match=what):
        from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = make("gpt2")
    model.blocks[0].norm1.weight.data[0] = math.inf
    save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="transformer.h.0.ln_1.weight holds values that are not"):
        from_pretrained(tmp_path)


def test_weights_of_which_some_would_be_left_out_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    save_pretrained(make("gpt2 without bias"), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    own = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(own | dict(tie_word_embeddings=False)), encoding="utf-8")
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        from_pretrained(tmp_path)
    tensors = load_file(weights)
    config.write_text(json.dumps(own), encoding="utf-8")
    from_pretrained(tmp_path)  # its biases are zeros
    tensors["transformer.h.0.attn.c_proj.bias"] += 1
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="c_proj.bias is not zero"):
        from_pretrained(tmp_path)
    config.write_text(json.dumps(own | dict(bias=True)), encoding="utf-8")
    name = "transformer.ln_f.bias"
    save_file({name: tensors[name]}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is also in another"):
        from_pretrained(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    save_file(tensors | {name: tensors[name].to(torch.int8)}, weights)
    with pytest.raises(ValueError, match="ln_f.bias is of type torch.int8"):
        from_pretrained(tmp_path)


def test_import_gpt_alone_imports_nothing_heavy():
    code = ("import sys, torch; before = set(sys.modules); import gpt; "
            "ours = {'transformers', 'matplotlib', 'tqdm', 'safetensors', 'data', 'config'}; "
            "assert not ours & (set(sys.modules) - before), ours & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gpt_py_is_ascii():
    (ROOT / "gpt.py").read_bytes().decode("ascii")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_model_has_blocks_that_change_nothing(shape):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPES[shape]))
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    model.norm.register_forward_pre_hook(lambda m, args: seen.update(y=args[0]))
    model(random_ids(model, 2, 16))
    assert torch.equal(seen["x"], seen["y"])
    for name, p in model.named_parameters():
        if p.dim() == 1:  # norms and biases
            assert p.eq(float(name.endswith("weight"))).all(), name
        elif name.startswith("blocks.") and "o_proj" not in name and "down_proj" not in name:
            assert p.std().item() == pytest.approx(0.5 / math.sqrt(p.size(1)), rel=0.1), name
        elif not name.startswith("blocks."):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize("shape", ["gpt2", "qwen3 grouped", "qwen3 untied"])
def test_flops_per_token_are_those_of_the_matrix_products(shape):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, T = make(shape), 24
    ids = random_ids(model, 2, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plain_loss(model, ids, ids).backward()
    assert model.flops_per_token(T) * ids.numel() == counter.get_total_flops()


# ---- the loss ----

def plain_loss(model, ids, targets):
    logits = model(ids)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                           reduction="sum")


@both
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])  # 0: the budget is less than one row
def test_chunked_loss_equals_the_plain_one(arch, rows):
    model = make(arch)
    ids, targets = random_ids(model, 4, 24), random_ids(model, 4, 24, seed=1)
    targets[0, :20] = targets[2] = -1
    (plain_loss(model, ids, targets) * 0.37).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    x = model.hidden(ids).flatten(0, 1)
    loss = linear_cross_entropy(x, model.head, targets.flatten(), rows * model.config.vocab_size)
    assert loss.item() == pytest.approx(plain_loss(model, ids, targets).item(), rel=1e-5)
    (loss * 0.37).backward()
    for name, p in model.named_parameters():
        # softmax ignores what shifts all of a query's scores: k_proj.bias has no gradient but noise
        scale = want[name.replace("k_proj.bias", "v_proj.bias")].abs().max()
        torch.testing.assert_close(p.grad, want[name], rtol=1e-5, atol=1e-5 * scale.item())


def test_chunked_loss_under_autocast_is_near_the_plain_one():
    model = make("qwen3", scale=1)
    ids, targets = random_ids(model, 4, 48), random_ids(model, 4, 48, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, n = model(ids, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and n == 4 * 48
    assert loss.item() == pytest.approx(plain_loss(model, ids, targets).item(), rel=1e-3)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_without_targets_has_loss_and_gradients_zero():
    model = make("gpt2")
    loss, n = model(random_ids(model, 2, 8), torch.full((2, 8), -1))
    loss.backward()
    assert loss.item() == 0 and n == 0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


def test_loss_needs_no_gradient_memory_without_grad():
    model = make("gpt2")
    with torch.no_grad():
        loss, _ = model(random_ids(model, 2, 8), random_ids(model, 2, 8, seed=1))
    assert not loss.requires_grad and loss > 0


# ---- attention ----

@both
def test_a_packed_row_gives_the_logits_of_each_document_alone(arch):
    model = make(arch)
    lengths = [5, 1, 17, 9]
    ids = random_ids(model, 2, sum(lengths))
    doc_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    packed = model(ids, doc_ids=doc_ids)
    alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


@both
def test_no_position_sees_a_later_one(arch):
    model = make(arch)
    ids = random_ids(model, 8, 20)
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % model.config.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_rope_turns_each_pair_by_its_frequency_times_the_position():
    from gpt import rope_table, rotate
    positions = torch.tensor([[0, 1, 7]])
    x = torch.randn(2, 3, 3, 6, generator=torch.Generator().manual_seed(0))  # (B, heads, T, D)
    turned = rotate(x, rope_table(positions, 6, 100.0))
    # pairs (i, i + 3) as complex numbers: a turn is a product with e^(i angle)
    pairs, new = (torch.complex(t[..., :3], t[..., 3:]) for t in (x, turned))
    for t, position in enumerate((0, 1, 7)):
        for i, frequency in enumerate((1.0, 100.0 ** (-1 / 3), 100.0 ** (-2 / 3))):
            angle = torch.tensor(1j * position * frequency).exp()
            torch.testing.assert_close(new[:, :, t, i], pairs[:, :, t, i] * angle)


# ---- dropout ----

@both
def test_dropout_falls_on_the_embeddings_and_on_both_branches_of_a_block(arch):
    model, seen = make(arch, dropout=0.25).train(), {}
    first, second = model.blocks[:2]
    for name, module in (("x", first), ("middle", first.norm2), ("y", second)):
        module.register_forward_pre_hook(
            lambda m, args, name=name: seen.update({name: args[0].detach()}))
    for name, module in (("attn", first.attn), ("mlp", first.mlp)):
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: out.detach()}))
    ids = random_ids(model, 8, 24)
    model(ids)
    embedded = model.wte(ids) + (0 if model.wpe is None else model.wpe(torch.arange(24)))
    for before, after in ((embedded, seen["x"]), (seen["attn"], seen["middle"] - seen["x"]),
                          (seen["mlp"], seen["y"] - seen["middle"])):
        kept = after.abs() > 1e-5
        assert (~kept).float().mean().item() == pytest.approx(0.25, abs=0.025)  # 4 sigma
        torch.testing.assert_close(after[kept], before[kept] / 0.75, rtol=1e-4, atol=1e-4)


def test_a_loaded_model_has_the_dropout_that_is_asked_for(tmp_path):
    save_pretrained(make("qwen3"), tmp_path)
    for asked in (0.0, 0.3):
        model = from_pretrained(tmp_path, dropout=asked)
        drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        assert drops == [asked] * (1 + len(model.blocks)) and model.config.dropout == asked


# ---- recomputed activations ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3 grouped", "qwen2"])
def test_recomputed_activations_give_the_same_gradients(arch, dtype):
    model = make(arch, dropout=0.25).train()
    ids, targets = random_ids(model, 2, 24), random_ids(model, 2, 24, seed=1)
    doc_ids = (torch.arange(24) // 9).expand(2, -1)
    gradients = []
    for model.recompute in (False, True):
        torch.manual_seed(5)  # of dropout
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, _ = model(ids, targets, doc_ids)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()] + [loss.detach(), torch.rand(9)])
        model.zero_grad(set_to_none=True)
    assert all(map(torch.equal, *gradients))


# ---- torch.compile ----

@pytest.mark.skipif(not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))),
                    reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("arch, recompute", [
    ("qwen3 grouped", False), pytest.param("gpt2", False, marks=pytest.mark.slow),
    pytest.param("qwen2", True, marks=pytest.mark.slow)])
def test_a_compiled_model_has_the_loss_and_gradients_of_the_plain_one(arch, recompute):
    model = make(arch, n_layer=1)
    ids, targets = random_ids(model, 2, 24), random_ids(model, 2, 24, seed=1)
    targets[0, :9] = -1

    def step():
        model.zero_grad(set_to_none=True)
        loss, n = model(ids, targets)
        (loss / n).backward()
        return loss.detach(), [p.grad for p in model.parameters()]
    plain_loss, plain = step()
    model.recompute = recompute
    model.compile_parts()
    loss, gradients = step()
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    norm = torch.nn.utils.get_total_norm(plain)
    for g, want in zip(gradients, plain):
        assert (g - want).norm() < 1e-5 * norm


# ---- generation ----

def uncached(model, ids, steps):
    """Greedy, the whole context read anew for each token; past block_size its last half is kept."""
    context, new = ids, []
    for _ in range(steps):
        if context.size(1) > model.config.block_size:
            context = context[:, -(model.config.block_size // 2):]
        new.append(model(context)[:, -1, :model.config.vocab_size].argmax(-1))
        context = torch.cat((context, new[-1][:, None]), dim=1)
    return torch.stack(new, dim=1)


@both
@pytest.mark.parametrize("prompt", [1, 10, 47, 48, 49, 130])
def test_cached_generation_equals_uncached_past_the_context_too(arch, prompt):
    model = make(arch, block_size=48)
    ids = random_ids(model, 2, prompt)
    cached = torch.stack(list(model.generate(ids, 120, temperature=0)), dim=1)
    assert torch.equal(cached, uncached(model, ids, 120))


@both
def test_more_tokens_than_the_context_holds_are_refused(arch):
    from gpt import LayerCache
    model = make(arch, block_size=16)
    with pytest.raises(ValueError, match="17 tokens do not fit a context of 16"):
        model(random_ids(model, 1, 17))
    caches = [LayerCache(32) for _ in model.blocks]
    model(random_ids(model, 1, 16), caches=caches)
    with pytest.raises(ValueError, match="17 tokens do not fit a context of 16"):
        model(random_ids(model, 1, 1), caches=caches)


def test_several_tokens_may_extend_a_cache():
    from gpt import LayerCache
    model = make("qwen3 grouped")
    ids = random_ids(model, 2, 20)
    caches = [LayerCache(64) for _ in model.blocks]
    parts = [model(part, caches=caches) for part in ids.split([7, 1, 2, 5, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=1e-4)


def test_sampling_repeats_with_its_seed_and_stays_within_the_ids():
    model = make("gpt2", scale=0.0)  # near-uniform: 6 of the 256 rows are padding
    ids = random_ids(model, 64, 1)
    draw = [torch.stack(list(model.generate(ids, 40, seed=s)), dim=1) for s in (5, 5, 6)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].max() < 250 and len(draw[0].unique()) > 200


def test_top_k_top_p_and_min_p_keep_the_likeliest():
    from gpt import sample_next
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(2000, -1)
    generators = [torch.Generator().manual_seed(i) for i in range(2000)]

    def draw(top_k, top_p, min_p=0.0):
        return sample_next(logits, 1.0, top_k, top_p, min_p, generators)
    assert set(draw(2, 1.0).tolist()) == {1, 2}
    p = logits[0].softmax(-1)
    mass = (p[1] + p[2]).item() + 0.01
    assert set(draw(0, mass).tolist()) == {1, 2, 3}
    assert set(draw(0, 0.01).tolist()) == {1}
    assert set(draw(0, 1.0, math.exp(-1.01)).tolist()) == {1, 2}
    share = (draw(0, 1.0) == 1).float().mean()
    assert share.item() == pytest.approx(p[1].item(), abs=0.05)


def kept_probabilities(logits, temperature, top_k, top_p, min_p):
    """What is left to draw from, as a list in descending order: the definitions, in float64."""
    probs = sorted((logits.double() / temperature).softmax(-1).tolist(), reverse=True)
    probs = probs[:top_k or len(probs)]
    total, mass, kept = sum(probs), 0.0, []
    for p in (p / total for p in probs):
        if mass < top_p and p >= min_p * probs[0] / total:  # mass: of all that are likelier
            kept.append(p)
        mass += p
    return [p / sum(kept) for p in kept]


@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_drawn_from_is_what_the_definitions_keep(top_k, top_p, min_p, monkeypatch):
    from gpt import sample_next
    given = []

    def multinomial(probs, n):
        given.extend(probs / probs.sum(-1, keepdim=True))
        return torch.zeros(len(probs), 1, dtype=torch.long)
    monkeypatch.setattr(torch, "multinomial", multinomial)
    logits = 2 * torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    first = sample_next(logits, 0.8, top_k, top_p, min_p, None)
    assert torch.equal(first, logits.argmax(-1))  # likeliest first
    for probs, row in zip(given, logits):
        want = kept_probabilities(row, 0.8, top_k, top_p, min_p)
        assert (probs > 0).sum() == len(want)
        assert probs[:len(want)].tolist() == pytest.approx(want, rel=1e-4)
    del given[:]
    sample_next(torch.zeros(1, 4), 1.0, 0, 0.5, 0.0, None)  # two of four reach it exactly
    assert given[0].tolist() == [0.5, 0.5, 0, 0]


def test_top_p_of_one_keeps_every_id(monkeypatch):
    from gpt import sample_next
    kept = []
    monkeypatch.setattr(torch, "multinomial", lambda probs, n: kept.append(probs > 0)
                        or torch.zeros(len(probs), 1, dtype=torch.long))
    sample_next(torch.arange(0, -20, -1.0)[None], 1.0, 0, 1.0, 0.0, None)
    assert kept[0].all()


def test_a_row_draws_the_same_alone_and_in_a_batch():
    model = make("qwen3")
    ids = random_ids(model, 1, 9)
    batch = torch.stack(list(model.generate(ids.expand(4, -1), 30, seed=7)), dim=1)
    alone = [torch.stack(list(model.generate(ids, 30, seed=7 + i)), dim=1)[0] for i in range(4)]
    assert torch.equal(batch, torch.stack(alone)) and len({tuple(r.tolist()) for r in batch}) == 4


@both
def test_a_cache_kept_between_turns_changes_nothing_and_saves_reading(arch):
    model = make(arch, block_size=64)
    cache, read, ids = KVCache(len(model.blocks), 64), [], random_ids(model, 1, 9)
    model.register_forward_hook(lambda m, args, out: read.append(args[0].size(1)))
    for turn in range(6):  # the last ones run past the context
        del read[:]
        kept = torch.stack(list(model.generate(ids, 8, temperature=0, cache=cache)), dim=1)
        if 0 < turn < 4:
            assert read[0] == 6  # the five new ids, and the last one drawn
        plain = torch.stack(list(model.generate(ids, 8, temperature=0)), dim=1)
        assert torch.equal(kept, plain)
        ids = torch.cat((ids, kept, random_ids(model, 1, 5)), dim=1)
    ids[0, 3] += 1  # another beginning
    kept = torch.stack(list(model.generate(ids[:, :20], 8, temperature=0, cache=cache)))
    assert torch.equal(kept, torch.stack(list(model.generate(ids[:, :20], 8, temperature=0))))


def test_repetition_penalty_equals_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor
    model = make("qwen3")
    ids = random_ids(model, 1, 12)
    new = list(model.generate(ids, 20, temperature=0, repetition_penalty=1.7))
    penalise, context = RepetitionPenaltyLogitsProcessor(1.7), ids
    for token in new:
        logits = model(context)[:, -1, :model.config.vocab_size]
        assert token == penalise(context, logits).argmax(-1)
        context = torch.cat((context, token[:, None]), dim=1)


def test_penalised_logits_equal_those_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    from gpt import penalise
    ids, logits = torch.tensor([[0, 2, 5, 7], [1, 1, 3, 6]]), torch.linspace(-2, 2, 16).view(2, 8)
    seen = torch.zeros(2, 8, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (0.8, 1.0, 1.7):
        want = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        torch.testing.assert_close(penalise(logits, seen, penalty), want)


def test_a_cache_keeps_what_all_its_rows_have_in_common_with_the_new_ids():
    ids = torch.arange(12).view(2, 6)
    for rows, at, kept in (((0,), 4, 4), ((1,), 3, 3), ((0, 1), 2, 2), ((1,), 0, 0), ((), 0, 5)):
        cache, new = KVCache(2, 16), ids.clone()
        cache.ids = ids
        for row in rows:
            new[row, at] += 1
        assert cache.rewind(new) == kept == cache.layers[0].length == cache.layers[1].length
    for new, kept in ((ids[:, :3], 2), (torch.cat((ids, ids), dim=1), 6), (ids[:1], 0)):
        cache = KVCache(2, 16)
        cache.ids = ids
        assert cache.rewind(new) == kept


def test_a_row_ends_with_its_stop_id_and_the_batch_with_its_last_row():
    model = make("gpt2")
    ids = random_ids(model, 8, 3)
    free = torch.stack(list(model.generate(ids, 30, temperature=0)), dim=1)
    stop = int(free[0, 4])
    stopped = torch.stack(list(model.generate(ids, 30, temperature=0, stop_ids=[stop])), dim=1)
    for row, full in zip(stopped.tolist(), free.tolist()):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert row == (full[:end] + [-1] * 30)[:len(row)]


# ---- optimizers ----

@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 80), (2, 80, 16)])
def test_orthogonalize_brings_every_singular_value_near_one(shape):
    from training.muon import orthogonalize
    torch.manual_seed(0)
    g = torch.randn(shape) * 1e-3
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    out = orthogonalize(g)
    rotated = u.mT @ out @ vt.mT
    values = rotated.diagonal(dim1=-2, dim2=-1)
    large = s > 0.05 * s.max()
    assert values[large].min() > 0.5 and values.max() < 1.3
    assert (rotated - torch.diag_embed(values)).abs().max() < 1e-3  # the singular vectors stay


def test_orthogonalize_leaves_a_zero_matrix_zero():
    from training.muon import orthogonalize
    assert torch.equal(orthogonalize(torch.zeros(2, 8, 6)), torch.zeros(2, 8, 6))


def test_muon_steps_as_that_of_torch_but_for_its_bfloat16():
    from training.muon import Muon
    torch.manual_seed(0)
    shapes = [(24, 24), (24, 24), (64, 24), (24, 64)]
    start = [torch.randn(s) for s in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a = Muon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s in zip(ours, theirs, start):
        assert ((p - q).norm() / (q - s).norm()) < 0.02


@pytest.mark.parametrize("slice_numel", [1, 24 * 24, 2 * 24 * 24 + 1])
def test_muon_in_slices_equals_muon_at_once(slice_numel, monkeypatch):
    from training.muon import Muon

    def stepped():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(24, 24)) for _ in range(5)]
        for p in params:
            p.grad = torch.randn_like(p)
        Muon(params, lr=0.02, weight_decay=0.1).step()
        return torch.stack([p.detach() for p in params])
    at_once = stepped()
    monkeypatch.setattr(Muon, "slice_numel", slice_numel)
    torch.testing.assert_close(stepped(), at_once)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(optimizer):
    model = make("gpt2")
    groups = [g for o in configure_optimizers(model, optimizer, 1e-3, 1e-2, 0.1, (0.9, 0.95))
              for g in o.param_groups]
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for g in groups for p in g["params"]]
    assert sorted(held) == sorted(names.values())
    for group in groups:
        for p in group["params"]:
            matrix = names[id(p)].startswith("blocks.") and p.dim() == 2
            assert (group["weight_decay"] > 0) == matrix, names[id(p)]

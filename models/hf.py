"""Hugging Face's format: names of tensors and settings, and model folders read and written.

    save_pretrained(model, "out/x/final")        # transformers, vLLM and llama.cpp load the folder
    model = from_pretrained("out/x/final")       # ours, or a GPT-2 or Qwen3 model of the hub
"""
import json
import shutil
from pathlib import Path

import torch
import torch.nn as nn

from gpt import GPT, GPTConfig


def save_pretrained(model, folder, state=None, dtype=torch.float32, **extra):
    """Write config.json (with the keys of extra) and model.safetensors.

    state: the full state dict, where model holds only a shard of it (FSDP).
    """
    from safetensors.torch import save_file
    folder, state, tensors = Path(folder), state or model.state_dict(), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, ours in hf_names(model.config):
        tensor = hf_tensor(state, ours).to(dtype)
        tensors[name] = (tensor.T if is_conv1d(name) else tensor).contiguous().cpu()
    config = hf_config(model.config) | {"dtype": str(dtype).removeprefix("torch.")} | extra
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # save_file makes it 0600


def hf_tensor(state, names):
    """Return our tensors of these names as one; a missing bias is zero, since transformers' GPT-2
    always has biases."""
    return torch.cat([state[name] if name in state else
                      torch.zeros(len(state[name.replace(".bias", ".weight")])) for name in names])


def from_pretrained(path, dropout=0.0, block_size=0):
    """Read a model folder or hub id of GPT-2 or Qwen3 architecture, as float32 on the CPU.

    block_size > 0 shortens the context. ValueError: another architecture, a feature that gpt.py
    does not compute, tensors missing, extra or misshapen. OSError: no such file, no network.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        patterns = ["config.json", "generation_config.json", "*.safetensors"]
        folder = Path(snapshot_download(str(path), allow_patterns=patterns))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so not a model folder")
    try:
        config = read_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{folder / 'config.json'}: {e}") from e
    tensors = read_safetensors(folder)
    config.dropout = dropout
    if config.n_layer > len(tensors):
        raise ValueError(f"{folder}: {len(tensors)} tensors for {config.n_layer} layers")
    with torch.device("meta"):  # allocate nothing before names and shapes are checked
        model = GPT(config)
    load_hf_tensors(model, tensors, folder)
    if 0 < block_size < config.block_size:
        config.block_size = block_size
        if model.wpe is not None:
            model.wpe.weight = nn.Parameter(model.wpe.weight[:block_size].clone())
    return model


def read_safetensors(folder):
    """Return {name: tensor} of all .safetensors files in a folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            new = load_file(file)
        except SafetensorError as e:
            raise ValueError(f"{file}: damaged ({e})") from e
        if new.keys() & tensors.keys():
            raise ValueError(f"{file}: {min(new.keys() & tensors.keys())} stands in another "
                             ".safetensors file too")
        tensors |= new
    return tensors


@torch.no_grad()
def load_hf_tensors(model, tensors, source):
    """Give a model on the meta device the tensors of a transformers state dict."""
    if model.config.arch == "gpt2":  # the hub's oldest files lack the prefix and hold mask buffers
        tensors = {f"transformer.{k.removeprefix('transformer.')}": t for k, t in tensors.items()
                   if not k.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))}
    elif model.config.tie:
        tensors = {k: t for k, t in tensors.items() if k != "lm_head.weight"}
    table = dict(hf_names(model.config))
    missing, extra = (sorted(a - b) for a, b in ((table.keys(), tensors.keys()),
                                                 (tensors.keys(), table.keys())))
    if missing or extra:
        raise ValueError(f"{source}: missing tensors {missing[:3] or 'none'} ({len(missing)}), "
                         f"unknown tensors {extra[:3] or 'none'} ({len(extra)})")
    shapes, copies = {name: t.shape for name, t in model.state_dict().items()}, []
    for name, ours in table.items():
        tensor = tensors[name].T if is_conv1d(name) else tensors[name]
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{source}: {name} is of type {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} holds values that are not finite")
        if not all(our in shapes for our in ours):  # a model trained without biases saved zeros
            if tensor.any():
                raise ValueError(f"{source}: {name} is not zero, config.json says no bias")
            continue
        rows = [shapes[our][0] for our in ours]
        want = (sum(rows), *shapes[ours[0]][1:])
        if tensor.shape != want:
            raise ValueError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, "
                             f"config.json says {want}")
        copies += zip(ours, tensor.split(rows))
    model.to_empty(device="cpu")
    state = model.state_dict()
    for name, part in copies:
        state[name].copy_(part)


# ---- names ----

def hf_names(c):
    """Yield pairs (their tensor, our tensors): theirs is ours concatenated on dimension 0."""
    if c.arch == "qwen3":
        parts = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
        parts |= {f"self_attn.{n}": f"attn.{n}" for n in
                  ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
        parts |= {f"mlp.{n}": f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
        yield "model.embed_tokens.weight", ["wte.weight"]
        for i in range(c.n_layer):
            for theirs, ours in parts.items():
                yield f"model.layers.{i}.{theirs}.weight", [f"blocks.{i}.{ours}.weight"]
        yield "model.norm.weight", ["norm.weight"]
        if not c.tie:
            yield "lm_head.weight", ["lm_head.weight"]
        return
    parts = {"ln_1": ["norm1"], "ln_2": ["norm2"], "attn.c_proj": ["attn.o_proj"],
             "attn.c_attn": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
             "mlp.c_fc": ["mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}
    yield "transformer.wte.weight", ["wte.weight"]
    yield "transformer.wpe.weight", ["wpe.weight"]
    for kind in ("weight", "bias"):
        for i in range(c.n_layer):
            for theirs, ours in parts.items():
                yield f"transformer.h.{i}.{theirs}.{kind}", [f"blocks.{i}.{o}.{kind}" for o in ours]
        yield f"transformer.ln_f.{kind}", [f"norm.{kind}"]


def is_conv1d(name):
    """Return whether a tensor is of GPT-2's Conv1D, whose weight is nn.Linear's transposed."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def hf_config(c):
    """Return config.json of a GPTConfig. vocab_size is the rows of the embedding, as transformers
    has it; transformers ignores our own keys unpadded_vocab_size and bias."""
    common = dict(vocab_size=c.padded_vocab_size, unpadded_vocab_size=c.vocab_size,
                  tie_word_embeddings=c.tie)
    if c.arch == "qwen3":
        return common | dict(
            architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=c.n_embd,
            intermediate_size=c.n_inner, num_hidden_layers=c.n_layer, head_dim=c.head_dim,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, hidden_act="silu",
            max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, attention_bias=False,
            attention_dropout=0.0, use_sliding_window=False, rope_theta=c.rope_theta,
            rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta))
    return common | dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, n_inner=c.n_inner, n_positions=c.block_size, n_ctx=c.block_size,
        activation_function=c.activation, layer_norm_epsilon=c.norm_eps, bias=c.bias,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=0.0)


def read_hf_config(h):
    """Return the GPTConfig of a config.json (a dict); ValueError for what gpt.py does not compute.
    """
    kind, rows = h.get("model_type"), h.get("vocab_size")
    vocab = dict(padded_vocab_size=rows,  # n_ids: our older folders
                 vocab_size=h.get("unpadded_vocab_size", h.get("n_ids", 0)) or rows)
    if kind == "qwen3":
        ropes = [h[key] for key in ("rope_parameters", "rope_scaling") if h.get(key)]
        rope = ropes[0] if ropes else {}
        needs = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
        for r in ropes:
            if r.get("rope_type", r.get("type", "default")) != "default":
                raise ValueError(f"RoPE scaling {r} is not supported")
        config = GPTConfig(
            arch="qwen3", n_embd=h["hidden_size"], n_inner=h["intermediate_size"],
            n_layer=h["num_hidden_layers"], n_head=h["num_attention_heads"],
            n_kv_head=h["num_key_value_heads"], head_dim=h.get("head_dim", 128),
            block_size=h["max_position_embeddings"], norm_eps=h["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", h.get("rope_theta", 10000.0))),
            tie=h.get("tie_word_embeddings", False), **vocab)
    elif kind == "gpt2":
        needs = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                 "add_cross_attention": False, "tie_word_embeddings": True}
        config = GPTConfig(
            arch="gpt2", n_embd=h["n_embd"], n_layer=h["n_layer"], n_head=h["n_head"],
            n_inner=h.get("n_inner") or 0, norm_eps=h.get("layer_norm_epsilon", 1e-5),
            block_size=h.get("n_positions", h.get("n_ctx", 1024)), bias=h.get("bias", True),
            activation=h.get("activation_function", "gelu_new"), **vocab)
    else:
        raise ValueError(f"model_type is {kind!r}; supported are 'gpt2' and 'qwen3'")
    for key, need in needs.items():
        if h.get(key, need) != need:
            raise ValueError(f"{key}={h[key]!r} is not supported, only {need!r} is")
    return config

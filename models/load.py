"""Read a model folder of GPT-2, Qwen3, Qwen2 or Llama architecture in Hugging Face's format.

    model = from_pretrained("out/x/final")       # ours, or one of the hub
"""
import json
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.hub import from_hub
from gpt import GPT, GPTConfig
from models.hf import HF_FIXED, HF_NAMES, hf_names, is_conv1d
from tokens.tokenizer_files import conversion

DOWNLOADED = ["config.json", "generation_config.json", "*.safetensors", "tokenizer.json",
              "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"]
# transformers' value of a setting that a config.json leaves out; the others must be there.
HF_DEFAULTS = {
    "gpt2": dict(n_inner=0, block_size=1024, norm_eps=1e-5, bias=True, activation="gelu_new"),
    "qwen3": dict(head_dim=128, rope_theta=10000.0, tie=False),
    "qwen2": dict(head_dim=0, rope_theta=10000.0, tie=False),
    "llama": dict(head_dim=0, rope_theta=10000.0, tie=False, n_kv_head=0)}


def download_model(hub_id):
    """Return the folder of a hub id's files, downloaded or cached; OSError: there is none."""
    from huggingface_hub import snapshot_download
    return from_hub(snapshot_download, hub_id, allow_patterns=DOWNLOADED)


def from_pretrained(path, dropout=0.0):
    """Read a model folder or hub id of one of HF_NAMES' architectures, as float32 on the CPU.

    ValueError: another architecture, a feature that gpt.py does not compute, tensors missing, extra
    or misshapen. OSError: no such file, no network.
    """
    folder = Path(path) if Path(path).is_dir() else download_model(str(path))
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    check_files(folder, files)
    try:
        config = read_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{folder / 'config.json'}: {e}") from e
    tensors = read_safetensors(files)
    config.dropout = dropout
    if config.n_layer > len(tensors):
        raise ValueError(f"{folder}: {len(tensors)} tensors for {config.n_layer} layers")
    with torch.device("meta"):  # allocate nothing before names and shapes are checked
        model = GPT(config)
    load_hf_tensors(model, tensors, folder)
    return model


def check_files(folder, files):
    """Raise FileNotFoundError unless folder has a config.json and files, its .safetensors."""
    others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pth", ".pt"))
    if not files and others:
        convert = ("To convert it: " + conversion("AutoModelForCausalLM", folder)
                   if (folder / "config.json").is_file() else "A config.json is missing too")
        raise FileNotFoundError(f"no .safetensors file in {folder}, and {others[0]} is not read "
                                f"because a pickle can run code. {convert}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so not a model folder")
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors file, so no weights; copy it there")


def shorten_context(model, block_size):
    """Cut the model's context to block_size, if that is above 0 and shorter."""
    if 0 < block_size < model.config.block_size:
        model.config.block_size = block_size
        if model.wpe is not None:
            model.wpe.weight = nn.Parameter(model.wpe.weight[:block_size].clone())


def read_safetensors(files):
    """Return {name: tensor} of all .safetensors files."""
    tensors = {}
    for file in files:
        try:
            new = load_file(file)
        except SafetensorError as e:
            raise ValueError(f"{file}: damaged ({e})") from e
        if new.keys() & tensors.keys():
            raise ValueError(f"{file}: {min(new.keys() & tensors.keys())} is also in another "
                             ".safetensors file")
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
    missing = sorted(table.keys() - tensors.keys())
    extra = sorted(tensors.keys() - table.keys())
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


def read_hf_config(h):
    """Return the GPTConfig of a config.json (a dict); ValueError for what gpt.py does not compute.
    """
    kind, rows = h.get("model_type"), h.get("vocab_size")
    if kind not in HF_NAMES:
        raise ValueError(f"model_type is {kind!r}; supported are {', '.join(HF_NAMES)}")
    arch = "gpt2" if kind == "gpt2" else "qwen3"
    if "n_ctx" in h:
        h = dict(n_positions=h["n_ctx"]) | h
    for key in ("rope_scaling", "rope_parameters") if arch == "qwen3" else ():
        rope = h.get(key) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"RoPE scaling {rope} is not supported")
        if "rope_theta" in rope:
            h = h | dict(rope_theta=rope["rope_theta"])
    if other := set(h.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types {min(other)!r} is not supported, only full_attention is")
    for key, need in HF_FIXED[kind].items():
        if h.get(key, need) != need:
            raise ValueError(f"{key}={h[key]!r} is not supported, only {need!r} is")
    settings = HF_DEFAULTS[kind] | {
        ours: h[theirs] for ours, theirs in HF_NAMES[kind].items()
        if h.get(theirs) is not None or ours not in HF_DEFAULTS[kind]}
    if arch == "qwen3":  # some files write 1000000
        settings |= dict(rope_theta=float(settings["rope_theta"]), qkv_bias=kind == "qwen2",
                         qk_norm=kind == "qwen3")
    return GPTConfig(arch=arch, padded_vocab_size=rows, **settings,  # n_ids: our older folders
                     vocab_size=h.get("unpadded_vocab_size", h.get("n_ids", 0)) or rows)

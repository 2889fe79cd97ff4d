"""Models in Hugging Face's format: names of tensors and settings; write a model folder.

    save_pretrained(model, "out/x/final")        # transformers, vLLM and llama.cpp load the folder

models/load.py reads such folders.
"""
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.command_line import UserError, first_line
from common.files import current_folder, read_json, replace_folder, write_json
from gpt import GPT, GPTConfig

# Small models loop, so penalise repetition; less in chats: answers repeat the question's words.
SAMPLING = {
    "base": dict(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.2),
    "chat": dict(temperature=0.5, top_k=50, top_p=0.9, repetition_penalty=1.05)}

# {model_type: {our name of a setting: theirs}}
HF_NAMES = {
    "gpt2": dict(n_embd="n_embd", n_layer="n_layer", n_head="n_head", n_inner="n_inner",
                 block_size="n_positions", norm_eps="layer_norm_epsilon", bias="bias",
                 activation="activation_function"),
    "qwen3": dict(n_embd="hidden_size", n_inner="intermediate_size", n_layer="num_hidden_layers",
                  n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                  head_dim="head_dim", block_size="max_position_embeddings",
                  norm_eps="rms_norm_eps", rope_theta="rope_theta", tie="tie_word_embeddings")}
HF_NAMES |= dict(qwen2=HF_NAMES["qwen3"], llama=HF_NAMES["qwen3"])
# Settings of theirs that gpt.py computes with one value only.
HF_FIXED = {
    "gpt2": dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                 add_cross_attention=False, tie_word_embeddings=True),
    "qwen3": dict(hidden_act="silu", attention_bias=False, use_sliding_window=False),
    "qwen2": dict(hidden_act="silu", use_sliding_window=False),
    "llama": dict(hidden_act="silu", attention_bias=False, mlp_bias=False)}
CLASSES = {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "llama": "LlamaForCausalLM"}  # {model_type: transformers' class}


def model_type(c):
    """Return the model_type of a GPTConfig: gpt2, qwen3, qwen2 (biases of q, k, v) or llama."""
    return c.arch if c.arch == "gpt2" or c.qk_norm else "qwen2" if c.qkv_bias else "llama"


# ---- names ----

def hf_names(c):
    """Yield pairs (their tensor, our tensors): theirs is ours concatenated on dimension 0."""
    if c.arch == "qwen3":
        parts = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
        qkv, norms = ("q_proj", "k_proj", "v_proj"), ("q_norm", "k_norm") * c.qk_norm
        parts |= {f"self_attn.{n}": f"attn.{n}" for n in (*qkv, "o_proj", *norms)}
        parts |= {f"mlp.{n}": f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
        parts = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in parts.items()}
        parts |= {f"self_attn.{n}.bias": f"attn.{n}.bias" for n in qkv * c.qkv_bias}
        yield "model.embed_tokens.weight", ["wte.weight"]
        for i in range(c.n_layer):
            for theirs, ours in parts.items():
                yield f"model.layers.{i}.{theirs}", [f"blocks.{i}.{ours}"]
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
    kind = model_type(c)
    config = dict(vocab_size=c.padded_vocab_size, unpadded_vocab_size=c.vocab_size,
                  model_type=kind, architectures=[CLASSES[kind]], **HF_FIXED[kind])
    config |= {theirs: getattr(c, ours) for ours, theirs in HF_NAMES[kind].items()}
    if c.arch == "qwen3":
        return config | dict(attention_dropout=0.0, rope_parameters=dict(
            rope_type="default", rope_theta=c.rope_theta))
    return config | dict(n_ctx=c.block_size, resid_pdrop=c.dropout, embd_pdrop=c.dropout,
                         attn_pdrop=0.0)


# ---- writing ----

def save_model(folder, model, weights, tok, kind, values):
    """Write best/ or final/ atomically: what transformers, vLLM and sample.py load.

    weights: the full state dict. values: step and scores, kept in config.json.
    """
    part = Path(f"{folder}.part")  # RunLog.start removes one of a killed run
    ids = dict(bos_token_id=tok.eot, pad_token_id=tok.eot,
               eos_token_id=[tok.im_end, tok.eot] if kind == "chat" else tok.eot)
    generation = ids | dict(do_sample=True) | SAMPLING[kind]
    with write_errors_as_user_error(part):
        save_pretrained(model, part, weights, **ids, **values)
        tok.save(part, chat=kind == "chat")
        write_json(part / "generation_config.json", generation)
        replace_folder(part, folder)


def save_pretrained(model, folder, state=None, dtype=torch.float32, **extra):
    """Write config.json (with the keys of extra) and model.safetensors.

    state: the full state dict, where model holds only a shard of it (FSDP).
    """
    folder, state, tensors = Path(folder), state or model.state_dict(), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, ours in hf_names(model.config):
        tensor = hf_tensor(state, ours).to(dtype)
        tensors[name] = (tensor.T if is_conv1d(name) else tensor).contiguous().cpu()
    config = hf_config(model.config) | {"dtype": str(dtype).removeprefix("torch.")} | extra
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # save_file makes it 0600


def hf_tensor(state, names):
    """Return our tensors of these names as one; a missing bias is zero, since transformers' GPT-2
    always has biases."""
    return torch.cat([state[name] if name in state else
                      torch.zeros(len(state[name.replace(".bias", ".weight")])) for name in names])


@contextmanager
def write_errors_as_user_error(part):
    """Report a failure to write the file or folder `part` as a UserError, and remove it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        question = "" if isinstance(e, PermissionError) else " Is the disk full?"
        raise UserError(f"{part} can't be written ({first_line(e)}).{question} The same command "
                        "resumes from the checkpoint before, where there is one") from e


# ---- what a run saved ----

def saved_value(folder, name):
    """Return the number `name` (step, val_loss) in a model folder's config.json, or None."""
    value = read_json(current_folder(folder) / "config.json").get(name)
    return float(value) if isinstance(value, (int, float)) else None


def model_of_checkpoint(checkpoint, dropout=0.0):
    """Return the GPT of a training checkpoint (a dict)."""
    config = checkpoint["model_config"] | dict(dropout=dropout)
    if "n_ids" in config:  # our older checkpoints
        config |= dict(padded_vocab_size=config["vocab_size"], vocab_size=config.pop("n_ids"))
    model = GPT(GPTConfig(**config))
    model.load_state_dict(checkpoint["model"])
    return model

"""Convert a model folder to a .gguf file for llama.cpp, Ollama and LM Studio. pip install gguf

    python -m models.to_gguf out/demo_sft/final demo.gguf
    llama-cli -m demo.gguf                       # chat with it in llama.cpp

The file holds weights, tokenizer and sampling settings. One difference remains: Qwen's own
tokenizer normalizes text to NFC, llama.cpp does not.
"""
# ---- output ----
dtype = "float16"        # of the matrices; float32 keeps every bit and takes twice the space

import os
from contextlib import closing
from pathlib import Path

import torch

from common.command_line import UserError, optional_package, run_main
from common.device import DTYPES
from common.files import atomic_file
from common.settings import configure
from models.folders import is_checkpoint, load_model, read_generation_config
from models.hf import hf_names, hf_tensor, model_type
from tokens.tokenizer import CHAT_TEMPLATE, QWEN_REGEX

SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "penalty_repeat"}  # {name in generation_config.json: in .gguf}


def write_gguf(folder, file, dtype="float16"):
    """Convert a model folder or hub id to file; UserError: llama.cpp can't compute such a model."""
    with optional_package("a .gguf file", "gguf"):
        import gguf
    if is_checkpoint(folder):
        raise UserError(f"{folder} is a checkpoint; name best/ or final/ of its run")
    model, tok = load_model(Path(folder).as_posix())
    if model.config.activation == "gelu" and model.config.arch == "gpt2":
        raise UserError(f"{folder} uses the exact GELU; llama.cpp has only the tanh approximation")
    c = model.config
    if model_type(c) == "qwen2" and c.n_head * c.head_dim != c.n_embd:
        raise UserError(f"{folder}: llama.cpp computes Qwen2's shape only with head_dim "
                        f"n_embd / n_head, not {c.head_dim}")
    if tok.fast is None:
        raise UserError(f"{folder}: llama.cpp does not know its tokenizer's splitting rule")
    if Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{file} exists and is not a file")
    with atomic_file(file) as f, closing(gguf.GGUFWriter(f.name, model_type(c))) as writer:
        add_shape(writer, c)
        add_tokenizer(writer, tok, *read_generation_config(folder))
        add_tensors(writer, model, tok.vocab_size, DTYPES[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def add_shape(writer, c):
    """Add the shape of the model; llama.cpp ignores the keys that an architecture does not have."""
    shape = dict(context_length=c.block_size, embedding_length=c.n_embd, block_count=c.n_layer,
                 feed_forward_length=c.n_inner, head_count=c.n_head, head_count_kv=c.n_kv_head,
                 key_length=c.head_dim, value_length=c.head_dim, layer_norm_eps=c.norm_eps,
                 layer_norm_rms_eps=c.norm_eps, rope_freq_base=c.rope_theta)
    for name, value in shape.items():
        getattr(writer, f"add_{name}")(value)


def add_tokenizer(writer, tok, sampling, ends):
    """Add vocabulary and merges, the ids that end a text, and the sampling settings.

    sampling, ends: as read_generation_config returns them.
    """
    import gguf
    bpe, kinds = tok.spec["model"], gguf.TokenType
    tokens = {i: (text, kinds.NORMAL) for text, i in bpe["vocab"].items()}
    tokens |= {i: (text, kinds.CONTROL) for text, i in tok.specials.items()}
    tokens = [tokens.get(i, (f"[UNUSED{i}]", kinds.UNUSED)) for i in range(tok.vocab_size)]
    split = tok.spec["pre_tokenizer"].get("pretokenizers", [{}])[0]
    ours = split.get("pattern", {}).get("Regex") == QWEN_REGEX
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre("qwen2" if ours else "gpt-2")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    for name, theirs in SAMPLING.items():  # llama.cpp takes them as defaults
        getattr(writer, f"add_sampling_{theirs}")(sampling[name])
    writer.add_sampling_penalty_last_n(-1)  # over the whole context, as generate() does
    end = ends[0] if ends else tok.eot
    if not 0 <= end < tok.vocab_size:
        raise UserError(f"eos_token_id {end} in generation_config.json is not in the tokenizer")
    writer.add_bos_token_id(tok.eot)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(tok.im_end)  # else llama.cpp picks one of both
    writer.add_pad_token_id(tok.eot)
    writer.add_add_bos_token(end == tok.eot)  # texts begin with it, conversations do not
    if end != tok.eot:  # llama-cli would chat with a base model that has a template
        writer.add_chat_template(CHAT_TEMPLATE)


def add_tensors(writer, model, vocab_size, dtype):
    """Add all weights in nn.Linear's layout; vectors stay float32. llama.cpp rotates the pairs
    (x[2i], x[2i + 1]) of q and k in Llama's architecture, so their rows are reordered there."""
    import gguf
    c, state = model.config, model.state_dict()
    kind = model_type(c)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], c.n_layer)
    for theirs, ours in hf_names(c):
        tensor = hf_tensor(state, ours)  # with zero biases where ours are missing
        if kind == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.view(-1, 2, c.head_dim // 2, c.n_embd)  # of each head
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if ours[0] in ("wte.weight", "lm_head.weight"):
            tensor = tensor[:vocab_size]  # llama.cpp would sample the padded rows
        tensor = tensor.to(dtype if tensor.dim() == 2 else torch.float32)
        if not tensor.isfinite().all():
            raise UserError(f"{ours[0]} has values outside float16; use --dtype=float32")
        writer.add_tensor(names.get_name(theirs, (".weight", ".bias")), tensor.numpy())


def main():
    """Convert the model that the command line names."""
    cfg, arguments = configure(__file__, files=False)
    if len(arguments) != 2:
        raise UserError("name a model and a file: python -m models.to_gguf out/demo/best demo.gguf")
    if cfg.dtype not in ("float16", "float32"):
        raise UserError(f"dtype={cfg.dtype} is neither float16 nor float32")
    folder, file = arguments
    write_gguf(folder, file, cfg.dtype)
    print(f"{file}: {os.path.getsize(file) / 1e6:,.1f} MB. Try: llama-cli -m {file}")


if __name__ == "__main__":
    run_main(main, __file__)

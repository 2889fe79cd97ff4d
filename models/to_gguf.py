"""A model folder as one .gguf file, which llama.cpp (Ollama, LM Studio) runs. pip install gguf

    python -m engine.gguf out/demo_sft/final demo.gguf
    llama-cli -m demo.gguf                       # of llama.cpp: talks with it

Tokens, weights and sampling settings are ours; text that is not NFC, which Qwen's own tokenizer
normalizes, llama.cpp reads as it is.
"""
# ---- what is written ----
dtype = "float16"        # of the matrices; float32 keeps every bit in twice the room

import os
from contextlib import closing
from pathlib import Path

import torch

try:
    import gguf  # the package of that name, not this module
except ImportError:
    gguf = None

from config import UserError, configure, run_main
from data.tokenizer import CHAT_TEMPLATE, QWEN_REGEX
from engine.rundir import load_model, read_generation
from gpt import hf_names

DTYPES = {"float16": torch.float16, "float32": torch.float32}
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "penalty_repeat"}  # as generation_config.json and .gguf name it


def write_gguf(folder, file, dtype="float16"):
    """Write a model folder (or hub id) as file; UserError: llama.cpp has no such model."""
    model, tok = load_model(Path(folder).as_posix())
    if model.config.activation == "gelu" and model.config.arch == "gpt2":
        raise UserError(f"{folder} has the exact GELU, llama.cpp only the tanh one")
    if tok.fast is None:
        raise UserError(f"{folder}: llama.cpp does not know its tokenizer's splitting rule")
    if Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{file} is no file that could be replaced")
    part = Path(f"{file}.part")
    writer = gguf.GGUFWriter(part, model.config.arch)
    add_shape(writer, model.config)
    add_tokenizer(writer, tok, *read_generation(folder))
    add_tensors(writer, model, tok.n_ids, DTYPES[dtype])
    try:
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        with open(part, "rb+") as f:  # after the writer has closed it
            os.fsync(f.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def add_shape(writer, c):
    """Each architecture reads its own of these keys."""
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_eps(c.norm_eps)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)


def add_tokenizer(writer, tok, sampling, ends):
    """Vocabulary and merges, the ids that end a text, and how to sample."""
    bpe, kinds = tok.spec["model"], gguf.TokenType
    tokens = {i: (text, kinds.NORMAL) for text, i in bpe["vocab"].items()}
    tokens |= {i: (text, kinds.CONTROL) for text, i in tok.specials.items()}
    tokens = [tokens.get(i, (f"[UNUSED{i}]", kinds.UNUSED)) for i in range(tok.n_ids)]
    split = tok.spec["pre_tokenizer"].get("pretokenizers", [{}])[0]
    ours = split.get("pattern", {}).get("Regex") == QWEN_REGEX
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre("qwen2" if ours else "gpt-2")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    for name, theirs in SAMPLING.items():  # these become llama.cpp's defaults
        getattr(writer, f"add_sampling_{theirs}")(sampling[name])
    writer.add_sampling_penalty_last_n(-1)  # ours sees the whole context, not the last 64
    end = ends[0] if ends else tok.eot
    if not 0 <= end < tok.n_ids:
        raise UserError(f"eos_token_id {end} in generation_config.json is no id of its tokenizer")
    writer.add_bos_token_id(tok.eot)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(tok.im_end)  # else the first found of both ends, in no certain order
    writer.add_pad_token_id(tok.eot)
    writer.add_add_bos_token(end == tok.eot)  # as sample.py begins a text, but not a conversation
    if end != tok.eot:  # with a template, llama-cli would talk with a base model
        writer.add_chat_template(CHAT_TEMPLATE)


def add_tensors(writer, model, n_ids, dtype):
    """All weights in nn.Linear's layout, as llama.cpp has it for both; vectors stay float32."""
    c, state = model.config, model.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[c.arch.upper()], c.n_layer)
    for theirs, ours in hf_names(c):
        # llama.cpp's GPT-2 always has biases: where ours has none they are zeros
        parts = [state[name] if name in state else
                 torch.zeros(len(state[name.replace(".bias", ".weight")])) for name in ours]
        tensor = torch.cat(parts)
        if ours[0] in ("wte.weight", "lm_head.weight"):
            tensor = tensor[:n_ids]  # the rest is padding, which llama.cpp would draw
        tensor = tensor.to(dtype if tensor.dim() == 2 else torch.float32)
        if not tensor.isfinite().all():
            raise UserError(f"{ours[0]} does not fit float16: --dtype=float32")
        writer.add_tensor(names.get_name(theirs, (".weight", ".bias")), tensor.numpy())


def main():
    cfg, words = configure(__file__, files=False)
    if gguf is None:
        raise UserError("a package is missing: pip install gguf")
    if len(words) != 2:
        raise UserError("name a model and a file: python -m engine.gguf out/demo/best demo.gguf")
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype={cfg.dtype} is none of {', '.join(DTYPES)}")
    write_gguf(*words, cfg.dtype)
    print(f"{words[1]}: {os.path.getsize(words[1]) / 1e6:,.1f} MB. Try: llama-cli -m {words[1]}")


if __name__ == "__main__":
    run_main(main, __file__)

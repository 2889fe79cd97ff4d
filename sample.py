"""Continue a text, or chat, with the newest run under out/, any model folder or hub id, or xiaoyu,
the model that comes with the code.

    python sample.py --start="数学是"
    python sample.py --start=FILE:prompt.txt --num_samples=3 --max_new_tokens=100
    python sample.py --chat                    # in the terminal; /help lists the commands
    python sample.py --web                     # in the browser (pip install gradio)
"""
# ---- task ----
model = ""             # folder, checkpoint, hub id or xiaoyu; "" = the newest base or chat run
#                        under out/, or where there is none xiaoyu
start = ""             # text to continue, or FILE:path
starts = ""            # several texts, "|" between them: each sample takes the next one
num_samples = 1        # sample i has the seed seed + i
chat = False           # chat in the terminal
web = False            # chat in the browser
port = 7860            # of the chat page, http://127.0.0.1:7860
system = ""            # chat: the system message
# ---- sampling; -1 = the value in the model's generation_config.json ----
max_new_tokens = 256
temperature = -1.0     # 0 = always the most likely token
top_k = -1             # sample among the k most likely tokens; 0 = all
top_p = -1.0           # sample among the most likely tokens with this total probability; 1 = all
min_p = -1.0           # drop tokens below this share of the highest probability; 0 = none
repetition_penalty = -1.0  # above 1 makes tokens that occurred already less likely; 1 = off
stop = ""              # end before any of these texts, "|" between them
seed = 1337
# ---- device ----
device = "auto"        # cuda, mps, cpu
dtype = "auto"         # of the weights: float32, bfloat16, float16; auto: 16 bits on CUDA

import sys
from itertools import chain

from common.command_line import UserError, run_main  # first: reports Ctrl-C

import torch

from common.device import choose_device, choose_dtype
from common.settings import check_range, check_ranges, configure
from corpus.encoding import UnknownEncoding
from corpus.files import SNIFF_BYTES, UNDECODABLE, decoded, refuse_pipe
from models.folders import RANGES, find_model, load_model, read_generation_config
from sampling.chat import Chat, chat_in_terminal
from sampling.text import continue_texts, encode_start, generate_text, print_stream, printable

NUMBERS = dict(max_new_tokens=(1, 2**40), num_samples=(1, 2**40), seed=(0, 2**62))


def load(cfg):
    """Return the model, ready to generate, and its tokenizer; fill in cfg.model and what is -1."""
    cfg.model = path = find_model(cfg.model, "chat" if cfg.chat or cfg.web else "base")
    model, tok = load_model(path)
    device = choose_device(cfg.device)
    for name, value in read_generation_config(path)[0].items():
        if getattr(cfg, name) == -1:
            setattr(cfg, name, value)
        check_range(name, getattr(cfg, name), *RANGES[name])
    print(f"[{path}]", file=sys.stderr)
    auto_on_cpu = cfg.dtype == "auto" and device.type == "cpu"
    dtype = torch.float32 if auto_on_cpu else choose_dtype(cfg.dtype, device.type)
    return model.to(device, dtype).eval(), tok


def read_start(start):
    """Return the text of the setting `start`, read from the file in FILE:path."""
    if not start.startswith("FILE:"):
        return start
    refuse_pipe(start[5:])
    with open(start[5:], "rb", SNIFF_BYTES) as file:
        try:
            text = decoded(file, newline=None).read()
        except UnknownEncoding:
            text = UNDECODABLE
    if UNDECODABLE in text:
        raise UserError(f"{start[5:]}: no known encoding; save it as UTF-8")
    return text


def print_samples(model, tok, cfg):
    """Print num_samples continuations; a single one is printed as it is generated."""
    starts = cfg.starts.split("|") if cfg.starts else [read_start(cfg.start)]
    if cfg.num_samples == 1:
        ids = encode_start(tok, starts[0], model.config.block_size)
        return print_stream(chain(starts[:1], generate_text(model, tok, ids, cfg, cfg.seed)))
    samples = continue_texts(model, tok, starts, cfg)
    print(printable(f"\n{'-' * 20}\n".join(start + text for start, text in samples)))


def main():
    """Sample or chat as the command line says."""
    cfg, arguments = configure(__file__, files=False)
    if arguments:
        text = arguments[0]
        raise UserError(f"'{text}' is not a setting. A text to continue: --start=\"{text}\"")
    check_ranges(cfg, NUMBERS)
    model, tok = load(cfg)
    if cfg.web:
        from sampling.web import serve  # imports an optional dependency
        serve(Chat(model, tok, cfg))
    elif cfg.chat:
        chat_in_terminal(Chat(model, tok, cfg))
    else:
        print_samples(model, tok, cfg)


if __name__ == "__main__":
    run_main(main, __file__)

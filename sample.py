"""Continue a text, or chat, with the newest model under out/ or any model folder or hub id.

    python sample.py --start="数学是"
    python sample.py --start=FILE:prompt.txt --num_samples=3 --max_new_tokens=100
    python sample.py --chat                    # /new begins anew, /quit ends
"""
# ---- what ----
model = ""             # folder or hub id; "" = the newest run under out/ (with --chat: chat run)
start = ""             # text to continue, or FILE:path
chat = False           # talk with it instead
system = ""            # chat: what the model is told first
num_samples = 1        # sample i has seed + i
starts = ""            # several texts, "|" between them: sample i continues the next in turn
overlap = ""           # name of a prepared set: how many of the samples' Han 4-grams stand in it
# ---- how; -1 = as the model's generation_config.json has it ----
max_new_tokens = 256
temperature = -1.0     # 0 = always the likeliest
top_k = -1             # choose among so many of the likeliest; 0 = all
top_p = -1.0           # choose among the likeliest that make up this mass; 1 = all
repetition_penalty = -1.0  # above 1 discourages what was said already
seed = 1337
# ---- machine ----
device = "auto"        # cuda, mps, cpu
dtype = "auto"         # of the weights: float32, bfloat16, float16; auto: 16 bits on CUDA

import codecs
import json
import re
import sys
from pathlib import Path

import torch

from config import UserError, configure, newest_model, run_main
from data.bins import Bins
from pretrain import choose_device, choose_dtype, load_model

LOWEST = dict(max_new_tokens=1, num_samples=1, seed=0, temperature=0.0, top_k=0, top_p=1e-6,
              repetition_penalty=1e-3)


def load(cfg):
    """(model ready to sample, its tokenizer)."""
    path = cfg.model or newest_model("chat" if cfg.chat else "")
    if not path:
        script = "sft.py config/demo_sft.py" if cfg.chat else "pretrain.py config/demo.py"
        raise UserError(f"no {'chat ' * cfg.chat}model under out/ yet. Run: python {script}, "
                        "or name one: --model=FOLDER_OR_HUB_ID")
    model, tok = load_model(Path(path).as_posix())
    device = choose_device(cfg.device)
    auto_on_cpu = cfg.dtype == "auto" and device.type == "cpu"
    dtype = torch.float32 if auto_on_cpu else choose_dtype(cfg.dtype, device.type)
    fill_in(cfg, Path(path) / "generation_config.json")
    print(f"[{Path(path).as_posix()}]", file=sys.stderr)
    return model.to(device, dtype).eval(), tok


def fill_in(cfg, file):
    """Sampling settings left at -1 come from the model's own file, where it has one."""
    plain = dict(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    try:
        own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        own = {name: type(plain[name])(own.get(name) or plain[name]) for name in plain}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{file} can't be read ({type(e).__name__})") from e
    for name, value in own.items():
        if getattr(cfg, name) == -1:
            setattr(cfg, name, value)
        if not LOWEST[name] <= getattr(cfg, name) < 1e6:
            raise UserError(f"{name}={getattr(cfg, name)} must be at least {LOWEST[name]}")


def stream(model, tok, ids, cfg, seed, stop_ids):
    """Yield the text of one continuation of ids, as it comes, in whole characters.

    A token may end inside a character: its bytes wait for the rest. Bytes that a small model leaves
    without one, or max_new_tokens cuts off, are not shown.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    ids = torch.tensor([ids], device=model.wte.weight.device)
    for new in model.generate(ids, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
                              cfg.repetition_penalty, stop_ids, seed):
        if new.item() in stop_ids:
            break
        yield decoder.decode(tok.decode_bytes([new.item()]))


def show(pieces):
    """Print pieces as they come; returns the whole."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text


def read_start(start):
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{start[5:]} is not UTF-8 (byte {e.start})") from e


def continue_texts(model, tok, cfg):
    """Print num_samples continuations; returns the new texts."""
    starts, texts = cfg.starts.split("|") if cfg.starts else [read_start(cfg.start)], []
    for i in range(cfg.num_samples):
        start = starts[i % len(starts)]
        ids = [tok.eot, *tok.encode(start)]  # a text begins where the one before ended
        context = model.config.block_size
        if len(ids) > context:
            print(f"sample.py: the start has {len(ids):,} tokens, the context holds {context:,}: "
                  f"only the last {context // 2:,} are read", file=sys.stderr)
        if i:
            print("-" * 20)
        print(start, end="", flush=True)
        texts.append(show(stream(model, tok, ids, cfg, cfg.seed + i, {tok.eot, tok.im_end})))
    return texts


def han_4grams(text):
    """Runs of four Han characters, overlapping."""
    return [run[i:i + 4] for run in re.findall("[\u4e00-\u9fff]{4,}", text)
            for i in range(len(run) - 3)]


def print_overlap(texts, name):
    """How much of the texts the training split already holds: near 100 % is recital."""
    bins = Bins(name)
    known = set(han_4grams(bins.tokenizer.decode(bins.tokens("train"))))
    grams = [g for text in texts for g in han_4grams(text)]
    share = sum(g in known for g in grams) / max(1, len(grams))
    print("-" * 20 + f"\n{len(texts)} samples: {share:.1%} of {len(grams):,} Han 4-grams stand in "
          f"{bins.folder}")


def talk(model, tok, cfg):
    """A chat in the terminal, or with lines from a pipe."""
    opening = [dict(role="system", content=cfg.system)] if cfg.system else []
    messages, turn = list(opening), 0
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as e:
            raise UserError(f"the question is not UTF-8 (byte {e.start})") from e
        if question == "/quit":
            return
        if question == "/new":
            messages = list(opening)
        if not question or question == "/new":
            continue
        messages.append(dict(role="user", content=question))
        ids = fit_messages(messages, opening, tok, model.config.block_size)
        if len(ids) > model.config.block_size:
            print(f"sample.py: the question has {len(ids):,} tokens, the context holds "
                  f"{model.config.block_size:,}: only its end is read", file=sys.stderr)
        answer = show(stream(model, tok, ids, cfg, cfg.seed + turn, {tok.eot, tok.im_end}))
        messages.append(dict(role="assistant", content=answer))
        turn += 1


def fit_messages(messages, opening, tok, block_size):
    """Prompt ids; where they fill over half of the context, the oldest turns are forgotten."""
    first = len(opening)
    while True:
        ids = tok.dialogue(messages) + tok.header("assistant")
        if len(ids) <= block_size // 2 or len(messages) <= first + 1:
            return ids
        del messages[first:first + 2]


def main():
    cfg, words = configure(__file__, files=False)
    if words:
        raise UserError(f"'{words[0]}' is not a setting (--name=value); to continue a text: "
                        f'--start="{words[0]}"')
    for name in ("max_new_tokens", "num_samples", "seed"):
        if not LOWEST[name] <= getattr(cfg, name) < 2**62:
            raise UserError(f"{name}={getattr(cfg, name)} must be at least {LOWEST[name]}")
    model, tok = load(cfg)
    if cfg.chat:
        return talk(model, tok, cfg)
    texts = continue_texts(model, tok, cfg)
    if cfg.overlap:
        print_overlap(texts, cfg.overlap)


if __name__ == "__main__":
    run_main(main, __file__)

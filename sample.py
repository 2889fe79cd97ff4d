"""Continue a text, or chat, with the newest run under out/ or any model folder or hub id.

    python sample.py --start="数学是"
    python sample.py --start=FILE:prompt.txt --num_samples=3 --max_new_tokens=100
    python sample.py --chat                    # in the terminal; /help lists what it knows
    python sample.py --web                     # in the browser (pip install gradio)
"""
# ---- what ----
model = ""             # folder or hub id; "" = the newest base run under out/, to talk: chat run
start = ""             # text to continue, or FILE:path
starts = ""            # several texts, "|" between them: sample i continues the next in turn
num_samples = 1        # sample i has seed + i
chat = False           # talk with it instead
web = False            # talk with it in the browser
port = 7860            # of the page: http://127.0.0.1:7860
system = ""            # chat: what the model is told first
# ---- how; -1 = as the model's generation_config.json has it ----
max_new_tokens = 256
temperature = -1.0     # 0 = always the likeliest
top_k = -1             # choose among so many of the likeliest; 0 = all
top_p = -1.0           # choose among the likeliest that make up this mass; 1 = all
min_p = -1.0           # drop what is less likely than this share of the likeliest; 0 = nothing
repetition_penalty = -1.0  # above 1 discourages what was said already
stop = ""              # end before any of these texts, "|" between them
seed = 1337
# ---- machine ----
device = "auto"        # cuda, mps, cpu
dtype = "auto"         # of the weights: float32, bfloat16, float16; auto: 16 bits on CUDA

import codecs
import json
import sys
from pathlib import Path

import torch

from config import UserError, configure, newest_model, run_main
from data.files import write_file
from engine.machine import choose_device, choose_dtype
from engine.rundir import RANGES, check_range, load_model, read_generation
from gpt import Cache

NUMBERS = dict(max_new_tokens=(1, 2**40), num_samples=(1, 2**40), seed=(0, 2**62))
ROWS = 16              # samples drawn at once
LONGEST_TOKEN = 16     # characters a token has at most on average: more text than that is not read
HELP = """/new            begin anew
/system TEXT    tell the model something first, and begin anew
/temperature X  how daring it is; 0 = always the likeliest
/save FILE      the conversation as a line of JSON, as prepare.py chat reads it
/quit           end; Ctrl-C stops an answer"""


def load(cfg):
    """(model ready to sample, its tokenizer)."""
    talking = cfg.chat or cfg.web
    kind = "chat" if talking else "base"
    path = cfg.model or newest_model(kind)
    if not path:
        script = "sft.py config/demo_sft.py" if talking else "pretrain.py config/demo.py"
        raise UserError(f"no {kind} model under out/ yet. Run: python {script}, "
                        "or name one: --model=FOLDER_OR_HUB_ID")
    model, tok = load_model(Path(path).as_posix())
    device = choose_device(cfg.device)
    for name, value in read_generation(path)[0].items():  # those left at -1 are the model's own
        if getattr(cfg, name) == -1:
            setattr(cfg, name, value)
        check_range(name, getattr(cfg, name), *RANGES[name])
    print(f"[{Path(path).as_posix()}]", file=sys.stderr)
    auto_on_cpu = cfg.dtype == "auto" and device.type == "cpu"
    dtype = torch.float32 if auto_on_cpu else choose_dtype(cfg.dtype, device.type)
    return model.to(device, dtype).eval(), tok


# ---- tokens to text ----

def sampling(cfg):
    """The settings generate() takes."""
    return {name: getattr(cfg, name) for name in RANGES}


def visible(pieces, stops):
    """Bytes as they come -> text as it comes, in whole characters, up to the first of stops.

    A token may end inside a character: its bytes wait for the rest. Bytes that a small model leaves
    without one, or max_new_tokens cuts off, are not shown. What may begin a stop waits too.
    """
    decoder, held = codecs.getincrementaldecoder("utf-8")("ignore"), ""
    for piece in pieces:
        held += decoder.decode(piece)
        at = min((held.find(s) for s in stops if s in held), default=-1)
        if at >= 0:
            yield held[:at]
            return
        ready = len(held) - max((n for s in stops for n in range(1, len(s))
                                 if held.endswith(s[:n])), default=0)
        yield held[:ready]
        held = held[ready:]
    yield held


def stop_texts(cfg):
    return [s for s in cfg.stop.split("|") if s]


@torch.inference_mode()  # cheaper bookkeeping than generate's no_grad
def draw(model, tok, ids, cfg, seeds, cache=None):
    """Yield a list of new ids a step, one a seed, which all continue ids; -1 where a row ended."""
    ends = (tok.eot, tok.im_end, tok.im_start)
    ids = torch.tensor([ids] * len(seeds), device=model.device)
    try:
        for new in model.generate(ids, cfg.max_new_tokens, stop_ids=ends, seed=seeds, cache=cache,
                                  **sampling(cfg)):
            yield [-1 if i in ends else i for i in new.tolist()]
    except RuntimeError as e:
        if "probability tensor" not in str(e):
            raise
        raise UserError("the model's logits are not finite; --dtype=float32 may help") from e


def stream(model, tok, ids, cfg, seed, cache=None):
    """Yield the text of one continuation of ids, as it comes."""
    new = draw(model, tok, ids, cfg, [seed], cache)
    return visible((tok.decode_bytes([i]) for i, in new if i >= 0), stop_texts(cfg))


def show(pieces):
    """Print pieces as they come."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


# ---- texts ----

def read_start(start):
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{start[5:]} is not UTF-8 (byte {e.start})") from e


def start_ids(tok, start, context):
    """Ids of a text to continue; what the context can't hold is left out, and said."""
    ids = [tok.eot, *tok.encode(start[-context * LONGEST_TOKEN:])]  # a text begins after another's
    if len(ids) > context:
        print(f"sample.py: the start has {len(ids):,} tokens or more, the context holds "
              f"{context:,}: only the last {context // 2:,} are read", file=sys.stderr)
    return ids[-context - 1:]


def continue_starts(model, tok, starts, cfg):
    """num_samples texts, (start, what follows) each; those of one start are drawn together."""
    texts = [None] * cfg.num_samples
    for k, start in enumerate(starts):
        ids = start_ids(tok, start, model.config.block_size)
        numbers = range(k, cfg.num_samples, len(starts))
        for some in (numbers[i:i + ROWS] for i in range(0, len(numbers), ROWS)):
            rows = zip(*draw(model, tok, ids, cfg, [cfg.seed + i for i in some]))
            for i, row in zip(some, rows):
                raw = tok.decode_bytes([t for t in row if t >= 0])
                texts[i] = start, "".join(visible([raw], stop_texts(cfg)))
    return texts


def continue_texts(model, tok, cfg):
    """Print num_samples continuations; a lone one as it comes."""
    starts = cfg.starts.split("|") if cfg.starts else [read_start(cfg.start)]
    if cfg.num_samples == 1:
        print(starts[0], end="", flush=True)
        ids = start_ids(tok, starts[0], model.config.block_size)
        return show(stream(model, tok, ids, cfg, cfg.seed))
    texts = continue_starts(model, tok, starts, cfg)
    print(f"\n{'-' * 20}\n".join(start + text for start, text in texts))


# ---- talk ----

class Chat:
    """A conversation: its messages, and the cache of what the model has read of them."""

    def __init__(self, model, tok, cfg):
        self.model, self.tok, self.cfg = model, tok, cfg
        self.cache = Cache(len(model.blocks), model.config.block_size)
        self.begin(cfg.system)

    def begin(self, system):
        self.system, self.messages, self.turn = system, [], 0

    def ask(self, question):
        """Yield the answer as it comes; both are remembered, the answer as far as it was read.

        UserError: the question does not fit the context; it is not remembered.
        """
        self.messages.append(dict(role="user", content=question))
        try:
            ids = self.prompt()
        except UserError:
            self.messages.pop()
            raise
        answer = ""
        try:
            for piece in stream(self.model, self.tok, ids, self.cfg, self.cfg.seed + self.turn,
                                self.cache):
                answer += piece
                yield piece
        finally:
            self.messages.append(dict(role="assistant", content=answer))
            self.turn += 1

    def prompt(self):
        """Ids of the conversation; where they leave no room for an answer, the oldest whole turns
        are forgotten, never the system message; then the question loses its beginning."""
        context = self.model.config.block_size
        room = context - min(self.cfg.max_new_tokens, context // 2)
        opening = [dict(role="system", content=self.system)] if self.system else []
        asked = dict(self.messages[-1])
        asked["content"] = asked["content"][-context * LONGEST_TOKEN:]
        messages = [*self.messages[:-1], asked]
        while True:
            ids = self.tok.dialogue(opening + messages) + self.tok.header("assistant")
            if len(ids) <= room:
                break
            if len(messages) > 1:
                messages = messages[2:]
            elif len(asked["content"]) > 1:
                asked["content"] = asked["content"][-(len(asked["content"]) * 3 // 4):]
            else:
                raise UserError(f"the system message has {len(ids):,} tokens; of the context's "
                                f"{context:,} it may fill {room:,}")
        if len(asked["content"]) < len(self.messages[-1]["content"]):
            print("sample.py: the question is longer than the context; only its last "
                  f"{len(asked['content']):,} characters are read", file=sys.stderr)
        return ids


def talk(model, tok, cfg):
    """A chat in the terminal, or with lines from a pipe."""
    if sys.stdin.isatty():
        try:
            import readline  # arrow keys, history  # noqa: F401
        except ImportError:
            pass  # Windows' console has its own
        print("/help lists what I know beside talking", file=sys.stderr)
    chat = Chat(model, tok, cfg)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                command(chat, *line[1:].split(maxsplit=1))
            elif line:
                show(chat.ask(line))
        except KeyboardInterrupt:  # stops an answer, not the program
            print()
        except EOFError:
            return
        except UserError as e:  # a question or system message that does not fit
            print(f"sample.py: {e}", file=sys.stderr)
        except UnicodeDecodeError as e:
            raise UserError(f"the question is not UTF-8 (byte {e.start})") from e


def command(chat, name="", text=""):
    """What a line that begins with a slash asks for."""
    if name == "new":
        chat.begin(chat.system)
    elif name == "system":
        chat.begin(text)
    elif name == "temperature":
        try:
            value = float(text)
            check_range(name, value, *RANGES[name])
            chat.cfg.temperature = value
        except (ValueError, UserError):
            print(f"'{text}' is no number from 0 to 1000", file=sys.stderr)
    elif name == "save" and text:
        opening = [dict(role="system", content=chat.system)] if chat.system else []
        line = json.dumps(dict(messages=opening + chat.messages), ensure_ascii=False)
        try:
            write_file(Path(text), line + "\n")
            print(f"saved to {text}", file=sys.stderr)
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            print(f"{text!r}: {getattr(e, 'strerror', None) or e}", file=sys.stderr)
    else:
        print(HELP, file=sys.stderr)


def main():
    # no config files: a word that ends in .py is as likely a text to continue
    cfg, words = configure(__file__, files=False)
    if words:
        raise UserError(f"'{words[0]}' is no setting. A text to continue: --start=\"{words[0]}\"")
    for name, (low, high) in NUMBERS.items():
        check_range(name, getattr(cfg, name), low, high)
    model, tok = load(cfg)
    if cfg.web:
        from engine.web import serve
        serve(Chat(model, tok, cfg))
    else:
        (talk if cfg.chat else continue_texts)(model, tok, cfg)


if __name__ == "__main__":
    run_main(main, __file__)

"""Continue texts: generate ids, decode them as they come, end at stop texts."""
import codecs
import re
import sys

import torch

from common.command_line import UserError
from models.folders import RANGES

BATCH_SIZE = 16        # samples generated at once
MAX_TOKEN_CHARS = 16   # no text has more characters per token; the rest is cut before encoding
MAX_TEXT_CHARS = 2**19  # tiktoken overflows its stack on a million blanks
# characters that a terminal executes: controls except "\n" and "\t", and changes of direction
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# ---- generate ----

@torch.inference_mode()  # saves more bookkeeping than generate's no_grad
def generate_ids(model, tok, ids, cfg, seeds, cache=None):
    """Yield at each step a list of new ids, one for each of seeds; -1 where that row has ended.

    Every row continues ids. UserError: the logits are not finite.
    """
    end_ids = (tok.eot, tok.im_end, tok.im_start)
    sampling = {name: getattr(cfg, name) for name in RANGES}
    ids = torch.tensor([ids] * len(seeds), device=model.device)  # (B, T)
    try:
        for new in model.generate(ids, cfg.max_new_tokens, stop_ids=end_ids, seed=seeds,
                                  cache=cache, **sampling):
            yield [-1 if i in end_ids else i for i in new.tolist()]
    except RuntimeError as e:
        if "probability tensor" not in str(e):
            raise
        raise UserError("the model's logits are not finite; --dtype=float32 may help") from e


def decode_stream(pieces, stop=""):
    """Yield the text of UTF-8 bytes that come in pieces, up to the first of the stop texts, which
    `stop` separates by "|".

    A token may end inside a character: its bytes are held back until the character is complete.
    Invalid bytes and an incomplete last character are dropped. Text that may be the beginning of
    a stop text is held back, too.
    """
    decoder, text = codecs.getincrementaldecoder("utf-8")("ignore"), ""
    stops = [s for s in stop.split("|") if s]
    for piece in pieces:
        text += decoder.decode(piece)
        if found := [text.find(s) for s in stops if s in text]:
            yield text[:min(found)]
            return
        n_held = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])),
                     default=0)
        ready = len(text) - n_held
        yield text[:ready]
        text = text[ready:]
    yield text


def generate_text(model, tok, ids, cfg, seed, cache=None):
    """Yield the text that continues ids, piece by piece as it is generated."""
    steps = generate_ids(model, tok, ids, cfg, [seed], cache)
    return decode_stream((tok.decode_bytes(new) for new in steps if new != [-1]), cfg.stop)


# ---- texts to continue ----

def last_part(text, context):
    """Return the end of a text that is long enough to fill the context."""
    return text[-min(context * MAX_TOKEN_CHARS, MAX_TEXT_CHARS):]


def encode_start(tok, start, context):
    """Return the ids of a text to continue; warn if it is longer than the context."""
    # every training document follows an <|endoftext|>
    ids = [tok.eot, *tok.encode(last_part(start, context))]
    if len(ids) > context:
        print(f"sample.py: the start has {len(ids):,} tokens or more, the context holds "
              f"{context:,}: only the last {context // 2:,} are read", file=sys.stderr)
    return ids[-context - 1:]


def continue_texts(model, tok, starts, cfg):
    """Return (start, continuation) of each of cfg.num_samples samples.

    Sample i continues starts[i % len(starts)] and has the seed cfg.seed + i. The samples of a start
    are generated in batches.
    """
    samples = [None] * cfg.num_samples
    for k, start in enumerate(starts):
        ids = encode_start(tok, start, model.config.block_size)
        numbers = range(k, cfg.num_samples, len(starts))
        for batch in (numbers[i:i + BATCH_SIZE] for i in range(0, len(numbers), BATCH_SIZE)):
            steps = generate_ids(model, tok, ids, cfg, [cfg.seed + i for i in batch])
            for i, new in zip(batch, zip(*steps)):
                raw = tok.decode_bytes([t for t in new if t >= 0])
                samples[i] = start, "".join(decode_stream([raw], cfg.stop))
    return samples


# ---- the terminal ----

def printable(text):
    r"""Return the text with control characters as escapes: a model may emit "\x1b[2J", which would
    clear the terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def print_stream(pieces):
    """Print pieces of text as they come, then a newline."""
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print(flush=True)

"""Tokenizers from elsewhere: the hub, files of several forms, and new ones, trained here.

    tok = load_tokenizer("qwen")             # or gpt2, a hub id, a path
    tok = train_bytebpe(texts, 2048)
"""
import itertools
import json
import os
import sys
from base64 import b64decode
from contextlib import contextmanager

from common.command_line import UserError, first_line
from common.files import current_folder, exists, read_json
from common.hub import from_hub
from tokens.tokenizer import (
    END_OF_TEXT, QWEN_REGEX, SPLIT_RULES, Tokenizer, byte_alphabet, control_token)

HUB_NAMES = {"qwen": "Qwen/Qwen2-0.5B", "gpt2": "openai-community/gpt2"}
PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}  # of Hugging Face, of OpenAI
# These forms do not hold the splitting rule. It is known by the class of the tokenizer or by the
# number of tokens without special ones: {number: (rule, id of <|endoftext|>)}.
CLASSES = dict(GPT2Tokenizer="gpt2", RobertaTokenizer="gpt2", CodeGenTokenizer="gpt2",
               Qwen2Tokenizer="qwen", QWenTokenizer="qwen")
SIZES = {50_256: ("gpt2", 50_256), 50_280: ("gpt2", 50_256), 100_256: ("cl100k", 100_257),
         151_643: ("qwen", 151_643), 199_998: ("o200k", 199_999)}
MAX_PIECE = 32  # characters; longer pieces are cut when a tokenizer is trained
PROBE = "\n中文，标点。  ABC abc\n\n\t123 龘 Éé 😀 "  # a lossless tokenizer gives it back


def load_tokenizer(name, rule="", lossless=False):
    """Return the Tokenizer of "qwen", "gpt2", a hub id or a path: tokenizer.json, a .tiktoken file,
    vocab.json and merges.txt, encoder.json and vocab.bpe, or a folder with one of these.

    rule: a key of SPLIT_RULES, for files that do not tell how texts are split. lossless: refuse a
    tokenizer that does not give every text back.
    """
    path = find_tokenizer(str(name))
    try:
        with quiet_stderr():
            tok = read_tokenizer(path, rule)
            back = tok.decode(tok.encode(PROBE))
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except OSError as e:
        raise UserError(f"{e.filename or path}: {e.strerror}") from e
    except BaseException as e:  # `tokenizers` raises plain Exception, and panics are not even that
        raise UserError(f"{path}: not a tokenizer file ({type(e).__name__}: {first_line(e)})"
                        ) from e
    if lossless and back != PROBE:
        raise UserError(f"tokenizer {name} is not lossless: {PROBE!r} becomes {back!r}. Use a "
                        "byte-level one: qwen, gpt2 or bytebpe")
    return tok


@contextmanager
def quiet_stderr():
    """Hide what is written to the file of stderr: Rust prints its panics there."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def find_tokenizer(name):
    """Return the file of a tokenizer: in a folder the most complete one; of a hub id a download."""
    path = current_folder(name)
    if path.is_dir():
        names = "tokenizer.json", *PAIRS, *sorted(file.name for file in path.glob("*.tiktoken"))
        if found := [path / name for name in names if (path / name).is_file()]:
            return found[0]
        others = [f for f in ("vocab.txt", "tokenizer.model") if (path / f).is_file()]
        raise UserError(f"tokenizer {name}: no tokenizer.json in this folder" + (
            f"; to convert {others[0]}: {conversion('AutoTokenizer', path)}" if others else ""))
    if path.is_file():
        return path
    if exists(path):
        raise UserError(f"tokenizer {name} is neither a file nor a folder")
    hub_id = HUB_NAMES.get(name, name)
    own = name.startswith(("data/", "out/"))  # in another working folder
    if hub_id == name and (own or path.suffix or name.count("/") != 1 or path.parent.is_dir()):
        raise UserError(f"tokenizer {path.absolute() if own else name}: no such file, and no hub "
                        "id like Qwen/Qwen2-0.5B")
    from huggingface_hub import hf_hub_download
    try:
        return from_hub(hf_hub_download, hub_id, "tokenizer.json")
    except OSError as e:
        raise UserError(
            f"tokenizer {hub_id} can't be downloaded ({e}). Set HF_ENDPOINT to a mirror, or use "
            "--tokenizer=PATH, or train one with --tokenizer=bytebpe") from e


def conversion(kind, folder):
    """Return the command that rewrites a model folder in the form that is read here."""
    return (f'python -c "from transformers import {kind} as T; '
            f"T.from_pretrained(r'{folder}').save_pretrained(r'{folder}')\"")


# ---- files of several forms ----

def read_tokenizer(path, rule=""):
    """Return the Tokenizer of a file that find_tokenizer found. Raise almost anything if it can't
    be read, UserError if it does not tell the splitting rule."""
    if vocab_file := next((v for v, m in PAIRS.items() if path.name in (v, m)), None):
        vocab, merges, added = read_vocab(path.with_name(vocab_file))
    elif path.suffix == ".tiktoken":
        vocab, merges, added = read_ranks(path)
    elif rule:
        raise UserError(f"split_rule={rule}: {path} has its own splitting rule")
    else:
        return Tokenizer(json.loads(path.read_text(encoding="utf-8")))
    if byte_alphabet().keys() - vocab.keys():
        raise ValueError("some bytes have no token")
    kind = read_json(path.with_name("tokenizer_config.json")).get("tokenizer_class") or ""
    known, _ = SIZES.get(len(merges) + 256, ("", 0))
    rule = rule or CLASSES.get(kind.removesuffix("Fast"), known)
    if rule not in SPLIT_RULES:
        problem = f"split_rule={rule} is not known" if rule else (
            f"{path} does not tell how texts are split")
        raise UserError(f"{problem}. Name the rule: --split_rule={' or '.join(SPLIT_RULES)}")
    spec = json.loads(byte_level_bpe([SPLIT_RULES[rule]], vocab, merges).to_str())
    if kind.startswith("Qwen2Tokenizer"):
        spec["normalizer"] = dict(type="NFC")
    return Tokenizer(spec | dict(added_tokens=[control_token(i, added[i]) for i in sorted(added)]))


def read_vocab(file):
    """Return {token: id}, [(token, token)] and {id: special token} of vocab.json, the merges beside
    it and transformers' files of added tokens. A token that no merge makes is special."""
    vocab = json.loads(file.read_text(encoding="utf-8"))
    lines = file.with_name(PAIRS[file.name]).read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    added = {i: text for text, i in read_json(file.with_name("added_tokens.json")).items()}
    config = read_json(file.with_name("tokenizer_config.json"))
    added |= {int(i): t["content"] for i, t in config.get("added_tokens_decoder", {}).items()}
    made = (byte_alphabet().keys() | {a + b for a, b in merges}) - set(added.values())
    added |= {i: text for text, i in vocab.items() if text not in made}
    return {text: i for text, i in vocab.items() if text in made}, merges, added


def read_ranks(file):
    """Return the same of a .tiktoken file: lines of a base64 token and its rank. The merge that
    makes a token is the pair that is left when its bytes are merged by the ranks below its own."""
    ranks = {}  # tiktoken's own reader keeps a copy of the file, which may be outdated
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[b64decode(token)] = int(rank)
    letters = {b: c for c, b in byte_alphabet().items()}

    def last_pair(token):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            scores = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = scores.index(min(scores))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def text(token):
        return "".join(letters[b] for b in token)

    by_rank = sorted(ranks, key=ranks.get)
    merges = [tuple(map(text, last_pair(token))) for token in by_rank if len(token) > 1]
    added = {SIZES[len(ranks)][1]: END_OF_TEXT} if len(ranks) in SIZES else {}
    return {text(token): ranks[token] for token in by_rank}, merges, added


# ---- new tokenizers ----

def byte_level_bpe(regexes, vocab=None, merges=None):
    """Return a `tokenizers` Tokenizer that splits text by the regexes, then applies BPE with
    {token: id} and [(token, token)] to the bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    return tok


# Every message of a chat begins with one of them: as frequent training text each becomes one id.
ROLES = ["system\nuser\nassistant\ntool\n"] * 10_000


def train_bytebpe(texts, vocab_size):
    """Return a new Tokenizer: byte-level BPE with Qwen2's splitting regex, trained on texts.

    vocab_size counts all ids: 256 bytes, merges, 3 control tokens. Few texts may give fewer.
    """
    from tokenizers import pre_tokenizers, trainers
    if not 256 + 3 <= vocab_size <= 2**20:
        raise UserError(f"vocab_size={vocab_size} is too small or too large: 259 (256 bytes and 3 "
                        "control tokens) to 1,048,576")
    # Training time is quadratic in the length of a piece, and text without punctuation is one
    # piece. So the trainer gets pieces of MAX_PIECE; the measured effect on the result: LOG.md.
    tok = byte_level_bpe([QWEN_REGEX, rf"[\s\S]{{1,{MAX_PIECE}}}"])
    tok.train_from_iterator(itertools.chain(texts, ROLES), trainers.BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty()))
    model = json.loads(tok.to_str())["model"]
    merges = list(map(tuple, model["merges"]))
    return Tokenizer(json.loads(byte_level_bpe([QWEN_REGEX], model["vocab"], merges).to_str()))

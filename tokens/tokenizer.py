"""Text to ids and back: Hugging Face's tokenizer.json on disk, encoded by tiktoken if possible.

    tok = load_tokenizer("qwen")            # or gpt2, a hub id, a path; train_bytebpe(texts, 2048)
    ids = tok.encode("数学是")               # control tokens are never parsed from text
    tok.encode_chat([{"role": "user", "content": "你好"}])        # ChatML ids
"""
import hashlib
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np

from common.command_line import UserError
from common.files import current_folder, write_file

QWEN_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
HUB_NAMES = {"qwen": "Qwen/Qwen2-0.5B", "gpt2": "openai-community/gpt2"}
MAX_PIECE = 32        # characters; longer pieces are cut when a tokenizer is trained
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_alphabet():
    """Return GPT-2's {printable character: byte} for all 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def control_token(i, content):
    """Return an entry of "added_tokens" in tokenizer.json."""
    return dict(id=i, content=content, single_word=False, lstrip=False, rstrip=False,
                normalized=False, special=True)


class Tokenizer:
    """A tokenizer of the content of a tokenizer.json; missing control tokens get the next ids.

    vocab_size: ids run from 0 to vocab_size - 1. eot, im_start, im_end: ids of the control tokens.
    fingerprint: sha256 over vocabulary, merges, splitting regex, normalizer and added tokens.
    fast, slow: the tiktoken or the `tokenizers` object that encodes; the other one is None.
    """

    def __init__(self, spec):
        self.spec = spec = dict(spec)
        model, added = spec["model"], [dict(t, special=True) for t in spec.get("added_tokens", [])]
        texts = {i: text for text, i in model["vocab"].items()}
        for t in added:
            if t["id"] < 0 or texts.get(t["id"], t["content"]) != t["content"]:
                raise ValueError(f"id {t['id']} of {t['content']} is negative or used twice")
        if min(texts, default=0) < 0:
            raise ValueError(f"{min(texts)} is an id")
        next_id = max([*model["vocab"].values(), *(t["id"] for t in added)]) + 1
        for content in (END_OF_TEXT, IM_START, IM_END):
            if not any(t["content"] == content for t in added):
                added.append(control_token(next_id, content))
                next_id += 1
        # special=True: with split_special_tokens=True transformers takes them as text, as encode()
        spec |= dict(added_tokens=added, post_processor=None, truncation=None, padding=None)
        self.specials = {t["content"]: t["id"] for t in added}
        self.vocab_size = next_id
        self.eot, self.im_start, self.im_end = (
            self.specials[t] for t in (END_OF_TEXT, IM_START, IM_END))
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
                  for m in model.get("merges", [])]
        self.nfc = spec.get("normalizer") == {"type": "NFC"}
        self.token_bytes = self._byte_table()
        regex = self._known_regex(merges)
        identity = [sorted(model["vocab"].items()), merges, regex or spec.get("pre_tokenizer"),
                    spec.get("normalizer"), sorted(self.specials.items())]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.fast = self._tiktoken(regex) if regex else None
        self.slow = None if regex else self._tokenizers()
        self.assistant_header = np.array(self.role_header("assistant"))

    def __getstate__(self):
        """Return what encoding needs, without the large tables: a worker starts 1.6 s earlier."""
        return {k: v for k, v in vars(self).items() if k not in ("spec", "token_bytes")}

    def _known_regex(self, merges):
        """Return the splitting regex if tiktoken gives the same ids as `tokenizers`, else None."""
        model, pre = self.spec["model"], self.spec.get("pre_tokenizer") or {}
        rules = pre.get("pretokenizers", [pre])
        last, vocab = rules[-1], model["vocab"]
        if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(rules) > 2:
            return None
        regex = GPT2_REGEX if len(rules) == 1 and last.get("use_regex", True) else (
            rules[0].get("pattern", {}).get("Regex"))
        # tiktoken merges the pair whose result has the lowest id: the merges must be in this order,
        # and the vocabulary must be the 256 bytes and the results of the merges.
        made = [vocab.get(a + b, -1) for a, b in merges]
        plain = model["type"] == "BPE" and not any(model.get(k) for k in (
            "dropout", "unk_token", "byte_fallback", "continuing_subword_prefix",
            "end_of_word_suffix"))
        ordered = all(a < b for a, b in zip([-1, *made], made))
        complete = len(vocab.keys() - self.specials.keys()) == len(made) + 256
        known = (regex in (QWEN_REGEX, GPT2_REGEX) and self.token_bytes is not None
                 and self.spec.get("normalizer") in (None, {"type": "NFC"}))
        return regex if known and plain and ordered and complete else None

    def _byte_table(self):
        """Return [bytes of each id], or None if the tokens are not written in byte_alphabet()."""
        if (self.spec.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        table = [b""] * self.vocab_size
        foreign = dict.fromkeys(range(256), 0xFFFF)  # not in latin-1: raises below
        letters = foreign | {ord(c): b for c, b in byte_alphabet().items()}
        try:
            for token, i in self.spec["model"]["vocab"].items():
                if token not in self.specials:
                    table[i] = token.translate(letters).encode("latin-1")
        except UnicodeEncodeError:
            return None
        for token, i in self.specials.items():
            table[i] = token.encode()
        return table

    def _tiktoken(self, regex):
        """Return the tiktoken encoding. Its regex is equivalent; with all but the look-ahead in one
        group it is 10 % faster, because the group needs no backtracking."""
        import tiktoken
        easy, look_ahead, rest = regex.partition(r"|\s+(?!\S)")
        regex = f"(?:{easy}){look_ahead}{rest}"
        vocab = self.spec["model"]["vocab"]
        ranks = {self.token_bytes[i]: i for token, i in vocab.items() if token not in self.specials}
        return tiktoken.Encoding("own", pat_str=regex, mergeable_ranks=ranks, special_tokens={})

    def _tokenizers(self):
        import tokenizers
        print("tokenizer: tiktoken does not support its form; using the slower `tokenizers`")
        slow = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
        slow.encode_special_tokens = True
        return slow

    def encode(self, text):
        """Return the ids of a text; control tokens in it are encoded as plain text."""
        if self.slow:
            return self.slow.encode(text, add_special_tokens=False).ids
        return self.fast.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)

    def decode_bytes(self, ids):
        """Return the UTF-8 bytes of ids, which may begin or end inside a character. Ids from
        vocab_size on (padded rows of an embedding) give nothing."""
        if self.token_bytes is None:
            return self.slow.decode([int(i) for i in ids], skip_special_tokens=False).encode()
        return b"".join(self.token_bytes[i] for i in ids if i < self.vocab_size)

    def decode(self, ids):
        """Return the text of ids, U+FFFD for incomplete characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def role_header(self, role):
        """Return the ids of `<|im_start|>role` and a newline, the beginning of a message."""
        return [self.im_start, *self.encode(role + "\n")]

    def encode_chat(self, messages):
        """Return the ChatML ids of [{"role", "content"}, ...], without an <|endoftext|>."""
        ids, newline = [], self.encode("\n")
        for m in messages:
            content = self.encode(m["content"].strip())
            ids += [*self.role_header(m["role"]), *content, self.im_end, *newline]
        return ids

    def loss_mask(self, ids):
        """Return which of ChatML ids (n,) the loss covers, (n,) bool: the content of assistant
        messages and their <|im_end|>.

        Messages are found by the ids of the whole header, which no text encodes to.
        """
        ids, header = np.asarray(ids), self.assistant_header
        mask, ends = np.zeros(len(ids), dtype=bool), np.flatnonzero(ids == self.im_end)
        for start in np.flatnonzero(ids == self.im_start):
            first = start + len(header)
            if np.array_equal(ids[start:first], header):
                end = ends[np.searchsorted(ends, start):][:1]
                mask[first:end[0] + 1 if len(end) else len(ids)] = True
        return mask

    def plain_text(self, ids):
        """Return a document's text as UTF-8 bytes, without control tokens; of a dialogue the
        contents of its messages, joined by newlines."""
        ids = np.asarray(ids)
        starts, ends = np.flatnonzero(ids == self.im_start), np.flatnonzero(ids == self.im_end)
        if not len(starts):
            return self.decode_bytes(ids[ids != self.eot])
        messages = [self.decode_bytes(ids[a + 1:b]) for a, b in zip(starts, ends)]
        return b"\n".join(m.partition(b"\n")[2] for m in messages)

    def save(self, folder, chat=False):
        """Write tokenizer.json and tokenizer_config.json for load_tokenizer and AutoTokenizer."""
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                      eos_token=IM_END if chat else END_OF_TEXT, pad_token=END_OF_TEXT,
                      chat_template=CHAT_TEMPLATE)
        for name, content in (("tokenizer.json", self.spec), ("tokenizer_config.json", config)):
            write_file(Path(folder) / name, json.dumps(content, ensure_ascii=False))


# ---- new tokenizers, and other files than tokenizer.json ----

def _byte_level_bpe(regexes, vocab=None, merges=None):
    """Return a `tokenizers` Tokenizer that splits text by the regexes, then applies BPE with
    {token: id} and [(token, token)] to the bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    return tok


def _to_tokenizer(regex, vocab, merges, added=()):
    tok = _byte_level_bpe([regex], vocab, merges)
    return Tokenizer(json.loads(tok.to_str()) | dict(added_tokens=added))


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
    tok = _byte_level_bpe([QWEN_REGEX, rf"[\s\S]{{1,{MAX_PIECE}}}"])
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty()))
    model = json.loads(tok.to_str())["model"]
    return _to_tokenizer(QWEN_REGEX, model["vocab"], list(map(tuple, model["merges"])))


def _from_vocab_and_merges(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and line[:8] != "#version"]
    regex = GPT2_REGEX if len(merges) == 50_000 else QWEN_REGEX  # the files do not tell which
    added = [control_token(vocab.pop(t), t) for t in (END_OF_TEXT, IM_START, IM_END) if t in vocab]
    return _to_tokenizer(regex, vocab, merges, added)


def _from_tiktoken(path):
    """Read lines of base64 token and rank, in Qwen's form. The merge that makes a token is the pair
    that is left when its bytes are merged by the ranks below its own."""
    from tiktoken.load import load_tiktoken_bpe
    ranks = load_tiktoken_bpe(str(path))
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
    return _to_tokenizer(QWEN_REGEX, {text(token): ranks[token] for token in by_rank}, merges)


# ---- loading ----

def load_tokenizer(name):
    """Return the Tokenizer of "qwen", "gpt2", a hub id or a path: tokenizer.json or a folder with
    one (a model, a prepared set), a .tiktoken file, a folder with vocab.json and merges.txt."""
    path = current_folder(name)
    if path.is_dir() and not any((path / f).is_file() for f in ("tokenizer.json", "vocab.json")):
        raise UserError(f"tokenizer {name}: no tokenizer.json in this folder")
    if (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if not path.exists():
        like_a_path = path.suffix or name.count("/") != 1 or path.parent.is_dir()
        if name not in HUB_NAMES and like_a_path:
            raise UserError(f"tokenizer {name}: no such file, and no hub id like Qwen/Qwen2-0.5B")
        path = _download(HUB_NAMES.get(name, name))
    try:
        if path.is_dir():
            return _from_vocab_and_merges(path)
        if path.suffix == ".tiktoken":
            return _from_tiktoken(path)
        return Tokenizer(json.loads(path.read_text(encoding="utf-8")))
    except Exception as e:  # `tokenizers` raises plain Exception
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path}: not a tokenizer file ({type(e).__name__}: {reason})") from e


def _download(hub_id):
    from huggingface_hub import hf_hub_download, logging
    logging.set_verbosity_error()  # it would print every retry
    try:
        return Path(hf_hub_download(hub_id, "tokenizer.json"))
    except Exception as e:  # the hub client raises errors of four libraries
        raise UserError(
            f"tokenizer {hub_id} can't be downloaded ({type(e).__name__}). Set HF_ENDPOINT to a "
            "mirror, or use --tokenizer=PATH, or train one with --tokenizer=bytebpe") from e

"""Text to ids and back: Hugging Face's tokenizer.json on disk, tiktoken inside where it can be.

    tok = load_tokenizer("qwen")            # or gpt2, a hub id, a path; train_bytebpe(texts, 2048)
    ids = tok.encode("数学是")               # control tokens are never parsed from text
    tok.dialogue([{"role": "user", "content": "你好"}])        # ChatML ids
"""
import hashlib
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np

from config import UserError
from data.files import write_file

QWEN_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
HUB_NAMES = {"qwen": "Qwen/Qwen2-0.5B", "gpt2": "openai-community/gpt2"}
LONGEST_PIECE = 32    # characters between two splits that a new tokenizer learns from
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_alphabet():
    """GPT-2's printable stand-in for each byte: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A tokenizer.json, given as the dict it holds; missing control tokens are added at the end.

    n_ids: ids run from 0 to n_ids - 1. eot, im_start, im_end: ids of the control tokens.
    fingerprint: sha256 over vocabulary, merges, splitting rule, normalizer and added tokens.
    """

    def __init__(self, spec):
        self.spec = spec = dict(spec)
        model, added = spec["model"], [dict(t, special=True) for t in spec.get("added_tokens", [])]
        texts = {i: text for text, i in model["vocab"].items()}
        for t in added:
            if t["id"] < 0 or texts.get(t["id"], t["content"]) != t["content"]:
                raise ValueError(f"id {t['id']} of {t['content']} is not free")
        if min(texts, default=0) < 0:
            raise ValueError(f"{texts[min(texts)]!r} has the id {min(texts)}")
        next_id = max([*model["vocab"].values(), *(t["id"] for t in added)]) + 1
        for content in (END_OF_TEXT, IM_START, IM_END):
            if not any(t["content"] == content for t in added):
                added.append(dict(id=next_id, content=content, single_word=False, lstrip=False,
                                  rstrip=False, normalized=False, special=True))
                next_id += 1
        # special: split_special_tokens=True then treats them as text, as encode() here does
        spec |= dict(added_tokens=added, post_processor=None, truncation=None, padding=None)
        self.specials = {t["content"]: t["id"] for t in added}
        self.n_ids = next_id
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
        self.headers = {}  # of the roles met, as ids
        self.assistant_header = np.array(self.header("assistant"))

    def __getstate__(self):
        """What encoding needs: a worker process gets this, and is ready in 0.2 s instead of 1.8."""
        return {k: v for k, v in vars(self).items() if k not in ("spec", "token_bytes")}

    def _known_regex(self, merges):
        """The splitting regex, if with it tiktoken makes the ids `tokenizers` makes; or None."""
        model, pre = self.spec["model"], self.spec.get("pre_tokenizer") or {}
        rules = pre.get("pretokenizers", [pre])
        last, vocab = rules[-1], model["vocab"]
        if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(rules) > 2:
            return None
        regex = GPT2_REGEX if len(rules) == 1 and last.get("use_regex", True) else (
            rules[0].get("pattern", {}).get("Regex"))
        # tiktoken merges the pair whose result has the lowest id: merges must stand in that order,
        # and nothing else may be in the vocabulary but the 256 bytes.
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
        """The bytes of every id, or None where tokens are not in the byte-level alphabet."""
        if (self.spec.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        table = [b""] * self.n_ids
        foreign = dict.fromkeys(range(256), 0xFFFF)  # what latin-1 can't encode
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
        """The same splitting rule, all but its look-ahead grouped: a tenth faster, since that group
        needs no backtracking engine."""
        import tiktoken
        easy, look_ahead, rest = regex.partition(r"|\s+(?!\S)")
        regex = f"(?:{easy}){look_ahead}{rest}"
        vocab = self.spec["model"]["vocab"]
        ranks = {self.token_bytes[i]: i for token, i in vocab.items() if token not in self.specials}
        return tiktoken.Encoding("own", pat_str=regex, mergeable_ranks=ranks, special_tokens={})

    def _tokenizers(self):
        import tokenizers
        print("tokenizer: tiktoken can't take this form over; the slower `tokenizers` is used")
        slow = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
        slow.encode_special_tokens = True
        return slow

    def encode(self, text):
        """Ids of a text, control strings in it taken as plain text."""
        if self.slow:
            return self.slow.encode(text, add_special_tokens=False).ids
        return self.fast.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)

    def decode_bytes(self, ids):
        """UTF-8 bytes of ids; may begin or end inside a character. Ids past n_ids are nothing."""
        if self.token_bytes is None:
            return self.slow.decode([int(i) for i in ids], skip_special_tokens=False).encode()
        return b"".join(self.token_bytes[i] for i in ids if i < self.n_ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def header(self, role):
        """`<|im_start|>role` and a newline: what opens a message."""
        if role not in self.headers:
            self.headers[role] = [self.im_start, *self.encode(role + "\n")]
        return self.headers[role]

    def dialogue(self, messages):
        """ChatML ids of [{"role", "content"}, ...], without the <|endoftext|> behind it."""
        ids, newline = [], self.encode("\n")
        for m in messages:
            ids += self.header(m["role"]) + self.encode(m["content"].strip())
            ids += [self.im_end, *newline]
        return ids

    def trained(self, ids):
        """Which of ChatML ids are trained: assistant content and its <|im_end|> -> bool array.

        Read off the ids by matching the whole header; no text can make the control ids.
        """
        ids, header = np.asarray(ids), self.assistant_header
        mask, ends = np.zeros(len(ids), dtype=bool), np.flatnonzero(ids == self.im_end)
        for start in np.flatnonzero(ids == self.im_start):
            first = start + len(header)
            if np.array_equal(ids[start:first], header):
                end = ends[np.searchsorted(ends, start):][:1]
                mask[first:end[0] + 1 if len(end) else len(ids)] = True
        return mask

    def visible(self, ids):
        """UTF-8 of what a reader sees of a document's ids: in a dialogue its messages, a line each,
        without their roles."""
        ids = np.asarray(ids)
        heads, ends = np.flatnonzero(ids == self.im_start), np.flatnonzero(ids == self.im_end)
        if not len(heads):
            return self.decode_bytes(ids[(ids != self.eot)])
        messages = [self.decode_bytes(ids[a + 1:b]) for a, b in zip(heads, ends)]
        return b"\n".join(m.partition(b"\n")[2] for m in messages)

    def save(self, folder, chat=False):
        """Write tokenizer.json and tokenizer_config.json, as AutoTokenizer and ours read them."""
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                      eos_token=IM_END if chat else END_OF_TEXT, pad_token=END_OF_TEXT,
                      chat_template=CHAT_TEMPLATE)
        for name, content in (("tokenizer.json", self.spec), ("tokenizer_config.json", config)):
            write_file(Path(folder) / name, json.dumps(content, ensure_ascii=False))


def train_bytebpe(texts, vocab_size):
    """Byte-level BPE with Qwen2's splitting rule, trained on an iterable of texts -> Tokenizer.

    vocab_size counts all ids: 256 bytes, merges, 3 control tokens. Few texts may give fewer.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer
    if not 256 + 3 <= vocab_size <= 2**20:
        raise UserError(f"vocab_size={vocab_size} is too small or too large: 259 (256 bytes and 3 "
                        "control tokens) to 1,048,576")
    tok = HFTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_REGEX), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Training slows down with the square of a piece's length, and text without punctuation is one
    # piece: pieces are cut, for the trainer alone, where that changes nothing else (LOG.md).
    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_PIECE}}}"), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, cut, level])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty()))
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return Tokenizer(json.loads(tok.to_str()))


def load_tokenizer(name):
    """The Tokenizer of "qwen", "gpt2", a hub id or a path: tokenizer.json or a folder with one (a
    model, a prepared set), a .tiktoken file, or a folder with vocab.json and merges.txt."""
    path = Path(name)
    if path.is_dir() and not any((path / f).is_file() for f in ("tokenizer.json", "vocab.json")):
        raise UserError(f"tokenizer {name}: no tokenizer.json in this folder")
    if path.is_dir() and not (path / "vocab.json").is_file() or (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if not path.exists():
        # what looks like a path, and is none, is a slip of the pen and not a hub id
        if name not in HUB_NAMES and (path.suffix or name.count("/") != 1
                                      or path.parent.is_dir()):
            raise UserError(f"tokenizer {name}: no such file, and not a hub id like "
                            "Qwen/Qwen2-0.5B")
        path = _download(HUB_NAMES.get(name, name))
    try:
        if path.is_dir():
            return _from_vocab_and_merges(path)
        if path.suffix == ".tiktoken":
            return _from_tiktoken(path)
        return Tokenizer(json.loads(path.read_text(encoding="utf-8")))
    except Exception as e:  # `tokenizers` raises what it likes
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path}: not a tokenizer file ({type(e).__name__}: {reason})") from e


def _download(hub_id):
    from huggingface_hub import hf_hub_download, logging
    logging.set_verbosity_error()  # its retries would fill the screen
    try:
        return Path(hf_hub_download(hub_id, "tokenizer.json"))
    except Exception as e:  # the hub client raises errors of four libraries
        raise UserError(
            f"tokenizer {hub_id} can't be had from the hub ({type(e).__name__}). Set HF_ENDPOINT "
            "to a mirror, give a local path (--tokenizer=PATH), or train one: "
            "--tokenizer=bytebpe") from e


def _spec(vocab, merges, regex):
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False}
    return {"version": "1.0", "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "decoder": level, "model": {"type": "BPE", "dropout": None, "unk_token": None,
                                        "continuing_subword_prefix": None,
                                        "end_of_word_suffix": None, "fuse_unk": False,
                                        "byte_fallback": False, "vocab": vocab, "merges": merges}}


def _from_vocab_and_merges(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    regex = GPT2_REGEX if len(merges) == 50_000 else QWEN_REGEX  # the only sign these files give
    added = {t: vocab.pop(t) for t in (END_OF_TEXT, IM_START, IM_END) if t in vocab}
    spec = _spec(vocab, merges, regex)
    spec["added_tokens"] = [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False,
                                 normalized=False, special=True) for t, i in added.items()]
    return Tokenizer(spec)


def _from_tiktoken(path):
    """Lines of base64 token and rank, in Qwen's form. The merge that makes a token is the pair left
    when its bytes are merged by the ranks below its own."""
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
    merges = [[text(part) for part in last_pair(token)] for token in by_rank if len(token) > 1]
    return Tokenizer(_spec({text(token): ranks[token] for token in by_rank}, merges, QWEN_REGEX))

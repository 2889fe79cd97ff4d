"""Text to ids and back: Hugging Face's tokenizer.json on disk, encoded by tiktoken if possible.

    tok = Bins("demo").tokenizer            # or tokenizer_files.load_tokenizer("qwen")
    ids = tok.encode("数学是")               # control tokens are never parsed from text
    tok.encode_chat([{"role": "user", "content": "你好"}])        # ChatML ids
"""
import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np

from common.files import write_file

# How a text is split before the byte pairs of each piece are merged.
GPT2_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CL100K_REGEX = QWEN_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # numbers in threes
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_REGEX = "".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?{word}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
) + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_RULES = dict(gpt2=GPT2_REGEX, cl100k=CL100K_REGEX, o200k=O200K_REGEX, qwen=QWEN_REGEX)
CONTROL_TOKENS = END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_alphabet():
    """Return GPT-2's {printable character: byte} for all 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def split_rule(regex):
    """Return the pre-tokenizer of tokenizer.json that splits a text into the matches of regex."""
    return dict(type="Split", pattern=dict(Regex=regex), behavior="Isolated", invert=False)


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
        self.specials = {t["content"]: t["id"] for t in added}
        ids = model["vocab"] | self.specials
        used = set(ids.values())
        if len(used) < len(ids) or not 0 <= min(used) <= max(used) < 2**24:
            raise ValueError("an id is negative, too large or used twice")
        self.vocab_size = max(used) + 1
        for content in CONTROL_TOKENS:
            if content not in self.specials:
                self.specials[content] = self.vocab_size
                added.append(control_token(self.vocab_size, content))
                self.vocab_size += 1
        self.eot, self.im_start, self.im_end = map(self.specials.get, CONTROL_TOKENS)
        # special=True: with split_special_tokens=True transformers takes them as text, as encode()
        spec |= dict(added_tokens=added, post_processor=None, truncation=None, padding=None)
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

    @property
    def padded_vocab_size(self):
        """Return the rows of an embedding: a multiple of 128 multiplies faster."""
        return -(-self.vocab_size // 128) * 128

    def __getstate__(self):
        """Return what encoding needs, without the large tables: a worker starts 1.6 s earlier."""
        return {k: v for k, v in vars(self).items() if k not in ("spec", "token_bytes")}

    def _known_regex(self, merges):
        """Return the splitting regex if tiktoken gives the same ids as `tokenizers`, else None."""
        model, pre = self.spec["model"], self.spec.get("pre_tokenizer") or {}
        *first, last = pre.get("pretokenizers", [pre])
        if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
            return None
        if last.get("use_regex", True):
            regex = None if first else GPT2_REGEX
        else:
            regex = next((r for r in SPLIT_RULES.values() if first == [split_rule(r)]), None)
        # tiktoken merges the pair whose result has the lowest id: the merges must be in this order,
        # and the vocabulary must be the 256 bytes and the results of the merges.
        made = [model["vocab"].get(a + b, -1) for a, b in merges]
        plain = model["type"] == "BPE" and not any(model.get(k) for k in (
            "dropout", "unk_token", "byte_fallback", "continuing_subword_prefix",
            "end_of_word_suffix"))
        ordered = all(a < b for a, b in zip([-1, *made], made))
        complete = len(model["vocab"].keys() - self.specials.keys()) == len(made) + 256
        known = (self.token_bytes is not None
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

    def loss_mask(self, ids, first=0):
        """Return which of ChatML ids (n,) the loss covers, (n,) bool: the content of assistant
        messages and their <|im_end|>, from the index `first` on.

        Messages are found by the ids of the whole header, which no text encodes to.
        """
        ids, header = np.asarray(ids), self.assistant_header
        mask, ends = np.zeros(len(ids), dtype=bool), np.flatnonzero(ids == self.im_end)
        for start in np.flatnonzero(ids == self.im_start):
            header_end = start + len(header)
            if np.array_equal(ids[start:header_end], header):
                end = ends[np.searchsorted(ends, start):][:1]
                mask[header_end:end[0] + 1 if len(end) else len(ids)] = True
        mask[:first] = False
        return mask

    def decode_chat(self, ids):
        """Return the messages of ChatML ids (n,), as encode_chat takes them."""
        ids = np.asarray(ids)
        starts, ends = np.flatnonzero(ids == self.im_start), np.flatnonzero(ids == self.im_end)
        texts = [self.decode(ids[a + 1:b]).partition("\n") for a, b in zip(starts, ends)]
        return [dict(role=role, content=content) for role, _, content in texts]

    def plain_text(self, ids):
        """Return a document's text as UTF-8 bytes, without control tokens; of a dialogue the
        contents of its messages, joined by newlines."""
        ids = np.asarray(ids)
        if self.im_start not in ids:
            return self.decode_bytes(ids[ids != self.eot])
        return "\n".join(m["content"] for m in self.decode_chat(ids)).encode()

    def save(self, folder, chat=False):
        """Write tokenizer.json and tokenizer_config.json for load_tokenizer and AutoTokenizer."""
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                      eos_token=IM_END if chat else END_OF_TEXT, pad_token=END_OF_TEXT,
                      chat_template=CHAT_TEMPLATE)
        for name, content in (("tokenizer.json", self.spec), ("tokenizer_config.json", config)):
            write_file(Path(folder) / name, json.dumps(content, ensure_ascii=False))

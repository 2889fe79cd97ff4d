"""Cleaning of documents: normalise, remove boilerplate, decide whether to keep.

    doc, reason, trimmed = clean_document(doc, Rules(min_chars=10))   # reason "" = keep it
"""
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np

from common.command_line import optional_package
from corpus.files import UNDECODABLE, first_reason
from corpus.sources import WikiPage

# control characters, byte order and direction marks, soft hyphens, surrogates
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u200b\u200e"
                     "\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")
LONG_BLANK = re.compile(r"[^\S\n]{101,}")  # tiktoken overflows its stack on a million
MARKS = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.combining(c))
MANY_MARKS = re.compile(f"(?<=[{MARKS}])[{MARKS}]{{30,}}")  # NFC takes quadratic time in them
IS_MARK = np.zeros(2**16, dtype=bool)  # by UTF-16 code unit; of a surrogate pair the first unit
IS_MARK[np.frombuffer(MARKS.encode("utf-16-le"), dtype="<u2")] = True
IS_MARK[0xDC00:0xE000] = False
# Bytes that UTF-8 could not decode, written as U+FFFD and read as GBK; a text about it quotes it.
MOJIBAKE = re.compile("锟斤拷(?<![“‘「『《（(\"']锟斤拷)")
LABEL = r"[【\[]?(?:标\s?题|標\s?題|正\s?文)(?:[】\]][:：]?|\s?[:：])[ \t\u3000]*"
LABELS = re.compile(rf"\A{LABEL}(?:((?:.*\n){{1,5}}?){LABEL})?")  # 标题：... 正文：... of a crawler
# Lines of web pages that do not belong to the text. The slow BOILERPLATE runs only on lines with
# one of the HINTS.
HINTS = ("编辑", "责编", "来源", "原标题", "相关", "分享到", "一篇", "一页", "版权所有", "转载", "ICP备",
         "返回", "打印本页", "关闭窗口", "加入收藏", "ights reserved", "opyright", "©", "点击")
BOILERPLATE = re.compile(
    r"[（(【\[]?(?:(?:责任|实习|本文|网络)?编辑|责编|(?:本文|文章|信息|稿件|新闻|图片)来源|原标题"
    r"|相关(?:阅读|新闻|链接|报道|专题)|分享到|上一[篇页]|下一[篇页])\s*[:：].*"
    r"|.{0,12}(?:©|copyright).*|.*(?:版权所有|ICP备\d|all rights reserved).*"
    r"|.*(?:未经.{2,12}(?:不得|禁止|严禁|谢绝)转载|转载(?:请|须|时请)?(?:务必)?注明).*"
    r"|[【\[(（]?(?:返回(?:首页|顶部|列表|目录)|打印本页|关闭窗口|加入收藏|回到顶部|点击(?:查看|进入).{2,12}"
    r")[】\])）>]{0,3}", re.I)
MAX_BOILERPLATE = 80  # characters; a longer line that matches is text


@dataclass
class Rules:
    """Settings of the cleaning. The minima apply to texts, not to dialogues."""
    min_chars: int = 0        # drop shorter texts
    min_chinese: float = 0.0  # drop texts with a smaller share of Han characters
    simplify: bool = False    # convert traditional to simplified characters


def clean(text):
    """Return the text in NFC with "\\n" as newline, without control characters, blanks at line
    ends, full-width indents and more than one empty line in a row."""
    for newline in ("\r\n", "\r", "\x85", "\u2028", "\u2029"):
        text = text.replace(newline, "\n")
    # U+E5E5 is A3A0 of GBK, an old full-width blank.
    text = CONTROL.sub("", text).replace("\xa0", " ").replace("\ue5e5", "\u3000")
    codes = np.frombuffer(text.encode("utf-16-le"), dtype="<u2")
    if np.count_nonzero(IS_MARK[codes]) > 30:
        text = MANY_MARKS.sub("", text)
    lines = unicodedata.normalize("NFC", text).split("\n")
    lines = [line.rstrip(" \t\u3000") for line in lines]
    lines = [line.lstrip(" \u3000") if line[:1] == "\u3000" else line for line in lines]
    lines = [LONG_BLANK.sub(lambda m: m[0][:100], line) if len(line) > 1000 else line
             for line in lines]
    text = "\n".join(lines).strip()
    while "\n\n\n" in text:  # 10 times faster than re.sub
        text = text.replace("\n\n\n", "\n\n")
    return text


def cleaned(text, rules):
    """Return the cleaned text, with simplified characters if the rules say so."""
    return simplifier().convert(clean(text)) if rules.simplify else clean(text)


def clean_document(doc, rules):
    """Return (cleaned document, reason to drop it or "", Counter of what was trimmed).

    doc: a str, WikiPage or dialogue as a reader yields it; a WikiPage becomes a str.
    """
    if isinstance(doc, list):
        return clean_dialogue(doc, rules)
    trimmed = Counter()
    text = doc.text() if isinstance(doc, WikiPage) else doc
    text = MOJIBAKE.sub(UNDECODABLE, text)
    if UNDECODABLE in text:
        lines = text.splitlines()
        kept = [line for line in lines if UNDECODABLE not in line]
        trimmed["undecodable lines"] = len(lines) - len(kept)
        if 10 * len(kept) < 9 * len(lines):
            return "", "bad encoding", trimmed
        text = "\n".join(kept)
    text = cleaned(text, rules)
    if LABELS.match(text):
        text = clean(LABELS.sub(r"\1", text))
        trimmed["header labels"] = 1
    hints = [hint for hint in HINTS if hint in text]
    if hints:
        lines = text.split("\n")
        kept = [line for line in lines if len(line) > MAX_BOILERPLATE
                or not any(hint in line for hint in hints)
                or not BOILERPLATE.fullmatch(line.strip())]
        trimmed["boilerplate lines"] = len(lines) - len(kept)
        text = clean("\n".join(kept)) if len(kept) < len(lines) else text
    reason = first_reason({
        "empty": not text, "too short": len(text) < rules.min_chars,
        "little Chinese": chinese_share(text) < rules.min_chinese})
    return text, reason, trimmed


def clean_dialogue(doc, rules):
    """Return (messages, reason to drop them or "", Counter of what was trimmed) of a dialogue.

    It is cut at its first empty message, then after its last answer. An empty system message is
    removed.
    """
    if any(UNDECODABLE in MOJIBAKE.sub(UNDECODABLE, m["content"]) for m in doc):
        return [], "bad encoding", Counter()
    messages = [dict(role=m["role"], content=cleaned(m["content"], rules)) for m in doc]
    messages = [m for m in messages if m["content"] or m["role"] != "system"]
    n = next((i for i, m in enumerate(messages) if not m["content"]), len(messages))
    while n and messages[n - 1]["role"] != "assistant":  # the loss covers nothing after it
        n -= 1
    reason = "" if n else "empty message"
    return messages[:n], reason, Counter({"messages": len(messages) - n})


def chinese_share(text):
    """Return the share of Han characters among the characters that are not blank."""
    codes = np.frombuffer(text.encode("utf-16-le"), dtype="<u2")
    han = np.count_nonzero(codes - np.uint16(0x3400) <= 0x9FFF - 0x3400)  # below: wraps around
    rare = np.count_nonzero(codes - np.uint16(0xD840) <= 0xD8FF - 0xD840)  # first of a pair
    return (han + rare) / max(1, np.count_nonzero(codes > 32) - rare)


def identity(doc):
    """Return the string whose hash identifies a cleaned document."""
    return doc if isinstance(doc, str) else "".join(f"{m['role']}\n{m['content']}\n" for m in doc)


@cache
def simplifier():
    """Return OpenCC's converter to simplified characters; it converts words, not characters."""
    with optional_package("simplify", "opencc"):
        from opencc import OpenCC
    return OpenCC("t2s")

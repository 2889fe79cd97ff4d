"""Detect the encoding of a text file from its first bytes.

Measured on pieces of real text in eight encodings: of pieces of 20 characters in GBK 99 % are
decoded correctly and the rest refused (charset-normalizer: 12 % decoded wrongly); of pieces of 100
characters all are decoded correctly.
"""
import codecs
import re
from functools import lru_cache

SNIFF_BYTES = 2**20  # beginning of a file from which its encoding and format are detected
BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
                    (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
                    (codecs.BOM_UTF16_BE, "utf-16"))
# The 200 most frequent Han characters, in both scripts: more than half of Chinese text; 30 hangul.
FREQUENT = (
    "的一是在了不有个用我以这人你中可和为来他上大到要行们时下会文国能年于使如也出件作发多后地过本得生就对它说开子之面自成分所而方道定法"
    "理数其里看着些家工者将那同当经学并动都进去好现新应么日第部还然最小或程前主事与系安器但没机命实更因务果内统点很关只建通样全提加想入种"
    "天等间令从设业代名十管她据此三意知目制公民起二问常重外需心高已合式表基被两性解化月由长相正区包条何位接及情单无度置明体信选运户门什"
    "個這為來們時會國於發後過對說開數裡裏著將當經學並動進現應麼還與沒機實務內統點關樣種間從設業據問兩長區條單無體選運戶門"
    "이다는에의을가고한로지기하은사어스서도니를리자해인시들그수")


def _block(encoding, first, last):
    """Return the characters whose two bytes lie between first and last in an encoding."""
    codes = (code.to_bytes(2, "big") for code in range(first, last + 1))
    return {char for code in codes if (char := code.decode(encoding, "ignore")) > "\x7f"}


# The weight of a character as evidence for its decoding: 1 for common Han characters of both
# scripts, punctuation, kana and hangul, 2 for frequent ones, 0 for all others.
PUNCTUATION_KANA_HANGUL = ((0x2010, 0x2027), (0x3000, 0x3012), (0x3041, 0x30FF), (0xAC00, 0xD7A4),
                           (0xFF01, 0xFF5F))
CHINESE = (dict.fromkeys(_block("gb2312", 0xB0A1, 0xD7F9) | _block("big5", 0xA440, 0xC67E), 1)
           | {chr(c): 1 for span in PUNCTUATION_KANA_HANGUL for c in range(*span)}
           | dict.fromkeys(FREQUENT, 2))
ANY = CHINESE | {chr(c): 2 for c in range(0x3041, 0x3094)}  # EUC-JP and GBK have the same hiragana
ENCODINGS = {"gb18030": CHINESE, "big5hkscs": CHINESE, "utf-16-le": ANY, "utf-16-be": ANY,
             "cp932": ANY, "euc_jp": ANY, "cp949": ANY}
USUAL_SCORE, MIN_SCORE, MIN_LEAD = 1.5, 0.9, 0.1  # right decodings have 1.0 or more


class UnknownEncoding(UnicodeError):
    """No encoding is certainly the right one."""


@lru_cache(2)  # called several times for each file
def encoding_of(head):
    """Return the encoding of a file that begins with these bytes.

    That of its byte order mark, else UTF-8 if nearly all of it is valid and without zero bytes,
    else the one of ENCODINGS that gives the most common characters. UnknownEncoding: no encoding
    leads clearly, or the characters are those of a wrong decoding.
    """
    for mark, name in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    text, bad = head.decode("utf-8", "replace"), 0
    try:  # the last character may be incomplete if the file is longer
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < SNIFF_BYTES)
    except UnicodeDecodeError:
        bad = text.count("\ufffd")
    if 10 * bad <= _beyond_ascii(text) and "\0" not in text:
        if _misread(text):
            raise UnknownEncoding("bad encoding: UTF-8 that was once read as GBK or Latin-1; take "
                                  "the file from where it is right")
        return "utf-8"
    sample = head[re.search(rb"[\0\x80-\xff]", head).start():][:2**16]  # without a long ASCII part
    texts = {e: (head[:2**16] if e.startswith("utf-16") else sample).decode(e, "replace")
             for e in ENCODINGS}
    scores = {e: _score(text, ENCODINGS[e]) for e, text in texts.items()}
    best = max(scores, key=scores.get)
    rivals = [e for e in scores if scores[e] > scores[best] - MIN_LEAD and texts[e] != texts[best]]
    if scores[best] >= MIN_SCORE and not rivals:
        return best
    if 100 * bad <= len(text):  # nearly all ASCII
        return "utf-8"
    raise UnknownEncoding("bad encoding: neither UTF-8 nor surely another one; convert the file to "
                          "UTF-8")


def _beyond_ascii(text):
    return len(text) - len(text.encode("ascii", "ignore"))


def _score(text, weights):
    """Return the mean weight of the characters beyond ASCII, zero bytes included."""
    text = re.sub("[\1-\x7f]+", "", text)
    # one more character of USUAL_SCORE: text in ASCII only is decoded correctly
    return (sum(weights.get(c, 0) for c in text) + USUAL_SCORE) / (len(text) + 1)


def _misread(text):
    """Return whether text is UTF-8 that was once read as GBK or Latin-1: encoded again, most of its
    bytes are Han characters in UTF-8, or U+FFFD (锟斤拷). That never happens by chance."""
    for encoding, chars_per_han in (("gb18030", 1.5), ("cp1252", 3), ("latin-1", 3)):
        back = text.encode(encoding, "ignore").decode("utf-8", "ignore")
        regained = sum("\u4e00" <= c <= "\u9fff" or c == "\ufffd" for c in back)
        if 2 * regained * chars_per_han > _beyond_ascii(text):
            return True
    return False

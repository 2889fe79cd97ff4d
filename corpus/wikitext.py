"""Wikitext to plain text.

    plain(markup)        an article of a MediaWiki dump
    tidy(text)           the output of WikiExtractor and similar programs

Paragraphs, headings and list items keep their lines. Every step takes linear time, even on broken
markup. mwparserfromhell is not used because of its measured speed and output: see LOG.md.
"""
import html
import re
from collections import Counter

SIMPLIFIED = ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh")  # preferred regional forms, in order
HIDDEN_LINKS = ("file", "image", "category", "media", "文件", "檔案", "档案", "图像", "圖像",
                "分类", "分類")
LANGUAGES = frozenset(
    "af als am an ar arz ast az ba bar be bg bn br bs ca ceb ckb cs cv cy da de el en eo es et "
    "eu fa fi fr fy ga gan gd gl gu hak he hi hr hu hy ia id is it ja jv ka kk kn ko ku ky la "
    "lb li lmo lt lv mg mk ml mn mr ms my nds ne nl nn no oc pa pl ps pt qu ro ru sa sco sd sh "
    "si simple sk sl so sq sr su sv sw ta te tg th tl tr tt ug uk ur uz vec vi vo war wuu xmf "
    "yi yo zh-classical zh-min-nan zh-yue".split())
REDIRECT = re.compile(r"\s*#(?:redirect|重定向|重新導向)", re.I)
DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:[\w-]{0,30}disambig[\w-]{0,30}|dab|hndis|geodis"
    r"|\w{0,30}消歧[义義]\w{0,30})\s*[|}]", re.I)
MAX_DEPTH = 60        # of nested templates; deeper markup is broken

# Templates that show text within a sentence. SHOWN: {name: arguments, of which the first one given
# is shown}; JOINED: {name: arguments shown one after the other}. Other templates are dropped.
SHOWN = {"lang": [2], "lang-": [1], "langx": [2], "link-": [3, 1], "le": [3, 1], "tsl": [4, 3],
         "ill": ["lt", 1], "internal link helper": ["d", 1], "nihongo": [1], "link": [2, 1],
         "nowrap": [1], "nobr": [1], "small": [1], "big": [1], "abbr": [1], "tooltip": [1],
         "color": [2], "font color": [2], "ruby": [1], "zy": [1], "僻字": [1], "unicode": [1],
         "ipa": [1], "sup": [1], "sub": [1], "mvar": [1], "math": [1], "val": [1], "num": [1],
         "quote": [1], "cquote": [1], "blockquote": [1], "rquote": [2], "vanchor": [1]}
JOINED = {"convert": [1, 2], "cvt": [1, 2]}

HIDDEN_TAGS = ("ref", "gallery", "timeline", "table", "imagemap", "templatestyles", "style",
               "script", "graph", "mapframe", "score", "hiero", "references", "noinclude")
FORMULAS = ("math", "chem", "ce")
ANY_TAG = re.compile(r"<(/?)([a-z]+[0-9]?)(?:[\s/][^<>]*)?>", re.I)
LAYOUT_TAGS = frozenset(
    "abbr b bdi big blockquote br center cite code dd del div dl dt em font h1 h2 h3 h4 hr i "
    "includeonly ins kbd li nowiki ol onlyinclude p poem pre q rb rp rt ruby s samp section small "
    "source span strike strong sub sup syntaxhighlight table td th tr tt u ul var wbr".split())
NESTED = re.compile(r"(\{\{|\}\}|\[\[|\]\]|^[ :*]*\{\||^[ ]*\|\}(?!\})|-\{(?!\{)|\}-)", re.M)
CLOSES = {"}}": "{{", "]]": "[[", "|}": "{|", "}-": "-{"}
HEADING = re.compile(r"(={1,6})\s*(.*?)\s*={1,6}")
APPENDIX = re.compile(
    r"(?:参考|參考|注释|注釋|註釋|註解|注解|脚注|腳註|附注|附註|资料|資料|来源|來源|外部|相关|相關|参见|參見|参看|參看|"
    r"另见|另見|延伸|图集|圖集|画廊|畫廊|references|notes|external links|see also|further reading)"
    r"(?:文献|文獻|资料|資料|来源|來源|书目|書目|链接|連結|鏈接|条目|條目|阅读|閱讀|與註釋|与注释|[与與及和]注[释釋])?", re.I)
FORM = re.compile(r"\s*([a-z]{2,3}(?:-[a-z]+)?)\s*:(.*)", re.S | re.I)
LEFT_FORMS = re.compile(r"-\{((?:[^{}]|\{[^{}]*\})*?)\}-")
# Empty brackets, left by a dropped template; but "main()" keeps its brackets.
BRACKETS = re.compile(r"(?:[（［]|(?<![A-Za-z0-9_])[(\[])[\s,，、;；:：]*[）)\]］]|《》|〈〉|「」|『』|“”")
AFTER_OPENING = re.compile(r"(?<=[（(])[\s,，、;；]{1,20}")
BEFORE_CLOSING = re.compile(r"[\s,，、;；:：]{1,20}(?=[）)])")


def plain(markup):
    """Return the text of an article in wikitext without templates, tables, references, pictures.
    """
    text = re.sub(r"<!--.*?(?:-->|\Z)", "", markup, flags=re.S)
    text = resolve(drop_tags(text))
    text = re.sub(r"\[(?:https?:|ftp:)?//[^\s\[\]]*+[ \t]?([^\[\]\n]*+)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", re.sub(r"__[A-Z]{3,30}__", "", text))
    return empty_brackets(unescape(outline(text)))


def unescape(text):
    """Return html.unescape(text), without character numbers too long for Python to convert."""
    return html.unescape(re.sub(r"&#x?[0-9a-fA-F]{8,};?", "", text))


def tidy(text):
    """Return extracted text with regional forms chosen, without tags and empty brackets."""
    return empty_brackets(drop_tags(LEFT_FORMS.sub(lambda m: _regional(m[1]), text)))


def drop_tags(text):
    """Return the text without tags and without the content of HIDDEN_TAGS; formulas become TeX
    between dollar signs, <br> a newline."""
    lowered, pieces, at, hidden = text.lower(), [], 0, ""
    last_end = {name: lowered.rfind(f"</{name}") for name in (*HIDDEN_TAGS, *FORMULAS)}
    for tag in ANY_TAG.finditer(text):
        name, ending = tag[2].lower(), tag[1] == "/"
        if hidden:
            if ending and name == hidden:
                if name in FORMULAS:
                    pieces.append(_formula(text[at:tag.start()]))
                hidden, at = "", tag.end()
        elif name in last_end or name in LAYOUT_TAGS:
            pieces.append(text[at:tag.start()] + ("\n" if name == "br" else ""))
            at = tag.end()
            if not ending and tag[0][-2] != "/" and tag.start() < last_end.get(name, -1):
                hidden = name
    return "".join(pieces) + text[at:]


def _formula(tex):
    """Return TeX between dollar signs, its brackets spaced so that they do not look like markup."""
    return "$" + re.sub(r"(?<=[{}\[\]-])(?=[{}\[\]-])", " ", tex.strip()) + "$"


def resolve(text):
    """Replace links, templates, tables and regional forms, the innermost first, in one pass."""
    stack, counts = [("", [])], Counter()  # [(opening token, pieces so far)], open tokens by kind

    def close():
        opened, pieces = stack.pop()
        counts[opened] -= 1
        return opened, "".join(pieces)

    for i, piece in enumerate(NESTED.split(text)):
        token = piece.strip(" :*") if i % 2 else ""
        if token in RENDER and len(stack) < MAX_DEPTH:
            stack.append((token, []))
            counts[token] += 1
        elif counts[CLOSES.get(token)]:
            while stack[-1][0] != CLOSES[token]:  # never closed: drop the token, keep the text
                stack[-2][1].append(close()[1])
            opened, inner = close()
            stack[-1][1].append(RENDER[opened](inner))
        elif not token:
            stack[-1][1].append(piece)
    while len(stack) > 1:  # never closed
        stack[-2][1].append(close()[1])
    return "".join(stack[0][1])


def _link(inner):
    """Return the shown text of [[target|shown]]; "" for pictures, categories, other languages."""
    target, *shown = inner.split("|")
    space, colon, _ = target.partition(":")
    space = space.strip()
    space = space.lower() if len(space) > 3 else space  # [[Re:..]] and [[CSI:..]] are titles
    if colon and (space in HIDDEN_LINKS or space in LANGUAGES and not shown):
        return ""
    if shown and shown[-1].strip():
        return shown[-1]
    if shown and len(target) < 300:  # [[a (b)|]] shows a
        return re.sub(r"[（(][^（）()]*[）)]$", "", target.strip()).strip()
    return target.lstrip(": ").partition("#")[0] or target


def _template(inner):
    """Return the text that {{name|...}} shows according to SHOWN and JOINED, else ""."""
    name, *given = inner.split("|")
    name, arguments, count = name.strip().lower().replace("_", " "), {}, 0
    for argument in given:
        key, equals, value = argument.partition("=")
        if not (equals and re.fullmatch(r"[\w -]{1,30}", key)):
            count += 1
            key, value = str(count), argument
        arguments[key.strip().lower()] = value.strip()
    if name in JOINED:
        return "".join(arguments.get(str(k), "") for k in JOINED[name])
    keys = SHOWN.get(name) or SHOWN.get(name.partition("-")[0] + "-", [])
    return next((arguments[str(k)] for k in keys if arguments.get(str(k))), "")


def _regional(inner):
    """Return the simplified form of -{zh-hans:..;zh-hant:..}-; "" if a flag before "|" hides it."""
    flags, bar, rest = inner.partition("|")
    if bar and re.fullmatch(r"[A-Za-z; -]{0,12}", flags):
        if set(flags.upper()) & set("TH-"):
            return ""  # a rule for the title or the rest of the page
        inner = rest
    matches = [FORM.fullmatch(part.rpartition("=>")[2]) for part in inner.split(";")]
    forms = {m[1].lower(): m[2].strip() for m in matches if m}
    if not forms:
        return inner
    return next((forms[f] for f in SIMPLIFIED if forms.get(f)), next(iter(forms.values())))


RENDER = {"{{": _template, "[[": _link, "{|": lambda inner: "", "-{": _regional}


def outline(text):
    """Return the text without list and heading marks, headings of empty sections, and the sections
    of references and links."""
    # waiting: headings without text so far; skipped: level of the section being dropped, or 0
    kept, waiting, skipped = [], [], 0
    for line in text.split("\n"):
        heading = HEADING.fullmatch(line.strip()) if line[:1] == "=" and len(line) < 300 else None
        if heading:
            level, title = len(heading[1]), heading[2]
            if not skipped or level <= skipped:
                skipped = level if APPENDIX.fullmatch(title) else 0
                waiting = [h for h in waiting if h[0] < level]
                waiting += [(level, title)] if title and not skipped else []
            continue
        line = re.sub(r"^(?:-{4,}|[*#:;]+)[ \t]*", "", line).rstrip()
        if skipped or line.lstrip()[:1] in ("|", "!") and line:  # the rest of a broken table
            continue
        if line.strip():
            kept += [f"\n{title}" for _, title in waiting]
            waiting = []
        kept.append(line)
    return "\n".join(kept)


def empty_brackets(text):
    """Return the text without empty brackets and without commas just inside other brackets."""
    for _ in range(2):  # nested ones: （《》）
        text = BRACKETS.sub("", text)
    return BEFORE_CLOSING.sub("", AFTER_OPENING.sub("", text))

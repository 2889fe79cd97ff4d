"""Wikitext to plain text.

    plain(markup)        an article of a MediaWiki dump
    tidy(text)           the output of WikiExtractor and similar programs

Paragraphs, headings and list items keep their lines. Every step takes linear time, even on broken
markup. mwparserfromhell is not used because of its measured speed and output: see LOG.md.
"""
import html
import re
from collections import Counter
from pathlib import Path

VARIANTS = {"zh-hans": "简体", "zh-cn": "大陆", "zh-sg": "新加坡", "zh-my": "大马", "zh": "原文",
            "zh-hant": "繁體", "zh-tw": "臺灣", "zh-hk": "香港", "zh-mo": "澳門"}
SIMPLIFIED = ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh")  # in order of preference
HIDDEN_LINKS = "file image category media 文件 檔案 档案 图像 圖像 分类 分類".split()
LANGUAGE = re.compile(r"(?!zh$|doi$|rfc$)[a-z]{2,3}(?:-[a-z-]+)?|simple")  # of another wiki
REDIRECT = re.compile(r"\s*#(?:redirect|重定向|重新導向)", re.I)
DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:[\w-]{0,30}disambig[\w-]{0,30}|dab|hndis|geodis|\w{0,9}消歧[义義]\w{0,9})\s*[|}]", re.I)
MAX_DEPTH = 60        # of nested templates; deeper markup is broken

HIDDEN_TAGS = ("ref", "gallery", "timeline", "table", "imagemap", "templatestyles", "style",
               "script", "graph", "mapframe", "score", "hiero", "references", "noinclude")
FORMULAS = ("math", "chem", "ce")
ANY_TAG = re.compile(r"<(/?)([a-z]+[0-9]?)(?:[\s/][^<>]*)?>", re.I)
LAYOUT_TAGS = frozenset(
    "abbr b bdi big blockquote br center cite code dd del div dl dt em font h1 h2 h3 h4 hr i "
    "includeonly ins kbd li nowiki ol onlyinclude p poem pre q rb rp rt ruby s samp section small "
    "source span strike strong syntaxhighlight table td th tr tt u ul var wbr".split())
NESTED = re.compile(r"(\{\{|\}\}|\[\[|\]\]|^[ :*]*\{\||^[ ]*\|\}(?!\})|-\{(?!\{)|\}-)", re.M)
CLOSES = {"}}": "{{", "]]": "[[", "|}": "{|", "}-": "-{"}
HEADING = re.compile(r"(={1,6})\s*(.*?)\s*={1,6}")
APPENDIX = re.compile(
    r"(?:[参參][考见見看]|[注註][释釋解]|[脚腳附][注註]|[资資]料|[来來]源|外部|相[关關]|另[见見]|延伸|[图圖]集|[画畫]廊"
    r"|references|notes|external links|see also|further reading)(?:文[献獻]|[资資]料|[来來]源|[书書]目"
    r"|[链鏈]接|連結|[条條]目|[阅閱][读讀]|[与與及和][注註][释釋])?", re.I)
BETWEEN_FORMS = re.compile(r";\s*+(?=(?:[^;]*=>\s*)?zh(?:-\w+)?\s*:|$)", re.I)
FORM = re.compile(r"(?:[^:]*=>)?+([^:]*+):(.*)", re.S)
LEFT_FORMS = re.compile(r"-\{((?:[^{}]|(?<!-)\{[^{}]*\})*?)\}-")
SCRIPT = re.compile(r"<(su[pb])>([^<>\n]*)</\1>")
SCRIPTS = {"sup": str.maketrans("0123456789+-−–=", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻⁼"),
           "sub": str.maketrans("0123456789+-−–=", "₀₁₂₃₄₅₆₇₈₉₊₋₋₋₌")}
REFERENCE_MARK = re.compile(r"\s*(?:\[[^\[\]]*\][\s,，]*|[注註]\s*\d+\s*)+")
# {{chem2}} and <chem>: arrows and dots, charges and mass numbers, indices: 2H2O, SO4(2-), ^{13}C
CHEMISTRY = [("<[=-]>", "⇌"), ("->", "→"), (r"\*", "·"), (
    r"\^\{([^{}]*)\}|\^(\d*[+−-]?)|\((\d*[+−-])\)|(?<=[\w)\]])([+−-])(?![\w(\[])",
    r"<sup>\1\2\3\4</sup>"), (r"_{([^{}]*)}|_(\d+)|(?<=[A-Za-z)\]])(\d+)", r"<sub>\1\2\3</sub>")]
# {name: what the template shows}; templates.txt describes the patterns
ROWS = Path(__file__).with_name("templates.txt").read_text(encoding="utf-8").splitlines()
TEMPLATES = {name: pattern.replace(r"\n", "\n") for pattern, tab, names in
             (row.partition("\t") for row in ROWS) for name in names.split("|") if tab}
FIELD = re.compile(r"(?:\[([^{]*))?\{([^}]*)\}(?:([^\[\]{}]*)\])?")  # {2}, or [before{2}after]
# Empty brackets, left by a dropped template; but "main()" keeps its brackets.
BRACKETS = re.compile(r"(?:[（［]|(?<![A-Za-z0-9_])[(\[])[\s,，、;；:：]*[）)\]］]|《》|〈〉|「」|『』|“”")
AFTER_OPENING = re.compile(r"(?<=[（(])[\s,，、;；]{1,20}")
BEFORE_CLOSING = re.compile(r"[\s,，、;；:：]{1,20}+(?=[）)])")


def plain(markup):
    """Return the text of an article in wikitext without templates, tables, references, pictures.
    """
    text = resolve(drop_tags(re.sub(r"<!--.*?(?:-->|\Z)", "", markup, flags=re.S)))
    text = re.sub(r"\[(?:https?:|ftp:)?//[^\s\[\]]*+[ \t]?([^\[\]\n]*+)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", re.sub(r"__[A-Z]{3,30}__", "", text))
    return empty_brackets(unescape(scripts(outline(text))))


def unescape(text):
    """Return html.unescape(text), without character numbers too long for Python to convert."""
    return html.unescape(re.sub(r"&#x?[0-9a-fA-F]{8,};?", "", text))


def tidy(text):
    """Return extracted text in simplified variants, without tags and empty brackets."""
    for _ in range(2):  # nested ones
        text = LEFT_FORMS.sub(lambda m: _variant(m[1]), text)
    return empty_brackets(scripts(drop_tags(text)))


def drop_tags(text):
    """Return the text without tags and without the content of HIDDEN_TAGS. <sup> and <sub> stay;
    formulas become TeX between dollar signs, <br> a newline."""
    lowered, pieces, at, hidden = text.lower(), [], 0, ""
    last_end = {name: lowered.rfind(f"</{name}") for name in (*HIDDEN_TAGS, *FORMULAS)}
    for tag in ANY_TAG.finditer(text):
        name, ending = tag[2].lower(), tag[1] == "/"
        if hidden:
            if ending and name == hidden:
                if name in FORMULAS:
                    pieces.append(_formula(name, text[at:tag.start()]))
                hidden, at = "", tag.end()
        elif name in last_end or name in LAYOUT_TAGS or name in SCRIPTS:
            shown = f"<{tag[1]}{name}>" if name in SCRIPTS else "\n" if name == "br" else ""
            pieces.append(text[at:tag.start()] + shown)
            at = tag.end()
            if not ending and tag[0][-2] != "/" and tag.start() < last_end.get(name, -1):
                hidden = name
    return "".join(pieces) + text[at:]


def scripts(text):
    """Return the text with the digits and signs in <sup> and <sub> as Unicode characters, and
    without the reference marks in them."""
    def script(match):
        inner = html.unescape(match[2])
        return "" if REFERENCE_MARK.fullmatch(inner) else inner.translate(SCRIPTS[match[1]])

    return re.sub("</?su[pb]>", "", SCRIPT.sub(script, text))


def _formula(tag, tex):
    """Return TeX between dollar signs, its brackets spaced so that they do not look like markup;
    a chemical formula without TeX commands as text."""
    if tag != "math" and not re.search(r"[\\$]", tex):
        return _chem2([tex.strip()])
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
    if colon and (space in HIDDEN_LINKS or LANGUAGE.fullmatch(space) and not shown):
        return ""
    if shown and shown[-1].strip():
        return shown[-1]
    if shown and len(target) < 300:  # [[a (b)|]] shows a
        return re.sub(r"[（(][^（）()]*[）)]$", "", target.strip()).strip()
    return target.lstrip(": ").partition("#")[0] or target


def _template(inner):
    """Return the text that {{name|...}} shows according to TEMPLATES; "" if it is not in there."""
    name, *given = re.sub(r"^(\s*\w+):", r"\1|", inner).split("|")  # {{formatnum:1234}} too
    name, arguments, count = " ".join(name.replace("_", " ").split()), {}, 0
    for argument in given:
        key, equals, value = argument.partition("=")
        if not (equals and re.fullmatch(r"[\w -]{1,30}", key)):
            count += 1
            key, value = str(count), argument
        arguments[key.strip().lower()] = value.strip()
    names = (f"{name}/{count}".lower(), name, name.lower(), name.lower().partition("-")[0] + "-")
    shown = next((TEMPLATES[n] for n in names if n in TEMPLATES), "")
    if shown in COMPUTED:
        return COMPUTED[shown]([arguments[key] for key in arguments if key.isdigit()])
    return FIELD.sub(lambda m: _field(m, arguments), shown).removeprefix("；")


def _field(match, arguments):
    """Return what a field of a pattern shows with the arguments {key: value} of a template."""
    before, keys, after = match.groups(default="")
    value = next((arguments[k] for k in keys.split("|") if arguments.get(k)), "")
    return value and before + (value.lstrip("0") if after in ("月", "日") else value) + after


def _number(given):
    """Return the first argument with commas in its long numbers: 1,234,567.8."""
    return re.sub(r"(?<![\d.])\d{4,18}(?!\d)", lambda m: f"{int(m[0]):,}", "".join(given[:1]))


def _quantity(given):
    """Return the quantity of {{convert|2|to|5|km|mi}} in its own unit: 2至5公里."""
    found = re.match(r"(?:[+−-]?[.\d][^|]*\|[^|]+(?:\||$))*", "|".join(given))
    words = (TEMPLATES.get(f"unit {word.lower()}", word) for word in found[0].split("|"))
    return _number(["".join(words)])


def _chem(given):
    """Return the formula of {{chem|SO|4|2-}}: charges and a mass number in front are raised,
    numbers and small letters lowered."""
    text = re.sub(r"^(\d+)(?=\|)|(?<=\|)(\d*[+−-])(?=\||$)", r"<sup>\1\2</sup>", "|".join(given))
    return re.sub(r"\|(['\da-z][^A-Z<|]*)(?=\||$)", r"<sub>\1</sub>", text).replace("|", "")


def _chem2(given):
    formula = "".join(given[:1])
    for mark, shown in CHEMISTRY:
        formula = re.sub(mark, shown, formula)
    return formula


COMPUTED = {"NUMBER": _number, "QUANTITY": _quantity, "CHEM": _chem, "CHEM2": _chem2}


def _variant(inner):
    """Return the simplified form in -{flags|zh-hans:..;zh-hant:..}-, as MediaWiki's ConverterRule
    does, else the first form; "" if a flag hides it."""
    before, bar, rules = inner.partition("|")
    flags = {flag.strip() for flag in before.split(";")} if bar and ":" not in before else set()
    rules = rules if flags else inner
    if flags & {"H", "-", "N"} or flags == {"T"}:  # rules for the page or its title
        return ""
    matches = map(FORM.fullmatch, BETWEEN_FORMS.split(rules))
    forms = {m[1].strip().lower(): m[2].strip() for m in matches if m}
    if flags & {"R", *VARIANTS} or not forms or set(forms) - set(VARIANTS):  # a colon in the text
        return rules
    if "D" in flags:
        return "".join(f"{VARIANTS[code]}：{form}；" for code, form in forms.items())
    return next((forms[code] for code in SIMPLIFIED if forms.get(code)), next(iter(forms.values())))


RENDER = {"{{": _template, "[[": _link, "{|": lambda inner: "", "-{": _variant}


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

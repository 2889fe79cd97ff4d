"""Wikitext shows what zh.wikipedia shows; cleaning removes what is not text."""
import time
from collections import Counter

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.clean import Rules, chinese_share, clean, clean_document
from corpus.sources import SOURCES, WikiPage
from corpus.wikitext import TEMPLATES, plain, tidy

CASES = SHARED / "cases"


def shows(rows):
    """Parametrize a test by the lines "markup -> text" of a table."""
    pairs = [line.strip().split(" => ") for line in rows.strip().split("\n")]
    return pytest.mark.parametrize("markup, text", pairs, ids=[markup for markup, _ in pairs])


# ---- wikitext ----

def test_what_extractors_leave_is_tidied():
    assert tidy("群、環、-{zh-cn:域;zh-tw:體}-等（）") == "群、環、域等"
    assert tidy("與-{zh-hans:简; zh-hant:珍;}-·马普尔（英語：，音译）") == "與简·马普尔（英語：，音译）"
    assert tidy("一<br>\n街-{庄}-（，二）《》main()") == "一\n\n街庄（二）main()"
    assert tidy("-{zh-hans:甲-{乙}-;zh-hant:丙}-，-{zh-cn:{x};zh-tw:y}-，10<sup>8</sup>") == "甲乙，{x}，10⁸"


@shows("""
动画[[Re:从零开始的异世界生活]]很有名 => 动画Re:从零开始的异世界生活很有名
[[CSI:犯罪现场|犯罪现场]] => 犯罪现场
甲[[en:A]][[zh-yue:B]][[be-x-old:C]][[simple:D]]乙 => 甲乙
见[[:en:Tea]]、[[wikt:茶]]、[[doi:10.1]] => 见en:Tea、wikt:茶、doi:10.1
1937年-{{lang|en|now}}，他说 => 1937年-now，他说
[[文件:a.jpg|缩略图|[[茶]]的图]]茶[[Category:茶|*]] => 茶
[[:分类:茶]]、[[:Category:茶]]、[[:File:a.jpg]] => 分类:茶、Category:茶、File:a.jpg
'''甲'''''乙'' => 甲乙
甲{{不知道的模板|乙}}丙{{cite book|title=丁}} => 甲丙
""")
def test_links_show_their_text(markup, text):
    assert plain(markup) == text


def test_numbers_too_long_for_a_character_are_dropped():
    assert plain("甲&#" + "9" * 5000 + ";乙") == "甲乙"


@shows("""
人口{{formatnum:1234567}}人 => 人口1,234,567人
{{Formatnum: -1234567.8912 }} => -1,234,567.8912
{{formatnum:123}}、{{formatnum|12345}}、{{formatnum:1234|R}}、{{nts|9000}} => 123、12,345、1234、9,000
{{frac|1|2}}和{{frac|3}}和{{frac|2|1|3}} => 1⁄2和1⁄3和2 1⁄3
{{birth date|1969|06|01}} => 1969年6月1日
{{Birth date and age|df=yes|1969|6|1}} => 1969年6月1日
{{death date and age|1990|1|2|1920|3|4}} => 1990年1月2日
{{start_date|2001|02}}、{{birth year and age|1969}} => 2001年2月、1969年
'''胡適'''{{BD|1891年|12月17日|1962年|2月24日|胡}} => 胡適（1891年12月17日—1962年2月24日）
（蒙古语，{{bd|1162年|5月31日|1227年|8月25日|catIdx=成}}） => （蒙古语，1162年5月31日—1227年8月25日）
{{bd||约1957年|1989年|3月}} => 约1957年—1989年3月
{{convert|5|km|mi}}，{{convert|2|to|5|km|mi}} => 5公里，2至5公里
{{convert|10000|km|mi|0|abbr=on}} => 10,000公里
{{convert|5|ft|10|in|m|2}} => 5英尺10英寸
{{cvt|100|parsec|0}} => 100parsec
{{¥|100}}、{{US$|1.5億}}、{{HKD|100}}、{{NTD|30|link=yes}} => ¥100、US$1.5億、HK$100、NT$30
{{€|5}}、{{RMB|8.0&nbsp;万}} => €5、¥8.0\u00a0万
{{val|6.02|e=23|u=mol}}、3{{e|8}}、{{10^|-9}} => 6.02×10²³ mol、3×10⁸、10⁻⁹
""".replace("\\u00a0", "\u00a0"))
def test_numbers_dates_and_currencies_stay_in_the_sentence(markup, text):
    assert plain(markup) == text


@shows("""
{{quote|南方之嘉木也。}} => 南方之嘉木也。
{{cquote|text=南方之嘉木也。}}，{{引文|嘉木}} => 南方之嘉木也。，嘉木
{{rquote|left|嘉木}} => 嘉木
{{lang|en|tea}}，{{lang-en|tea}}，{{Lang-zh-hans|茶}} => tea，tea，茶
甲（{{zh|s=汉语|t=漢語|p=Hànyǔ}}） => 甲（简体中文：汉语；繁体中文：漢語；拼音：Hànyǔ）
{{zh|t=漢語}}，{{zh|汉语}} => 繁体中文：漢語，汉语
{{link-en|甲|A}}，{{le|甲|A|乙}}，{{link-ja|丙|C|d=Q1}} => 甲，乙，丙
{{tsl|en|Tea|茶}}，{{tsl|en|Tea|茶|茶叶}}，{{tsl|en|Tea}} => 茶，茶叶，Tea
{{ruby|漢字|かんじ}}，{{nowrap|甲 乙}}，{{nowrap|1=a=b}}，{{math|x {{=}} 1}} => 漢字，甲 乙，a=b，x = 1
{{color|red|{{lang|en|{{small|x}}}}}} => x
""")
def test_templates_show_their_text(markup, text):
    assert plain(markup) == text


def test_a_quotation_names_its_author_on_the_next_line():
    assert plain("{{quote|学而时习之。|孔子|《论语》}}") == "学而时习之。\n——孔子，《论语》"
    assert plain("{{cquote|学而时习之。|4=孔子}}") == "学而时习之。\n——孔子"


def test_the_table_of_templates_is_well_formed():
    assert all(name == "BD" or name == name.lower() == name.strip() and name for name in TEMPLATES)
    assert all(TEMPLATES[name] for name in TEMPLATES) and TEMPLATES["nbsp"] == " "


@shows("""
10<sup>8</sup>、10<sup>−6</sup>、10<sup>&minus;6</sup> => 10⁸、10⁻⁶、10⁻⁶
H<sub>2</sub>O、Ca<SUP class="a">2+</SUP>、{{sup|2}}{{sub|3}} => H₂O、Ca²⁺、²₃
x<sup>n</sup>、1<sup>st</sup>、x<sup>2n+1</sup>、v<sub>max</sub> => xn、1st、x²n⁺¹、vmax
C<sub>''n''</sub>H<sub>[[二|2]]</sub> => CnH₂
茶<sup>[1]</sup>甲<sup>[[#n|[1]]]</sup>乙<sup>[注 1][2]</sup>丙<sup>[來源請求]</sup> => 茶甲乙丙
茶{{ref|a}}甲<ref name="x">丁</ref>乙<ref name="x" />丙<sup>註1</sup>{{efn|戊}} => 茶甲乙丙
数组a[1] => 数组a[1]
未闭<sup>2的 => 未闭2的
{{chem|H|2|O}}、{{chem|SO|4|2-}}、{{chem|Na|+}} => H₂O、SO₄²⁻、Na⁺
{{chem|4|2|He}}、{{chem|14|C}}、{{Chem|Ca|(OH)|2}} => ⁴₂He、¹⁴C、Ca(OH)₂
{{chem|C|''n''|H|2''n''+2}} => CnH₂n₊₂
{{chem2|H2SO4}}、{{chem2|SO4(2-)}}、{{chem2|Na+}}、{{chem2|O2-}} => H₂SO₄、SO₄²⁻、Na⁺、O₂⁻
{{chem2|2 H2 + O2 -> 2 H2O}}、{{chem2|CoCl2*6H2O}} => 2 H₂ + O₂ → 2 H₂O、CoCl₂·6H₂O
{{chem2|CH3(CH2)5CH3}}、{{chem2|^{13}CH4 |}} => CH₃(CH₂)₅CH₃、¹³CH₄
<chem>H2O</chem>、<ce>^{227}_{90}Th+</ce>、<ce>\\frac{a}{b}</ce> => H₂O、²²⁷₉₀Th⁺、$\\frac{a} {b}$
<math>x^{2}</math> => $x^{2}$
""")
def test_digits_and_signs_above_and_below_the_line_are_unicode(markup, text):
    assert plain(markup) == text


@shows("""
-{zh-hans:计算机; zh-hant:電腦;}- => 计算机
-{zh-tw:電腦;zh-cn:计算机}- => 计算机
-{zh-hant:電腦;zh-tw:台灣}- => 電腦
-{zh-CN:甲;zh-TW:乙}- => 甲
-{zh-hans:;zh-hant:乙}-茶 => 茶
-{天后宫}-、-{ 甲 }-、-{R|zh-cn:a}- => 天后宫、 甲 、zh-cn:a
-{zh-hans|甲}-、-{zh|乙}-、-{zh-hans;zh-hant|丙}-、-{zh; zh-cn; zh-hk |丁}- => 甲、乙、丙、丁
-{zh-cn|zh-tw:a}-、-{zh-hk|甲;乙}- => zh-tw:a、甲;乙
-{A|zh-cn:博客;zh-tw:部落格}-、-{A|甲}-、-{A;T|zh-cn:乙}- => 博客、甲、乙
茶-{H|zh-cn:博客;zh-tw:部落格}--{T|zh-cn:甲}--{-|zh-cn:甲}--{T;H|甲}- => 茶
茶（-{D|zh-cn:博客; zh-hk:網誌}-） => 茶（大陆：博客；香港：網誌）
-{網誌=>zh-cn:博客;網誌=>zh-tw:部落格}- => 博客
-{zh-hans:A&amp;B;zh-hant:C&lt;D}-、-{zh-hans:&#39;甲&#39;;zh-hant:乙}- => A&B、'甲'
-{zh-cn:http://a.b/c;d=1;zh-tw:乙}-、-{https://a.b/c;d}- => http://a.b/c;d=1、https://a.b/c;d
-{zh-cn:[http://a.b 甲];zh-tw:[http://a.b 乙]}- => 甲
-{zh-cn:<span style="color:red;">甲</span>;zh-tw:<b>乙</b>;}- => 甲
-{zh-hans:甲-{乙}-丙; zh-hant:丁;}-、-{ 外-{ 内 }-外}- => 甲乙丙、 外 内 外
-{zh-hans:[[A|甲]];zh-hant:[[B|乙]]}-、[[茶|-{zh-hans:甲;zh-hant:乙}-]] => 甲、甲
-{zh-hans:{{lang|en|a}};zh-hant:b}-、{{lang|zh|-{zh-hans:甲;zh-hant:乙}-}} => a、甲
""")
def test_language_variants_are_those_of_a_simplified_reader(markup, text):
    assert plain("。" + markup + "。") == "。" + text + "。"


@pytest.mark.parametrize("piece", [
    "{{", "[[", "<ref>", "<a ", "-{", "[//a", "[http://aa", "(", "|}", "'", "=", "<!--", "{|\n",
    "&#1", "{{lang|en|", "a\u0301\u0323", "\u0301\u0323", "[[a|", "\n=a", "-{zh:", " ", "\n",
    "<sup>", "<sup>[1]", "[1] ", "{{chem|1|", "{{chem2|^{", "{{formatnum:1", "{{convert|1|", "1",
    "-{a|;zh:", "-{zh:;", "-{zh:a=>", "=>", ";  ", "-{{a}", "{{quote|a=", "{{a:", "标题：", "正文：\n",
    "锟斤拷", "\ue5e5"])
def test_broken_wikitext_takes_linear_time(piece):
    text = "茶" + piece * (300_000 // len(piece))
    part = text[:100_000]
    closed = "{{chem2|" + part + "}}<sup>" + part + "</sup>-{zh:" + part + "}--{" + part + "}-"
    began = time.process_time()
    for raw in (text, closed):
        for in_wikitext in (True, False):
            clean_document(WikiPage("", raw, in_wikitext), Rules())
    assert time.process_time() - began < 10


@given(st.text(alphabet="{}[]|-=<>ref/!*'\n （）:茶zh;#sup1^+chem2", max_size=300))
@settings(max_examples=500, deadline=None)
def test_broken_wikitext_never_fails_and_plain_text_stays(text):
    plain(text), tidy(text)
    letters = "".join(c for c in text if c == "茶")
    if not set(text) & set("{}[]<>=|!-"):
        assert "".join(c for c in plain(text) if c == "茶") == letters


@given(st.sampled_from(sorted(TEMPLATES)),
       st.lists(st.text("0123456789|=.-+茶a{}[]()'^_\n ", max_size=9)))
@settings(max_examples=500, deadline=None)
def test_no_argument_makes_a_template_fail(name, arguments):
    assert "茶" in plain("茶{{" + "|".join([name, *arguments]) + "}}")


# ---- cleaning ----

def test_texts_are_kept_or_dropped_by_the_rules():
    rules = Rules(min_chars=5, min_chinese=0.3)
    for text, reason in (("", "empty"), ("短", "too short"), ("only English here", "little Chinese"),
                         ("长江是一条很长的河。", "")):
        assert clean_document(text, rules)[1] == reason
    assert chinese_share("a 长\n") == 0.5 and chinese_share("𠮷") == 1
    page = "正文在这里，讲一件事。\n责任编辑：张三\n相关阅读：别的\n版权所有 某网站\n责任编辑是一种工作。"
    text, _, trimmed = clean_document(page, Rules())
    assert text == "正文在这里，讲一件事。\n责任编辑是一种工作。" and trimmed["boilerplate lines"] == 3


@pytest.mark.parametrize("mark", ["\udcff", "锟斤拷", "锟斤拷锟斤拷?"])
def test_lines_that_were_not_decoded_are_dropped(mark):
    lines = ["好的一行。"] * 12 + [f"坏{mark}的一行"]
    text, reason, trimmed = clean_document("\n".join(lines), Rules())
    assert not reason and "坏" not in text and trimmed == {"undecodable lines": 1}
    assert clean_document(f"坏{mark}的", Rules())[1] == "bad encoding"
    dialogue = [dict(role="user", content="问"), dict(role="assistant", content=f"坏{mark}的")]
    assert clean_document(dialogue, Rules())[1] == "bad encoding"


def test_a_text_about_mojibake_is_kept():
    text = "“锟斤拷”是常见的乱码，由U+FFFD而来。"
    assert clean_document(text, Rules()) == (text, "", Counter())


def test_invisible_characters_go_and_emoji_stay():
    emoji = "一家👨\u200d👩\u200d👧\u200d👦看🏳️\u200d🌈和🏴\U000e0067\U000e0062\U000e007f，１２３元"
    assert clean(emoji) == emoji
    text = "我\u200b们\ufeff，\u202d１３\u202c、\u2066甲\u2069\u200e、\u061c乙"
    assert clean(text) == "我们，１３、甲、乙"
    assert clean("甲\ud800乙\udfff") == "甲乙"  # lone surrogates
    assert clean("甲\ue000乙\uf8ff") == "甲\ue000乙\uf8ff"  # private use: characters of some font


def test_the_full_width_blank_of_gbk_is_an_indent():
    text = "  清晨\r\n  河 面".encode("gb18030").replace(b" ", b"\xa3\xa0").decode("gb18030")
    assert "\ue5e5" in text and clean(text) == "清晨\n河\u3000面"


@pytest.mark.parametrize("blank", " \ue5e5\n")
def test_two_million_blanks_are_no_text(blank):
    began = time.process_time()
    text = blank * 1_000_000 + "茶" + blank * 1_000_000 + "茶"
    for doc in (text, WikiPage("", text, True)):
        assert len(clean_document(doc, Rules())[0]) < 200
    assert time.process_time() - began < 10


@pytest.mark.parametrize("text, want", [
    ("标题：春天\n作者：张三\n正文：春天来了。", "春天\n作者：张三\n春天来了。"),
    ("【标题】春天\n【正文】\n来了", "春天\n\n来了"), ("标 题: 春天\n\n正 文: 来了", "春天\n\n来了"),
    ("正文：春天来了。", "春天来了。"), ("标题党：春天", "标题党：春天"),
    ("春天\n正文：来了", "春天\n正文：来了"),
    ("标题：一\n二\n三\n四\n五\n六\n七\n正文：八", "一\n二\n三\n四\n五\n六\n七\n正文：八")])
def test_labels_of_title_and_body_go_at_the_beginning(text, want):
    found, reason, trimmed = clean_document(text, Rules())
    assert found == want and not reason
    assert trimmed["header labels"] == (not text.startswith(want[:2]))


def test_traditional_text_is_simplified_word_by_word():
    pytest.importorskip("opencc")
    assert clean_document("頭髮和發展，乾淨和乾坤", Rules(simplify=True))[0] == "头发和发展，干净和乾坤"


@pytest.mark.parametrize("name, content", [
    ("wiki_00", '{"title": "茶", "text": "%s"}'), ("wiki_01", '{"title": "茶", "text": "茶\\n\\n%s"}'),
    ("wiki_02", '<doc id="1" url="" title="茶">\n茶\n\n%s\n\n</doc>\n'),
    ("a.xml", "<mediawiki><page><title>茶</title><text>{{模板}}%s</text></page></mediawiki>")])
def test_a_page_without_text_is_empty_in_every_reader(name, content, tmp_path):
    for text, found in (("是饮料。", ("茶\n\n是饮料。", "")), ("", ("", "empty"))):
        (tmp_path / name).write_text(content % text, encoding="utf-8")
        ((_, doc),) = SOURCES["wiki"].documents([str(tmp_path / name)])
        assert clean_document(doc, Rules())[:2] == found


@pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases here")
def test_the_cases_of_blanks_and_invisible_characters():
    for name in ("gbk_e5e5.txt", "zw.txt"):
        ((_, doc),) = SOURCES["text"].documents([str(CASES / "15-private-use" / name)])
        text = clean_document(doc, Rules())[0]
        assert not set(text) & set("\ue5e5\u3000\u200b\u202d\u202c") and len(text) > 1000
    kept = ("👨\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "１３８")
    assert [text.count(k) for k in kept] == [60, 60, 60]

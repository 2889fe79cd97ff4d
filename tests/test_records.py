"""Files to records: what a file is is told by its content, and one fault loses one record."""
import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from common.command_line import UserError
from corpus import files, records
from corpus.clean import Rules, clean_document
from corpus.encoding import FREQUENT, UnknownEncoding, encoding_of
from corpus.files import Dropped, find_files
from corpus.records import json_values
from corpus.sources import MARKUP, SOURCES, WikiPage

SIMPLIFIED = "长江是中国最长的河流，发源于青藏高原。\n它流过十一个省份，最后流入东海。"
TRADITIONAL = "長江是中國最長的河流，發源於青藏高原。\n它流過十一個省份，最後流入東海。"
JAPANESE = "この文書は、長江という川についてまとめたものです。\n正しい内容です。"
KOREAN = "이 문서는 중국에서 가장 긴 강에 대한 것입니다.\n강은 바다로 흘러갑니다."


def read(name, data=None, source="text", **options):
    """Return [(place, document)] of a file with this content; of a Dropped its reason."""
    if data is not None:
        with open(name, "wb") as file:
            file.write(data if isinstance(data, bytes) else data.encode())
    return [(place, doc.reason if isinstance(doc, Dropped) else doc)
            for place, doc in SOURCES[source].documents([name], **options)]


def values(text):
    """Return (the values read, the number of Dropped) of JSON."""
    found = [value for _, value in json_values("x", io.StringIO(text))]
    good = [value for value in found if not isinstance(value, Dropped)]
    return good, len(found) - len(good)


# ---- encodings ----

@pytest.mark.parametrize("text, encoding", [
    *[(SIMPLIFIED, e) for e in ("gbk", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig")],
    *[(TRADITIONAL, e) for e in ("big5", "big5hkscs", "gb18030", "utf-16-le", "utf-16")],
    *[(JAPANESE, e) for e in ("shift_jis", "euc_jp", "utf-16-le")], (KOREAN, "euc_kr")])
def test_texts_of_every_encoding_are_decoded_rightly(text, encoding, here):
    assert read("a.txt", text.encode(encoding)) == [("a.txt", text)]
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert read("a.jsonl", line.encode(encoding)) == [("a.jsonl:1", text)]


@pytest.mark.parametrize("data", [
    SIMPLIFIED.encode().decode("gbk", "replace").encode(), ("锟斤拷" * 9).encode(),
    SIMPLIFIED.encode().decode("latin-1").encode(), bytes(range(128, 256)) * 9,
    "Жил-был у бабушки серенький козлик.".encode("koi8-r"),
    (SIMPLIFIED * 9).encode() + (SIMPLIFIED * 9).encode("gbk")])
def test_what_is_surely_in_no_encoding_is_dropped_with_its_file(data, here):
    assert read("a.txt", data) == [("a.txt", "unknown encoding")]
    assert read("a.jsonl", data, "chat") == [("a.jsonl", "unknown encoding")]


@given(st.text(FREQUENT[:200], min_size=20, max_size=60).filter(lambda t: len(set(t)) > 12),
       st.sampled_from(
           ["gbk", "utf-16-le", "utf-16-be", "big5hkscs"]))
@settings(max_examples=200, deadline=None)
def test_frequent_characters_are_decoded_rightly_or_refused(text, encoding):
    data = text.encode(encoding, "ignore")
    try:
        found = encoding_of(data)
    except UnknownEncoding:
        return
    assert len(data) < 40 or data.decode(found) == data.decode(encoding)


def test_a_line_with_bad_bytes_is_dropped_in_its_place(here):
    lines = [json.dumps({"text": f"{SIMPLIFIED}{i}"}, ensure_ascii=False) for i in range(9)]
    lines = [line.encode() for line in lines]
    lines[3] = lines[3].replace("青".encode(), b"\xe9\x9d")
    lines[5] = rb'{"text": "\ud83d"}'
    lines[6] = rb'{"text": "\ud83d\ude00"}'
    found = dict(read("a.jsonl", b"\n".join(lines)))
    assert found["a.jsonl:4"] == found["a.jsonl:6"] == "bad encoding" and found["a.jsonl:7"] == "😀"
    assert list(found.values()).count("bad encoding") == 2
    table = ("text,n\n" + f"{SIMPLIFIED[:19]},1\n" * 9).encode()
    assert read("a.csv", table.replace(b",1\n", b"\xe9,1\n", 1))[0] == ("a.csv:2", "bad encoding")


# ---- files ----

def archive(name, members):
    if name.endswith(".zip"):
        with zipfile.ZipFile(name, "w") as out:
            for member, data in members:
                out.writestr(member, data)
    else:
        end = name.rpartition(".")[2].removeprefix("t").replace("bz2", "bz2")
        with tarfile.open(name, "w" if end == "ar" else f"w:{end}") as out:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tbz2",
                                  "a.tar.xz", "a.txz"])
def test_members_of_an_archive_are_documents(name, here, capsys):
    line = json.dumps({"text": SIMPLIFIED}).encode()
    archive(name, [("a/1.txt", b"one"), ("a/2.jsonl", line * 2), ("b.png", b"\x89PNG"),
                   ("../../c.txt", b"three"), ("__MACOSX/._1.txt", b"x"), ("d.zip", b"PK")])
    assert find_files([here], SOURCES["text"].wanted) == [str(here / name)]
    assert sorted(read(name)) == sorted([
        (f"{name}/a/1.txt", "one"), (f"{name}/a/2.jsonl:1", SIMPLIFIED),
        (f"{name}/a/2.jsonl:1", SIMPLIFIED), (f"{name}/../../c.txt", "three"),
        (f"{name}/d.zip", "unreadable file")])
    assert "skipped 1 files of other types" in capsys.readouterr().out
    assert not (here.parent / "c.txt").exists() and os.listdir() == [name]


def test_a_cut_archive_is_read_up_to_its_damage(here):
    lines = "".join(json.dumps({"text": os.urandom(500).hex()}) + "\n" for _ in range(500)).encode()
    archive("a.tar.gz", [(f"{i}.jsonl", lines) for i in range(3)])
    (here / "a.tar.gz").write_bytes((here / "a.tar.gz").read_bytes()[:450_000])
    found = [doc for _, doc in read("a.tar.gz")]
    good = [doc for doc in found if len(doc) == 1000]
    assert 750 < len(good) < 900 and found[-1] == "unreadable file" and len(found) < len(good) + 4


def test_files_that_hold_no_text_are_refused_by_name(here):
    for name in ("a.docx", "a.PDF", "a.epub", "a.doc", "a.7z", "a.xlsx", "a.jsonl.zst"):
        (here / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name} can't be read; (save it as|unpack it)"):
            find_files([name], SOURCES["text"].wanted)
    os.mkfifo("pipe.txt")
    for name in ("pipe.txt", os.devnull):
        with pytest.raises(UserError, match="a pipe or a device"):
            find_files([name], SOURCES["text"].wanted)


def test_markup_and_time_stamps_are_not_text(here):
    page = ('<!DOCTYPE html><html><head><title>茶 &amp; 水</title><style>p{color:red}</style><script>'
            'if (a<b) {x = "<p>"}</script></head><body class="a>b"><p>第一<b>段</b>，\n 换行<br/>新行</p>'
            "<div data-x='{\"a\":\"<b>\"}'>第二段&nbsp;&#8212;</div><!-- <p>不 --></body></html>")
    text = "茶 & 水\n第一段， 换行\n新行\n第二段\xa0—"
    for name in ("a.html", "a.HTM", "a.xhtml"):
        assert read(name, page) == [(name, text)]
    cues = ("1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>你好</i>\r\n第 2 行\r\n\r\n2\r\n"
            "00:01:03,000 --> 00:01:04,000\r\n{\\an8}1984\r\n")
    assert read("a.srt", cues) == [("a.srt", "你好\n第 2 行\n1984\n")]
    cues = ("WEBVTT\nKind: captions\n\n00:01.000 --> 00:02.500 align:start\n你好\n\n"
            "00:03.000 --> 00:04.000\n再见\n")
    assert read("a.vtt", cues) == [("a.vtt", "你好\n再见\n")]
    lyrics = "[ti:歌]\n[ar:某人]\n[00:12.00][01:15.3]月亮<00:13.1>升起\n[00:14]来 [副歌]\n"
    assert read("a.lrc", lyrics) == [("a.lrc", "月亮升起\n来 [副歌]\n")]
    assert all(SOURCES["text"].wanted(f"b{end}") for end in (".md", *MARKUP))


@given(st.text("<>/!-ab\"' =p&#;\n[]0:.,1{\\", max_size=200), st.sampled_from(sorted(MARKUP)))
@settings(max_examples=300, deadline=None)
def test_broken_markup_keeps_what_is_around_it(text, ending):
    assert "茶" in MARKUP[ending](f"茶\n{text}")


# ---- forms ----

@pytest.mark.parametrize("beginning", [
    "[本书由某某整理]\n", "{楔子}\n", "[00:00.00]月亮", "[English](a.md) | ", "[1] 参考", "[[1], [2]]\n",
    "[]\n", "{}\n", "[", "{", '["月', '{"a"', '["引用"]他说。\n', '[{"a": 1}]\n',
    '{"text": "月"}\n# 日\n'])
def test_a_text_that_begins_with_a_bracket_is_a_text(beginning, here):
    for name in ("a.txt", "a.md"):
        assert read(name, beginning + SIMPLIFIED) == [(name, beginning + SIMPLIFIED)]


ITEMS = [{"text": f"第{i}篇"} for i in range(5)]
TEXTS = [item["text"] for item in ITEMS]


@pytest.mark.parametrize("text", [
    json.dumps(ITEMS), json.dumps(ITEMS, indent=2), "\n".join(map(json.dumps, ITEMS)),
    ",\n".join(map(json.dumps, ITEMS)), "\n".join(json.dumps(i, indent=1) for i in ITEMS),
    "".join(map(json.dumps, ITEMS)), "[\n" + ",\n".join(map(json.dumps, ITEMS)) + "\n]",
    json.dumps(TEXTS), "\ufeff" + "\r\n".join(map(json.dumps, ITEMS)),
    "\r".join(map(json.dumps, ITEMS)), json.dumps({"data": ITEMS}),
    json.dumps({"text": {str(i): text for i, text in enumerate(TEXTS)}}),  # as pandas writes tables
    json.dumps({"columns": ["n", "text"], "data": [[i, text] for i, text in enumerate(TEXTS)]}),
    "\n\n" + json.dumps(ITEMS[0]) + "\n" + "\n".join(json.dumps(i, indent=1) for i in ITEMS[1:])])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
def test_json_is_read_in_any_layout_under_any_name(text, name, here):
    assert [doc for _, doc in read(name, text)] == TEXTS


def test_records_are_named_by_their_first_line(here):
    places = [place for place, _ in read("a.json", json.dumps(ITEMS, indent=2))]
    assert places == [f"a.json:{line}" for line in (2, 5, 8, 11, 14)]
    assert [place for place, _ in read("a.csv", 'text\n"一\n二"\n三\n')] == ["a.csv:2", "a.csv:4"]


def test_a_wiki_is_a_dump_only_if_it_begins_like_one(here):
    lines = [{"id": "1", "title": "XML", "text": "转储以 <mediawiki 开头。"}, ITEMS[0]]
    found = read("wiki_00", "\n".join(map(json.dumps, lines)), "wiki")
    assert [page.raw for _, page in found] == ["XML\n\n转储以 <mediawiki 开头。", TEXTS[0]]
    page = "<mediawiki><page><title>茶</title><ns>0</ns><text>茶是饮料。</text></page></mediawiki>"
    for head in ("", '<?xml version="1.0"?>\n', "<!-- a --><!DOCTYPE mediawiki>\n"):
        (found,) = read("a.xml", head + page, "wiki")
        assert found == ("a.xml: page 茶", WikiPage("茶", "茶是饮料。", True))
    for encoding in ("x-unknown", "gb2312"):
        (found,) = read("a.xml", f'<?xml version="1.0" encoding="{encoding}"?>{page}', "wiki")
        assert found == ("a.xml", "unreadable file")
    assert read("b.xml", "<rss><item>茶是饮料。</item></rss>", "wiki") == [("b.xml", "not a dump")]


def test_a_page_without_text_is_empty_in_every_reader(here):
    records = [{"title": "茶", "text": text} for text in ("", " \n", "茶", "茶\n\n", "茶\n\n饮料")]
    blocks = "".join(f'<doc title="{r["title"]}">\n{r["text"]}\n</doc>\n' for r in records)
    for data in ("\n".join(map(json.dumps, records)), blocks):
        docs = [clean_document(doc, Rules())[:2] for _, doc in read("wiki_00", data, "wiki")]
        assert docs == [("", "empty")] * 4 + [("茶\n\n饮料", "")]


def test_news_are_lines_if_most_lines_have_a_tab(here):
    whole = "有一条\t新闻\n\u3000\u3000正文。\n第二段。"
    assert read("1.txt", whole, "thucnews") == [("1.txt", whole)]
    assert read("1.txt", "体育\t标题\t正文\n没有\n财经\t文\n", "thucnews") == [
        ("1.txt:1", "标题\t正文"), ("1.txt:2", "no tab"), ("1.txt:3", "文")]


def test_each_line_is_a_document_on_request(here):
    assert read("a.txt", "一\n\n二\r三", lines=True) == [("a.txt:1", "一\n"), ("a.txt:3", "二\n"),
                                                     ("a.txt:4", "三")]
    assert len(read("a.jsonl", json.dumps(ITEMS[0]), lines=True)) == 1


def test_a_list_of_lines_is_a_text_below_its_title(here):
    poem = json.dumps([{"title": "江上", "author": "某人", "paragraphs": ["清晨雾满江。", "竹篙下斜阳。"]}])
    for field in ("", "paragraphs"):
        assert read("a.json", poem, field=field) == [("a.json:1", "江上\n\n清晨雾满江。\n竹篙下斜阳。")]
    assert read("a.json", poem, field="author") == [("a.json:1", "某人")]
    assert read("a.json", poem, field="none") == [("a.json:1", "no none")]


# ---- JSON ----

NAMES = st.text("ab{}[],:\"\\' 茶\n", max_size=8)
PARTS = st.lists(st.builds(dict, role=NAMES, n=st.integers(0, 9)), max_size=3)
RECORD = st.builds(dict, text=NAMES, more=PARTS)


@given(st.lists(RECORD, min_size=2, max_size=6), st.data(), st.sampled_from([None, 2]))
@settings(max_examples=300, deadline=None)
def test_a_bad_record_of_an_array_loses_only_itself(items, data, indent):
    bad = data.draw(st.integers(0, len(items) - 2))  # after the last one nothing begins
    texts = [json.dumps(item, indent=indent, ensure_ascii=False) for item in items]
    colon = texts[bad].index(":")
    texts[bad] = data.draw(st.sampled_from([
        texts[bad][:colon] + texts[bad][colon + 1:], texts[bad][:colon],
        texts[bad].replace(', "more"', ', more').replace(',\n  "more"', ',\n  more'),
        '{"text": ' + "[" * 100_000, '{"text": ' + "1" * 5000 + "}"]))
    good, lost = values("[" + ",\n".join(texts) + "]")
    assert good == items[:bad] + items[bad + 1:] and lost == 1


def test_a_text_in_escapes_is_measured_by_its_characters(here, monkeypatch):
    assert records.MAX_LINE > 6 * files.MAX_CHARS
    monkeypatch.setattr(records, "MAX_LINE", 800)
    monkeypatch.setattr("corpus.sources.MAX_CHARS", 100)
    lines = [json.dumps({"text": "江" * n}) for n in (100, 101, 200)] + [json.dumps(ITEMS[0])]
    assert [doc for _, doc in read("a.jsonl", "\n".join(lines))] == [
        "江" * 100, "too long", "too long", TEXTS[0]]


# ---- tables ----

FIELD = st.text("ab茶,;\t|\"' \n", max_size=6).filter(lambda f: f.strip() == f)


@given(st.lists(st.lists(FIELD, min_size=3, max_size=3), max_size=6), st.sampled_from(",;\t|"),
       st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_table_written_with_any_delimiter_is_read_back(rows, delimiter, end, said):
    out = io.StringIO(f"sep={delimiter}{end}" * said, newline="")
    out.seek(0, io.SEEK_END)
    header = ["question", "answer", "n"]
    quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL
    table = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting)
    table.writerows([header, *rows])
    name = "a.tsv" if delimiter == "\t" else "a.csv"
    stream = io.BufferedReader(io.BytesIO(out.getvalue().encode()), files.SNIFF_BYTES)
    found = [row for _, row in records.records(name, stream)]
    assert found == [dict(zip(header, row)) for row in rows if any(row)]


@pytest.mark.parametrize("table, want", [
    ('text,n\n一,1\n"二,2\n三,3\n四,"4"\n', ["一", "not CSV", "三", "四"]),
    ('text,n\n一,1\n"二,2\n三,3\n', ["一", "not CSV", "三"]),
    ('text,n\n"说\\"一\\"",1\n二,2\n"三""",3\n', ['说"一"', "二", '三"']),
    ("text,n\n一\n二,2,\n三,3,4\n", ["一", "二", "not CSV"]), ("n,text\n1\n2,二\n", ["no text", "二"]),
    *[(f"{said}text,n\n一,1\n", ["一"]) for said in ("sep=,\n", '"sep=,"\n')],
    (",text,,\n0,一,,\n1,二,,\n", ["一", "二"]), ('text\n5" 屏幕\n', ['5" 屏幕']),
    ("天空为什么是蓝色的？,因为散射。\n海呢？,也是。\n", ["no header", "no text"])])
def test_faults_of_a_table_lose_no_other_row(table, want, here):
    want = ["" if w == "no text" and "1\n2" in table else w for w in want]  # empty, dropped later
    assert [doc for _, doc in read("a.csv", table)] == want


def test_excels_unicode_text_is_a_table(here):
    table = "question\tanswer\r\n问\t答\r\n".encode("utf-16")
    assert read("a.txt", table, "chat") == [("a.txt:2", [
        dict(role="user", content="问"), dict(role="assistant", content="答")])]


# ---- arrow ----

def test_a_damaged_arrow_file_never_crashes_the_process(here):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": [SIMPLIFIED] * 20, "tags": [["a", "b"]] * 20,
                      "kind": pa.array(["x", "y"] * 10).dictionary_encode()})
    with pa.OSFile("a.arrow", "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    code = """if True:
        import random, sys
        sys.path.insert(0, sys.argv[1])
        from corpus.sources import SOURCES
        whole = open("a.arrow", "rb").read()
        for seed in range(150):
            rng, data = random.Random(seed), bytearray(whole)
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            open("b.arrow", "wb").write(data)
            list(SOURCES["text"].documents(["b.arrow"]))"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

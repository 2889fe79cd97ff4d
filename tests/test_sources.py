"""Sources: every raw format is read, and every document is written or counted as dropped."""
import bz2
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import random
import resource
import signal
import subprocess
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import ENV, ROOT, SHARED, one_line, run, run_process, start, succeed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import checked_counts, documents

import prepare
from common.command_line import UserError
from corpus import files, records
from corpus.clean import Rules, clean_document
from corpus.files import Dropped, encoding_of
from corpus.records import json_lines, json_values
from corpus.sources import SOURCES, WikiPage
from tokens.bins import SPLITS, Bins
from tokens.tokenizer_files import load_tokenizer, train_bytebpe

SAMPLES = SHARED / "samples"
FIXTURES = ROOT / "tests" / "fixtures"
ARTICLE = """茶

茶（tea；學名：Camellia sinensis，/tiː/）是用开水泡的饮料，起源于中国。它的沸水约为$100^{\\circ}$，與咖啡碱有关。

历史

古代
传说神农发现了茶。
唐代的陆羽写了《茶经》。
共三卷。
第一卷讲起源 与工具。

饮法
在街庄里，人们用紫砂壶泡茶。茶者，南方之嘉木也。"""


def read_all(source, files):
    return [document for _, document in SOURCES[source].documents(files)]


def counts_of(name, source="text"):
    return checked_counts(Bins(name))[source]


def texts(name, splits=SPLITS):
    """Return the plain text of all documents of a set."""
    bins = Bins(name)
    return [bins.tokenizer.plain_text(d).decode() for s in splits for d in documents(bins, s)]


# ---- golden counts ----

GOLDEN = {
    "wiki wiki_zh_2019": (64, 64, {}),
    "wiki wikiextractor_json wikiextractor_doc": (80, 80, {}),
    "wiki mediawiki_xml --min_chinese=0": (8, 6, {"other namespace": 2}),
    "wiki mediawiki_xml wiki_zh_2019": (72, 64, {"other namespace": 2, "little Chinese": 6}),
    "thucnews thucnews": (502, 459, {"duplicate": 40, "little Chinese": 1, "too short": 2}),
    "alpaca alpaca": (1000, 992, {"duplicate": 8}),
    "belle belle": (579, 579, {}),
    "sharegpt sharegpt": (183, 183, {}),
    "webqa webqa": (3036, 3030, {"duplicate": 5, "no question or no answer": 1}),
    "webqa webqa --evidence": (3257, 3118, {"duplicate": 2, "no question or no answer": 137}),
    "dureader dureader": (220, 125, {"no question or no answer": 95}),
    "dureader dureader --evidence": (220, 125, {"no question or no answer": 95}),
    "chat messages": (5, 5, {}),
    "chat gbk": (424, 412, {"duplicate": 11, "bad encoding": 1}),
    "chat squad_style": (1002, 1000, {"no question or no answer": 2}),
}


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/samples here")
@pytest.mark.parametrize("words", GOLDEN)
def test_samples_of_every_form_give_the_documents_counted_in_them(words, here, tokenizer):
    source, *rest = words.split()
    rest = [w if w.startswith("--") else str(SAMPLES / w) for w in rest]
    prepare.main([source, *rest, tokenizer, "--name=x"])
    counts = counts_of("x", source)
    assert (counts["read"], counts["written"], counts["dropped"]) == GOLDEN[words]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/samples here")
def test_chat_tells_every_form_by_its_content(here, tokenizer):
    prepare.main(["chat", str(SAMPLES), tokenizer, "--name=x"])
    counts = counts_of("x", "chat")
    wanted = ("alpaca", "belle", "sharegpt", "webqa", "dureader", "messages", "gbk", "squad_style")
    assert counts["read"] == sum(GOLDEN[k][0] for k in GOLDEN if k.endswith(wanted))


# ---- wikis ----

def test_a_dump_becomes_the_text_a_reader_sees(here, tokenizer):
    prepare.main(["wiki", str(FIXTURES / "zhwiki.xml"), tokenizer, "--name=x"])
    counts = counts_of("x", "wiki")
    assert counts["read"] == 8 and counts["written"] == 2
    assert counts["dropped"] == {"redirect": 2, "other namespace": 2, "disambiguation": 1,
                                 "empty": 1}
    pages = [clean_document(page, Rules())[0]
             for page in read_all("wiki", [str(FIXTURES / "zhwiki.xml")])
             if isinstance(page, WikiPage)]
    assert pages[0] == ARTICLE
    assert pages[1].startswith("水\n\n水是氢和氧组成的化合物") and pages[1].endswith("是生命之源。")
    assert pages[2] == ""


def test_a_dump_in_utf16_and_bz2_is_the_same_dump(here):
    text = (FIXTURES / "zhwiki.xml").read_text(encoding="utf-8")
    (here / "a.xml.bz2").write_bytes(bz2.compress(text.encode("utf-16")))
    ours, theirs = ([getattr(d, "raw", type(d)) for d in read_all("wiki", [file])]
                    for file in ("a.xml.bz2", str(FIXTURES / "zhwiki.xml")))
    assert ours == theirs


# ---- files ----

QA = [dict(role="user", content="问"), dict(role="assistant", content="答")]
TEXT = "长江是中国最长的河流，发源于青藏高原。\n它流过十一个省份，最后流入东海。"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
                                      "gb18030", "gbk"])
def test_encodings_are_told_apart(encoding, here):
    (here / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_all("text", ["a.txt"]) == [TEXT]
    (here / "a.jsonl").write_bytes(json.dumps({"text": TEXT}, ensure_ascii=False).encode(encoding))
    assert read_all("text", ["a.jsonl"]) == [TEXT]


@pytest.mark.parametrize("data, encoding", [
    (b"a" * 50 + b"\n", "utf-8"), (b"", "utf-8"), ("It\ufffds a nice day".encode(), "utf-8"),
    (b"a" * (files.SNIFF_BYTES - 1) + "好".encode()[:1], "utf-8"),  # cut inside a character
    (TEXT.encode() * 9 + b"\0" * 300, "utf-8"), (TEXT.encode() * 9 + b"\xff\x80", "utf-8"),
    (b"hello " * 50 + "好".encode() + b"\x80", "utf-8"),
    ("分久必合，合久必分。".encode("gbk"), "gb18030"), (b'{"text": "a"}\n' * 99 + b"\0\1", "utf-8"),
    ("一二三。\n".encode("utf-16-be"), "utf-16-be")])
def test_odd_files_have_the_encoding_that_makes_sense(data, encoding):
    assert encoding_of(data) == encoding


def test_news_are_read_in_any_encoding(here):
    lines = "".join(f"体育\t有第{i}条新闻。\n" for i in range(5))
    for encoding in ("utf-8", "utf-16", "gbk", "utf-16-le"):
        for text, n in ((lines, 5), ("有一条新闻\n\u3000\u3000有正文。", 1)):
            (here / "a.txt").write_bytes(text.encode(encoding))
            assert len(read_all("thucnews", ["a.txt"])) == n, encoding


def test_compressed_files_are_read_as_they_are(here):
    lines = "".join(json.dumps({"text": f"{TEXT}{i}"}) + "\n" for i in range(3)).encode()
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.bz2", bz2.compress),
                           ("a.jsonl.xz", lzma.compress)):
        (here / name).write_bytes(compress(lines))
        assert read_all("text", [name]) == [f"{TEXT}{i}" for i in range(3)]
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("../../b.jsonl", lines)
        archive.writestr("c/d.jsonl.gz", gzip.compress(lines))
        archive.writestr("picture.png", b"\x89PNG")
    assert len(read_all("text", ["a.zip"])) == 6
    assert not (here.parent / "b.jsonl").exists()
    os.replace("a.jsonl.gz", "A.JSONL.GZ")
    assert len(read_all("text", ["A.JSONL.GZ"])) == 3
    os.replace("A.JSONL.GZ", "a.jsonl.gz")
    array = json.dumps([{"text": f"{TEXT}{i}" * 99} for i in range(99)]).encode()
    (here / "a.json.gz").write_bytes(gzip.compress(array))
    for name in ("a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.zip", "a.json.gz"):  # cut short
        (here / name).write_bytes((here / name).read_bytes()[:-20])
        found = read_all("text", [name])
        assert isinstance(found[-1], Dropped) and found[-1].reason == "unreadable file", name
    assert len(found) > 9  # of a.json.gz, all elements before the damage


def test_links_that_go_round_are_followed_once(here):
    (here / "raw" / "sub").mkdir(parents=True)
    (here / "raw" / "sub" / "a.txt").write_text(TEXT, encoding="utf-8")
    (here / "raw" / "sub" / "round").symlink_to(here / "raw")
    (here / "raw" / "nowhere.txt").symlink_to(here / "missing")
    assert files.find_files(["raw", "./raw/"], SOURCES["text"].wanted) == ["raw/sub/a.txt"]


def test_tables_and_saved_datasets_are_read(here):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    table = pa.table({"title": ["长江", "黄河"], "text": [TEXT, "黄河流过九个省区。"]})
    parquet.write_table(table, "a.parquet")
    os.makedirs("saved")
    with pa.OSFile("saved/data-00000-of-00001.arrow", "wb") as out:
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (here / "saved" / name).write_text("{}", encoding="utf-8")
    (here / "a.csv").write_text('title,text\n长江,"长江是河，\n很长。"\n黄河,黄河也是河。\n坏\n',
                                encoding="utf-8")
    want = [f"长江\n\n{TEXT}", "黄河\n\n黄河流过九个省区。"]
    for name in ("a.parquet", "saved"):
        found = files.find_files([name], SOURCES["text"].wanted)
        assert list(read_all("text", found)) == want
    rows = read_all("text", ["a.csv"])
    assert rows[:2] == ["长江\n\n长江是河，\n很长。", "黄河\n\n黄河也是河。"]
    assert rows[2:] == [""]  # a title alone
    odd = pa.table({"text": [TEXT, "坏", TEXT], "day": pa.array([0, 2**30, 1], pa.date32())})
    parquet.write_table(odd, "odd.parquet")
    kinds = [type(d) for d in read_all("text", ["odd.parquet"])]
    assert kinds == [str, Dropped, str]
    (here / "b.parquet").write_bytes((here / "a.parquet").read_bytes()[:-40])
    assert [d.reason for d in read_all("text", ["b.parquet"])] == ["unreadable file"]


values = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v,
                                                                          max_size=3), max_leaves=8)


@given(st.lists(values, max_size=6), st.sampled_from([None, 1]))
@settings(max_examples=200, deadline=None)
def test_the_elements_of_a_json_array_are_read_up_to_its_damage(items, indent):
    text = json.dumps(items, indent=indent)
    assert [v for _, v in json_values("x", io.StringIO(text))] == items
    cut = [v for _, v in json_values("x", io.StringIO(text[:-1]))]
    assert cut[:-1] == items and isinstance(cut[-1], Dropped)


ONE, TWO = {"text": f"{TEXT}一"}, {"text": f"{TEXT}二"}


@pytest.mark.parametrize("text, read, dropped", [
    (json.dumps(ONE) + json.dumps(TWO), 2, 0), ("3", 0, 1), ("[[[[", 0, 1),
    (f"[{json.dumps(ONE)},\n{json.dumps(TWO)}\n]", 2, 0), (json.dumps([ONE]) + "]", 1, 1),
    (json.dumps({"version": 1, "data": [ONE, TWO]}), 2, 0),
    (json.dumps([ONE, TWO], indent=2), 2, 0),
    ("{broken\n" + json.dumps(ONE) + "\n" + json.dumps(TWO), 2, 1), (json.dumps([ONE, TEXT]), 2, 0),
    (json.dumps({"text": "长" * 7_000}), 1, 0), (json.dumps({"text": "长" * 9_000}), 0, 1)])
def test_a_json_file_of_any_shape_is_read_or_counted(text, read, dropped, here, monkeypatch):
    monkeypatch.setattr(records, "MAX_JSON_CHARS", 50_000)
    (here / "a.json").write_text(text, encoding="utf-8")
    lost = [isinstance(doc, Dropped) for doc in read_all("text", ["a.json"])]
    assert (lost.count(False), lost.count(True)) == (read, dropped)


def test_lines_of_lists_are_a_dialogue_each(here):
    (here / "a.json").write_text("\n".join([json.dumps(QA)] * 5), encoding="utf-8")
    (here / "b.json").write_text(json.dumps(QA, indent=1), encoding="utf-8")
    (here / "c.json").write_text(json.dumps([QA, QA]), encoding="utf-8")
    assert [len(read_all("chat", [f"{n}.json"])) for n in "abc"] == [5, 1, 2]


def test_an_object_of_questions_gives_each_of_them_within_the_limit(here, monkeypatch):
    webqa = {f"Q{i}": {"question": f"问{i}", "evidences": {"e": {"answer": ["是"], "evidence": "文"}}}
             for i in range(100)}
    squad = {"version": "1", "data": [{"paragraphs": [{"context": "文", "qas": [
        {"question": f"问{i}", "answers": [{"text": "答"}]}]}]} for i in range(100)]}
    for value in (webqa, squad):
        (here / "a.json").write_text(json.dumps(value), encoding="utf-8")
        assert list(map(type, read_all("chat", ["a.json"]))) == [list] * 100
    monkeypatch.setattr(records, "MAX_JSON_CHARS", 3000)
    (lost,) = read_all("chat", ["a.json"])
    assert lost.reason == "too long" and "convert the file to JSON lines" in lost.details


def test_a_json_error_is_reported_at_its_line(here):
    (here / "a.json").write_text('[\n{"text": "长江"},\n{"text": "黄河",\n "x": y}]', "utf-8")
    (_, text), (place, lost) = SOURCES["text"].documents(["a.json"])
    assert text == "长江" and place == "a.json:4"
    assert lost.details.startswith("not JSON (Expecting value, column 7")


# ---- dialogues (their formats: test_dialogues.py) ----

def test_a_dialogue_ends_before_its_first_empty_message():
    doc = [*QA, dict(role="user", content=" "), dict(role="assistant", content="x")]
    assert clean_document(doc, Rules()) == (QA, "", Counter(messages=2))


# ---- several sources, samples, limits ----

def test_near_duplicates_are_dropped_on_request(here, tokenizer):
    pytest.importorskip("datasketch")
    rng = random.Random(0)
    docs = ["".join(rng.choices("的一是在不了有和人这中大为上个国", k=300)) for _ in range(30)]
    docs += [docs[0][:290] + "改了结尾", docs[1] + "多了几个字"]
    (here / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs), "utf-8")
    prepare.main(["text", "a.jsonl", tokenizer, "--name=x", "--near_duplicates=0.8"])
    assert counts_of("x")["dropped"] == {"near duplicate": 2}

def write_corpus(file, n, what):
    file.write_text("".join(json.dumps({"text": f"第{i}篇{what}，讲的是一件很小的事情。"}) + "\n"
                            for i in range(n)), encoding="utf-8")


def test_several_sources_make_one_set_in_any_order(here, tokenizer):
    write_corpus(here / "w.jsonl", 60, "百科")
    lines = (f"体育\t第{i}条新闻，讲的是一场球赛。\n" for i in range(40))
    (here / "n.txt").write_text("".join(lines), "utf-8")
    more = [tokenizer, "--name=zh", "--val_fraction=0.1"]
    prepare.main(["wiki", "w.jsonl", "thucnews", "n.txt", *more])
    first = {s: Bins("zh").tokens(s).tobytes() for s in ("train", "val")}
    assert [counts_of("zh", s)["written"] for s in ("wiki", "thucnews")] == [60, 40]
    assert "第3条新闻，讲的是一场球赛。" in texts("zh")
    prepare.main(["thucnews", "n.txt", "wiki", "w.jsonl", *more])
    assert first == {s: Bins("zh").tokens(s).tobytes() for s in ("train", "val")}


def test_a_sample_is_the_same_part_whatever_the_order(here, tokenizer):
    for k in "ab":
        write_corpus(here / f"{k}.jsonl", 150, k)
    found = []
    for words in (["a.jsonl", "b.jsonl"], ["b.jsonl", "a.jsonl"], ["a.jsonl"]):
        prepare.main(["text", *words, tokenizer, "--name=x", "--sample=0.3", "--val_fraction=0.1"])
        found.append(set(texts("x")))
    assert found[0] == found[1] > found[2] and 50 < len(found[0]) < 130
    assert counts_of("x")["dropped"]["not in the sample"] > 80
    prepare.main(["text", "a.jsonl", tokenizer, "--name=x", "--max_docs=30"])
    assert counts_of("x")["read"] == 30


# ---- inspect, tokenizers ----

def test_inspect_shows_tokens_with_borders_and_what_is_trained(here, tokenizer, capsys):
    lines = [{"messages": [{"role": "user", "content": f"第{i}问"},
                           {"role": "assistant", "content": f"第{i}答"}]} for i in range(40)]
    (here / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    prepare.main(["chat", "a.jsonl", tokenizer, "--name=x", "--val_fraction=0.2"])
    capsys.readouterr()
    prepare.main(["inspect", "x"])
    shown = capsys.readouterr().out
    first = next(line for line in shown.splitlines() if line.startswith("<|im_start|>"))
    before, trained = first.replace("}", "{").split("{")[:2]
    assert before.replace("|", "").endswith("<im_start>assistant\\n")
    assert trained.replace("|", "").endswith("答<im_end>")
    assert "2.0 messages a dialogue, 0 dialogues with none" in shown
    assert "40 of 40 documents" in shown and "tokens per character" in shown
    for words, what in (([], "name one"), (["none"], "not prepared")):
        with pytest.raises(UserError, match=what):
            prepare.main(["inspect", *words])


def test_inspect_draws_a_set_and_refuses_a_damaged_one(here, tokenizer):
    write_corpus(here / "a.jsonl", 30, "文")
    prepare.main(["text", "a.jsonl", tokenizer, "--name=x"])
    prepare.main(["inspect", "x", "--plot"])
    assert (here / "data/x/inspect.png").stat().st_size > 1000
    for split in ("train", "val"):
        file = here / f"data/x/{split}.bin"
        file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(UserError, match="train.bin has changed"):
        prepare.main(["inspect", "x"])
    with pytest.raises(UserError, match="prepared set"):
        prepare.main(["tokenizer", "a.jsonl", "--name=x"])
    meta = json.loads((here / "data/x/meta.json").read_text(encoding="utf-8"))
    for change in ({"sources": 3}, {"vocab_size": "x"}, {"tokenizer": None}, {"splits": {}}):
        (here / "data/x/meta.json").write_text(json.dumps(meta | change), encoding="utf-8")
        with pytest.raises(UserError, match="meta.json"):
            Bins("x")


def test_a_tokenizer_alone_serves_a_set(here):
    write_corpus(here / "a.jsonl", 300, "文")
    prepare.main(["tokenizer", "a.jsonl", "--vocab_size=290", "--name=t"])
    prepare.main(["text", "a.jsonl", "--tokenizer=data/t", "--name=x"])
    bins = Bins("x")
    assert bins.tokenizer.vocab_size == 290 and bins.tokenizer.fast
    assert load_tokenizer("data/t").fingerprint == bins.tokenizer.fingerprint


@given(st.lists(st.text(min_size=1, max_size=40), unique=True), st.integers(1, 300), st.randoms())
@settings(max_examples=200, deadline=None)
def test_a_training_sample_is_bounded_and_the_same_in_any_order(texts, most, rng):
    rows, dropped = [("", prepare.digest(t), t) for t in texts], Counter()
    kept = prepare.sample_texts(rows, most, dropped)
    assert sum(map(len, kept)) <= most or len(kept) == 1
    assert len(kept) + dropped["not in the sample"] == len(texts)
    if sum(map(len, texts)) <= most:
        assert len(kept) == len(texts)
    rng.shuffle(rows)
    assert prepare.sample_texts(rows, most, Counter()) == kept


def test_a_text_without_punctuation_trains_in_linear_time():
    for letters in ("的一是在不了有和人这中大为上个国", "abcdefgh", "，。！？", "あいうえお"):
        text = "".join(random.Random(0).choices(letters, k=100_000))
        train_bytebpe([text], 400)  # minutes, if it were one piece


def test_enough_is_held_out_of_a_small_set_whatever_the_order(here, tokenizer):
    write_corpus(here / "a.jsonl", 130, "一")
    write_corpus(here / "b.jsonl", 130, "二")
    line = json.dumps({"messages": QA}) + "\n"
    lines = (line.replace("\\u95ee", str(i)) for i in range(200))
    (here / "c.jsonl").write_text("".join(lines), "utf-8")
    val = []
    for words in (["a.jsonl", "b.jsonl"], ["b.jsonl", "a.jsonl"]):
        prepare.main(["text", *words, "chat", "c.jsonl", tokenizer, "--name=x", "--min_chars=1"])
        val.append(texts("x", ["val"]))
        assert all("讲的是" in text for text in val[-1])  # no dialogue
        splits, whole = Bins("x").meta["splits"], texts("x")
        assert splits["val"]["characters"] == sum(map(len, val[-1]))
        assert len(whole) == len(set(whole)) == splits["train"]["documents"] + len(val[-1])
        assert len(val[-1]) == len(whole) // 20
    assert sorted(val[0]) == sorted(val[1])


# ---- accidents ----

def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_preparing_that_was_killed_leaves_nothing_to_read_and_starts_over(here, tokenizer):
    write_corpus(here / "a.jsonl", 200, "旧")
    words = ["text", "a.jsonl", tokenizer, "--name=x", "--workers=1"]
    prepare.main(words)
    want = {p.name: p.read_bytes() for p in (here / "data/x").iterdir() if p.name != "meta.json"}
    (here / "data/x/meta.json").unlink()
    (here / "b.jsonl").write_text((json.dumps({"text": TEXT * 9000}) + "\n") * 30, "utf-8")
    process = start(here, "prepare.py", "text", "b.jsonl", *words[2:-1], "--workers=2",
                    stdout=subprocess.DEVNULL)
    while not list((here / "data/x.part").glob("*.bin")):
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    one_line(run(here, "prepare.py", *words), "being prepared by another process")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive a parent that was killed"
    with pytest.raises(UserError, match="not prepared"):
        Bins("x")
    prepare.main(words)
    assert want == {p.name: p.read_bytes() for p in (here / "data/x").iterdir()
                    if p.name != "meta.json"}


def test_a_full_disk_is_one_line_and_leaves_nothing(here, tokenizer):
    write_corpus(here / "a.jsonl", 9000, "很长")
    done = run_process(
        here, "prepare.py", "text", "a.jsonl", tokenizer, "--name=x",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    one_line(done, "File too large")
    assert not (here / "data" / "x").exists()


# ---- the hub ----

class Hub(http.server.BaseHTTPRequestHandler):
    """Serves .files {path: content}, as both hubs do; breaks off halfway in .fragile the first
    time, and then is gone until .gone is False."""
    protocol_version, files, fragile, gone, ranges = "HTTP/1.1", {}, "", False, []

    def log_message(self, *args):
        pass

    def do_GET(self):
        branch = "/resolve/main/" if "/resolve/main/" in self.path else "/resolve/master/"
        path = self.path.removeprefix("/datasets/").replace(branch, "/")
        if path not in Hub.files or Hub.gone:
            return self.send_error(503 if Hub.gone else 404)
        body = Hub.files[path]
        start, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        start, end = int(start), int(end or len(body) - 1)
        self.send_response(206 if "Range" in self.headers else 200)
        for name, value in (("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"'),
                            ("X-Repo-Commit", "a" * 40), ("Content-Length", end + 1 - start),
                            ("Content-Range", f"bytes {start}-{end}/{len(body)}")):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or end == 0:
            return self.wfile.write(body[:end + 1] if self.command == "GET" else b"")
        Hub.ranges.append((path, start))
        if path == Hub.fragile and not start:
            Hub.gone = self.close_connection = True
            body = body[:len(body) // 2]
        self.wfile.write(body[start:])

    do_HEAD = do_GET


def parquet(column, values):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    out = io.BytesIO()
    pa.parquet.write_table(pa.table({column: values, "score": [0.8] * len(values)}), out)
    return out.getvalue()


def articles(part):
    return [f"第{part}部分第{i}篇文章，讲的是一件小事。" for i in range(100)]


def a_wiki():
    return {"pleisto/wikipedia-cn-20230720-filtered/wikipedia-cn-20230720-filtered.json":
            json.dumps([{"completion": text, "source": "wikipedia"} for text in articles(0)],
                       ensure_ascii=False, indent=1).encode()}, 100, {}


def stories():
    return {f"RobinChen2001/TinyStories-Zh-2M/data/train-0000{part}-of-00003.parquet":
            parquet("text", articles(part)) for part in range(3)}, 300, {}


def a_part_of_fineweb():
    numbers = (0, 1, 2, 4, 5, 10, 11, 12, 14, 18, 19, 21, 40, 45, 114)
    return {f"opencsg/Fineweb-Edu-Chinese-V2.1/4_5/{i:06}.parquet":
            parquet("text", articles(i)) for i in numbers}, 1500, {}


def blossom():
    rows = [[dict(role="user", content=f"{word} {i}?"), dict(role="assistant", content=word)]
            for word in ("你好", "hello") for i in range(100)]
    return {"Azure99/blossom-chat-v2/blossom-chat-v2-30k.json": json.dumps(
        [dict(id=str(i), conversations=row) for i, row in enumerate(rows)]).encode()}, 100, {
            "no Chinese": 100}


@pytest.mark.parametrize("source,make,hub", [
    ("wiki", a_wiki, "huggingface"), ("wiki", a_wiki, "modelscope"), ("blossom", blossom, ""),
    ("tinystories", stories, "modelscope"), ("tinystories", stories, ""),
    ("fineweb", a_part_of_fineweb, "modelscope")])
def test_a_source_comes_from_the_hub_and_goes_on_where_it_broke_off(source, make, hub, here,
                                                                    tokenizer):
    Hub.files, written, dropped = make()
    if hub == "modelscope":
        Hub.files = {path.replace("pleisto", "AI-ModelScope"): content
                     for path, content in Hub.files.items()}
    paths = list(Hub.files)
    Hub.fragile, Hub.gone, Hub.ranges = paths[len(paths) // 2], False, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}"
    env = {k: v for k, v in ENV.items() if k != "HF_HUB_OFFLINE"} | {
        "HUB": hub, "HF_ENDPOINT": site, "MODELSCOPE_ENDPOINT": site, "HF_HOME": str(here / "home")}
    try:
        done = run_process(here, "prepare.py", source, tokenizer, env=env)
        one_line(done, "can't be downloaded", "HF_ENDPOINT", f"python prepare.py {source} PATH")
        raw = here / "data" / "raw" / source
        assert not (raw / Path(Hub.fragile).name).exists() and not (here / "data" / source).exists()
        Hub.gone = False
        succeed(run_process(here, "prepare.py", source, tokenizer, env=env))
    finally:
        server.shutdown()
    at = paths.index(Hub.fragile)
    assert Hub.ranges == [(path, 0) for path in paths[:at + 1]] + [
        (Hub.fragile, len(Hub.files[Hub.fragile]) // 2)] + [(path, 0) for path in paths[at + 1:]]
    counts = counts_of(source, source)
    assert (counts["written"], counts["dropped"]) == (written, dropped)
    assert {p.name: p.read_bytes() for p in raw.glob("[!.]*")} == {
        Path(path).name: content for path, content in Hub.files.items()}


def test_without_a_hub_a_source_says_what_to_do(here, tokenizer):
    for source in ("belle", "tinystories"):
        one_line(run(here, "prepare.py", source, tokenizer), "can't be downloaded", "HF_ENDPOINT",
                 "HUB to modelscope", f"python prepare.py {source} PATH")


def test_own_files_are_never_taken_for_an_interrupted_download(here):
    for source in SOURCES:
        raw = here / "data" / "raw" / source
        raw.mkdir(parents=True)
        (raw / ".lock").touch()
        assert SOURCES[source].is_missing(raw)
        for name in map(os.path.basename, (SOURCES[source].hub or ("", ["a"]))[1]):
            (raw / name).touch()
        assert not SOURCES[source].is_missing(raw)
        (raw / name).rename(raw / "mine.jsonl")
        assert not SOURCES[source].is_missing(raw)


# ---- bad input ----

LINES = st.one_of(
    st.integers(0, 30).map(
        lambda i: json.dumps({"text": f"第{i}篇文章，讲的是一件小事。"}).encode()),
    st.sampled_from([b'{"text": "\xe7\x9f\xad"}', b'{"text": "an English text only"}', b"[]",
                     b"{broken", b'{"text": "\xff\xfe"}', b'{"body": 3}', b'""', b"  ",
                     b'{"text": " \\u0000"}']),
    st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")))


@given(st.lists(LINES, max_size=60), st.sampled_from([1.0, 0.5]))
@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_read_are_those_written_and_those_dropped(here, tokenizer, lines, sample):
    good = [f"第{i}篇文章，讲的是一件小事。" for i in range(60, 160)]
    lines = [json.dumps({"text": t}).encode() for t in good] + lines
    (here / "a.jsonl").write_bytes(b"\n".join(lines))
    prepare.main(["text", "a.jsonl", tokenizer, "--name=x", "--val_fraction=0.2",
                  f"--sample={sample}"])
    counts = counts_of("x")
    blank = sum(not line.replace(b"\xef\xbb\xbf", b"").strip(b" \t\r") for line in lines)
    assert counts["read"] == len(lines) - blank
    assert len(texts("x")) == len(set(texts("x"))) == counts["written"]
    assert sample < 1 or set(good) <= set(texts("x"))


def mutate(data, rng):
    """The bytes with one kind of damage."""
    i = rng.randrange(max(1, len(data)))
    return rng.choice([
        lambda: bytes(b ^ (1 << rng.randrange(8)) if rng.random() < 0.001 else b for b in data),
        lambda: data[:i],
        lambda: data[i:],
        lambda: data.decode("utf-8", "ignore").encode(
            rng.choice(["utf-16", "gb18030", "utf-16-le"]), "ignore"),
        lambda: data[:i] + rng.choice([b"[", b"{", b'{"a":']) * 100_000 + data[i:],
        lambda: data[:i] + rng.randbytes(500) + data[i:],
        lambda: data.replace(b"\n", b" "),
        lambda: data.replace(rng.choice([b'"', b",", b"}", b"<", b"\n", b"]"]), b"")])()


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/samples here")
def test_damaged_samples_never_fail_and_leave_a_trace(here):
    rng = random.Random(int(os.environ.get("SEED", 0)))
    samples = sorted(p for p in SAMPLES.rglob("*") if p.is_file())
    compressors = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
    for _ in range(int(os.environ.get("MUTATIONS", 60))):  # MUTATIONS=2000 for the long run
        sample = rng.choice(samples)
        data = sample.read_bytes()
        data = bz2.decompress(data) if sample.suffix == ".bz2" else data
        data = data[:rng.randrange(10_000, 200_000)]
        ending, compress = rng.choice(list(compressors.items()))
        data = compress(mutate(data, rng)) if rng.random() < 0.7 else mutate(compress(data), rng)
        file = here / f"{sample.name.removesuffix('.bz2')}{ending}"
        file.write_bytes(data)
        for source in ("wiki", "thucnews", "text", "chat"):
            found = list(read_all(source, [str(file)]))
            assert found or not data or ".csv" in file.name  # a single line is only a header
            for doc in found:
                isinstance(doc, Dropped) or clean_document(doc, Rules())
        file.unlink()


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=20))
@settings(max_examples=300, deadline=None)
def test_every_line_that_is_not_blank_is_a_document_or_its_loss(lines):
    text = io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), "utf-8", errors="mark", newline="\n")
    found = [where for where, _ in json_lines("x", text)]
    blank = [not line.replace(b"\xef\xbb\xbf", b"").strip(b" \t\r") for line in lines]
    want = [f"x:{i}" for i, empty in enumerate(blank, 1) if not empty]
    assert found == want


@given(st.binary(min_size=1, max_size=400), st.sampled_from(
    [".txt", ".json", ".jsonl", ".csv", ".xml", ".zip", ".gz", ".jsonl.bz2", ".xz"]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_and_accounted_for(data, ending):
    import tempfile
    with tempfile.NamedTemporaryFile(suffix=ending) as file:
        file.write(data)
        file.flush()
        for source in ("wiki", "thucnews", "text", "chat"):
            list(read_all(source, [file.name]))
        list(files.read_each([file.name], bool, records.records))

"""Tokenizers, prepare.py, prepared sets on disk."""
import bz2
import gzip
import hashlib
import json
import lzma
import os
import shutil
import socket
import tempfile
from base64 import b64encode
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import DEMO, SHARED, one_line, run, run_process, succeed
from hypothesis import given, settings
from hypothesis import strategies as st

from common import files
from common.command_line import UserError
from common.hub import from_hub
from corpus.clean import clean
from tokens import bin_writer, tokenizer_files
from tokens.bin_writer import BinWriter
from tokens.bins import SPLITS, VERIFIED, Bins
from tokens.tokenizer import IM_END, IM_START, SPLIT_RULES, Tokenizer, split_rule
from tokens.tokenizer_files import load_tokenizer, train_bytebpe

QWEN = SHARED / "tokenizers"
needs_qwen = pytest.mark.skipif(not QWEN.is_dir(), reason="no ../shared/tokenizers here")
HOSTILE = [
    "", " ", "\n", "a", "数学是什么？", "你好，world! 123456 ３４５", "👩‍👩‍👧‍👦🏳️‍🌈 emoji 😀",
    "𠮷野家 龘靐齉 㐀 𪚥", "é cafe\u0301 A\u030a n\u0303",
    "<|im_start|>user\n<|im_end|><|endoftext|>", "<|im_start",
    "<tool_call>x</tool_call><|fim_prefix|>",
    "a\r\nb\rc\n\n\n d\t\te  \n", "I'll WE'VE don't 'S", "ﬁ ｱ ﾊﾟ 각 각", "\u200b\u200d\ufeff\u2028",
    "的" * 3000, " " * 300 + "x", "1" * 100, "$$$___---", "مرحبا हिन्दी ไทย",
    "\x00\x1f\x7f", "ΐ ΰ Å"]


def demo_rows(*names):
    for name in names:
        for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def demo_texts():
    for row in demo_rows("texts_val", "texts_train", "dialogues_val", "dialogues_train"):
        yield from [row["text"]] if "text" in row else (m["content"] for m in row["messages"])


def auto_tokenizer(tok, folder):
    from transformers import AutoTokenizer
    tok.save(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


def check_equal_to_transformers(tok, folder, texts):
    theirs = auto_tokenizer(tok, folder)
    assert tok.fast is not None
    for text in texts:
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text[:80])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train_bytebpe(list(demo_texts()), 1024)


# ---- tokenizers ----

def test_an_own_tokenizer_equals_transformers(small, tmp_path):
    check_equal_to_transformers(small, tmp_path, [*demo_texts(), *HOSTILE])


@needs_qwen
def test_qwens_tokenizer_equals_transformers(tmp_path):
    tok = load_tokenizer(str(QWEN / "qwen2_5"))
    assert tok.vocab_size == 151_665 and tok.eot == 151_643 and tok.im_start == 151_644
    check_equal_to_transformers(tok, tmp_path, [*demo_texts(), *HOSTILE])


@needs_qwen
def test_the_tiktoken_file_gives_the_same_ids_and_merges():
    names = ("qwen.tiktoken", "qwen2_5/tokenizer.json")
    ours, theirs = (load_tokenizer(str(QWEN / name)) for name in names)
    assert ours.vocab_size == 151_646
    as_pairs = [m.split(" ") if isinstance(m, str) else m for m in theirs.spec["model"]["merges"]]
    assert ours.spec["model"]["merges"] == as_pairs
    for text in HOSTILE:
        assert ours.encode(clean(text)) == theirs.encode(clean(text))


def test_gpt2s_own_form_goes_through_tiktoken_and_equals_tokenizers(small, tmp_path):
    spec = json.loads(json.dumps(small.spec))
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                             "use_regex": True}
    check_equal_to_transformers(Tokenizer(spec), tmp_path, HOSTILE)


def write_vocab(folder, tok, names=("vocab.json", "merges.txt"), **config):
    """Write a tokenizer's vocabulary and merges, with <pad> and <s> between its first ids."""
    model = tok.spec["model"]
    vocab = {text: i + 2 * (i >= 256) for text, i in model["vocab"].items()}
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    for name, text in zip(names, (json.dumps(vocab | {"<pad>": 256, "<s>": 257}),
                                  "#version: 0.2\n" + "\n".join(merges))):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_ranks(file, tok):
    """Write a tokenizer's tokens without the special ones as a .tiktoken file."""
    ids = tok.spec["model"]["vocab"].values()
    file.write_bytes(b"".join(b"%b %d\n" % (b64encode(tok.token_bytes[i]), i) for i in sorted(ids)))


@pytest.mark.parametrize("kind, rule", [("GPT2Tokenizer", "gpt2"), ("Qwen2Tokenizer", "qwen")])
def test_the_class_of_a_vocabulary_gives_its_splitting_rule(kind, rule, small, tmp_path):
    import transformers
    write_vocab(tmp_path, small, tokenizer_class=kind)
    tok = load_tokenizer(tmp_path)
    assert tok.fast and tok.specials["<pad>"] == 256 and tok.specials["<s>"] == 257
    assert tok.spec["pre_tokenizer"]["pretokenizers"][0] == split_rule(SPLIT_RULES[rule])
    files = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
    theirs = getattr(transformers, kind)(*files, split_special_tokens=True)
    for text in [*HOSTILE, *demo_texts()]:
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text[:80])


def test_the_number_of_tokens_gives_the_splitting_rule(small, tmp_path, monkeypatch):
    write_vocab(tmp_path, small, ("encoder.json", "vocab.bpe"))
    write_ranks(tmp_path / "x.tiktoken", small)
    for name in ("", "encoder.json", "vocab.bpe", "x.tiktoken"):
        with pytest.raises(UserError, match="--split_rule=gpt2 or cl100k or o200k or qwen"):
            load_tokenizer(tmp_path / name)
    monkeypatch.setitem(tokenizer_files.SIZES, 1021, ("cl100k", 1030))
    named, known, ranks = (load_tokenizer(tmp_path / name, rule) for name, rule in (
        ("", "cl100k"), ("vocab.bpe", ""), ("x.tiktoken", "")))
    assert named.fingerprint == known.fingerprint and (ranks.eot, ranks.im_start) == (1030, 1031)
    for text in [*HOSTILE, "12345678 四千９９９９年"]:
        assert known.decode(known.encode(text)) == ranks.decode(ranks.encode(text)) == text
        assert [i + 2 * (i >= 256) for i in ranks.encode(text)] == known.encode(text)
    assert known.spec["pre_tokenizer"]["pretokenizers"][0] == split_rule(SPLIT_RULES["cl100k"])


def test_a_changed_tiktoken_file_is_read_anew(small, tmp_path):
    write_ranks(tmp_path / "x.tiktoken", small)
    load_tokenizer(tmp_path / "x.tiktoken", "qwen")
    write_ranks(tmp_path / "x.tiktoken", shared_tokenizer())
    tok = load_tokenizer(tmp_path / "x.tiktoken", "qwen")
    assert tok.fingerprint == shared_tokenizer().fingerprint


TIKTOKENS_OWN = dict(  # tiktoken_ext/openai_public.py
    gpt2=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    cl100k=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++"
           r"[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    o200k="|".join([
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]))


@pytest.mark.parametrize("rule", TIKTOKENS_OWN)
@given(st.text(st.sampled_from("Aaé的 12３.'sS\n\r\t/\u0301\u00a0ǅ")))
@settings(max_examples=300, deadline=None)
def test_our_splitting_rules_split_as_tiktokens_own_do(rule, text):
    import regex
    from tokenizers import Regex, pre_tokenizers
    text += "."  # tiktoken's rules differ from the published tokenizer.json at blanks at the end
    want = regex.findall(TIKTOKENS_OWN[rule], text)
    assert regex.findall(SPLIT_RULES[rule], text) == want
    split = pre_tokenizers.Split(Regex(SPLIT_RULES[rule]), "isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == want


def changed(tok, **values):
    """Return the content of a tokenizer.json like tok's but for some values."""
    return json.loads(json.dumps(tok.spec | values))


@pytest.mark.parametrize("kind", ["Lowercase", "NFKC", "StripAccents"])
def test_a_tokenizer_that_changes_text_is_refused_for_a_set(kind, small, tmp_path):
    spec = changed(small, normalizer={"type": kind} if kind != "StripAccents" else {
        "type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": kind}]})
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    one_line(run(tmp_path, "prepare.py", "text", DEMO, f"--tokenizer={file}"), "is not lossless")
    assert load_tokenizer(file).encode("数学")  # a model that has it can be tried
    file.write_text(json.dumps(changed(small, normalizer={"type": "NFC"})), encoding="utf-8")
    assert load_tokenizer(file, lossless=True).encode("数学") == small.encode("数学")


def test_a_wordpiece_tokenizer_is_refused_for_a_set(tmp_path):
    from tokenizers import BertWordPieceTokenizer
    words = sorted({c for text in demo_texts() for c in text if not c.isspace()})
    tok = BertWordPieceTokenizer(
        {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])},
        lowercase=False)
    tok.save(str(tmp_path / "tokenizer.json"))
    one_line(run(tmp_path, "prepare.py", "text", DEMO, f"--tokenizer={tmp_path}", "--name=x"),
             f"tokenizer {tmp_path} is not lossless", "Use a byte-level one")
    assert not (tmp_path / "data").exists()


def test_a_panic_of_tokenizers_is_one_line(tmp_path, capfd):
    model = dict(type="BPE", vocab={"a": 0, "b": 1, "ab": 2}, merges=["a b"],
                 continuing_subword_prefix="##")
    spec = dict(version="1.0", model=model, added_tokens=[], normalizer=None, pre_tokenizer=None,
                post_processor=None, decoder=None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    done = run(tmp_path, "prepare.py", "text", DEMO, f"--tokenizer={tmp_path}")
    one_line(done, "tokenizer.json: not a tokenizer file (PanicException: ")
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    one_line(run(tmp_path, "prepare.py", "text", DEMO, f"--tokenizer={tmp_path}/x.json"),
             "x.json is neither a file nor a folder")
    refused = run(tmp_path, "prepare.py", "text", tmp_path / "x.json")
    one_line(refused, "x.json is a pipe or a device")


def test_without_an_answer_from_the_hub_only_the_cache_is_asked(monkeypatch):
    from huggingface_hub import constants
    calls = []

    def download(*names, local_files_only):
        calls.append(local_files_only)
        raise ValueError("is not there")
    for offline, url, seconds, problem in (
            (True, "http://x", "9", "HF_HUB_OFFLINE is set"),
            (False, "http://127.0.0.1:9", "9", "127.0.0.1:9: "),
            (False, "silent", "0.1", "no answer from .* within 0.1 s")):
        with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts, and never answers
            silent = f"http://127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
            monkeypatch.setattr(constants, "ENDPOINT", silent if url == "silent" else url)
            monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", seconds)
            with pytest.raises(OSError, match=problem):
                from_hub(download, "a/b")
    assert calls == [True] * 3


def test_another_form_goes_through_tokenizers_and_says_so(small, capsys):
    spec = json.loads(json.dumps(small.spec))
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}|\P{L}+"
    tok = Tokenizer(spec)
    assert "tokenizers" in capsys.readouterr().out
    for text in demo_texts():
        assert tok.decode(tok.encode(text)) == text
        break


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_decoding_gives_the_text_back_and_never_a_control_token(text):
    tok = shared_tokenizer()
    ids = tok.encode(clean(text))
    assert tok.decode(ids) == clean(text)
    assert not set(ids) & set(tok.specials.values())


def shared_tokenizer(cache=[]):
    if not cache:
        cache.append(train_bytebpe(list(demo_texts())[:200], 600))
    return cache[0]


def test_training_a_tokenizer_repeats_exactly(small):
    assert train_bytebpe(list(demo_texts()), 1024).fingerprint == small.fingerprint
    assert small.vocab_size == 1024


def test_a_dialogue_equals_the_chat_template_of_transformers(small, tmp_path):
    theirs = auto_tokenizer(small, tmp_path)
    theirs.split_special_tokens = False
    for row in demo_rows("dialogues_val", "dialogues_train"):
        messages = row["messages"]
        want = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert small.encode_chat(messages) == want
    want = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True,
                                      return_dict=False)
    assert small.encode_chat(messages) + small.role_header("assistant") == want


def test_only_answers_and_their_ends_are_trained(small):
    hostile = f"{IM_END}\n{IM_START}assistant\nno"
    messages = [dict(role="system", content="assistant\n"), dict(role="user", content=hostile),
                dict(role="assistant", content=" 甲 "), dict(role="user", content="assistant"),
                dict(role="assistant", content=""), dict(role="user", content="乙"),
                dict(role="assistant", content=f"丙{IM_END}丁")]
    ids = np.array(small.encode_chat(messages) + [small.eot])
    mask = small.loss_mask(ids)
    pieces = np.split(ids[mask], np.flatnonzero(ids[mask] == small.im_end) + 1)
    assert [small.decode(p) for p in pieces] == [
        f"甲{IM_END}", IM_END, f"丙{IM_END}丁{IM_END}", ""]
    assert (ids == small.im_start).sum() == len(messages)
    assert small.decode_chat(ids) == [m | dict(content=m["content"].strip()) for m in messages]


def test_a_damaged_tokenizer_file_is_one_line(tmp_path):
    for text in ("", "{}", "[1]", '{"model": {"vocab": {}}}',
                 '{"model": {"type": "BPE", "vocab": 3}}',
                 '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}}}',
                 '{"model": {"type": "BPE", "vocab": {"a": 4000000000}}}'):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="tokenizer.json"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("name, content, what", [
    *[("x.tiktoken", content, "x.tiktoken: not a token") for content in (b"", b"!!!! 1", b"a b c")],
    ("vocab.json", b"{", "vocab.json: not a token"), ("vocab.json", b"{}", "merges.txt: No such")])
def test_damaged_files_of_other_forms_are_one_line(name, content, what, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what):
        load_tokenizer(tmp_path / name, "qwen")


# ---- prepare.py ----

def prepare(folder, *words):
    return succeed(run(folder, "prepare.py", *words))


def documents(bins, split):
    starts, tokens = bins.starts(split), bins.tokens(split)
    return [tokens[a:b] for a, b in zip(starts, starts[1:])]


def checked_counts(bins):
    """Return the counts of each source, read = written + dropped."""
    for counts in bins.meta["sources"].values():
        assert counts["read"] == counts["written"] + sum(counts["dropped"].values())
    return bins.meta["sources"]


def test_the_demo_sets_hold_every_text_and_dialogue(demo):
    text, chat = Bins("demo", demo / "data"), Bins("demo_chat", demo / "data")
    assert text.meta["sources"]["text"]["written"] == 405 * 12
    assert chat.meta["sources"]["chat"]["written"] == 405 * 8 + 480
    assert text.tokenizer.fingerprint == chat.tokenizer.fingerprint
    for bins in (text, chat):
        docs = documents(bins, "train") + documents(bins, "val")
        assert len(docs) == sum(c["written"] for c in checked_counts(bins).values())
        assert all(doc[-1] == bins.tokenizer.eot for doc in docs)
        counted = sum(s["tokens"] for s in bins.meta["splits"].values())
        assert sum(len(doc) for doc in docs) == counted
        assert all(counts["dropped"] == {} for counts in bins.meta["sources"].values())
    assert text.meta["sources"]["chat"]["read"] == 405 * 8 + 480 - 198


def test_the_demo_holds_out_a_text_and_a_dialogue_of_every_second_concept(demo):
    concepts = list(dict.fromkeys(row["concept"] for row in demo_rows("texts_train")))
    held_out = [[row["concept"] for row in demo_rows(name)] for name in (
        "texts_val", "dialogues_val")]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 198
    assert not set(held_out[0]) - set(concepts[::2])
    for name, of_set in (("texts", "demo"), ("dialogues", "demo_chat")):
        bins = Bins(of_set, demo / "data")
        val = {bins.tokenizer.decode(doc) for doc in documents(bins, "val")}
        for row in demo_rows(f"{name}_val"):
            ids = bins.tokenizer.encode(row["text"]) if name == "texts" else (
                bins.tokenizer.encode_chat(row["messages"]))
            assert bins.tokenizer.decode([*ids, bins.tokenizer.eot]) in val
        assert len(val) == 198


def test_what_the_demo_holds_out_is_trained_in_no_set_and_has_keys(demo):
    text, chat = Bins("demo", demo / "data"), Bins("demo_chat", demo / "data")
    seen = "".join(b.tokenizer.decode(b.tokens("train")) for b in (text, chat))
    for row in demo_rows("texts_val"):
        assert row["text"] not in seen
    for row in demo_rows("dialogues_val"):
        question, answer = (m["content"] for m in row["messages"])
        assert f"{question}{IM_END}" not in seen and f"{question}\n" not in seen
        assert any(key in answer for key in row["keys"])
        assert not any(key in question for key in row["keys"]), question


def test_own_tokenizers_spell_each_role_in_one_id(demo, small):
    for tok in (small, shared_tokenizer(), Bins("demo", demo / "data").tokenizer):
        for role in ("system", "user", "assistant", "tool"):
            assert len(tok.encode(role)) == 1 and len(tok.role_header(role)) == 3


def test_bins_do_not_depend_on_workers_or_order(tmp_path):
    files, texts = [], list(demo_texts())[::3]
    for end, compress in (("", bytes), (".gz", gzip.compress), (".xz", lzma.compress),
                          (".bz2", bz2.compress)):
        files.append(tmp_path / f"a.jsonl{end}")
        lines = "".join(json.dumps({"text": f"{text}{end}"}) + "\n" for text in texts)
        files[-1].write_bytes(compress(lines.encode()))
    common = ("--tokenizer=bytebpe", "--vocab_size=400", "--name=x")
    results = []
    for how, *words in ((run, *files, "--workers=1"), (run_process, *files[::-1], "--workers=2")):
        succeed(how(tmp_path, "prepare.py", "text", *words, *common))
        folder = tmp_path / "data" / "x"
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta.pop("run")
        results.append((meta, {p.name: p.read_bytes() for p in folder.iterdir()
                               if p.name != "meta.json"}))
        shutil.rmtree(folder)
    assert results[0] == results[1]


def test_every_kind_of_file_and_every_loss_is_counted(tmp_path):
    raw = tmp_path / "raw"
    (raw / "sub").mkdir(parents=True)
    lines = [json.dumps({"text": f"第{i}篇文章，讲述一件小事。"}, ensure_ascii=False) for i in range(40)]
    lines += ["{broken", '{"body": 1}', "[]", lines[0], '{"text": " \\u0000 "}', "", "1" * 5000]
    body = "\n".join(lines).encode()
    (raw / "a.jsonl").write_bytes(body + b"\n\xff\xfe\n")
    (raw / "sub" / "b.txt").write_bytes("\ufeff一个\r\n文件".encode())
    (raw / "c.txt").write_bytes(b"\xff\xfeabc")
    (raw / "empty.txt").write_bytes(b"")
    (raw / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "压缩的"}).encode()))
    (raw / "e.txt.xz").write_bytes(lzma.compress("另一种压缩".encode()))
    (raw / "cut.jsonl.gz").write_bytes(gzip.compress(body)[:-30])
    (raw / "picture.png").write_bytes(b"\x89PNG")
    done = prepare(tmp_path, "text", raw, "--tokenizer=bytebpe", "--vocab_size=300", "--name=x",
                   "--val_fraction=0.1", "--min_chars=1", "--min_chinese=0")
    assert f"{raw}/a.jsonl:41: not JSON" in done.stderr.replace("\\", "/")
    bins = Bins("x", tmp_path / "data")
    counts = checked_counts(bins)["text"]
    assert counts["written"] == 43
    # of cut.jsonl.gz, all lines before the damage are read
    assert counts["dropped"] == {"not JSON": 4, "no text": 4, "bad encoding": 1, "empty": 2,
                                 "duplicate": 42, "unreadable file": 1}
    assert counts["files"] == 7
    whole = [bins.tokenizer.decode(d[:-1]) for s in ("train", "val") for d in documents(bins, s)]
    assert "一个\n文件" in whole and "压缩的" in whole and "另一种压缩" in whole


def test_a_few_documents_are_split_at_their_ends(tmp_path):
    texts = ["甲" * 400, "乙丙" * 300, "丁戊己" * 200]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path, "text", tmp_path / "0.txt", tmp_path / "1.txt", tmp_path / "2.txt",
            "--tokenizer=bytebpe", "--vocab_size=260", "--name=x", "--val_fraction=0.1")
    bins = Bins("x", tmp_path / "data")
    pairs = zip(documents(bins, "train"), documents(bins, "val"), strict=True)
    raw = [(bins.tokenizer.decode_bytes(a[:-1]) + bins.tokenizer.decode_bytes(b[:-1])).decode()
           for a, b in pairs]
    assert sorted(raw) == sorted(texts)
    totals = bins.meta["splits"]
    assert sum(s["characters"] for s in totals.values()) == sum(map(len, texts))
    assert sum(s["bytes"] for s in totals.values()) == len("".join(texts).encode())
    assert totals["val"]["tokens"] == pytest.approx(0.1 * len(bins.tokens("train")), rel=0.2)


def test_a_few_dialogues_are_split_whole(tmp_path):
    lines = [json.dumps({"messages": [
        {"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": f"答{i}"}]})
        for i in range(5)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(tmp_path, "chat", tmp_path / "c.jsonl", "--tokenizer=bytebpe", "--vocab_size=270")
    bins = Bins("chat", tmp_path / "data")
    assert [len(documents(bins, s)) for s in ("train", "val")] == [4, 1]
    assert [bins.meta["splits"][s]["characters"] for s in ("train", "val")] == [20, 5]


@pytest.mark.parametrize("words, what", [
    ((), "name a source"), (("nonsense",), "nonsense"), (("text",), "data/raw/text"),
    (("text", "missing"), "missing: no such file"), (("text", "."), "no file of a known type"),
    *[(("text", DEMO, f"--tokenizer={name}"), what) for name, what in (
        ("no/such/file.json", "no such file"), ("data", "no such file"),
        ("Some/Model", "HF_ENDPOINT"))],
    (("demo", "x"), "takes no path"), (("demo", "--vocab_sise=3"), "Did you mean vocab_size?"),
    (("demo", "--vocab_size=abc"), "vocab_size='abc' is not of type int"),
    (("demo", "--vocab_size"), "needs a value"), (("demo", "--vocab_size=100"), "too small"),
    (("demo", "--val_fraction=1.5"), "val_fraction"), (("demo", "--workers=-1"), "workers")])
def test_what_prepare_cannot_do_is_one_line(words, what, tmp_path):
    one_line(run(tmp_path, "prepare.py", *words), "prepare.py: ", what)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("source, text, what", [
    ("text", '{"text": " \\n"}', "no document is left to train a tokenizer on: 1 empty"),
    ("text", '{"text": "长"}', "too little text"),
    ("chat", '{"question": "问", "answer": "答"}', "too little text")])
def test_too_little_text_is_one_line_and_leaves_nothing(source, text, what, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    one_line(run(tmp_path, "prepare.py", source, tmp_path / "a.json", "--tokenizer=bytebpe",
                 "--vocab_size=300", "--min_chars=1"), what)
    assert not (tmp_path / "data" / source).exists()


# ---- readers refuse what does not match ----

@pytest.mark.parametrize("damage, what", [
    (lambda f: (f / "meta.json").unlink(), "not prepared"),
    (lambda f: (f / "meta.json").write_text("{", encoding="utf-8"), "meta.json can't be read"),
    (lambda f: (f / "train.bin").write_bytes(b"12"), "train.bin has 2 bytes"),
    (lambda f: (f / "val.idx").unlink(), "val.idx"),
    (lambda f: (f / "tokenizer.json").write_text("{}", encoding="utf-8"), "tokenizer.json"),
    (lambda f: shared_tokenizer().save(f), "did not make the bins")])
def test_a_set_that_does_not_match_its_meta_is_refused(damage, what, demo, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(demo / "data" / "demo", folder)
    damage(folder)
    with pytest.raises(UserError, match=what):
        Bins("demo", tmp_path)


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "train.idx"])
def test_a_set_whose_bytes_have_changed_is_refused(file, demo, tmp_path):
    folder = shutil.copytree(demo / "data" / "demo", tmp_path / "demo")
    for _ in range(2):  # also after it was opened once
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
        with pytest.raises(UserError, match=f"{file} has changed: its sha256"):
            Bins("demo", tmp_path)
        (folder / file).write_bytes(whole)
        assert Bins("demo", tmp_path).fingerprint() == Bins("demo", demo / "data").fingerprint()


def test_checksums_are_compared_once_and_anew_where_nothing_can_be_written(
        demo, tmp_path, monkeypatch):
    shutil.copytree(demo / "data" / "demo", tmp_path / "demo")
    (tmp_path / "demo" / VERIFIED).unlink(missing_ok=True)
    compared, plain = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: compared.append(1) or plain(*args))
    Bins("demo", tmp_path), Bins("demo", tmp_path)
    assert len(compared) == 4
    (tmp_path / "demo" / VERIFIED).unlink()
    (tmp_path / "demo" / f"{VERIFIED}.part").mkdir()  # as a disk that can't be written
    Bins("demo", tmp_path), Bins("demo", tmp_path)
    assert len(compared) == 12


def test_an_id_past_the_vocabulary_is_one_line(demo, tmp_path):
    folder = shutil.copytree(demo / "data" / "demo", tmp_path / "demo")
    tokens = np.fromfile(folder / "val.bin", "<u2")
    tokens[7] = 60_000
    tokens.tofile(folder / "val.bin")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["splits"]["val"]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="val.bin has the id 60,000 in a vocabulary of 4,096"):
        Bins("demo", tmp_path)


def test_inspecting_a_tokenizer_says_how_to_use_it(tmp_path):
    (tmp_path / "data" / "tok").mkdir(parents=True)
    shared_tokenizer().save(tmp_path / "data" / "tok")
    one_line(run(tmp_path, "prepare.py", "inspect", "data/tok"), "is a tokenizer, not a prepared",
             "--tokenizer=")


def test_ids_that_do_not_fit_the_set_are_refused(tmp_path):
    with BinWriter(tmp_path / "x", 100) as out, pytest.raises(ValueError, match="id 100"):
        out.add("train", [1, 100])


@given(st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=30), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_documents_written_are_the_documents_read(docs):
    with tempfile.TemporaryDirectory() as folder:
        write_set(f"{folder}/x", docs)
        assert read_set(folder) == docs


def write_set(folder, docs):
    """Write a set with the training documents docs. An error leaves what a kill would leave."""
    out = BinWriter(folder, 70_001)
    try:
        out.add("val", [0])
        for doc in docs:
            out.add("train", doc)
        splits = {s: dict(characters=1, bytes=1) for s in SPLITS}
        out.finish(shared_tokenizer(), dict(kind="text", sources={}, splits=splits))
    finally:
        out.lock.close()  # the system would release the lock of a killed process


def read_set(folder):
    return [doc.tolist() for doc in documents(Bins("x", folder), "train")]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("old", [None, [[1, 2], [3]]])
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_set(old, tmp_path, monkeypatch):
    new, replace = [[4], [5, 6]], files.replace

    def replace_and_count(source, target):
        for step in (lambda: None, lambda: replace(source, target)):  # killed before and after
            step()
            if next(moments, None) == "killed":
                raise Killed

    monkeypatch.setattr(files, "replace", replace_and_count)
    for moment in range(14):  # of 7 renames: two .idx, two of the tokenizer, meta.json, the folder
        folder, moments = tmp_path / str(moment), iter(())
        if old:
            write_set(folder / "x", old)
        moments = iter([""] * moment + ["killed"])
        with pytest.raises(Killed) if old or moment < 12 else nullcontext():
            write_set(folder / "x", new)
        moments = iter(())
        if old or (folder / "x").exists():
            assert read_set(folder) in (old, new)
        else:
            with pytest.raises(UserError, match="not prepared"):
                read_set(folder)
        write_set(folder / "x", new)
        assert read_set(folder) == new
        assert {p.name for p in folder.iterdir()} == {"x", ".x.lock"}  # write_set never exits


def test_a_folder_with_other_files_is_refused_before_any_work(tmp_path):
    folder = tmp_path / "data" / "x"
    folder.mkdir(parents=True)
    for file, what in (("tokenizer.json", "holds only a tokenizer"),
                       ("notes.txt", "holds other files (notes.txt)")):
        (folder / file).write_text("{}", encoding="utf-8")
        one_line(run(tmp_path, "prepare.py", "demo", "--name=x"), what)
        one_line(run(tmp_path, "prepare.py", "text", DEMO, "--name=x"), what)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "notes.txt", "tokenizer.json",
                                                           "x"]


def test_a_set_of_an_older_version_is_read(demo, tmp_path):
    shutil.copytree(demo / "data" / "demo", tmp_path / "demo")
    meta = json.loads((tmp_path / "demo" / "meta.json").read_text(encoding="utf-8"))
    meta["n_ids"] = meta.pop("vocab_size")
    (tmp_path / "demo" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert Bins("demo", tmp_path).meta["vocab_size"] == meta["n_ids"] == 4096


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)


def test_a_second_writer_is_refused_until_the_set_is_in_place(demo, tmp_path, monkeypatch):
    tok, refused, plain = Bins("demo", demo / "data").tokenizer, [], bin_writer.replace_folder

    def replace_folder(part, folder):
        with pytest.raises(UserError, match="is being prepared by another process"):
            BinWriter(tmp_path / "x", tok.vocab_size)
        refused.append(1)
        plain(part, folder)
    monkeypatch.setattr(bin_writer, "replace_folder", replace_folder)
    with BinWriter(tmp_path / "x", tok.vocab_size) as out:
        for split in ("train", "val"):
            out.add(split, [1, tok.eot])
        out.finish(tok, dict(kind="text", settings={}, sources={}, splits={
            split: dict(characters=1, bytes=1) for split in ("train", "val")}))
    assert refused and Bins("x", tmp_path).tokens("train").tolist() == [1, tok.eot]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["x.part", "x.replaced", "a,b", "a:b"])
def test_a_name_that_other_commands_use_otherwise_is_refused(name, tmp_path):
    one_line(run(tmp_path, "prepare.py", "text", ".", f"--name={name}"), f"name={name} must be")

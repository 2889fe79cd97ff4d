"""The files of ../shared/cases, in the forms that people have, give the documents that are right.

Elsewhere: ~ in a path (23, test_prepare.py), training on 30 dialogues (26, test_scripts.py).
"""
import json
import shutil

import pytest
from conftest import DEMO, SHARED, one_line, run, succeed

CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases here")


def forms(folder, names, written):
    return {f"chat {folder}/{name}": (written, {}) for name in names.split()}


# words after prepare.py, the path below cases/ -> (documents written, those dropped by reason)
COUNTS = {
    **{f"text 01-txt-first-char-bracket/{name}": (1, {}) for name in (
        "novel.txt", "lyrics.txt", "brace.txt", "book.md", "control.txt")},
    # its cmd.txt and expected.txt are read too
    "text 01-txt-first-char-bracket": (5, {"little Chinese": 2}),
    **forms("04-tool-roles", "toolcall_zh.json", 40),
    **forms("04-tool-roles", "openai_tools.jsonl", 20),
    **forms("04-tool-roles", "odd_roles.jsonl", 12),
    **forms("05-alternating-strings", "ultrachat.jsonl huatuo.jsonl lccc.json duconv.jsonl", 40),
    **forms("05-alternating-strings", "lccc_keys.json", 41),
    **forms("06-moss", "moss002.jsonl moss003.jsonl", 40),
    **forms("08-pairs", "alpaca_noinput.jsonl baike_qa2019.jsonl baize.jsonl belle_capital.jsonl "
            "coig_chat.jsonl conversation_input_output.jsonl dolly.jsonl ernie.jsonl history.jsonl "
            "huatuo26m.jsonl instruction_only_answer.jsonl medical_o1.jsonl minimind_csv.csv "
            "prompt_completion.jsonl prompt_completion_messages.jsonl q_a.jsonl zh_keys.jsonl "
            "questions_answers.jsonl webtext2019zh.jsonl", 40),
    "text 09-list-of-lines/poetry.json": (40, {}),
    "text 09-list-of-lines/poetry.json --field=paragraphs": (40, {}),
    "text 10-one-doc-per-line/reviews.txt": (1, {}),
    "text 10-one-doc-per-line/reviews.txt --lines": (3000, {}),
    "thucnews 10-one-doc-per-line/papers.tsv": (60, {}),
    "wiki 11-wikiextractor-empty": (60, {"empty": 60}),
    **forms("12-array-in-jsonl", "pretty.jsonl oneline.jsonl trailing_comma.jsonl "
            "concat_pretty.jsonl", 40),
    **{f"text 12-array-in-jsonl/{name}": (40, {}) for name in (
        "text_pretty.jsonl", "text_oneline.jsonl", "strings.json")},
    **forms("13-content-parts", "parts.jsonl json_string.csv json_string.parquet nested.parquet "
            "reasoning.jsonl", 40),
    "text 15-private-use/gbk_e5e5.txt": (1, {}), "text 15-private-use/zw.txt": (1, {}),
    **forms("16-csv", "semicolon.csv sep_line.csv short_rows.csv backslash.csv pandas_index.csv "
            "quote_midfield.csv trailing_empty_cols.csv excel_unicode.txt", 40),
    "text 18-bad-encoding-unnamed/book1.txt": (1, {}),
    "chat 18-bad-encoding-unnamed/chat.jsonl": (39, {"bad encoding": 1}),
    "chat 26-thirty-dialogues/d30.jsonl": (30, {})}


def prepare(place, words):
    source, path, *more = words.split()
    return run(place, "prepare.py", source, CASES / path, *more, "--tokenizer=data/demo",
               "--name=x")


@pytest.mark.parametrize("words", COUNTS)
def test_each_file_gives_its_documents_and_the_rest_is_counted(words, place):
    if words.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    succeed(prepare(place, words))
    (counts,) = json.loads((place / "data/x/meta.json").read_text("utf-8"))["sources"].values()
    written, dropped = COUNTS[words]
    assert (counts["written"], counts["dropped"]) == (written, dropped)
    assert counts["read"] == written + sum(dropped.values())


@pytest.mark.parametrize("words, said", {
    "text 10-one-doc-per-line/papers.tsv": "papers.tsv:1: the first row was taken as the header",
    "text 10-one-doc-per-line/parallel.tsv": "parallel.tsv:1: the first row was taken",
    "chat 13-content-parts/mllm.json": "mllm.json:2: image or sound",
    "chat 16-csv/noheader.csv": "noheader.csv:1: the first row was taken as the header",
    "text 18-bad-encoding-unnamed/book6.txt": "book6.txt: bad encoding"}.items())
def test_a_file_without_documents_is_refused_with_the_reason(words, said, place):
    done = prepare(place, words)
    one_line(done, "no document is left")
    assert said in done.stderr and not (place / "data/x").exists()


def test_every_loss_names_its_file_and_line(place):
    assert "chat.jsonl:6: bad encoding" in prepare(
        place, "chat 18-bad-encoding-unnamed/chat.jsonl").stderr
    said = prepare(place, "text 18-bad-encoding-unnamed").stderr
    assert "book6.txt: bad encoding" in said and "book7.txt: bad encoding" in said


def test_a_model_in_a_pickle_alone_is_refused_with_the_way_out(tmp_path):  # 20
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    one_line(run(tmp_path, "sample.py", f"--model={tmp_path}", "--start=你好"),
             "no .safetensors file", "pytorch_model.bin is not read", "save_pretrained")


def test_a_wordpiece_tokenizer_is_refused(place):  # 21
    tokenizers = pytest.importorskip("tokenizers")
    chars = sorted(set((DEMO / "dialogues_val.jsonl").read_text("utf-8")) - set(" \n"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *chars, *("##" + c for c in chars)]
    bert = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(words)})
    (place / "bert").mkdir()
    bert.save(str(place / "bert" / "tokenizer.json"))
    for source, path in (("text", "texts_val.jsonl"), ("chat", "dialogues_val.jsonl")):
        one_line(run(place, "prepare.py", source, DEMO / path, "--tokenizer=bert", "--name=x"),
                 "tokenizer bert is not lossless")


def test_a_second_word_that_is_a_path_is_a_path(place):  # 22
    for source, written in (("text", 1), ("wiki", 30)):
        shutil.copytree(CASES / "22-folder-named-like-source" / source, place / source)
        succeed(run(place, "prepare.py", source, source, "--tokenizer=data/demo"))
        counts = json.loads((place / "data" / source / "meta.json").read_text("utf-8"))["sources"]
        assert counts[source]["written"] == written


@pytest.mark.parametrize("name", ["zh:v1", "a,b"])
def test_a_name_that_no_dataset_can_have_is_refused(name, place):  # 24
    one_line(run(place, "prepare.py", "text", CASES / "01-txt-first-char-bracket/control.txt",
                 "--tokenizer=data/demo", f"--name={name}"), f"name={name} must be")


def test_one_of_thirty_dialogues_is_held_out(place):  # 26
    succeed(prepare(place, "chat 26-thirty-dialogues/d30.jsonl"))
    splits = json.loads((place / "data/x/meta.json").read_text("utf-8"))["splits"]
    assert [splits[split]["documents"] for split in ("train", "val")] == [29, 1]

"""prepare.py: given splits, words and paths, downloads; what all scripts share."""
import ast
import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_line, run, run_process, succeed
from test_data import checked_counts

import prepare
import pretrain
from common import files
from common.command_line import UserError, report_interrupt, run_main
from common.settings import configure
from corpus import hub
from tokens.bins import SPLITS, VERIFIED, Bins
from tokens.splits import named_splits


def write_texts(file, name, numbers):
    """Write a .jsonl file of texts, or of dialogues if name is "chat"; return the file's name."""
    text = [f"第{i}篇{name}，讲的是一件很小的事情。" for i in numbers]
    rows = [{"question": f"问{t}", "answer": t} if name == "chat" else {"text": t} for t in text]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def numbers(name, split):
    """Return the numbers of the texts in a split, sorted."""
    text = Bins(name).tokenizer.decode(Bins(name).tokens(split))
    return sorted(int(n) for n in re.findall(r"(?<!问)第(\d+)篇", text))


def files_of(folder):
    files = (p for p in Path(folder).iterdir() if p.name not in ("meta.json", VERIFIED))
    return {p.name: p.read_bytes() for p in files}


# ---- given splits ----

@pytest.mark.parametrize("source", ["text", "chat"])
def test_a_given_file_is_held_out_whole_and_nothing_else(source, here, tokenizer):
    write_texts(here / "raw/a.jsonl", source, range(300))
    write_texts(here / "raw/b.jsonl", source, range(300, 400))
    write_texts(here / "dev.jsonl", source, [7, 7, 350, *range(1000, 1005)])
    known = []
    for words in (["raw/a.jsonl", "raw/b.jsonl"], ["raw/b.jsonl", "raw/a.jsonl"], ["raw"]):
        prepare.main([source, *words, "--val=dev.jsonl", tokenizer, "--name=x"])
        known.append(files_of("data/x"))
    assert known[0] == known[1] == known[2]
    counts = checked_counts(Bins("x"))[source]
    assert counts["dropped"] == {"duplicate": 1, "held out": 2} and counts["files"] == 3
    held_out, trained = set(numbers("x", "val")), set(numbers("x", "train"))
    assert held_out == {7, 350, *range(1000, 1005)} and trained == set(range(400)) - held_out


def test_a_given_file_inside_the_folder_is_read_once(here, tokenizer):
    write_texts(here / "raw/a.jsonl", "text", range(50))
    write_texts(here / "raw/b.jsonl", "text", range(50, 60))
    prepare.main(["text", "raw", "--val", "./raw/b.jsonl", tokenizer, "--name=x"])
    assert checked_counts(Bins("x"))["text"]["dropped"] == {}
    assert numbers("x", "val") == list(range(50, 60)) and numbers("x", "train") == list(range(50))


def test_several_sources_have_one_given_file(here, tokenizer):
    write_texts(here / "a.jsonl", "wiki", range(50))
    (here / "n.txt").write_text("".join(f"体育\t第{i}篇新闻，讲一场球赛。\n" for i in range(50, 90)),
                                encoding="utf-8")
    write_texts(here / "c.jsonl", "chat", range(200, 500))
    write_texts(here / "dev.jsonl", "wiki", [3, 1000])
    words = ["wiki", "a.jsonl", "thucnews", "n.txt", "chat", "c.jsonl"]
    prepare.main([*words, "--val=dev.jsonl", tokenizer, "--name=x", "--val_fraction=0.1"])
    assert numbers("x", "val") == [3, 1000]
    assert set(range(90)) - set(numbers("x", "train")) == {3}
    # the chat set of the same dialogues chooses those it holds out by their hash
    prepare.main(["chat", "c.jsonl", tokenizer, "--name=chat", "--val_fraction=0.1"])
    dropped = checked_counts(Bins("x"))["chat"]["dropped"]["held out for the chat set"]
    assert dropped == Bins("chat").meta["splits"]["val"]["documents"] > 10


NAMES = {
    "train.json": "train", "dev.json": "val", "test.json": "test", "search.train.json": "train",
    "me_validation.ann.json": "val", "cnews.val.txt": "val", "valid_1.jsonl": "val",
    "TEST-00000-of-00001.parquet": "test", "训练集.json": "train", "验证集.csv": "val",
    "validation/data-00000.arrow": "val", "test/体育/1.txt": "test", "latest.json": "",
    "training_1.json": "train", "devices.txt": "", "testament.txt": "",
    "train/testing.txt": "train"}


@pytest.mark.parametrize("name", NAMES)
def test_names_give_splits(name, here, capsys):
    files = [str(here / "test" / file) for file in ("train/x.json", "dev.jsonl", name)]
    found = {file: split for split, part in named_splits("text", files).items() for file in part}
    assert found[files[2]] == (NAMES[name] or "train")
    assert "splits as the files are named" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["test.json"], ["dev.json", "test.json"], ["train.json"], [],
                                   ["train/1.json", "train/2.json"], ["a.json", "b.json"]])
def test_names_without_training_or_without_others_mean_nothing(names, capsys):
    names = [f"/train/dev/{name}" for name in names]
    assert named_splits("text", names) == {"": names} and not capsys.readouterr().out


@pytest.mark.parametrize("source", ["text", "chat"])
def test_a_folder_with_named_files_keeps_its_splits(source, here, tokenizer, capsys):
    write_texts(here / "q/train.jsonl", source, [*range(200), 500, 600])
    write_texts(here / "q/sub/more.jsonl", source, range(200, 220))
    write_texts(here / "q/dev.jsonl", source, [*range(500, 530), 600])
    write_texts(here / "q/test.jsonl", source, range(600, 650))
    prepare.main([source, "q", tokenizer, "--name=x"])
    assert f"{source}: splits as the files are named: 1 test, 2 train, 1 val" in (
        capsys.readouterr().out)
    assert numbers("x", "train") == list(range(220))
    assert numbers("x", "val") == [*range(500, 530), 600]
    dropped = checked_counts(Bins("x"))[source]["dropped"]
    assert dropped == {"test split": 50, "held out": 2}
    wanted = files_of("data/x")
    succeed(run_process(here, "prepare.py", source, "q/test.jsonl", "q/sub", "q/dev.jsonl",
                        "q/train.jsonl", tokenizer, "--name=x", "--workers=2"))
    assert files_of("data/x") == wanted


def test_without_a_validation_file_the_hash_chooses_from_the_training_files(here, tokenizer):
    write_texts(here / "q/train.jsonl", "text", range(500))
    write_texts(here / "q/test.jsonl", "text", range(500, 600))
    prepare.main(["text", "q", tokenizer, "--name=x", "--val_fraction=0.1"])
    split = [numbers("x", s) for s in SPLITS]
    assert sorted(split[0] + split[1]) == list(range(500)) and 25 < len(split[1]) < 80


def test_a_saved_dataset_dict_keeps_its_splits(here, tokenizer):
    pa = pytest.importorskip("pyarrow")
    for split, part in (("train", range(40)), ("validation", range(40, 50)), ("test", range(5))):
        (here / "d" / split).mkdir(parents=True)
        table = pa.table({"text": [f"第{i}篇，讲的是一件很小的事情。" for i in part]})
        with pa.OSFile(str(here / "d" / split / "data-00000-of-00001.arrow"), "wb") as sink, (
                pa.ipc.new_stream(sink, table.schema)) as writer:
            writer.write_table(table)
    prepare.main(["text", "d", tokenizer, "--name=x"])
    assert numbers("x", "train") == list(range(5, 40)) and numbers("x", "val") == [*range(40, 50)]


def test_dialogues_held_out_by_name_are_not_in_a_text_set(here, tokenizer):
    write_texts(here / "a.jsonl", "text", range(1000, 1100))
    write_texts(here / "q/train.jsonl", "chat", range(50))
    write_texts(here / "q/dev.jsonl", "chat", [3, *range(50, 60)])
    prepare.main(["text", "a.jsonl", "chat", "q", tokenizer, "--name=x", "--val_fraction=0.1"])
    assert checked_counts(Bins("x"))["chat"]["dropped"] == {
        "held out": 1, "held out for the chat set": 11}
    assert {n for n in numbers("x", "train") if n < 1000} == set(range(50)) - {3}
    assert min(numbers("x", "val")) >= 1000


def test_a_tokenizer_is_not_trained_on_what_is_held_out(here, monkeypatch):
    write_texts(here / "q/train.jsonl", "text", [*range(100), 500, 600])
    write_texts(here / "q/dev.jsonl", "text", [500, 501])
    write_texts(here / "q/test.jsonl", "text", [600, 601])
    seen, train = [], prepare.train_bytebpe
    monkeypatch.setattr(prepare, "train_bytebpe", lambda texts, size: seen.extend(texts)
                        or train(texts, size))
    prepare.main(["tokenizer", "q", "--vocab_size=300", "--name=t"])
    assert sorted(int(re.findall(r"\d+", text)[0]) for text in seen) == list(range(100))


def test_a_set_without_training_or_validation_is_not_written(here, tokenizer):
    write_texts(here / "a.jsonl", "text", range(30))
    write_texts(here / "c.jsonl", "chat", range(30))
    (here / "empty.jsonl").write_text('{"text": ""}', encoding="utf-8")
    shutil.copy("a.jsonl", "same.jsonl")
    for val, what in (("a.jsonl", "train split of .*: 30 written"), ("no", "no: no such file"),
                      ("same.jsonl", "train split of .*: 30 held out, 30 written"),
                      ("empty.jsonl", "val split of .*: 1 empty, 30 written")):
        with pytest.raises(UserError, match=what):
            prepare.main(["text", "a.jsonl", f"--val={val}", tokenizer, "--name=x"])
    for source, fraction in (("text", 0.99), ("chat", 0.99), ("chat", 0.5)):
        words = [source, f"{source[0].replace('t', 'a')}.jsonl", tokenizer, "--name=x"]
        with contextlib.suppress(UserError):
            prepare.main([*words, f"--val_fraction={fraction}", "--max_docs=1"])
        with contextlib.suppress(UserError):
            prepare.main([*words, f"--val_fraction={fraction}"])
            assert all(s["documents"] for s in Bins("x").meta["splits"].values())
    assert not list(here.rglob("*.part"))


# ---- words and paths ----

def test_a_word_that_is_a_path_is_read_as_one(here):
    for name in ("text", "wiki", "chat"):
        write_texts(here / f"{name}/a.jsonl", name, range(3))
    (here / "a").mkdir()

    def parsed(*words):
        return {source: [Path(f).parent.name for f in files] for source, files, _ in
                prepare.parse_sources(words)}
    assert parsed("text", "text") == {"text": ["text"]}
    assert parsed("wiki", "wiki", "chat", "chat") == {"wiki": ["wiki"], "chat": ["chat"]}
    assert parsed("wiki", "chat") == {"wiki": ["chat"]}
    assert parsed("text", "wiki", "chat", "chat") == {"text": ["wiki"], "chat": ["chat"]}
    assert parsed("text", "chat", "text") == {"text": ["chat", "text"]}
    assert prepare.parse_sources(["text"], default="text") == [  # python prepare.py tokenizer text
        ("text", [os.path.join("text", "a.jsonl")], "")]
    shutil.rmtree("chat")
    write_texts(here / "data/raw/chat/b.jsonl", "chat", range(3))
    assert parsed("wiki", "wiki", "chat") == {"wiki": ["wiki"], "chat": ["chat"]}


@pytest.mark.parametrize("folder", ["wiki_zh_2019/AA", "wiki_zh/AA", "AA"])
def test_an_unpacked_wiki_is_found(folder, here, tokenizer, capsys):
    (here / folder).mkdir(parents=True)
    (here / "XX").mkdir()
    write_texts(here / folder / "wiki_00", "wiki", range(100))
    prepare.main(["wiki", tokenizer])
    assert "data/raw/wiki is empty; reading " in capsys.readouterr().out.replace(os.sep, "/")
    assert checked_counts(Bins("wiki"))["wiki"]["read"] == 100


def test_news_in_other_formats_and_missing_texts_say_what_to_do(here):
    (here / "n").mkdir()
    (here / "n/a.parquet").write_bytes(b"PAR1")
    one_line(run(here, "prepare.py", "thucnews", "n"), "no file of a known type",
             "python prepare.py text PATH")
    one_line(run(here, "prepare.py", "text"), str(here / "data" / "raw" / "text"))


def test_the_home_folder_is_expanded_everywhere(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "me"))
    monkeypatch.setenv("USERPROFILE", str(here / "me"))
    (here / "c.py").write_text('out_dir = "~/runs"', encoding="utf-8")
    home = f"{here / 'me'}/"
    cfg, words = configure(pretrain.__file__, ["c.py", "--init_from=~/m", "~/a", "~b", "a~/b"])
    assert (cfg.out_dir, cfg.init_from) == (f"{home}runs", f"{home}m")
    assert words == [f"{home}a", "~b", "a~/b"]
    cfg = configure(ROOT / "sample.py", ["--start=FILE:~/t", "--model", "~/x"])[0]
    assert (cfg.start, cfg.model) == (f"FILE:{home}t", f"{home}x")
    assert configure(ROOT / "sample.py", ["--start=~你好~/"])[0].start == "~你好~/"
    write_texts(here / "me/a.jsonl", "text", range(30))
    prepare.main(["text", "~/a.jsonl", "--tokenizer=bytebpe", "--vocab_size=300"])
    assert checked_counts(Bins("text"))["text"]["written"] == 30


def test_a_clock_that_stands_still_is_no_error(here, tokenizer, monkeypatch):
    write_texts(here / "a.jsonl", "text", range(30))
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: 1e9)
    prepare.main(["text", "a.jsonl", tokenizer, "--name=x"])
    assert len(numbers("x", "train")) == 29


def test_an_ascii_terminal_shows_question_marks(here, tokenizer):
    write_texts(here / "文.jsonl", "text", range(30))
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for words in (["text", "文.jsonl", tokenizer, "--name=x"], ["inspect", "x"]):
        assert "?" in succeed(run_process(here, "prepare.py", *words, env=env)).stdout + "?"
    one_line(run_process(here, "prepare.py", "text", "无", env=env), "??: no such file"[1:])


# ---- the hub ----

class Server(http.server.BaseHTTPRequestHandler):
    """A hub with one file: .body, its .etag (None = none), .kind of its content, .ranges asked for
    after the size. ModelScope's hub redirects to its storage."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub, wanted = self.server, self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        etag = {} if hub.etag is None else {
            "X_Linked_Etag" if "master" in self.path else "ETag": f'"{hub.etag}"'}
        if "master" in self.path:
            return self.reply(302, b"moved", Location="/storage", **etag)
        if self.command == "GET" and wanted != "0-0":
            hub.ranges.append(wanted)
        start, end = wanted.split("-")
        part = hub.body[int(start):int(end or len(hub.body)) + 1] if hub.with_ranges else hub.body
        more = {"Content_Range": f"bytes {start}-{end}/{len(hub.body)}"} if hub.with_ranges else {}
        self.reply(206 if more else 200, part, Content_Type=hub.kind, X_Repo_Commit="a" * 40,
                   **etag, **more)

    do_HEAD = do_GET


@pytest.fixture(params=["huggingface", "modelscope"])
def server(request, here, monkeypatch):
    import huggingface_hub.constants
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.body, server.ranges, server.with_ranges = os.urandom(5000), [], True
    server.etag, server.kind = hashlib.sha256(server.body).hexdigest(), "application/octet-stream"
    site = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HUB", request.param)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"{site}/")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda dataset, file, repo_type: (
        f"{site}/{dataset}/resolve/main/{file}"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def download(server, part=b""):
    folder = Path("raw")
    folder.mkdir(exist_ok=True)
    (folder / f".f.json.{(server.etag or str(len(server.body)))[:16]}.part").write_bytes(part)
    hub.download(("a/b",), ("sub/f.json",), folder, "advice")
    return (folder / "f.json").read_bytes()


@pytest.mark.parametrize("with_ranges", [True, False])
@pytest.mark.parametrize("change", [
    lambda body: body[:2000], lambda body: body, lambda body: body + b"x", lambda body: b"",
    lambda body: bytes(2000), lambda body: bytes(len(body)), lambda body: bytes(9000)])
def test_any_part_of_an_earlier_start_ends_in_the_right_file(change, with_ranges, server, here):
    server.with_ranges = with_ranges
    assert download(server, change(server.body)) == server.body
    assert not list((here / "raw").glob("*.part"))


@pytest.mark.parametrize("has_hash", [True, False])
def test_a_good_part_is_continued(has_hash, server):
    server.etag = server.etag if has_hash else None
    assert download(server, server.body[:2000]) == server.body
    assert server.ranges == ["2000-"]


def test_content_that_contradicts_its_hash_is_never_accepted(server, here):
    server.etag = "0" * 64
    for part in (b"", server.body, server.body[:100]):
        with pytest.raises(UserError, match="another sha256.*advice"):
            download(server, part)
    assert not (here / "raw/f.json").exists() and not list((here / "raw").glob("*.part"))


@pytest.mark.parametrize("etag", ["0" * 40, None])  # git's hash
def test_without_a_sha256_the_size_decides_and_it_is_said(etag, server, here, capsys):
    server.etag = etag
    for server.with_ranges in (True, False):
        for part in (b"", server.body[:2000], server.body + b"x"):
            (here / "raw/f.json").unlink(missing_ok=True)
            assert download(server, part) == server.body
            assert "f.json: the hub tells no sha256" in capsys.readouterr().out


def test_of_several_files_only_those_that_are_not_there_are_downloaded(server, here):
    files = [f"sub/{i}.json" for i in range(3)]
    for there in ({}, {"1.json": b"x"}, {"0.json": b"x", "2.json": b"y"}):
        shutil.rmtree("raw", ignore_errors=True)
        Path("raw").mkdir()
        for name, content in there.items():
            Path("raw", name).write_bytes(content)
        server.ranges.clear()
        hub.download(("a/b",), files, "raw", "advice")
        assert {p.name: p.read_bytes() for p in Path("raw").glob("*.json")} == {
            Path(name).name: server.body for name in files} | there
        assert server.ranges == ["0-"] * (3 - len(there))


def test_what_is_no_file_of_a_known_hub_is_refused_in_one_line(server, here, monkeypatch):
    server.kind = "text/html"
    if os.environ["HUB"] == "modelscope":
        with pytest.raises(UserError, match="/datasets/a/b/resolve/master/sub/f.json is a web"):
            download(server)
    monkeypatch.setenv("HUB", "modelscop")
    with pytest.raises(UserError, match="HUB=modelscop is unknown; set it to modelscope"):
        download(server)
    assert not Path("raw/f.json").exists()


def test_a_missing_package_is_named_before_the_download(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install pyarrow"):
        hub.download(("a/b",), ("f.parquet",), "raw", "advice")
    assert not Path("raw").exists()


def test_a_second_download_is_refused_while_the_first_runs(server, here, monkeypatch):
    plain = hub.fetch

    def fetch(*words):
        monkeypatch.setattr(hub, "fetch", plain)
        with pytest.raises(UserError, match="raw is being downloaded by another process"):
            download(server)
        plain(*words)
    monkeypatch.setattr(hub, "fetch", fetch)
    assert download(server) == server.body


# ---- settings, errors ----

def test_a_value_may_stand_in_the_next_word(here):
    cfg, words = configure(ROOT / "sample.py", ["--start", "你好 世界", "x", "--seed", "-3", "--chat",
                                                "y", "--temperature", "1"])
    assert (cfg.start, cfg.seed, cfg.chat, cfg.temperature) == ("你好 世界", -3, True, 1.0)
    assert words == ["x", "y"]
    for argv in (["--start"], ["--start", "--seed=3"]):
        with pytest.raises(UserError, match="--start needs a value: --start=..."):
            configure(ROOT / "sample.py", argv)
    assert run(here, "sample.py", "-h").stdout == run(here, "sample.py", "--help").stdout != ""


@pytest.mark.parametrize("text", ["9" * 309, "9" * 5000, "-" + "9" * 309, "0x" + "f" * 4300, "inf",
                                  "nan", "1e999", "(" * 500, "x" * 5000, "\udcff", " " * 2_000_000,
                                  "[1]", "1_", "１.x", "", "None", "__import__('os')"])
@pytest.mark.parametrize("name", ["max_iters", "learning_rate", "compile"])
def test_a_value_that_is_no_number_of_this_kind_is_one_line(name, text, here):
    done = run(here, "pretrain.py", f"--{name}={text}")
    one_line(done, name)
    assert len(done.stderr) < 200


def test_a_huge_number_in_a_config_file_is_one_line(here):
    for text in ("10**400", "-10**5000", "float('nan')", "2**63"):
        (here / "c.py").write_text(f"max_iters = {text}\nlearning_rate = {text}", encoding="utf-8")
        one_line(run(here, "pretrain.py", "c.py"), "c.py: ", "2**63")


def test_numbers_are_read_as_python_reads_them():
    cfg = configure(pretrain.__file__, ["--max_iters=0x10", "--seed=1_000", "--learning_rate=1",
                                        "--compile=TRUE", "--block_size=１２"])[0]
    assert (cfg.max_iters, cfg.seed, cfg.learning_rate, cfg.block_size) == (16, 1000, 1.0, 12)
    assert cfg.compile is True and type(cfg.learning_rate) is float


@pytest.mark.parametrize("words", [["text", "\udcff"], ["\udcff"], ["text", ".", "--name=\udcff"],
                                   ["--\udcff=3"], ["text", ".", "--val=\udcff"]])
def test_a_lone_surrogate_is_one_line(words, here):
    one_line(run(here, "prepare.py", *words))


@pytest.mark.parametrize("error, what", [
    (PermissionError(13, "Permission denied", "data/x"), "data/x: Permission denied"),
    (OSError(28, "No space left on device"), "No space left on device. Free some space"),
    (OSError(24, "Too many open files", "a"), "a: Too many open files"),
    (KeyboardInterrupt(), "interrupted"), (UserError("one\ntwo"), "one two"),
    (MemoryError(), "out of memory")])
def test_errors_of_the_system_are_one_line(error, what, capsys):
    def fail():
        raise error
    with pytest.raises(SystemExit):
        run_main(fail, "x.py")
    assert capsys.readouterr().err.startswith(f"x.py: {what}")


def test_ctrl_c_during_the_imports_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["a/x.py"])
    assert sys.excepthook is report_interrupt or "pytest" in sys.modules
    report_interrupt(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "x.py: interrupted\n"
    report_interrupt(ValueError, ValueError("bug"), None)
    assert "ValueError: bug" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["prepare", "pretrain", "sft", "sample", "eval", "bench"])
def test_every_script_reports_ctrl_c_before_it_imports_what_takes_time(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    names = [getattr(node, "module", None) or node.names[0].name for node in tree.body
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    first = next(n for n in names if n.partition(".")[0] not in sys.stdlib_module_names)
    assert first == ("pretrain" if script == "sft" else "common.command_line")


# ---- files ----

def test_a_file_appears_whole_or_not_at_all(tmp_path):
    for error in (OSError(28, "full"), KeyboardInterrupt()):
        files.write_file(tmp_path / "a", "old")
        with pytest.raises(type(error)), files.atomic_file(tmp_path / "a") as f:
            f.write(b"new")
            raise error
        assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with files.atomic_file(tmp_path / "a") as f:
        f.write(b"new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"

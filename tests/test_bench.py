"""The laws of bench.py: a part keeps to its time, and one that fails does not stop the others."""
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, one_line, run, run_process

import bench
from benchmarks import contenders, numerics
from common.command_line import UserError
from common.settings import configure

torch.set_num_threads(1)
TINY = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=128", "--block_size=16",
        "--rounds=2", "--device=cpu", "--dtype=float32", "--max_new_tokens=8")


@pytest.fixture
def call(monkeypatch, tmp_path, capfd):
    """Call main() with words in an empty folder -> what it printed."""
    def call(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["bench.py", *words])
        for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", ""),
                            ("PYTHONWARNINGS", "")):  # main() sets these for its children
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
        bench.main()
        return capfd.readouterr().out
    return call


@pytest.fixture
def broken(tmp_path):
    """A nanoGPT checkout whose model.py can't be imported."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model.py").write_text("raise ImportError('a broken model.py')", "utf-8")
    return f"--vs={tmp_path / 'broken'}"


def result(folder):
    return json.loads((folder / "out/bench.json").read_text(encoding="utf-8"))


def test_words_are_checked_and_none_prints_the_usage(call):
    assert "python bench.py gpu" in call()
    for words, said in ((["fly"], "'fly' is none of train, sample, prepare, gpu"),
                        (["train", "gpu"], "'gpu' is none of"),
                        (["gpu", "train", "fly"], "'fly' is none of numerics, train")):
        with pytest.raises(UserError, match=said):
            call(*words)


@pytest.mark.parametrize("word, said", [
    ("--rounds=0", "rounds=0 is not from 1"), ("--steps=-1", "steps=-1 is not from 1"),
    ("--batch_size=-8", "batch_size=-8 is not from 0"), ("--batch_size=0", "on a GPU alone"),
    ("--max_new_tokens=0", "max_new_tokens=0"), ("--minutes=-1", "minutes=-1.0 is not from 0"),
    ("--n_layer=-1", "n_layer=-1 is not"), ("--n_layer=1000000", "n_layer=1000000 is not"),
    ("--n_head=0", "n_head must be"), ("--n_embd=15", "n_embd 15 is not a multiple"),
    ("--vocab_size=-5", "vocab_size must be"), ("--block_size=0", "block_size must be"),
    ("--arch=x", "arch must be"), ("--optimizer=sgd", "optimizer must be"),
    ("--dtype=int4", "dtype=int4 is none of"), ("--vs_dtype=int4", "dtype=int4 is none of"),
    ("--vs=nowhere", "vs=nowhere is no nanoGPT checkout"), ("--out=results", "end in .json"),
    ("--dataset=nowhere", "dataset=nowhere is no prepared set")])
def test_settings_that_nothing_can_work_with_are_one_line_at_once(tmp_path, word, said):
    for command in ("train", "gpu"):
        one_line(run(tmp_path, "bench.py", command, *TINY, word), said)
    assert not list(tmp_path.iterdir())


def test_a_script_that_fails_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    (tmp_path / "texts.jsonl").write_text('{"text": "山"}\n', "utf-8")
    done = run_process(tmp_path, "bench.py", "prepare", "--corpus=texts.jsonl", "--tokenizer=.")
    one_line(done, "prepare: ours: prepare.py ended with code 2; its message is above")
    assert "prepare.py: " in done.stderr and "tokenizer.json" in done.stderr
    one_line(run(tmp_path, "bench.py", "prepare"), "name what to read: --corpus=")


def test_profile_names_operators(call):
    assert "aten::" in call("train", "--profile", *TINY)


def test_ours_is_timed_and_a_contender_that_fails_is_named(call, broken, capfd):
    with pytest.raises(UserError, match="train: nanoGPT: a broken model.py"):
        call("train", broken, *TINY)
    said = capfd.readouterr().out
    assert said.count("tokens/s") == 3, said  # two turns and their median
    assert "| nanoGPT |  |  |  | a broken model.py |" in said
    assert "tokens/s" in call("sample", *TINY)


@pytest.mark.parametrize("name, dtype, vs_dtype, expected", [
    ("ours", "float32", "bfloat16", torch.float32), ("nanoGPT", "bfloat16", "", torch.float32),
    ("nanoGPT", "float32", "bfloat16", torch.bfloat16),
    ("ours bfloat16", "auto", "", torch.bfloat16)])
def test_nanogpt_is_float32_on_a_cpu_unless_vs_dtype_is_given(name, dtype, vs_dtype, expected):
    cfg = configure(bench.__file__, [f"--dtype={dtype}", f"--vs_dtype={vs_dtype}"])[0]
    assert contenders.contender_dtype(name, cfg, torch.device("cpu")) == expected
    if name == "nanoGPT":
        gpu = contenders.contender_dtype(name, cfg, torch.device("cuda"))
        assert gpu == contenders.DTYPES[vs_dtype or dtype]


# ---- gpu ----

def test_a_failing_contender_does_not_stop_the_other_parts(call, broken, tmp_path, capfd):
    with pytest.raises(UserError, match="train: nanoGPT: a broken model.py"):
        call("gpu", "train", "fsdp", broken, "--minutes=10", *TINY)
    parts = result(tmp_path)["parts"]
    ours, nano = (parts["train"]["contenders"][name] for name in ("ours", "nanoGPT"))
    assert len(ours["turns"]["0"]) == 2 and not ours["error"] and "broken" in nano["error"]
    both = parts["fsdp"]["contenders"]
    plain, fsdp = (both[name]["turns"]["0"] for name in ("ours", "ours fsdp"))
    assert len(plain) == 2
    for a, b in zip(plain, fsdp, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    rows = capfd.readouterr().out.partition(bench.TABLE_HEAD)[2].splitlines()[1:]
    assert [row.count("broken") for row in rows] == [0, 1, 0, 0]


def test_a_part_that_breaks_leaves_the_next_and_its_own_error(call, monkeypatch, tmp_path, capfd):
    def run_part(cfg, name, *more):
        if name == "train":
            raise ZeroDivisionError("broken part")
        return dict(part=name, error=""), [f"row of {name}"]

    monkeypatch.setattr(bench, "run_part", run_part)
    with pytest.raises(UserError, match="train: ZeroDivisionError: broken part"):
        call("gpu", "train", "decode", *TINY)
    assert "row of decode" in capfd.readouterr().out
    parts = result(tmp_path)["parts"]
    assert "broken part" in parts["train"]["error"] and parts["decode"]["part"] == "decode"


def test_what_the_time_does_not_allow_is_skipped_aloud(call, tmp_path):
    said = call("gpu", *TINY, "--minutes=0.01")
    parts = result(tmp_path)["parts"]
    assert len(parts) == 6 and all(part["skipped"] == "no time" for part in parts.values())
    assert all(f"{name}: skipped" in said for name in parts)


def test_an_early_part_leaves_its_time_to_the_later_ones(call, monkeypatch):
    given = []
    monkeypatch.setattr(bench, "try_part", lambda cfg, name, part, now, seconds:
                        given.append((part.share, seconds)) or (dict(error=""), []))
    call("gpu", *TINY, "--minutes=8")
    left = given[-1][1]
    assert left == pytest.approx(480 - bench.MARGIN, abs=20)  # the parts took no time
    rest = [share for share, _ in given]
    for i, (share, seconds) in enumerate(given):
        assert seconds == pytest.approx(left * share / sum(rest[i:]), rel=0.05)


def test_a_contender_is_ended_at_its_time_limit(tmp_path):
    cfg = SimpleNamespace(**vars(configure(bench.__file__, list(TINY))[0]), end=time.monotonic())
    one = contenders.Contender("ours", contenders.train, cfg, tmp_path)
    try:
        one.turn(0)
        assert one.error == "stopped at the time limit" and one.turns == {}
        one.process.join(60)
        assert one.process.exitcode
        one.turn(0)  # does nothing
    finally:
        one.kill()


def test_what_is_not_installed_is_left_out_aloud(call, monkeypatch, capfd, tmp_path):
    """In the child: a package that can't be imported is its error, without a traceback."""
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers here')", "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)  # the child's sys.path is that of its parent
    with pytest.raises(UserError, match="decode: transformers: no transformers here"):
        call("gpu", "decode", *TINY)
    said = capfd.readouterr()
    assert "transformers: no transformers here" in said.out and "Traceback" not in said.err
    assert result(tmp_path)["parts"]["decode"]["contenders"]["ours"]["turns"]["64"]


def test_the_table_compares_ours_with_the_others():
    def contender(name, error="", **turns):
        keys = ("rate", "gib", "batch", "mfu")
        turns = {size: [dict(zip(keys, turn)) | dict(unit="tokens/s") for turn in done]
                 for size, done in zip((0, bench.EQUAL_TOKENS), turns.values())}
        return SimpleNamespace(name=name, turns=turns, error=error)

    cfg = configure(bench.__file__, ["--block_size=1024", "--compile"])[0]
    part = bench.list_gpu_parts(cfg, on_gpu=True)["train"]
    ours = contender("ours", best=[(130, 50, 64, .46), (120, 50, 64, .45), (132, 50, 64, .47)],
                     equal=[(120, 20, 32, .4)])
    nano = contender("nanoGPT", best=[(100, 30, 16, .3), (100, 30, 16, .3), (110, 30, 16, .3)],
                     equal=[(90, 32, 32, .3)])
    late = contender("other", error="stopped at the time limit", best=[(65, 0, 8, 0)])
    title = "| train, gpt2 12/12/768, 151,680 words, context 1,024, compiled |"
    assert bench.make_rows("train", part, cfg, [ours, nano, late]) == [
        f"{title} ours | 130.0 tokens/s (120.0 to 132.0) | 50.00 | nanoGPT 1.20 (1.20 to 1.30), "
        "1.67; other 2.00 (2.00 to 2.00) | batch 64, MFU 47.0% |",
        f"{title} nanoGPT | 100.0 tokens/s (100.0 to 110.0) | 30.00 |  | batch 16, MFU 30.0% |",
        f"{title} other | 65.0 tokens/s |  |  | batch 8 |",
        f"{title} ours | 120.0 tokens/s | 20.00 | nanoGPT 1.33 (1.33 to 1.33), 0.62 | "
        "batch 32, MFU 40.0% |",
        f"{title} nanoGPT | 90.0 tokens/s | 32.00 |  | batch 32, MFU 30.0% |",
        f"{title} other |  |  |  | stopped at the time limit |"]


def test_a_gpu_compiles_and_looks_for_the_best_batch():
    cfg = configure(bench.__file__, [])[0]
    parts = bench.list_gpu_parts(cfg, on_gpu=True)
    train = parts["train"].settings
    assert train["compile"] and train["batch_size"] == 0 and train["vocab_size"] == 50_304
    assert parts["train"].turns == {0: 5, bench.EQUAL_TOKENS: 1}
    assert all(f" {name}" in bench.__doc__ for name in parts)


def test_a_part_changes_only_what_the_user_has_not_set(monkeypatch, tmp_path):
    part = bench.Part(None, [], {}, dict(vocab_size=50_304, block_size=1024))
    cfg = configure(bench.__file__, ["--block_size=512"])[0]
    settings = bench.run_part(cfg, "train", part, 0)[0]["settings"]
    assert settings == vars(cfg) | dict(vocab_size=50_304)


# ---- the work ----

def test_a_turn_of_training_takes_so_many_tokens_a_step():
    turn = contenders.train("ours", configure(bench.__file__, [*TINY, "--steps=1"])[0])
    assert turn(0)["batch"] == 8 and turn(48)["batch"] == 3


def test_the_best_batch_is_the_smallest_of_the_fast_ones():
    def train(rows, n):
        if rows > 64:
            raise RuntimeError("CUDA out of memory")
        return n * rows / min(rows, 32) / 100, 0.0

    assert contenders.find_best_batch(train, 1024, torch.device("cpu")) == (32, 64)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_the_numeric_checks_pass_on_a_cpu(arch):
    checks = list(numerics.numeric_checks(torch.device("cpu")))
    assert len(checks) == 16
    for name, limit, check in checks:
        if name.startswith(arch):
            assert check() <= limit, name


def test_a_numeric_check_that_fails_leaves_the_others(monkeypatch):
    checks = [("broken", 1, lambda: 1 / 0), ("over", 1, lambda: 2.0), ("nan", 1, lambda: math.nan),
              ("good", 1, lambda: 0.5)]
    monkeypatch.setattr(numerics, "numeric_checks", lambda *_: checks)
    turn = numerics.numerics("ours", SimpleNamespace(device="cpu", compile=False))
    assert [turn(0)["ok"] for _ in checks] == [False, False, False, True]


def test_the_real_run_resumes_and_fills_its_time(monkeypatch, tmp_path):
    clock, runs = [0.0], []  # 20 s to start, then 1,000 tokens/s

    def run_script(script, *words, cwd, seconds):
        cfg, more = configure(ROOT / script, [str(word) for word in words])
        first = 0 if cfg.overwrite else runs[-1].max_iters
        assert not more and cwd == tmp_path and seconds == 0.9 * (200 - clock[0])
        clock[0] += 20 + (cfg.max_iters - first) * cfg.batch_size * cfg.block_size / 1000
        entry = dict(tokens_per_second=1000.0, memory_gib=1.0, loss=5.0)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (
            dict(step=10) | entry, dict(step=cfg.max_iters, val_loss=6.0, bpb=2.0))), "utf-8")
        runs.append(cfg)

    monkeypatch.setattr(contenders, "run_script", run_script)
    monkeypatch.setattr(contenders, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    cfg = configure(bench.__file__, [*TINY, f"--out={tmp_path}/out.json",
                                     f"--dataset={tmp_path}/data/demo"])[0]
    turn = contenders.pretrain("ours", SimpleNamespace(**vars(cfg), end=200.0))
    short, long = turn(30), turn(0)
    assert [run.overwrite for run in runs] == [True, False] and runs[0].arch == "qwen3"
    assert short["step"] == 30 < long["step"] == runs[1].max_iters and long["bpb"] == 2.0
    assert 0.7 * 200 < clock[0] < 0.9 * 200


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    vs = ROOT / "bench_data/nanoGPT"
    words = [f"--vs={vs}"] if vs.is_dir() else []
    done = run_process(tmp_path, "bench.py", "gpu", "--minutes=4.5", *words, *TINY)
    assert done.returncode == 0, done.stderr
    parts = result(tmp_path)["parts"]
    for name, part in parts.items():
        for who, did in part["contenders"].items():
            assert did["turns"] and not did["error"], (name, who, done.stderr[-2000:])
    checks = parts["numerics"]["contenders"]["ours"]["turns"]["0"]
    assert len(parts) == 6 and len(checks) == 16 and all(check["ok"] for check in checks)

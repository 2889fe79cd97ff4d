"""The laws of bench.py: a part keeps to its time, and one that fails does not stop the others."""
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run

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
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        bench.main()
        return capfd.readouterr().out
    yield call
    torch.set_float32_matmul_precision("highest")  # main() has lowered it for this process


def contender(name, *turns, error="", **facts):
    """A contender that has done these turns, without a process."""
    made = object.__new__(bench.Contender)
    made.name, made.turns, made.facts, made.error = name, turns, facts, error
    return made


def result(folder):
    return json.loads((folder / "out/bench_gpu.json").read_text(encoding="utf-8"))


def test_words_are_checked_and_none_prints_the_usage(call):
    assert "python bench.py gpu" in call()
    for words, said in ((["fly"], "'fly' is none of"), (["train", "gpu"], "is none of"),
                        (["gpu", "train", "fly"], "'fly' is none of the parts numerics, train")):
        with pytest.raises(UserError, match=said):
            call(*words)
    with pytest.raises(UserError, match="must end in .json"):
        call("gpu", "--out=results")


def test_profile_names_operators(call):
    assert "aten::" in call("train", "--profile", *TINY)


def test_ours_is_timed_and_a_contender_that_fails_is_named(call, capfd):
    with pytest.raises(UserError, match="nanoGPT ended; the reason stands above"):
        call("train", "--vs=nowhere", *TINY)
    said = capfd.readouterr()
    assert "nowhere is no nanoGPT checkout" in said.err
    assert said.out.count("tokens/s") == 3, said.out  # two turns and their median
    assert "tokens/s" in call("sample", *TINY)


# ---- gpu ----

def test_a_failing_contender_does_not_stop_the_other_parts(call, tmp_path):
    said = call("gpu", "train", "fsdp", "--vs=nowhere", "--minutes=10", *TINY)
    parts = result(tmp_path)["parts"]
    ours, nano = (parts["train"]["contenders"][name] for name in ("ours", "nanoGPT"))
    assert len(ours["turns"]) == 2 and not ours["error"] and "nanoGPT ended" in nano["error"]
    plain, fsdp = (parts["fsdp"]["contenders"][name] for name in ("ours", "ours fsdp"))
    assert len(plain["turns"]) == 2
    for a, b in zip(plain["turns"], fsdp["turns"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    rows = said.partition("| 性质 | 结果 | 命令 |\n|---|---|---|\n")[2].splitlines()
    assert len(rows) == 2 and "nanoGPT 没有做完" in rows[0] and "没有做完" not in rows[1]


def test_a_part_that_breaks_leaves_the_next_and_its_own_error(call, monkeypatch, tmp_path):
    def run_part(cfg, name, *more):
        if name == "train":
            raise ZeroDivisionError("broken part")
        return dict(part=name), [f"row of {name}"]

    monkeypatch.setattr(bench, "run_part", run_part)
    assert "row of decode" in call("gpu", "train", "decode", *TINY)
    parts = result(tmp_path)["parts"]
    assert "broken part" in parts["train"]["error"] and parts["decode"] == dict(part="decode")


def test_what_the_time_does_not_allow_is_skipped_aloud(call, tmp_path):
    said = call("gpu", *TINY, "--minutes=0.01")
    parts = result(tmp_path)["parts"]
    assert len(parts) == 6 and all(part == dict(skipped="no time") for part in parts.values())
    assert all(f"{name}: skipped" in said for name in parts)


def test_an_early_part_leaves_its_time_to_the_later_ones(call, monkeypatch):
    given = []
    monkeypatch.setattr(bench, "run_part", lambda cfg, name, part, device, seconds:
                        given.append((part[0], seconds)) or ({}, []))
    call("gpu", *TINY, "--minutes=8")
    left = given[-1][1]
    assert left == pytest.approx(480 - bench.MARGIN, abs=20)  # the parts took no time
    rest = [share for share, _ in given]
    for i, (share, seconds) in enumerate(given):
        assert seconds == pytest.approx(left * share / sum(rest[i:]), rel=0.05)


def test_a_contender_is_ended_at_its_time_limit(tmp_path, capfd):
    cfg = configure(bench.__file__, list(TINY))[0]
    one = bench.Contender("ours", "train", cfg, tmp_path, end=time.monotonic())
    bench.measure([one], {0: 3})
    assert one.error == "ours was stopped at the time limit" and one.turns == []
    assert one.process.wait(60) != 0


def test_what_is_not_installed_is_left_out_aloud(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "tiktoken" else name)
    cfg = SimpleNamespace(vs="")
    assert bench.why_missing("ours", "pretrain", cfg) == "tiktoken is not installed"
    assert bench.why_missing("nanoGPT", "train", cfg) and not bench.why_missing(
        "transformers", "sample", cfg)
    assert "ours is left out: tiktoken" in capsys.readouterr().out


def test_targets_are_met_or_not(capsys):
    def turn(rate, memory, batch, mfu):
        return dict(rate=rate, memory=memory * 2**30, batch=batch, mfu=mfu, unit="tokens/s")

    ours = contender("ours", turn(130, 50, 64, 0.46), turn(120, 20, 32, 0.4), largest=128)
    nano = contender("nanoGPT", turn(100, 30, 16, 0.3), turn(90, 32, 32, 0.3), largest=32)
    targets = bench.compare_with_targets([ours, nano], 32)
    assert [(round(value, 3), met) for value, met in targets.values()] == [
        (1.3, True), (0.46, True), (0.625, False)]
    assert capsys.readouterr().out.count("not met") == 1
    cfg = configure(bench.__file__, ["--batch_size=0", "--block_size=1024"])[0]
    (row,) = bench.make_rows("train", "train", cfg, [ours, nano])
    bench.report_all([ours, nano])
    assert "1.30 times as fast as nanoGPT" in capsys.readouterr().out
    assert "nanoGPT 的 1.30 倍" in row and "64 行（最多 128）" in row and "20.00 / 32.00 GiB" in row


def test_a_gpu_compiles_and_looks_for_the_best_batch():
    cfg = configure(bench.__file__, [])[0]
    parts = bench.list_parts(cfg, on_gpu=True)
    *_, train = parts["train"]
    assert train["compile"] and train["batch_size"] == 0 and train["vocab_size"] == 50_304
    assert all(f" {name}" in bench.__doc__ for name in parts)


# ---- the work ----

def test_the_best_batch_is_the_smallest_of_the_fast_ones():
    def train(rows, n):
        if rows > 64:
            raise RuntimeError("CUDA out of memory")
        return n * rows / min(rows, 32) / 100, 0.0

    sizes = contenders.try_batch_sizes(train, 1024, torch.device("cpu"))
    assert list(sizes) == [4, 8, 16, 32, 64] and contenders.best_batch(sizes) == 32


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
    monkeypatch.setattr(contenders, "numeric_checks", lambda *_: checks)
    _, turn = contenders.numerics("ours", SimpleNamespace(device="cpu", compile=False))
    assert [turn(0)["ok"] for _ in checks] == [False, False, False, True]


def test_the_real_run_resumes_and_fills_its_time(monkeypatch, tmp_path):
    clock, runs = [0.0], []  # 20 s to start, then 1,000 tokens/s

    def run_until(end, command, folder):
        script, *words = [str(word) for word in command]
        cfg, more = configure(script, words)
        first = 0 if cfg.overwrite else runs[-1].max_iters
        assert not more and folder == tmp_path
        clock[0] += 20 + (cfg.max_iters - first) * cfg.batch_size * cfg.block_size / 1000
        entry = dict(tokens_per_second=1000.0, memory_gib=1.0, loss=5.0)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (
            dict(step=10) | entry, dict(step=cfg.max_iters, val_loss=6.0, bpb=2.0))), "utf-8")
        runs.append(cfg)
        return 0, ["数学 > 是", "step 10"]

    monkeypatch.setattr(contenders, "run_until", run_until)
    monkeypatch.setattr(contenders, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    cfg = configure(bench.__file__, [*TINY, f"--out={tmp_path}/out.json",
                                     f"--dataset={tmp_path}/data/demo"])[0]
    _, turn = contenders.pretraining("ours", SimpleNamespace(**vars(cfg), seconds=200.0))
    short, long = turn(0), turn(0)
    assert [run.overwrite for run in runs] == [True, False] and runs[0].arch == "qwen3"
    assert short["step"] == 30 < long["step"] and long["samples"] == ["数学 > 是"]
    assert 0.7 * 200 < clock[0] < 0.9 * 200


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    vs = ROOT / "bench_data/nanoGPT"
    words = [f"--vs={vs}"] if vs.is_dir() else []
    done = run(tmp_path, "bench.py", "gpu", "--minutes=4.5", *words, *TINY)
    assert done.returncode == 0, done.stderr
    parts = result(tmp_path)["parts"]
    for name, part in parts.items():
        for who, did in part["contenders"].items():
            assert did["turns"] and not did["error"], (name, who, done.stderr[-2000:])
    checks = parts["numerics"]["contenders"]["ours"]["turns"]
    assert len(parts) == 6 and len(checks) == 16 and all(check["ok"] for check in checks)

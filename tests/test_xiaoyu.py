"""The model that comes with the code: its files are those that were measured, it loads everywhere,
and it is taken where there is no other."""
import hashlib
import json

import pytest
import torch
from conftest import ROOT, run, run_process, succeed

from common.command_line import UserError
from models.folders import SHIPPED, find_model, load_model
from models.hf import save_model
from models.to_bfloat16 import write_bfloat16

KINDS = ("base", "chat")
both = pytest.mark.parametrize("kind", KINDS)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_files_are_those_of_the_model_card():
    card = (ROOT / "docs" / "xiaoyu.md").read_text(encoding="utf-8")
    files = [SHIPPED / kind / name for kind in KINDS for name in (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json")]
    assert sorted(f for f in SHIPPED.glob("*/*")) == sorted(files)
    assert sum(f.stat().st_size for f in files) <= 28e6
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        assert f"{sha256(file)}  {name}\n" in card, name


@both
def test_transformers_computes_the_same_logits(kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tok = load_model(SHIPPED / kind)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        SHIPPED / kind, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    messages = [dict(role="user", content="长江流到哪里？")]
    ids = AutoTokenizer.from_pretrained(SHIPPED / kind).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)
    assert ids == tok.encode_chat(messages) + tok.role_header("assistant")
    ids = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs.eval()(ids).logits, rtol=0, atol=1e-3)


def test_it_is_taken_and_named_where_there_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        assert (tmp_path / find_model("", kind)).resolve() == SHIPPED / kind
        assert f"no {kind} run under out/ yet: taking" in capsys.readouterr().err
        assert (tmp_path / find_model("xiaoyu", kind)).resolve() == SHIPPED / kind
        assert not capsys.readouterr().err


def test_a_run_of_ones_own_comes_first(base, monkeypatch, capsys):
    monkeypatch.chdir(base)
    assert find_model("", "base") == "out/tiny/best"
    assert (base / find_model("", "chat")).resolve() == SHIPPED / "chat"


def test_it_speaks_right_after_the_clone(tmp_path):
    said = succeed(run_process(tmp_path, "sample.py", "--start=数学是", "--max_new_tokens=8"))
    assert said.stdout.startswith("数学是") and "comes with the code" in said.stderr
    said = succeed(run(tmp_path, "sample.py", "--chat", "--max_new_tokens=8", input="你好\n"))
    assert said.stdout.strip()


def test_own_dialogues_are_prepared_for_it_and_tune_it(tmp_path):
    rows = [dict(messages=[dict(role="user", content=f"{n}加一是多少？"),
                           dict(role="assistant", content=f"{n}加一是{n + 1}。")])
            for n in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    prepared = succeed(run(tmp_path, "prepare.py", "chat", "own.jsonl", "--val_fraction=0.1"))
    assert "tokenizer: that of " in prepared.stdout and "xiaoyu/base" in prepared.stdout
    words = ("--dtype=float32", "--batch_size=1", "--gradient_accumulation_steps=1",
             "--max_iters=1")
    assert "xiaoyu/base" in succeed(run(tmp_path, "sft.py", *words)).stdout
    assert "xiaoyu/base" in succeed(run(tmp_path, "sft.py", *words, "--init_from=xiaoyu",
                                        "--out_dir=out/other")).stdout


def test_a_model_in_bfloat16_is_the_same_but_for_rounding(base, tmp_path):
    write_bfloat16(base / "out/tiny/best", tmp_path / "m")
    full, tok = load_model(base / "out/tiny/best")
    half, other = load_model(tmp_path / "m")
    assert tok.fingerprint == other.fingerprint
    state = half.state_dict()
    for name, tensor in full.state_dict().items():
        assert torch.equal(tensor.bfloat16().float(), state[name])
    for source, target, what in (("nowhere", "n", "no such folder"), ("m", "m", "exists already")):
        with pytest.raises(UserError, match=what):
            write_bfloat16(tmp_path / source, tmp_path / target)


def test_two_models_are_averaged(base, tmp_path):
    model, tok = load_model(base / "out/tiny/best")
    zero = {name: torch.zeros_like(w) for name, w in model.state_dict().items()}
    save_model(tmp_path / "zero", model, zero, tok, "base", {})
    write_bfloat16(base / "out/tiny/best", tmp_path / "m", tmp_path / "zero", share=0.25)
    mixed = load_model(tmp_path / "m")[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal((0.75 * tensor).bfloat16().float(), mixed[name])
    with pytest.raises(UserError, match="not of the same shape"):
        write_bfloat16(base / "out/tiny/best", tmp_path / "n", SHIPPED / "base")

"""Model folders and checkpoints: found, loaded, refused; those of older versions load too."""
import json
import os
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import one_line, run, succeed
from test_scripts import TINY, back_to_the_checkpoint_before, train, weights

from common.command_line import UserError
from gpt import GPT, GPTConfig
from models.folders import (
    load_base_model, load_model, model_folder, newest_model, read_generation_config)
from models.hf import save_pretrained
from models.load import from_pretrained
from tokens.bins import Bins
from tokens.tokenizer_files import load_tokenizer
from training.checkpoint import checkpoint_files


def tiny_model():
    return GPT(GPTConfig(vocab_size=300, padded_vocab_size=384, block_size=16, n_layer=1,
                         n_head=1, n_embd=8))


def equal(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


# ---- older versions ----

def test_an_older_model_folder_loads_as_the_newer_one(tmp_path):
    model = tiny_model()
    save_pretrained(model, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["n_ids"] = config.pop("unpadded_vocab_size")
    write_json(file, config)
    old = from_pretrained(tmp_path)
    assert old.config == model.config and equal(old, model)


def test_a_run_resumes_from_an_older_checkpoint(place):
    train(place, "--out_dir=newer")
    back_to_the_checkpoint_before(place / "newer", place / "older")
    file = checkpoint_files(place / "older")[0]
    checkpoint = torch.load(file, weights_only=True)
    config = checkpoint["model_config"]
    config["n_ids"], config["vocab_size"] = config["vocab_size"], config.pop("padded_vocab_size")
    for name in ("qkv_bias", "qk_norm"):
        del config[name], checkpoint["cfg"][name]
    torch.save(checkpoint, file)
    assert "resuming from" in train(place, "--out_dir=older").stdout
    assert weights(place / "older") == weights(place / "newer")


@pytest.mark.parametrize("words, kind", [
    (["--qk_norm=False"], "Llama"), (["--qkv_bias", "--qk_norm=False"], "Qwen2")])
def test_a_run_saves_the_shape_that_its_settings_name(words, kind, place):
    train(place, *words, "--out_dir=out/x", "--max_iters=2")
    config = json.loads((place / "out/x/final/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [f"{kind}ForCausalLM"]
    one_line(run(place, "pretrain.py", *TINY, "--out_dir=out/x", "--max_iters=4"),
             f"was made with {'qkv_bias=True' if kind == 'Qwen2' else 'qk_norm=False'}, not")
    one_line(run(place, "pretrain.py", *TINY, "--qkv_bias", "--out_dir=out/y"), "switch one off")


# ---- checkpoints ----

def test_a_checkpoint_loads_as_the_model_folder_of_its_step(base):
    file, final = checkpoint_files(base / "out/tiny")[0], base / "out/tiny/final"
    (model, tok), (same, same_tok) = load_model(str(file)), load_model(str(final))
    assert equal(model, same) and model.config == same.config
    assert tok.fingerprint == same_tok.fingerprint
    assert read_generation_config(file)[0] == read_generation_config(final)[0]
    words = "--start=数学", "--max_new_tokens=9"
    texts = [succeed(run(base, "sample.py", f"--model={path.relative_to(base)}", *words)).stdout
             for path in (file, final)]
    assert texts[0] == texts[1]
    started = load_base_model(file, Bins("demo", base / "data"), 0.25, block_size=7)
    assert (started.config.dropout, started.config.block_size) == (0.25, 7)


def test_a_checkpoint_alone_takes_the_tokenizer_of_its_set(base, place, monkeypatch):
    monkeypatch.chdir(place)
    file = checkpoint_files(base / "out/tiny")[0]
    (place / "run").mkdir()
    for name in (file.name, "run.json"):
        shutil.copy(file.parent / name, place / "run")
    tok = load_model(f"run/{file.name}")[1]
    assert tok.fingerprint == Bins("demo").tokenizer.fingerprint
    write_json(place / "run/run.json", dict(kind="chat", tokenizer="another"))
    with pytest.raises(UserError, match="was made with another tokenizer than demo has now"):
        load_model(f"run/{file.name}")
    settings, _ = read_generation_config(f"run/{file.name}")
    assert settings["temperature"] == 0.5  # of chats


@pytest.mark.parametrize("content, what", [
    (b"", "damaged"), ({"model": {}, "model_args": {}}, "no checkpoint of pretrain.py"),
    ({"model": {}, "model_config": {}, "cfg": {}}, "no checkpoint of pretrain.py")])
def test_a_file_that_is_no_checkpoint_is_one_line(content, what, tmp_path):
    if content:
        torch.save(content, tmp_path / "x.pt")
    else:
        (tmp_path / "x.pt").write_bytes(content)
    one_line(run(tmp_path, "sample.py", "--model=x.pt", "--start=x"), "x.pt is", what)
    one_line(run(tmp_path, "sample.py", "--model=y.pt", "--start=x"), "y.pt: no such checkpoint")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"model": Evil()}, tmp_path / "x.pt")
    one_line(run(tmp_path, "sample.py", "--model=x.pt", "--start=x"), "x.pt is damaged")
    assert not (tmp_path / "ran").exists()


# ---- what is not read ----

def test_pickled_weights_are_refused_with_a_command_that_converts_them(tmp_path, own_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel
    folder = tmp_path / "m"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=8, n_layer=1, n_head=1,
                                       n_positions=16))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    own_tokenizer.save(folder)
    done = run(tmp_path, "sample.py", f"--model={folder}", "--start=x")
    one_line(done, f"no .safetensors file in {folder}, and pytorch_model.bin is not read",
             "To convert it: python -c")
    code = done.stderr.partition('python -c "')[2].rpartition('"')[0]
    exec(code, {})
    assert from_pretrained(folder).n_params()
    for path, what in ((folder / "pytorch_model.bin", "a pickle can run code"),
                       (folder / "config.json", "is not a folder")):
        one_line(run(tmp_path, "sample.py", f"--model={path}", "--start=x"), what)


def test_a_path_in_data_or_out_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for refused in (lambda: load_tokenizer("data/demo"), lambda: model_folder("out/base")):
        with pytest.raises(UserError, match=f"{tmp_path}.*no such f"):
            refused()


def test_a_config_without_weights_is_one_line(base, tmp_path):
    shutil.copy(base / "out/tiny/best/config.json", tmp_path)
    with pytest.raises(UserError, match="no .safetensors file, so no weights"):
        load_model(tmp_path)


def test_weights_without_a_config_are_one_line(tmp_path):
    torch.save({}, tmp_path / "model.pth")
    one_line(run(tmp_path, "sample.py", f"--model={tmp_path}", "--start=x"),
             "model.pth is not read", "A config.json is missing too")


def test_a_tokenizer_without_tokenizer_json_comes_with_a_command_that_converts_it(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n", encoding="utf-8")
    with pytest.raises(UserError, match="no tokenizer.json.*to convert vocab.txt: python -c"):
        load_tokenizer(tmp_path)


@contextmanager
def no_permission(folder):
    """Take all rights to a folder away; root, who needs none, becomes another user."""
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


@pytest.mark.skipif(sys.platform == "win32", reason="no such rights on Windows")
@pytest.mark.parametrize("load", [load_model, load_tokenizer, Bins])
def test_a_folder_that_may_not_be_read_is_named_so(load, tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("m", "m/best"):
        with no_permission(tmp_path / "m"), pytest.raises(
                (UserError, PermissionError), match="Permission denied"):
            load(str(tmp_path / name))


# ---- finding ----

def write_run(folder, step, time, kind="base", models=("best", "final"), **values):
    """Write the files of a run by which its models are chosen; time: when it was saved."""
    write_json(folder / "run.json", dict(kind=kind, settings=dict(
        batch_size=4, gradient_accumulation_steps=1, block_size=10)))
    for name in models:
        write_json(folder / name / "config.json", dict(step=step) | values)
        os.utime(folder / name / "config.json", (time, time))


def test_the_newest_model_is_named_and_a_trial_run_is_passed_over(tmp_path, capsys):
    write_run(tmp_path / "long", 2000, 1e9, val_loss=3.25)
    write_run(tmp_path / "trial", 19, 1.1e9)
    write_run(tmp_path / "chat", 1, 1.2e9, "chat")
    assert newest_model("base", tmp_path) == tmp_path / "long/best"
    passed, chosen = capsys.readouterr().err.splitlines()
    assert "trial/best, which trained on 760 tokens, under 1 % of the longest base run" in passed
    assert "long/best (step 2,000, saved " in chosen and " days ago, val loss 3.250)" in chosen
    write_run(tmp_path / "enough", 20, 1.1e9, models=["final"])
    assert newest_model("base", tmp_path) == tmp_path / "enough/final"
    assert newest_model("chat", tmp_path) == tmp_path / "chat/best"
    write_json(tmp_path / "old/run.json", dict(kind="base"))  # older files do not tell the tokens
    write_json(tmp_path / "old/best/config.json", {})
    assert newest_model("base", tmp_path) == tmp_path / "old/best"
    assert newest_model("base", tmp_path / "none") is None


def test_a_missing_model_of_a_run_comes_with_the_one_there_is(tmp_path):
    for there, asked in (("best", "final"), ("final", "best")):
        write_run(tmp_path / f"only_{there}", 1, 1e9, models=[there])
        one_line(run(tmp_path, "sample.py", f"--model=only_{there}/{asked}", "--start=x"),
                 f"there is no only_{there}/{asked}, only only_{there}/{there}")
        one_line(run(tmp_path, "sample.py", f"--model=only_{there}", "--start=x"),
                 f"only_{there} is a run; name its model: only_{there}/{there}")
    write_run(tmp_path / "young", 1, 1e9, models=[])
    (tmp_path / "young/ckpt_step_10.pt").touch()
    one_line(run(tmp_path, "sample.py", "--model=young", "--start=x"),
             "young is a run; name its model: young/ckpt_step_10.pt")


@pytest.fixture
def own_tokenizer(base):
    return load_tokenizer(base / "out/tiny/best")

"""Own texts: what is chosen for the size of a set, and what it holds out."""
import json
import re

import pytest
from conftest import ROOT, one_line, run, succeed

import prepare
from gpt import GPTConfig
from tokens.bins import SPLITS, Bins
from tokens.tokenizer_files import load_tokenizer
from training.estimate import SIZES, suitable_settings

XIAOYU = f"--tokenizer={(ROOT / 'data' / 'xiaoyu' / 'base').as_posix()}"


def write(file, numbers, characters=100, chat=False):
    """Write a .jsonl file with a text or a dialogue for each number."""
    text = "这是一篇讲小事的文章，写得很平常，但是每一篇都不一样。"
    rows = []
    for i in numbers:
        body = f"第{i}篇。" + (text * (characters // len(text) + 1))[:characters]
        rows.append(json.dumps(dict(messages=[dict(role="user", content=f"问{body}"),
                                              dict(role="assistant", content="好。")])
                               if chat else dict(text=body), ensure_ascii=False))
    file.write_text("\n".join(rows), encoding="utf-8")
    return str(file)


def numbers(name, split):
    """Return the numbers of the documents in a split."""
    bins = Bins(name)
    text = bins.tokenizer.decode(bins.tokens(split))
    return {int(n) for n in re.findall(r"第(\d+)篇", text)}


# ---- what is held out ----

@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("n, characters", [(30, 600), (30, 1500), (300, 100)])
def test_a_small_set_holds_out_a_twentieth_and_2000_characters(n, characters, kind, here):
    prepare.main([kind, write(here / "a.jsonl", range(n), characters, kind == "chat"), XIAOYU,
                  "--name=x"])
    held, total = (sum(Bins("x").meta["splits"][s]["characters"] for s in group)
                   for group in (["val"], SPLITS))
    assert not numbers("x", "val") & numbers("x", "train")
    assert held >= min(0.05 * total, total - held) - characters
    assert held >= 2000 - characters or total < 20_000
    assert held <= max(0.08 * total, 2000) + characters


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_adding_documents_moves_none_from_validation_to_training(kind, here):
    held = set()
    for n in (25, 40, 100, 300):
        file = write(here / "a.jsonl", range(n), 60, kind == "chat")
        prepare.main([kind, file, XIAOYU, "--name=x"])
        assert held <= numbers("x", "val") and not held & numbers("x", "train")
        held = numbers("x", "val")
    before = (here / "data/x/val.bin").read_bytes()
    prepare.main([kind, file, XIAOYU, "--name=x"])  # the same once more
    assert (here / "data/x/val.bin").read_bytes() == before and len(held) < 40


def test_adding_documents_to_a_large_set_keeps_what_a_small_one_held_out(here, monkeypatch):
    prepare.main(["text", write(here / "a.jsonl", range(300)), XIAOYU, "--name=x"])
    held = numbers("x", "val")
    monkeypatch.setattr(prepare, "SMALL", 10_000)
    prepare.main(["text", write(here / "a.jsonl", range(900)), XIAOYU, "--name=x"])
    after = numbers("x", "val")
    assert Bins("x").meta["settings"]["val_fraction"] == 0.005
    assert held <= after and len(after) < len(held) + 25


def test_a_novel_among_essays_is_for_training(here):
    for seed in range(4):  # novels whose hashes are below 0.6
        write(here / "a.jsonl", range(30), 200)
        write(here / "b.jsonl", [104 + seed], 20_000)
        prepare.main(["text", str(here / "a.jsonl"), str(here / "b.jsonl"), XIAOYU, "--name=x",
                      "--val_fraction=0.6"])
        assert 104 + seed in numbers("x", "train") and numbers("x", "val") < set(range(30))


def test_the_end_of_each_of_a_few_long_texts_is_held_out(here, capsys):
    prepare.main(["text", write(here / "a.jsonl", range(3), 8000), XIAOYU, "--name=x"])
    splits_of = Bins("x").meta["splits"]
    assert "few documents: the last 8.3% of each of the 3" in capsys.readouterr().out
    assert 1900 < splits_of["val"]["characters"] < 2200
    assert splits_of["train"]["documents"] == splits_of["val"]["documents"] == 3


def test_dialogues_of_a_large_text_set_stay_out_of_the_validation_of_a_small_chat_set(here):
    chats = write(here / "c.jsonl", range(400), 40, chat=True)
    prepare.main(["text", write(here / "a.jsonl", range(1000, 1100)), "chat", chats, XIAOYU,
                  "--name=x", "--val_fraction=0.005"])
    prepare.main(["chat", chats, XIAOYU, "--name=chat"])
    hashed = numbers("chat", "val") & numbers("x", "train")
    assert len(hashed) < 20 / 2  # those that were added to the hashes' choice


# ---- the tokenizer ----

def test_the_tokenizer_follows_the_text(here, monkeypatch, capsys):
    file = write(here / "a.jsonl", range(40))
    prepare.main(["text", file, "--name=x"])
    xiaoyu = load_tokenizer(ROOT / "data" / "xiaoyu" / "base")
    assert Bins("x").tokenizer.fingerprint == xiaoyu.fingerprint
    assert "tokenizer: that of xiaoyu" in capsys.readouterr().out
    rare = "".join(map(chr, range(0x9000, 0x9000 + 200)))
    (here / "b.jsonl").write_text("\n".join(
        json.dumps(dict(text=rare[i:] + rare[:i])) for i in range(40)), encoding="utf-8")
    prepare.main(["text", str(here / "b.jsonl"), "--name=y"])
    out = capsys.readouterr().out
    assert "tokenizer: trained on these texts" in out and "under 100,000 training tokens" in out
    prepare.main(["text", file, "--tokenizer=bytebpe", "--vocab_size=4096", "--name=y"])
    assert f"has {Bins('y').tokenizer.vocab_size:,} ids, not 4,096" in capsys.readouterr().out
    monkeypatch.setattr(prepare, "SMALL", 1000)
    monkeypatch.setattr(prepare, "make_tokenizer", lambda wanted, *_: prepare.load_tokenizer(
        ROOT / "data" / "xiaoyu" / "base") if wanted == "qwen" else None)
    prepare.main(["text", file, "--name=z"])
    assert "qwen, for 50 MB and more; without a network --tokenizer=bytebpe" in (
        capsys.readouterr().out)


def test_more_text_gets_more_ids():
    sizes = [prepare.suitable_vocab_size(10 ** power) for power in range(1, 10)]
    assert sizes == sorted(sizes) and sizes[0] == 512 and sizes[-1] == 16384


# ---- the settings ----

@pytest.mark.parametrize("tokens", [100, 10_000, 10**6, 10**7, 10**9, 10**11])
@pytest.mark.parametrize("kind, base", [
    ("base", None), ("base", GPTConfig(n_embd=256, n_head=4, block_size=512)),
    ("chat", GPTConfig(n_embd=256, n_head=4, block_size=256)),
    ("chat", GPTConfig(arch="qwen3", n_embd=1024, n_head=16, block_size=40_960))])
def test_suitable_settings_read_a_set_at_most_eight_times(tokens, kind, base):
    found, reason = suitable_settings(kind, tokens, base)
    step = found["batch_size"] * found["gradient_accumulation_steps"] * found["block_size"]
    assert found["max_iters"] * step <= max(8.5 * tokens, 41 * step) and step <= 65_536
    assert found["block_size"] <= (base.block_size if base else 512) and reason
    assert base or (found["n_embd"], found["n_layer"]) in SIZES


def test_own_texts_start_from_xiaoyu_and_what_is_set_stays(here):
    prepare.main(["text", write(here / "a.jsonl", range(40)), "--name=text"])
    words = (ROOT / "config" / "mine.py", "--max_iters=3", "--batch_size=2", "--eval_tokens=512",
             "--dtype=float32", "--device=cpu")
    first = succeed(run(here, "pretrain.py", *words)).stdout
    assert "size=auto: " in first and "--init_from=xiaoyu" in first and "--max_iters" not in (
        first.split("size=auto")[1].split("\nout/mine")[0])
    settings = json.loads((here / "out/mine/run.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["init_from"], settings["max_iters"], settings["batch_size"]) == (
        "xiaoyu", 3, 2)
    again = succeed(run(here, "pretrain.py", *words[:1], "--max_iters=4", "--eval_tokens=512"))
    assert "settings that this run began with" in again.stdout and "resuming from" in again.stdout
    assert "--batch_size=2" in again.stdout  # the earlier command had set it
    prepare.main(["chat", write(here / "c.jsonl", range(40), 30, chat=True), "--name=chat"])
    sft = succeed(run(here, "sft.py", ROOT / "config" / "mine_sft.py", "--max_iters=2",
                      "--eval_interval=100")).stdout
    assert "--init_from=out/mine/" in sft and "a base model 256 wide" in sft


def test_another_tokenizer_means_a_new_model(here):
    prepare.main(["text", write(here / "a.jsonl", range(40)), "--tokenizer=bytebpe",
                  "--vocab_size=300", "--name=text"])
    out = succeed(run(here, "pretrain.py", ROOT / "config" / "mine.py", "--dry_run")).stdout
    assert "a new model, 4 layers, 128 wide" in out and "xiaoyu" not in out
    one_line(run(here, "pretrain.py", "--size=big"), "size=big is neither")

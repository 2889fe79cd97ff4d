"""Laws of the windows of long dialogues: every answer is trained once, in the context it had."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line, run, succeed, with_sets
from hypothesis import given, settings
from hypothesis import strategies as st

import sft
from evaluation.likelihood import bits_per_byte
from gpt import GPT, GPTConfig
from models.folders import load_model
from tokens.bins import Bins
from tokens.chat_batches import ChatData
from tokens.chat_windows import begins_dialogue, chat_windows, window_ids
from tokens.tokenizer_files import load_tokenizer
from training.checkpoint import checkpoint_files

pytestmark = pytest.mark.numeric
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tok(demo):
    return load_tokenizer(demo / "data" / "demo")


def encode(tok, dialogues):
    """tokens and starts of dialogues, each (has a system message, [(lengths of a turn)])."""
    parts, number = [], 300  # ids of contents: all differ
    for system, turns in dialogues:
        ids = []
        for role, n in [("system", system)] * bool(system) + [
                (("user", "assistant")[i % 2], n) for turn in turns for i, n in enumerate(turn)]:
            content = [300 + (number + i) % 3700 for i in range(n)]
            number += n
            ids += [*tok.role_header(role), *content, tok.im_end, *tok.encode("\n")]
        parts.append(np.array([*ids, tok.eot]))
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


def answers_of(tok, ids):
    """(first, end) of each answer in ids."""
    mask = np.diff(np.concatenate([[0], tok.loss_mask(ids), [0]]).astype(int))
    return list(zip(np.flatnonzero(mask > 0).tolist(), np.flatnonzero(mask < 0).tolist()))


lengths = st.integers(1, 90)
dialogues = st.lists(st.tuples(st.integers(0, 30), st.lists(
    st.tuples(lengths, lengths), min_size=1, max_size=12)), min_size=1, max_size=3)


@given(dialogues, st.integers(48, 130))
@settings(max_examples=80, deadline=None)
def test_every_answer_is_a_target_once_behind_a_third_of_the_context(tok, dialogues, context):
    tokens, starts = encode(tok, dialogues)
    windows, counts = chat_windows(tokens, starts, tok, context)
    third, wanted, trained = -(-context // 3), dict(answers_of(tok, tokens)), {}
    for window in windows:
        ids, first = window_ids(tokens, window)
        assert len(ids) <= context + 1 and ids[0] == tok.im_start
        begin, in_front, start, _, rest, stop, _ = window.tolist()
        origin, dialogue = stop - len(ids), np.searchsorted(starts, begin, "right") - 1
        for a, b in answers_of(tok, ids):
            if a < first:
                assert b <= first  # context, no target
                continue
            cut = b - a < wanted[origin + a] - origin - a
            assert origin + a not in trained and (not cut or b == len(ids) == context + 1)
            assert (ids[b - 1] == tok.im_end) != cut  # the end token of a cut answer is no target
            assert not cut or first <= third  # no more than a third stands before it
            trained[origin + a] = b - a
        system = in_front - begin or dialogues[dialogue][0] and begins_dialogue(window)
        assert (system or not dialogues[dialogue][0]
                or counts["system messages too long to be repeated"])
        assert not system or ids[1] == tok.role_header("system")[1]
        if not begins_dialogue(window) and first < third - 5:  # 5: a header is not cut
            length = next(b - a for a, b in answers_of(tok, ids) if a == first)
            assert first + length >= context - 5  # the answer needs the room
    assert sorted(trained) == sorted(wanted) and not counts["answers that do not fit at all"]
    assert len({window[0] for window in windows.tolist()}) == len(dialogues)


@pytest.mark.parametrize("context", [12, 20, 30])
def test_what_cannot_fit_is_counted(tok, context):
    tokens, starts = encode(tok, [(30, [(60, 5), (2, 70), (60, 60)])])
    windows, counts = chat_windows(tokens, starts, tok, context)
    targets = sum(bool(tok.loss_mask(*window_ids(tokens, w)).any()) for w in windows)
    assert targets + counts["answers that do not fit at all"] == 3 and counts[
        "system messages too long to be repeated"] == 1
    assert all(len(window_ids(tokens, w)[0]) <= context + 1 for w in windows)


def test_a_dialogue_that_fits_is_one_window_of_all_its_ids(tok):
    tokens, starts = encode(tok, [(3, [(5, 5)] * 3), (0, [(20, 30)]), (0, [(4, 4)])])
    windows, counts = chat_windows(tokens, starts, tok, max(np.diff(starts)) - 1)
    assert len(windows) == 3 and not counts.total()
    for window, a, b in zip(windows, starts, starts[1:]):
        ids, first = window_ids(tokens, window)
        assert np.array_equal(ids, tokens[a:b]) and first == 0 and begins_dialogue(window)


# ---- rows ----

SENTENCE = "春天的风吹过山，水流进长江。"


@pytest.fixture(scope="module")
def long_chats(demo, tmp_path_factory):
    """A folder with data/long: 150 dialogues of 1 to 12 turns, half of them under a message."""
    folder, rng = with_sets(tmp_path_factory.mktemp("long"), demo), np.random.default_rng(0)
    with open(folder / "c.jsonl", "w", encoding="utf-8") as f:
        for n in range(150):
            messages = [dict(role="system", content="你是小语。")] * (n % 2)
            for turn in range(rng.integers(1, 13)):
                question, answer = (SENTENCE * rng.integers(most) for most in (3, 8))
                messages += [dict(role="user", content=f"问{n}，{turn}？{question}"),
                             dict(role="assistant", content=f"答{n}，{turn}。{answer}")]
            f.write(json.dumps(dict(messages=messages)) + "\n")
    succeed(run(folder, "prepare.py", "chat", "c.jsonl", "--tokenizer=data/demo", "--name=long",
                "--val_fraction=0.1"))
    return folder


def data_of(folder, *words):
    cfg = sft.configure(sft.__file__, ["--dataset=long", "--batch_size=4", *words],
                        base=sft.pretrain.__file__, fixed=sft.FIXED)[0]
    return ChatData(Bins("long", folder / "data"), cfg)


def test_windows_packed_in_rows_equal_each_alone(long_chats):
    data = data_of(long_chats, "--block_size=96", "--multi_turn=0")
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch="qwen3", vocab_size=4096, block_size=96, n_layer=2, n_head=2,
                          n_embd=16))
    for p in model.parameters():  # else the blocks are the identity, and attention has no effect
        p.data += 0.3 * torch.randn_like(p)
    assert len(data.windows["train"]) > 1.5 * len(data.bins.starts("train"))
    with torch.no_grad():
        several = [n for n, row in enumerate(data.rows["train"]) if len(row) > 1]
        for row in (several[0], several[1], several[-1]):
            packed, n = model(*data.collate("train", [row], epoch=1))
            alone = n_alone = 0
            for i in data.exchanged(1)[data.rows["train"][row]]:
                ids, targets = map(torch.from_numpy, data.window("train", i))
                alone += F.cross_entropy(model(ids[None, :-1])[0], targets[1:], reduction="sum",
                                         ignore_index=-1).item()
                n_alone += int((targets[1:] >= 0).sum())
            assert n == n_alone and packed.item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("block_size", [96, 256])
def test_an_epoch_reads_every_answer_with_little_padding_and_twice_the_tokens(
        block_size, long_chats):
    data = data_of(long_chats, f"--block_size={block_size}", "--multi_turn=0.5")
    tok, tokens = data.tokenizer, data.bins.tokens("train")
    targets, positions = [], 0
    for step in range(len(data.steps)):
        for micro in range(4):
            ids, y, _ = data.batch(step, micro)
            targets, positions = targets + [y[y >= 0]], positions + ids.numel()
    n_cut = len(tokens[tok.loss_mask(tokens)]) - len(torch.cat(targets))
    assert 0 <= n_cut < 0.01 * len(torch.cat(targets))
    assert sum(data.row_lengths["train"]) > 0.98 * positions and positions < 2 * len(tokens)


def turn_numbers(tok, ids):
    """(number of the dialogue, number of the turn) of each message but the system's in ids."""
    texts = [m["content"] for m in tok.decode_chat(ids) if "，" in m["content"][:6]]
    return [tuple(map(int, re.match(r".(\d+)，(\d+)", text).groups())) for text in texts]


def test_only_a_window_that_ends_its_dialogue_is_continued_by_one_that_begins_another(long_chats):
    data, joined = data_of(long_chats, "--block_size=512", "--multi_turn=1"), 0
    tok, last = data.tokenizer, dict(turn_numbers(data.tokenizer, data.bins.tokens("train")))
    for row in range(len(data.rows["train"])):
        x, _, doc_ids = data.packed_row("train", row, 0)
        for doc in range(doc_ids[-1] + 1):
            found = turn_numbers(tok, np.append(x[doc_ids == doc], tok.im_end))
            for (a, i), (b, j) in zip(found, found[1:]):
                assert j - i in (0, 1) if a == b else (i, j) == (last[a], 0)
                joined += a != b
    assert joined > 10 and len(data.windows["train"]) > len(last)


def test_rows_are_no_longer_than_the_dialogues_need(long_chats):
    own = data_of(long_chats, "--block_size=40960")
    longest = max(lengths.max() for lengths in own.lengths.values())
    assert own.row_length <= max(1024, longest) and len(own.windows["train"]) == len(
        own.bins.starts("train")) - 1
    assert data_of(long_chats, "--block_size=100").row_length <= 100


# ---- fine-tuning ----

FEW = ["--dataset=demo_chat", "--max_iters=2", "--batch_size=2", "--gradient_accumulation_steps=1",
       "--eval_tokens=2000", "--sample_start=你好", "--dtype=float32"]


@pytest.fixture
def tuned(base, place):
    """A folder with the base run in out/tiny, and a run of sft.py in out/x, block_size=64."""
    shutil.copytree(base / "out", place / "out")
    done = succeed(run(place, "sft.py", *FEW, "--out_dir=out/x", "--block_size=64"))
    assert "rows of at most 64 tokens" in done.stdout and "attention mask" in done.stdout
    return place


def test_the_block_size_of_the_rows_is_not_that_of_the_model(tuned):
    def sft_run(*words):
        return run(tuned, "sft.py", *FEW, "--max_iters=3", *words)
    model = load_model(str(tuned / "out/x/final"))[0]
    assert model.config.block_size == 128
    one_line(sft_run("--out_dir=out/y", "--block_size=129"), "block_size=129", "(128)")
    for words, made in (([], "block_size=64, not 128"),
                        (["--block_size=32"], "block_size=64, not 32")):
        one_line(sft_run("--out_dir=out/x", *words), made)
    assert "resuming" in succeed(sft_run("--out_dir=out/x", "--block_size=64")).stdout
    file = checkpoint_files(tuned / "out/x")[0]  # as older versions wrote it
    state = torch.load(file, weights_only=True)
    del state["row_length"]
    torch.save(state, file)
    one_line(sft_run("--out_dir=out/x", "--block_size=64", "--max_iters=4"),
             "long dialogues=cut, not windows")


def test_fine_tuning_logs_what_the_base_model_forgets(tuned, monkeypatch):
    def logged(name):
        lines = (tuned / "out" / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [entry["base_bpc"] for entry in map(json.loads, lines) if "base_bpc" in entry]
    monkeypatch.chdir(tuned)
    model, tok = load_model("out/tiny/best", block_size=64)
    bins = Bins("demo")
    texts = [tok.plain_text(ids).decode() for ids in np.split(
        bins.tokens("val"), bins.starts("val")[1:-1])]
    assert bins.meta["splits"]["val"]["tokens"] < sft.BASE_TOKENS
    with torch.no_grad():
        want = bits_per_byte(model.eval(), tok, texts)["bpc"]
    assert len(logged("x")) == 2 and logged("x")[0] == pytest.approx(want, rel=1e-5)
    succeed(run(tuned, "sft.py", *FEW, "--out_dir=out/x", "--block_size=64", "--max_iters=4"))
    assert len(logged("x")) == 3  # a resumed run finds the base's set, too
    (tuned / "data/demo").unlink()
    done = succeed(run(tuned, "sft.py", *FEW, "--out_dir=out/y"))
    assert "no base_bpc" in done.stdout and not logged("y")

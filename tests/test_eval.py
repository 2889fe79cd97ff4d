"""Laws of eval.py: it measures what training logs, and counts everything that it reads."""
import itertools
import json
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEMO, ENV, one_line, run, run_process
from test_scripts import train

import eval as evaluation
from common.command_line import UserError
from evaluation import answers as chat_answers
from evaluation.likelihood import (
    bits_per_byte,
    choose,
    encode_rows,
    likelihoods,
    standard_error,
    windows,
)
from evaluation.questions import (
    Question,
    answer_prompt,
    letter_prompt,
    read_questions,
    sentence_prompt,
    sentence_questions,
)
from gpt import GPT, GPTConfig
from models import folders
from models.folders import load_model
from tokens.bins import Bins
from tokens.tokenizer_files import train_bytebpe

pytestmark = pytest.mark.numeric
torch.set_num_threads(1)
CMMLU = ",Question,A,B,C,D,Answer\n0,水在多少度结冰？,零度,十度,百度,千度,A\n1,一加一等于几？,一,二,三,四,B\n"
CEVAL = ('id,question,A,B,C,D,answer,explanation\n0,"长江, 流入\n哪里？",东海,黄海,南海,渤海,A,课本\n'
         "1,没有答案？,甲,乙,丙,丁,,\n2,少一项？,甲,乙,,丁,D,\n3,多选？,甲,乙,丙,丁,AB,\n4,短行,甲\n")
LINES = ('{"question": "天是什么颜色？", "choices": ["红", "蓝"], "answer": 1}\n\nno json\n'
         '{"Question": "草呢？", "A": "绿", "B": "红", "C": "黑", "D": "白", "Answer": "a"}\n'
         '{"question": "号码太大？", "choices": ["红", "蓝"], "answer": 2}\n'
         '{"question": "半个字符？", "choices": ["红", "\\ud800"], "answer": 0}\n')


@pytest.fixture(scope="module")
def tiny(base):
    model, tok = load_model(str(base / "out/tiny/best"))
    return model.eval().requires_grad_(False), tok


@pytest.fixture
def output(base, monkeypatch, capsys):
    """Return a function that runs eval.py with arguments, in base, and returns what it prints."""
    monkeypatch.chdir(base)

    def run_main(*arguments):
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, arguments)])
        evaluation.main()
        return capsys.readouterr().out
    return run_main


def tables(folder):
    for name, text in (("law_val.csv", CEVAL), ("physics.csv", CMMLU), ("sky.jsonl", LINES)):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# ---- bits per byte ----

def test_bits_per_byte_equal_the_training_log(place, output, monkeypatch):
    train(place, "--out_dir=out/x", "--eval_tokens=0", "--max_iters=4", "--eval_interval=4")
    lines = (place / "out/x/log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [entry for entry in map(json.loads, lines) if "bpb" in entry][-1]
    monkeypatch.chdir(place)
    model, tok = load_model("out/x/final")
    with torch.no_grad():
        docs = [text for _, text in evaluation.texts_to_score("demo", Counter())]
        scores = bits_per_byte(model.eval(), tok, docs, batch_size=3)
    for ours, theirs in (("nats", "val_loss"), ("bpb", "bpb"), ("bpc", "bpc")):
        assert scores[ours] == pytest.approx(logged[theirs], rel=1e-6)
    split = Bins("demo").meta["splits"]["val"]
    assert all(scores[k] == split[k] for k in ("documents", "tokens", "bytes", "characters"))
    printed = output("bpb", "data/demo", "--stride=8")  # of the newest model
    nats = re.search(r"stride 8\nnats per token (\S+)  bits per byte", printed)
    assert nats and float(nats[1]) != pytest.approx(scores["nats"], abs=1e-4)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40, 41])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_is_predicted_once_with_the_context_its_stride_leaves(n, stride):
    tokens, found, rows = np.arange(100, 100 + n), [], 0
    for ids, targets in windows(tokens, 7, 8, stride, batch_size=2):
        rows += len(ids)
        for x, y in zip(ids.tolist(), targets.tolist()):
            at = [i for i, target in enumerate(y) if target >= 0]
            assert all(x[i] == (y[i] - 1 if y[i] > 100 else 7) for i in at)
            assert not found or at[0] == 8 - stride
            found += [y[i] for i in at]
    assert found == tokens.tolist() and rows == max(1, math.ceil((n - 8) / stride) + 1)


def test_a_set_is_encoded_anew_for_a_model_with_another_tokenizer(place, monkeypatch):
    monkeypatch.chdir(place)
    texts = list(evaluation.read_texts(Bins("demo"), "val"))
    tok = train_bytebpe(texts, 300)
    model = GPT(GPTConfig(vocab_size=384, block_size=64, n_layer=1, n_head=2, n_embd=16)).eval()
    with open("val.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        f.write('{"other": 1}\n')
    dropped = Counter()
    with torch.no_grad():
        one, two = (bits_per_byte(model, tok, [t for _, t in evaluation.texts_to_score(
            name, dropped)]) for name in ("demo", "val.jsonl"))
    split = Bins("demo").meta["splits"]["val"]
    assert one == two and one["bytes"] == split["bytes"] and one["tokens"] > split["tokens"]
    assert dropped.total() == 1 and "val.jsonl:199" in next(iter(dropped))
    assert one["bpb"] == pytest.approx(one["nats"] / math.log(2) * one["tokens"] / one["bytes"])


def test_a_file_is_cleaned_as_prepare_cleans_it(tiny, tmp_path):
    texts = ["\ud800长江\x1b是一条河。", "水" + " " * 2_000_000 + "火", "\n" * 2_000_000, "\ud83d\ude00"]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "x.jsonl").write_text("".join(lines), encoding="ascii")
    (tmp_path / "bad.txt").write_bytes("长江是一条很长的河。\n".encode() * 50 + b"\xe9\x95\n")
    skipped = Counter()
    docs = [text for _, text in evaluation.texts_to_score(str(tmp_path), skipped)]
    assert docs == ["\n".join(["长江是一条很长的河。"] * 50), "水" + " " * 100 + "火", "😀"]
    assert [key.removeprefix(f"{tmp_path / 'x.jsonl'}:")[:15] for key in sorted(skipped)] == [
        "1: bad encoding", "3: empty", "undecodable lin"] and set(skipped.values()) == {1}
    assert math.isfinite(bits_per_byte(*tiny, docs)["bpb"])


# ---- likelihoods ----

def test_batched_likelihoods_equal_those_of_single_rows(tiny):
    model, tok = tiny
    questions = [Question("水是什么？" * n, ["一种液体。", "山", "春天的风很大。", "山"], 0) for n in (1, 3)]
    rows = [row for q in questions for make in (letter_prompt, answer_prompt, sentence_prompt)
            for row in encode_rows(tok, *make(q), [tok.eot], model.config.block_size)[0]]
    naive = []
    for ids, given in rows:
        logp = model(torch.tensor([ids[:-1]]))[0].float().log_softmax(-1)
        naive.append(sum(logp[i - 1, ids[i]].item() for i in range(given, len(ids))))
    for batch_size in (1, 5):
        assert likelihoods(model, rows, batch_size) == pytest.approx(naive, abs=1e-3, rel=1e-5)
    text = tok.decode(rows[4][0][rows[4][1]:])
    assert text.endswith("一种液体。") and len(rows) == 24


def test_the_beginning_of_a_long_prompt_is_cut_off_and_counted(tiny):
    model, tok = tiny
    long = Question("很长的问题。" * 200, ["甲", "乙"], 1)
    rows, cut = encode_rows(tok, *answer_prompt(long), [], 128)
    assert cut and [len(ids) for ids, _ in rows] == [129, 129]
    assert [tok.decode(ids[given:])[-1] for ids, given in rows] == ["甲", "乙"]
    short = Question("短", ["甲", "乙"], 0)
    chosen, n_cut = choose(model, tok, [answer_prompt(long), answer_prompt(short)], [], 8)
    assert n_cut == 1 and len(chosen) == 2


class Knowing(torch.nn.Module):
    """After each prefix of the given rows it predicts the next id of the row."""

    def __init__(self, rows, vocab_size):
        super().__init__()
        self.config, self.head = GPTConfig(vocab_size=vocab_size), 30 * torch.eye(vocab_size)
        self.wte = torch.nn.Embedding(1, 1)
        self.next = {tuple(ids[:i]): ids[i] for ids, _ in rows for i in range(len(ids))}

    def hidden(self, ids):
        known = [[self.next.get(tuple(row[:i + 1]), 0) for i in range(len(row))]
                 for row in ids.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(known), len(self.head)).float()

    def logits_budget(self):
        return 2**16


@pytest.mark.parametrize("make_prompt", [letter_prompt, answer_prompt, sentence_prompt])
def test_a_model_that_knows_the_answers_chooses_them(make_prompt, tiny):
    tok = tiny[1]
    options = ["春天的风", "水", "红色的山，很高", "一条河"]
    questions = [Question(f"第{i}题是什么？", options, i % 4) for i in range(8)]
    rows = [encode_rows(tok, *make_prompt(q), [], 1024)[0][q.answer] for q in questions]
    prompts = [make_prompt(q) for q in questions]
    chosen, _ = choose(Knowing(rows, tok.vocab_size), tok, prompts, [], 4)
    assert chosen == [q.answer for q in questions]
    wrong = [encode_rows(tok, *prompt, [], 1024)[0][q.answer - 1]
             for q, prompt in zip(questions, prompts)]
    chosen, _ = choose(Knowing(wrong, tok.vocab_size), tok, prompts, [], 4)
    assert chosen == [(q.answer - 1) % 4 for q in questions]


def test_the_standard_error_is_that_of_a_sample():
    marks = [1.0] * 7 + [0.0] * 13
    assert standard_error(0.35, 20) == pytest.approx(np.std(marks, ddof=1) / math.sqrt(20))
    assert math.isnan(standard_error(1.0, 1))


# ---- questions ----

def test_every_row_is_a_question_or_counted(tmp_path):
    (tmp_path / "names.json").write_text('{"law": ["Law", "法学", "x"], "physics": "物理", "sky": "天"}',
                                         encoding="utf-8")
    folder = tmp_path / "questions"
    folder.mkdir()
    subjects = read_questions([tables(folder)], "关于{subject}：", tmp_path / "names.json")
    (law, no_law), (physics, none), (sky, no_sky) = subjects.values()
    assert (len(law), len(physics), len(sky)) == (1, 2, 2) and not none
    assert no_law == {"the answer is not one of the options": 2, "a question or option is empty": 2}
    assert no_sky == {"not JSON": 1, "the answer is not one of the options": 1,
                      "bad encoding": 1}
    assert law[0] == Question("长江, 流入\n哪里？", ["东海", "黄海", "南海", "渤海"], 0, "关于法学：\n\n")
    assert letter_prompt(physics[1]) == (
        "关于物理：\n\n一加一等于几？\nA. 一\nB. 二\nC. 三\nD. 四\n答案：", [" A", " B", " C", " D"])
    assert [q.answer for q in sky] == [1, 0] and sky[0].options == ["红", "蓝"]
    assert answer_prompt(sky[0])[0] == "天是什么颜色？\n答案："


def test_choice_prints_every_subject_and_both_means(output, tmp_path):
    printed = output("choice", tables(tmp_path), "--model=out/tiny/best")
    rows = [line.split() for line in printed.splitlines() if "±" in line][1:]
    assert [row[:3] for row in rows] == [["5", "1", "25.00%"], ["2", "2", "25.00%"],
                                         ["5", "2", "37.50%"], ["12", "5", "30.00%"]]
    assert "skipped 1: not JSON" in printed and "mean of 3 subjects" in printed
    assert "nan" not in printed and re.search(r"% ± +- .*law_val", printed)  # one question


def test_texts_make_questions_whose_options_all_differ(base, output):
    texts = list(evaluation.read_texts(Bins("demo", base / "data"), "val"))
    texts[:2] = ["题目\n\n正文的一句。还有一句。", "她说：“好。”\n他也说好！"]
    questions, skipped = sentence_questions([*texts, "只有一句话的文字。"], seed=1)
    assert len(questions) == 198 and skipped.total() == 1
    for q, text in zip(questions, texts):
        assert len(set(q.options)) == 4 and text.startswith(q.text + q.options[q.answer])
    assert [q.text for q in questions[:2]] == ["题目\n\n", "她说：“好。”\n"]
    assert questions[0].options[questions[0].answer] == "正文的一句。"
    assert questions == sentence_questions(texts, seed=1)[0] != sentence_questions(texts, seed=2)[0]
    assert {q.answer for q in questions} == {0, 1, 2, 3}
    printed = output("cloze", "--model=out/tiny/best")
    assert re.search(r"198 +198 +25.00%.*data.demo", printed), printed


# ---- memorisation ----

def test_overlap_is_the_longest_common_passage():
    rng = random.Random(0)
    for _ in range(30):
        docs, texts = ([("".join(rng.choices("山水风火", k=rng.randrange(60)))) for _ in range(4)]
                       for _ in range(2))
        passage, share, n = evaluation.overlap_with(docs, texts)
        common = {t[i:j] for t in texts for i in range(len(t)) for j in range(i + 1, len(t) + 1)
                  if any(t[i:j] in doc for doc in docs)}
        assert len(passage) == max(map(len, common), default=0) and passage in common | {""}
        grams = [t[i:i + 4] for t in texts for i in range(len(t) - 3)]
        assert n == len(grams)
        assert share == sum(any(g in d for d in docs) for g in grams) / max(1, n)


def test_overlap_finds_exactly_a_planted_passage(output, monkeypatch):
    planted = max(evaluation.read_texts(Bins("demo"), "train"), key=len)[5:45]
    monkeypatch.setattr(evaluation, "continue_texts",
                        lambda *words: [("", "壹"), ("", f"㐀{planted}㐀")])
    printed = output("overlap", "demo", "--model=out/tiny/best")
    assert f"40 characters: {planted!r}" in printed and "held-out text, 43 characters" in printed


def test_samples_are_those_of_their_seeds(output):
    words = ("overlap", "demo", "--model=out/tiny/best", "--max_new_tokens=12", "--starts=水|山")
    one, two, other = (output(*words, "--num_samples=3", f"--seed={s}") for s in (1, 1, 9))
    assert one == two != other and "3 samples" in one


# ---- facts ----

def asked(question):
    return [dict(role="user", content=question)]


def test_an_answer_is_right_if_it_contains_a_key_of_its_own_question():
    keys = [["东海"], ["黄河", "大河"], ["江"]]
    right, chance = chat_answers.contains_key(["流进东海。", "大河。", "东海和大河，长江。"], keys)
    assert right == [1, 1, 1] and chance == [0, 0, 1]
    right, chance = chat_answers.contains_key(["江", "江", "不知道"], keys)
    assert right == [0, 0, 0] and chance == [0.5, 0.5, 0]
    mean, error = chat_answers.mean_and_error([1, 0, 0, 0, 1])
    assert mean == 0.4 and error == pytest.approx(standard_error(0.4, 5))


def test_answers_in_batches_are_those_of_single_questions(tiny, monkeypatch):
    torch.manual_seed(0)
    tok = tiny[1]
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, block_size=64, n_layer=2, n_head=2,
                          n_embd=16)).eval()
    with torch.no_grad():
        for p in model.parameters():  # else the blocks are the identity, and the answers equal
            p.normal_(std=0.5)
    questions = [asked(f"{'很' * (n % 4)}{n}是什么？") for n in range(40)]

    def single(question):
        ids = torch.tensor([tok.encode_chat(question) + tok.role_header("assistant")])
        return [int(i) for i in model.generate(ids, 64, temperature=0)]
    alone = [single(question) for question in questions[:8]]
    monkeypatch.setattr(tok, "eot", alone[0][20])  # so that some answers end early
    for new, answer in zip(alone, chat_answers.greedy_answers(model, tok, 8, questions)):
        assert len(new) == 64
        n = min((new.index(end) for end in (tok.eot, tok.im_end) if end in new), default=64)
        assert answer == tok.decode(new[:n])
    assert len({tuple(new) for new in alone}) == 8


def test_questions_are_asked_alone_after_a_greeting_and_after_two_others():
    def answer(dialogues):
        chats.extend(dialogues)
        return [f"答{d[-1]['content']}" for d in dialogues]

    chats, questions = [], [asked(f"问{n}") for n in range(9)]
    names = [name for name, _ in chat_answers.ask_in_chats(answer, questions, seed=3)]
    assert names == ["alone", "after 你好", "after two other turns"]
    alone, greeting, greeted, after_two = chats[:9], chats[9], chats[10:19], chats[19:]
    assert alone == questions and greeting == asked("你好")
    welcome = dict(role="assistant", content="答你好")
    assert greeted == [[*greeting, welcome, *question] for question in questions]
    before = []
    for question, chat in zip(questions, after_two):
        assert chat[-1:] == question
        assert [m["role"] for m in chat] == ["user", "assistant"] * 2 + ["user"]
        assert all(chat[i + 1]["content"] == f"答{chat[i]['content']}" for i in (0, 2))
        assert len({m["content"] for m in chat[::2]}) == 3
        before += [m["content"] for m in chat[:-1:2]]
    assert sorted(before) == sorted(f"问{n}" for n in range(9) for _ in range(2))
    del chats[:]
    list(chat_answers.ask_in_chats(answer, questions, seed=4))
    assert chats[:19] == [*alone, greeting, *greeted] and chats[19:] != after_two


def test_facts_prints_what_is_right_and_chance_in_three_chats(output, tmp_path, monkeypatch):
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(dict(messages=[*asked(f"问{n}"), dict(
        role="assistant", content=f"是{n}。")], keys=[str(n)])) + "\n" for n in range(4)),
        encoding="utf-8")
    monkeypatch.setattr(evaluation, "greedy_answers", lambda model, tok, size, dialogues: [
        f"第{d[-1]['content'][1]}" if len(d) == 1 else "3" for d in dialogues])
    rows = [line.split() for line in output(
        "facts", file, "--model=out/tiny/best").splitlines()[2:]]
    assert [row[:7] for row in rows] == [
        ["4", "100.00%", "±", "0.00%", "0.00%", "±", "0.00%"],
        *[["4", "25.00%", "±", "25.00%", "25.00%", "±", "8.33%"]] * 2]


def test_every_measure_is_that_of_the_nearest_reference():
    compare = chat_answers.compare
    assert compare("长江，流进东海。", ["长江流进东海"]) == (1, 1, 1) and compare("", ["甲"]) == (0, 0, 0)
    assert compare("甲甲乙", ["甲丙"])[:2] == (0, pytest.approx(2 * 1 / 5))
    exact, f1, rouge = compare("甲乙", ["丙", "甲丁", "乙甲"])
    assert (exact, f1, rouge) == (0, 1, pytest.approx(0.5))  # one character in order


def test_rouge_l_is_that_of_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("甲乙丙", k=rng.randrange(8))) for _ in range(2))
        parts = {"".join(x) for n in range(len(a) + 1) for x in itertools.combinations(a, n)}
        n = max(n for n in range(len(b) + 1)
                if any("".join(x) in parts for x in itertools.combinations(b, n)))
        p, r = n / max(1, len(a)), n / max(1, len(b))
        want = (1 + 1.44) * p * r / (r + 1.44 * p) if n else 0
        assert chat_answers.rouge_l(a, b) == pytest.approx(want)


def test_bits_per_byte_by_a_key_are_those_of_each_group_and_add_up(output, tmp_path):
    texts = {"wiki": ["长江是一条河。", "水是一种液体。" * 30], "-": ["春天的风。"], "news": ["红色的山。" * 9]}
    lines = [json.dumps({"text": t} | ({"source": name} if name != "-" else {}))
             for name, group in texts.items() for t in group]
    for file, kept in ("0", lines[:2]), ("1", lines[2:3]), ("2", lines[3:]), ("all", lines):
        (tmp_path / f"{file}.jsonl").write_text("\n".join(kept), encoding="utf-8")
    words = ("--model=out/tiny/best", "--dtype=float32")
    rows = {row[-1]: row[:4] for row in map(str.split, output(
        "bpb", tmp_path / "all.jsonl", "--by=source", *words).splitlines()[2:5])}
    for i, (name, group) in enumerate(texts.items()):
        alone = output("bpb", tmp_path / f"{i}.jsonl", *words).splitlines()[-1]
        assert rows[name] == [str(len(group)), *re.findall(r"\d+\.\d+", alone)]
    total = output("bpb", tmp_path / "all.jsonl", "--by=source", *words).splitlines()[-2:]
    n = {name: sum(len(t.encode()) for t in group) for name, group in texts.items()}
    mean = sum(float(rows[name][2]) * n[name] for name in n) / sum(n.values())
    assert "4 documents" in total[0] and float(total[1].split()[7]) == pytest.approx(mean, abs=1e-3)
    for name, part in ((tmp_path / "all.jsonl", "has the key sorce; keys: text, source"),
                       ("demo", "no records")):
        with pytest.raises(UserError, match=part):
            output("bpb", name, "--by=sorce", *words)


def test_the_questions_of_a_set_come_with_all_its_answers(base):
    bins = Bins("demo_chat", base / "data")
    known = chat_answers.known_questions(bins, "train", 10_000, seed=0)
    rows = [json.loads(line)["messages"] for line in open(
        DEMO / "dialogues_train.jsonl", encoding="utf-8")]
    answers = {}
    for question, answer, *_ in rows:
        if len(bins.tokenizer.encode(answer["content"])) > 64:
            continue
        answers.setdefault(question["content"], set()).add(answer["content"])
    assert {asked[0]["content"]: set(texts) for asked, texts in known} == answers
    some = chat_answers.known_questions(bins, "train", 60, seed=0)
    assert len(some) == 60 == len({str(asked) for asked, _ in some})
    assert some == chat_answers.known_questions(bins, "train", 60, seed=0)
    assert some != chat_answers.known_questions(bins, "train", 60, seed=1)


def test_answers_are_compared_with_those_of_both_splits(output, monkeypatch):
    """A stand-in knows the answers to the training questions, and one polite word confuses it."""
    known = dict((asked[-1]["content"], texts[0]) for asked, texts in
                 chat_answers.known_questions(Bins("demo_chat"), "train", 10_000, 0))
    monkeypatch.setattr(evaluation, "greedy_answers", lambda model, tok, size, dialogues: [
        known.get(d[-1]["content"], "") for d in dialogues])
    rows = [line.split(maxsplit=11) for line in output(
        "answers", "demo_chat", "--model=out/tiny/best").splitlines()[2:]]
    ways = "alone", "after 你好", "after two other turns", "请问 before it", "without its mark"
    assert [row[11] for row in rows] == [
        f"{split}, {way}" for split in ("train", "val") for way in ways]
    assert [row[:11] for row in rows[:3]] == [["60", "60", *["100.00%", "±", "0.00%"] * 3]] * 3
    assert [row[:2] for row in rows[5:8]] == [["60", "0"]] * 3
    assert 0 < int(rows[3][1]) < 60 and int(rows[4][1]) < 60  # some begin with 请, some have no mark
    for exact, f1, rouge, error in ((row[2], row[5], row[8], row[4]) for row in rows[3:4]):
        p, n = float(exact[:-1]) / 100, int(rows[3][0])
        assert exact == f1 == rouge and error == f"{standard_error(p, n):.2%}"


def test_the_embedded_facts_are_asked_by_default():
    dialogues, keys = zip(*chat_answers.read_facts([evaluation.FACTS]))
    assert len(dialogues) == 198 and all(len(d) == 1 for d in dialogues)
    assert ["东海"] in keys


@pytest.mark.parametrize("row, part", [
    ("[1]", 'f.jsonl:4: a record needs "messages"'), ("{", "f.jsonl:4: "),
    ('{"messages": [], "keys": ["甲"]}', 'a record needs "messages"'),
    ('{"messages": [{"role": "user", "content": "甲"}], "keys": ["甲"]}', "ends with a question"),
    ('{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "乙"}], '
     '"keys": "乙"}', "a list of texts"),
    ('{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "乙"}], '
     '"keys": ["甲"]}', "one of which the answer contains")])
def test_a_bad_table_of_facts_is_one_line(row, part, tmp_path):
    file = tmp_path / "f.jsonl"
    good = json.dumps(dict(messages=[*asked("问"), dict(role="assistant", content="答")],
                           keys=["答"]))
    file.write_text(f"{good}\n" * 3 + row, encoding="utf-8")
    with pytest.raises(UserError) as error:
        chat_answers.read_facts([file])
    assert part in str(error.value)
    file.write_text(good, encoding="utf-8")
    with pytest.raises(UserError, match="f.jsonl: 1 questions; at least 3"):
        chat_answers.read_facts([file])


def test_a_chat_that_is_longer_than_the_context_loses_its_oldest_turns(tiny):
    tok, model = tiny[1], SimpleNamespace(config=SimpleNamespace(block_size=100))
    system = [dict(role="system", content="甲")]
    turns = [m for n in range(9) for m in (dict(role="user", content=f"{n}问"),
                                           dict(role="assistant", content="答"))]
    ids = chat_answers.prompt(model, tok, [*system, *turns, *asked("末")])
    kept = tok.decode_chat(ids)
    assert len(ids) <= 36 and kept[0] == system[0] and kept[-1] == asked("末")[0]
    assert kept[1:-1] == turns[-len(kept[1:-1]):] and kept[1]["role"] == "user"
    long = asked("很" * 200)
    assert tok.decode_chat(chat_answers.prompt(model, tok, long)) == long


# ---- refusals ----

@pytest.mark.parametrize("words, part", [
    ((), "name a task: bpb, choice, cloze, overlap, facts, answers"),
    (("choice",), "name files or folders with questions"),
    (("bpb", "nowhere.txt"), "nowhere.txt is neither a prepared set under data/ nor a file"),
    (("bpb", "demo", "val"), "name one prepared set or text file, not: demo val"),
    (("bpb", "demo", "--stride=999"), "stride=999 is more than the context, 128"),
    (("bpb", "demo", "--device=xla"), "'XLA' backend)"),
    (("cloze", "nowhere"), "data/nowhere is not prepared"),
    (("overlap", "demo", "--num_samples=0"), "num_samples=0 is not from 1"),
    (("bpb", "demo", "--model=nowhere/x/y"), "nowhere/x/y: no such folder")])
def test_bad_arguments_are_refused(words, part, output):
    with pytest.raises(UserError) as error:
        output(*words, *["--model=out/tiny/best"][:"--model" not in str(words)])
    assert part in str(error.value).replace("\\", "/"), error.value


def test_without_a_model_the_error_names_the_command(place, monkeypatch):
    monkeypatch.setattr(folders, "SHIPPED", place)
    one_line(run(place, "eval.py", "bpb", "demo"), "eval.py: no base model under out/ yet",
             "pretrain.py")


@pytest.mark.parametrize("name, text, parts", [
    ("a.csv", "Question,A,B,Answer\n问,甲,乙,A\n", ("a.csv:2: no c d", "question, a, b, answer")),
    ("a.jsonl", '\n{"q": "问", "choices": []}\n', ("a.jsonl:2: no question answer", "q, choices")),
    ("a.jsonl", "[[1]]\n", ("a.jsonl:1: no question", "found: a list, not an object")),
    ("a.csv", "Question,A,B,C,D,Answer\n", ("a.csv: it contains no question",)),
    ("names.json", "[]", ("names.json: not JSON like",)),
    ("names.json", "[" * 100_000, ("names.json: not JSON like",)),
    ("names.json", '{"a": ' * 100_000 + "1" + "}" * 100_000, ("names.json: not JSON like",)),
    ("none.csv", None, ("none.csv: no such file",))])
def test_a_bad_table_is_one_line(name, text, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_questions([name], "", name if name == "names.json" else "")
    assert all(part in str(error.value) for part in parts), error.value


def test_a_set_without_texts_or_questions_is_refused(output, tmp_path):
    with pytest.raises(UserError, match="holds texts"):
        output("answers", "demo")
    with pytest.raises(UserError, match="holds dialogues"):
        next(evaluation.texts_to_score("demo_chat", Counter()))
    with pytest.raises(UserError, match="0 documents have a title or a"):
        sentence_questions(["无"], 1)
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "问", "choices": ["甲", "乙"], "answer": 9}\n', encoding="utf-8")
    with pytest.raises(UserError, match="no usable question: 1 x the answer is not one"):
        output("choice", file, "--model=out/tiny/best")
    with pytest.raises(UserError, match="no text in .*x.jsonl: 1 x .*x.jsonl:1: no string under"):
        output("bpb", file, "--model=out/tiny/best")
    file.write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="no text in .*x.jsonl: no document"):
        output("bpb", file, "--model=out/tiny/best")


@pytest.mark.parametrize("words", [("eval.py", "choice", "q.csv"), ("sample.py", "--chat")])
def test_an_ascii_terminal_gets_no_traceback(words, base, tmp_path):
    (tmp_path / "q.csv").write_text(CMMLU, encoding="utf-8")
    done = run_process(tmp_path, *words, f"--model={base / 'out/tiny/best'}", "--max_new_tokens=3",
                       input="你好\n", env=ENV | {"PYTHONIOENCODING": "ascii"}, encoding="utf-8")
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or "not ascii text" in done.stderr

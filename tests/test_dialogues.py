"""Dialogues: every published form of a record gives the messages that are right, or a reason."""
import io
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from common.command_line import UserError
from corpus.chats import dialogues, read_chat
from corpus.clean import Rules, clean_document
from corpus.files import Dropped
from tokens.bins import Bins
from tokens.tokenizer_files import train_bytebpe

Q, A, Q2, A2 = "天为什么蓝？", "因为散射。", "傍晚呢？", "会变红。"
PAIR = [("user", Q), ("assistant", A)]
TURNS = [*PAIR, ("user", Q2), ("assistant", A2)]
SYSTEM = ("system", "你是老师")
CALL = '<tool_call>\n{"name": "track", "arguments": {"id": 0}}\n</tool_call>'
THOUGHT = ("assistant", f"<think>\n想一想。\n</think>\n\n{A}")


def chat(*pairs, role="role", content="content", **names):
    return [{role: names.get(who, who), content: said} for who, said in pairs]


def read(record, **options):
    """Return each dialogue of a record as (role, content) pairs, of a Dropped the reason."""
    return [one.reason if isinstance(one, Dropped) else [(m["role"], m["content"]) for m in one]
            for one in dialogues(record, **options)]


OPENAI_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function",
    "function": {
    "name": "track", "arguments": '{"id": 0}'}}]}
FORMS = {
    # pairs
    "alpaca": ({"instruction": Q, "input": "", "output": A}, PAIR),
    "alpaca with input": ({"instruction": "翻译", "input": "天", "output": "sky"},
                          [("user", "翻译\n天"), ("assistant", "sky")]),
    "alpaca noinput": ({"instruction": Q, "input": "<noinput>", "output": A}, PAIR),
    "alpaca zh": ({"instruction_zh": Q, "input_zh": "", "output_zh": A, "instruction": "Why?",
                   "input": "", "output": "So."}, PAIR),
    "instruction, answer": ({"instruction": Q, "answer": A}, PAIR),
    "alpaca history": ({"instruction": Q2, "output": A2, "system": "你是老师", "history": [[Q, A]]},
                       [SYSTEM, *TURNS]),
    "dolly": ({"instruction": Q, "context": "", "response": A, "category": "open_qa"}, PAIR),
    "dolly with context": ({"instruction": "总结", "context": "长文", "response": A},
                           [("user", "总结\n长文"), ("assistant", A)]),
    "belle": ({"instruction": f"Human:{Q}\nAssistant:{A}\nHuman: {Q2}\nAssistant:", "input": "",
        "output": A2},
              TURNS),
    "belle with names in an answer": (
        {"instruction": "Human:一\nAssistant:用户：x\n助手：y\n<bot>z\nHuman:三：Human:不是\nAssistant:",
            "output": "四"},
        [("user", "一"), ("assistant", "用户：x\n助手：y\n<bot>z"), ("user", "三：Human:不是"), ("assistant",
            "四")]),
    "a prompt that names parts": ({"instruction": f"问题：{Q}\n答案：", "output": A},
                                  [("user", f"问题：{Q}\n答案："), ("assistant", A)]),
    "firefly-train": ({"kind": "NLI", "input": Q, "target": A}, PAIR),
    "prompt, completion": ({"prompt": Q, "completion": A}, PAIR),
    "prompt, completion of messages": ({"prompt": chat(PAIR[0]), "completion": chat(PAIR[1])},
        PAIR),
    "q, a": ({"q": Q, "a": A}, PAIR),
    "questions, answers": ({"questions": Q, "answers": A}, PAIR),
    "huatuo26m": ({"questions": [[Q, "别的问法"]], "answers": [A]}, PAIR),
    "ernie": ({"src": [Q, Q2], "tgt": [A, A2]}, TURNS),
    "swift": ({"query": Q2, "response": A2, "history": [[Q, A]], "system": "你是老师"},
              [SYSTEM, *TURNS]),
    "csv history": ({"history": "[]", "q": Q, "a": A}, PAIR),
    "zh keys": ({"提问": Q, "回复": A}, PAIR), "zh letters": ({"问": Q, "答": A}, PAIR),
    "zh headers": ({"标题": Q, "描述": "", "回答": A}, PAIR),
    "capitals": ({"INSTRUCTION": Q, "RESPONSE": A, "SOURCE": "zhihu"}, PAIR),
    "medical o1": ({"Question": Q, "Complex_CoT": "想一想。", "Response": A}, [PAIR[0], THOUGHT]),
    "R1 distilled": ({"input": Q, "reasoning_content": "想一想。", "content": A, "score": 10},
                     [PAIR[0], THOUGHT]),
    "webtext2019zh": ({"qid": 1, "title": Q, "desc": Q2, "topic": "物理", "star": 3, "content": A},
                      [("user", f"{Q}\n{Q2}"), ("assistant", A)]),
    "webtext2019zh without desc": ({"qid": 1, "title": Q, "desc": "", "content": A}, PAIR),
    "baike_qa2019": ({"qid": "1", "category": "x", "title": Q, "desc": Q2, "answer": A},
                     [("user", f"{Q}\n{Q2}"), ("assistant", A)]),
    "cMedQA csv": ({"department": "内科", "title": "标题", "ask": Q, "answer": A}, PAIR),
    "AdvertiseGen": ({"content": "类型#裤", "summary": "好裤子"}, [("user", "类型#裤"), ("assistant",
        "好裤子")]),
    "psychology": ({"Context": Q, "Response": A}, PAIR),
    "HC3": ({"question": Q, "human_answers": ["人"], "chatgpt_answers": [A]}, PAIR),
    "PsyQA": ({"questionID": 1, "question": Q, "description": Q2, "answers": [{"answer_text": A}]},
              [("user", f"{Q}\n{Q2}"), ("assistant", A)]),
    "numbers": ({"question": "1-1", "answer": 0}, [("user", "1-1"), ("assistant", "0")]),
    "empty containers": ({"question": Q, "answer": A, "data": [], "qas": [], "paragraphs": [],
                          "instances": [], "messages": [], "images": []}, PAIR),
    # reading comprehension
    "squad": ({"data": [{"title": "茶", "paragraphs": [{"context": "文", "qas": [
        {"question": Q, "id": "1", "answers": [{"text": A, "answer_start": 0}]}]}]}]}, PAIR),
    "squad flat": ({"id": "1", "title": "茶", "context": "文", "question": Q,
                    "answers": {"text": [A], "answer_start": [0]}}, PAIR),
    "dureader": ({"question": Q, "answers": ["", A, "别的"], "documents": []}, PAIR),
    "webqa": ({"question": Q, "evidences": {"a": {"answer": ["no_answer"], "evidence": "x"},
                                            "b": {"answer": [A], "evidence": "y"}}}, PAIR),
    "webqa sogou": ({"id": "3", "question": Q, "passages": [
        {"answer": "", "passage": "x"}, {"answer": A, "passage": "y"}]}, PAIR),
    "seed task": ({"instruction": "写诗", "instances": [{"input": "夏", "output": "诗"}]},
                  [("user", "写诗\n夏"), ("assistant", "诗")]),
    # lists of messages
    "messages": ({"messages": chat(*TURNS)}, TURNS), "bare list": (chat(*TURNS), TURNS),
    "sharegpt": ({"conversations": chat(*TURNS, role="from", content="value", user="human",
                                        assistant="gpt")}, TURNS),
    "sharegpt original": ({"id": 1, "items": chat(*TURNS, role="from", content="value",
        user="human",
                                                  assistant="bing")}, TURNS),
    "zh roles": ({"conversations": chat(*TURNS, user="用户", assistant="助手")}, TURNS),
    "capital roles": ({"conversations": chat(*TURNS, user="USER ", assistant="GPT-4")}, TURNS),
    "patient": ({"dialog": chat(*TURNS, role="speaker", content="text", user="病人", assistant="医生")},
                TURNS),
    "crosswoz": ({"messages": chat(*TURNS, user="usr", assistant="sys")}, TURNS),
    "system beside": ({"system": "你是老师", "conversations": chat(*PAIR)}, [SYSTEM, *PAIR]),
    "own system": ({"system": "不用", "messages": chat(SYSTEM, *PAIR)}, [SYSTEM, *PAIR]),
    "ultrachat_200k": ({"prompt": Q, "prompt_id": "x", "messages": chat(*TURNS)}, TURNS),
    "magpie": ({"instruction": Q, "response": A, "conversations": chat(*PAIR, role="from",
        content="value",
                user="human", assistant="gpt")}, PAIR),
    "slimorca": ({"conversations": [{"from": "human", "value": Q, "weight": 0},
                                    {"from": "gpt", "value": A, "weight": 1}]}, PAIR),
    "wildchat": ({"model": "gpt-4", "conversation": [dict(m, language="Chinese", toxic=False)
                                                     for m in chat(*TURNS)]}, TURNS),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]},
                            {"role": "assistant", "content": [{"type": "text", "text": A}]}]},
                                PAIR),
    "json in a string": ({"messages": json.dumps(chat(*TURNS))}, TURNS),
    "python in a string": ({"messages": str(chat(*TURNS))}, TURNS),
    "json objects in strings": ({"messages": [json.dumps(m) for m in chat(*PAIR)]}, PAIR),
    "a list a key": ({"messages": {"role": ["user", "assistant"], "content": [Q, A]}}, PAIR),
    "reasoning": ({"messages": [{"role": "user", "content": Q},
                                {"role": "assistant", "content": A, "reasoning_content": "想一想。"}]},
                  [PAIR[0], THOUGHT]),
    # turns
    "firefly": ({"conversation": [{"human": Q, "assistant": A}, {"human": Q2, "assistant": A2}]},
        TURNS),
    "xtuner": ({"conversation": [{"system": "你是老师", "input": Q, "output": A},
                                 {"input": Q2, "output": A2}]}, [SYSTEM, *TURNS]),
    "coig": ({"instruction": "", "conversations": [{"question": Q, "answer": A},
                                                   {"question": Q2, "answer": A2}]}, TURNS),
    "moss 003": ({"meta_instruction": "你是老师", "num_turns": 2, "chat": {
        "turn_1": {"Human": f"<|Human|>: {Q}<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                   "Commands": "<|Commands|>: None<eoc>\n",
                       "Tool Responses": "<|Results|>: None<eor>\n",
                   "MOSS": f"<|MOSS|>: {A}<eom>\n"},
        "turn_2": {"Human": f"<|Human|>: {Q2}<eoh>\n", "MOSS": f"<|MOSS|>: {A2}<eom>\n"}}},
        [SYSTEM, *TURNS]),
    "moss 003 with a tool": ({"chat": {"turn_1": {
        "Human": f"<|Human|>: {Q}<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: 查<eot>\n",
        "Commands": "<|Commands|>: Search(\"天\")<eoc>\n", "Tool Responses": "<|Results|>: 蓝<eor>\n",
        "MOSS": f"<|MOSS|>: {A}<eom>\n"}}},
        [PAIR[0], ("assistant", '<think>\n查\n</think>\n\n<tool_call>\nSearch("天")\n</tool_call>'),
         ("tool", "蓝"), PAIR[1]]),
    # strings
    "ultrachat": ({"id": "0", "data": [Q, A, Q2, A2]}, TURNS), "lccc": ([Q, A, Q2, A2], TURNS),
    "lccc on the hub": ({"dialog": [Q, A, Q2, A2]}, TURNS),
    "huatuo": ({"data": [f"问：{Q}", f"答：{A}"]}, PAIR),
    "duconv": ({"conversation": [Q, A]}, PAIR), "kdconv": ({"messages": [
        {"message": Q, "attrs": []}, {"message": A}]}, PAIR),
    "duconv test": ({"goal": [], "history": [Q, A, Q2], "response": A2}, TURNS),
    "context list": ({"context": [Q, A, Q2], "response": A2}, TURNS),
    "pairs": ({"conversation": [[Q, A], [Q2, A2]]}, TURNS),
    "moss 002": ({"prefix": "你是老师", "plain_text":
                  f"[Human]: {Q}<eoh> [MOSS]: {A}<eoa> [Human]: {Q2}<eoh> [MOSS]: {A2}<eoa>"},
                 [SYSTEM, *TURNS]),
    "baize": ({"topic": "天", "input": f"你是老师\n[|Human|] {Q}\n[|AI|] {A}\n[|Human|] "},
              [SYSTEM, *PAIR]),
    "guanaco": ({"text": f"### Human: {Q}### Assistant: {A}### Human: {Q2}### Assistant: {A2}"},
        TURNS),
    "chatml": ({"text": f"<|im_start|>system\n你是老师<|im_end|>\n<|im_start|>user\n{Q}<|im_end|>\n"
                        f"<|im_start|>assistant\n{A}<|im_end|>\n"}, [SYSTEM, *PAIR]),
    "oig": ({"text": f"<human>: {Q}\n<bot>: {A}"}, PAIR),
    "a question about a dialogue": (
        {"instruction": "总结", "input": "用户：你好\n客服：再见", "output": A},
        [("user", "总结\n用户：你好\n客服：再见"), ("assistant", A)]),
    # tools
    "sharegpt tools": ({"conversations": [
        {"from": "human", "value": Q}, {"from": "function_call",
            "value": '{"name": "track", "arguments": {"id": 0}}'},
        {"from": "observation", "value": '{"city": "武汉"}'}, {"from": "gpt", "value": A}],
            "tools": "[]"},
        [PAIR[0], ("assistant", CALL), ("tool", '{"city": "武汉"}'), PAIR[1]]),
    "openai tools": ({"messages": [
        *chat(PAIR[0]), OPENAI_CALL, {"role": "tool", "tool_call_id": "c", "content": "武汉"},
            *chat(PAIR[1])]},
        [PAIR[0], ("assistant", CALL), ("tool", "武汉"), PAIR[1]]),
    "glaive": ({"chat": f"USER: {Q}\n\n\nASSISTANT: {A} <|endoftext|>\n\n\nFUNCTION RESPONSE: 武汉"
                        f"\n\n\nASSISTANT: {A2} <|endoftext|>"},
               [*PAIR, ("tool", "武汉"), ("assistant", A2)]),
    "llama 2": ({"text": f"<s>[INST] <<SYS>>\n你是老师\n<</SYS>>\n\n{Q} [/INST] {A} </s><s>[INST] {Q2} "
                         f"[/INST] {A2} </s>"}, [SYSTEM, *TURNS]),
    "llama 2 without system": ({"text": f"<s>[INST] {Q} [/INST] {A} </s>"}, PAIR),
    "llama 3": ({"text": "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{who}<|end_header_id|>\n\n{said}<|eot_id|>" for who, said in TURNS)},
        TURNS),
    "gemma": ({"text": f"<bos><start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n{A}"
                       "<end_of_turn>\n"}, PAIR),
    "deepseek": ({"text": f"<｜begin▁of▁sentence｜><｜User｜>{Q}<｜Assistant｜>{A}<｜end▁of▁sentence｜>"},
                 PAIR),
    "chatglm": ({"text": f"[Round 1]\n\n问：{Q}\n\n答：{A}\n\n[Round 2]\n\n问：{Q2}\n\n答：{A2}"},
                TURNS),
    "gemini": ({"systemInstruction": {"parts": [{"text": "你是老师"}]}, "contents": [
        {"role": "user", "parts": [{"text": Q}]}, {"role": "model", "parts": [{"text": A}]}]},
        [SYSTEM, *PAIR]),
    # strings alternate, unless an answer stands beside them
    "naturalconv": ({"dialog_id": "1", "content": [Q, A, Q2, A2]}, TURNS),
    "context and response": ({"context": [Q, A, Q2], "response": A2}, TURNS),
    "aya": ({"inputs": Q, "targets": A, "language": "zho"}, PAIR),
    "traditional": ({"問題": Q, "答案": A}, PAIR),
    "traditional messages": ({"對話": [{"角色": "使用者", "內容": Q}, {"角色": "助理", "內容": A}]}, PAIR),
    "missing fields of pandas": (
        {"instruction": Q, "input": "nan", "output": A, "system": math.nan}, PAIR),
    # options
    "cmmlu": ({"Question": Q, "A": "天", "B": "地", "Answer": "A"},
              [("user", f"{Q}\nA. 天\nB. 地"), ("assistant", "A")]),
    **{f"options {i}": ({"question": Q, "options": options, "answer": "A"},
                        [("user", f"{Q}\nA. 天\nB. 地"), ("assistant", "A")])
       for i, options in enumerate((
           ["天", "地"], ["A. 天", "B. 地"], "A. 天\nB. 地", {"A": "天", "B": "地"}, '["天", "地"]',
           {"text": ["天", "地"], "label": ["A", "B"]}, [{"text": "天"}, {"text": "地"}]))},
    # marks that allow training
    "kto": ({"prompt": Q, "completion": A, "label": True}, PAIR),
    "label that is no mark": ({"question": Q, "answer": A, "label": 0}, PAIR),
    "untrained turn": ({"messages": [*chat(*PAIR), {"role": "user", "content": Q2},
                                     {"role": "assistant", "content": A2, "loss": False}]},
                       [*TURNS[:3], ("assistant", "")]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_messages(form):
    record, wanted = FORMS[form]
    assert read(record) == [wanted]
    assert read(json.dumps(record)) == [wanted]


SEVERAL = {
    "webqa": {"Q1": {"question": Q, "evidences": {"e": {"answer": [A], "evidence": "文"}}},
              "Q2": {"question": Q2, "evidences": {"e": {"answer": [A2], "evidence": "文"}}}},
    "crosswoz": {"1": {"messages": chat(*PAIR, user="usr", assistant="sys")},
                 "2": {"messages": chat(*TURNS[2:], user="usr", assistant="sys")}},
    "lccc": {"train": [[Q, A]], "valid": [[Q2, A2]]}, "lists": [[Q, A], [Q2, A2]],
    "split of pairs": {"train": [{"question": Q, "answer": A}, {"question": Q2, "answer": A2}]},
    "records": [{"instruction": Q, "output": A}, {"instruction": Q2, "output": A2}],
    "huatuo": {"data": [[f"问：{Q}", f"答：{A}"], [f"问：{Q2}", f"答：{A2}"]]}}


@pytest.mark.parametrize("form", SEVERAL)
def test_records_that_hold_several_dialogues_give_each(form):
    assert read(SEVERAL[form]) == [TURNS[:2], TURNS[2:]]


CHOSEN = {
    "dpo": {"prompt": Q, "chosen": A, "rejected": "坏"},
    "alpaca dpo": {"instruction": Q, "input": "", "chosen": A, "rejected": "坏"},
    "sharegpt dpo": {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt",
        "value": A},
                     "rejected": {"from": "gpt", "value": "坏"}},
    "ultrafeedback": {"prompt": Q, "chosen": chat(*PAIR), "rejected": chat(PAIR[0], ("assistant",
        "坏"))},
    "orpo with messages": {"prompt": Q, "messages": chat(*PAIR), "chosen": chat(*PAIR),
        "rejected": chat(PAIR[0])},
    "hh-rlhf": {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: 坏"},
    "cvalues": {"prompt": Q, "pos_resp": A, "neg_resp": "坏"},
    "swift": {"messages": chat(*PAIR), "rejected_response": "坏"},
    "reward": {"question": Q, "response_chosen": A, "response_rejected": "坏"},
    "openai dpo": {"input": {"messages": chat(PAIR[0])}, "preferred_output": chat(PAIR[1]),
                   "non_preferred_output": chat(("assistant", "坏"))}}


@pytest.mark.parametrize("form", CHOSEN)
def test_of_a_preference_pair_the_chosen_answer_is_read_on_request_only(form):
    assert read(CHOSEN[form]) == ["preference pair (see --chosen)"]
    assert read(CHOSEN[form], chosen=True) == [PAIR]


@pytest.mark.parametrize("record, reason", [
    *[(r, "no answer") for r in ([], 3, "x", None, {"messages": [1]})],
    *[(r, "no question or no answer") for r in (
        {}, {"question": Q, "A": "天", "B": "地"},
        {"messages": []}, {"text": "长江很长。"}, {"a": {"b": 1}}, {"answer": A}, {"question": Q,
            "my_answer": A},
        {"question": Q, "answers": [], "is_impossible": True}, {"title": "新闻", "content": "正文"},
        {"question": Q, "answer": " ", "history": [["一", "二"]]},
        {"context": "文", "question": "", "answers": [{"text": A}]})],
    ({"messages": chat(("robot7", Q))}, "unknown role"), (chat(PAIR[0]), "no answer"),
    ({"messages": chat(("user", f"<image>{Q}"), PAIR[1])}, "image or sound"),
    ({"images": ["a.jpg"], "messages": chat(*PAIR)}, "image or sound"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url",
        "image_url": {"url": "x"}}]}]},
     "image or sound"),
    *[(dict(prompt=Q, completion=A, **mark), "marked as untrained") for mark in (
        {"label": False}, {"label": "False"}, {"kto_tag": False}, {"train": 0}, {"weight": 0.0})],
    ({"messages": [*chat(PAIR[0]), {"role": "assistant", "content": A, "weight": 0}]},
     "marked as untrained"),
    ({"messages": chat(*PAIR), "label": False}, "marked as untrained"),
    ({"messages": chat(PAIR[0], ("assistant", "长" * 2**22))}, "too long")])
def test_records_that_cannot_be_trained_on_are_dropped_by_reason(record, reason):
    assert read(record) == [reason]


def test_a_reason_names_the_keys_found_or_the_id():
    (lost,) = dialogues({"Foo": 1, "bar": "x"})
    assert "Foo, bar" in lost.details
    (_, lost) = dialogues({"Q1": {"question": Q, "answers": [A]}, "Q2": {"question": Q}})
    assert lost.details.startswith("Q2: ")


def test_evidence_stands_before_the_question_of_each_text():
    squad = {"context": "长江很长。", "qas": [{"question": Q, "answers": [{"text": A}]}]}
    assert read(squad, evidence=True) == [[("user", f"长江很长。\n\n{Q}"), PAIR[1]]]
    webqa = {"question": Q, "evidences": {"a": {"answer": [A], "evidence": "一"},
                                          "b": {"answer": ["no_answer"], "evidence": "二"}}}
    assert read(webqa, evidence=True) == [[("user", f"一\n\n{Q}"), PAIR[1]],
        "no question or no answer"]
    webqa |= {"question": None}
    assert read(webqa, evidence=True) == ["no question or no answer"] * 2
    dureader = {"question": Q, "answers": [A], "documents": [
        {"is_selected": False, "paragraphs": ["一"]},
        {"is_selected": True, "paragraphs": ["二", "三"], "most_related_para": 1}]}
    assert read(dureader, evidence=True) == [[("user", f"三\n\n{Q}"), PAIR[1]]]


NAMES = st.sampled_from(["messages", "role", "content", "question", "answer", "data", "qas",
    "evidences", "history",
                         "chosen", "rejected", "system", "tool_calls", "documents", "input",
                             "instruction", "text",
                         "type", "loss", "train"]) | st.text(max_size=3)
LEAVES = st.sampled_from([None, True, 0, 2.5, 10**20, "", "user", "assistant",
    "Human: a\nAssistant: b", "[1", '{"a": 1}',
                          "['x']", "<|Human|>: None<eoh>"]) | st.text(max_size=5)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(NAMES, v,
    max_size=5), max_leaves=20)


@given(VALUES, st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_value_gives_dialogues_or_reasons(value, evidence, chosen):
    found = list(dialogues(value, evidence, chosen))
    assert found
    for one in found:
        if isinstance(one, Dropped):
            assert one.reason and one.details
        else:
            assert all(m.keys() == {"role", "content"} and isinstance(m["content"],
                str) for m in one)
            assert {m["role"] for m in one} <= {"system", "user", "assistant", "tool"}
            assert any(m["role"] == "assistant" and m["content"].strip() for m in one)


@pytest.mark.parametrize("value", ["[" * 3000, "[" * 100_000,
    '{"messages": ' * 900 + "1" + "}" * 900,
                                   "[" + "0x" + "f" * 5000 + "]"])
def test_deep_and_huge_values_are_a_reason(value):
    for one in (value, {"messages": value}, {"question": value, "answer": ""}):
        assert all(isinstance(d, Dropped) for d in dialogues(one))
    deep = 1
    for _ in range(900):
        deep = {"data": [deep]}
    assert all(isinstance(d, Dropped) for d in dialogues(deep))


def test_the_loss_covers_the_calls_of_tools_and_not_their_results():
    tok = train_bytebpe([Q + A], 300)
    (dialogue,) = dialogues(FORMS["openai tools"][0])
    ids = np.array(tok.encode_chat(dialogue))
    assert tok.decode(ids[tok.loss_mask(ids)]) == f"{CALL}<|im_end|>{A}<|im_end|>"
    assert "<|im_start|>tool\n武汉<|im_end|>" in tok.decode(ids)
    assert clean_document(dialogue, Rules()) == (dialogue, "", Counter())


def test_messages_in_lines_are_one_dialogue_and_bad_lines_are_lost():
    lines = [*chat(*TURNS), {"parent_id": None, **chat(PAIR[0])[0]}, {"role": "robot7",
        "content": Q}]
    data = io.BytesIO("\n".join([*map(json.dumps, lines), "{"]).encode())
    found = dict(read_chat("a.jsonl", io.BufferedReader(data)))
    assert [(m["role"], m["content"]) for m in found.pop("a.jsonl:1")] == TURNS
    assert [lost.reason for lost in found.values()] == ["no answer", "unknown role", "not JSON"]
    assert found["a.jsonl:6"].details == "unknown role; roles: robot7"


def test_prepare_takes_the_chosen_answer_on_request(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = dict(CHOSEN["dpo"], prompt=Q2)
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(CHOSEN['dpo'])}\n{json.dumps(other)}", "utf-8")
    words = ["chat", "a.jsonl", f"--tokenizer={demo / 'data' / 'demo'}", "--name=x"]
    with pytest.raises(UserError, match="2 preference pair .see --chosen"):
        prepare.main(words)
    prepare.main([*words, "--chosen=True", "--val_fraction=0"])
    assert Bins("x").meta["settings"]["chosen"] is True

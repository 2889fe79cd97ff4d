"""Laws of .gguf files: llama.cpp encodes texts and computes logits as we do with the folder."""
import json
import subprocess
import sys
import unicodedata
import urllib.request

import pytest
import torch
from conftest import ENV, ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from common.command_line import UserError
from gpt import GPT, GPTConfig
from models import to_gguf
from models.folders import load_model
from models.hf import save_model
from models.to_gguf import write_gguf
from tokens.tokenizer_files import load_tokenizer

pytest.importorskip("gguf")
llama = pytest.importorskip("xllamacpp")
torch.set_num_threads(1)

TEXTS = ["数学是研究数量的科学。", "GPT-2 有1.5亿个参数，I'LL say: don't!",
         "  两格\t制表\r\n换行\n\n\n三行  ", "３．１４ ①②③ 二〇二六年",
         "<|endoftext|><|im_start|>user\n你好<|im_end|>", "👩‍👩‍👧‍👦🇨🇳𠮷野家 𪚥",
         "\u3000全角\u00a0\u200b零宽\ufeff\u0085\u2028", "\x00\x01\x7f", "!!!\n\n??\r\r ...",
         "e\u0301 ﬁ \u0301", " " * 50 + "啊" * 300, "한국어 ひらがな नमस्ते ا ل ع",
         "'ſ it'S we'RE ＡＢ'ｓ", "\ue000\U0010ffff", ""]
SHAPES = {"gpt2": dict(arch="gpt2", n_head=4, n_inner=96),
          "gpt2 without biases": dict(arch="gpt2", n_head=4, bias=False),
          "qwen3": dict(arch="qwen3", n_head=4, n_kv_head=2, head_dim=32, rope_theta=1e6),
          "qwen3 with its own head": dict(arch="qwen3", n_head=2, tie=False, norm_eps=1e-6),
          "qwen2": dict(arch="qwen3", qkv_bias=True, qk_norm=False, n_head=4, n_kv_head=2,
                        rope_theta=1e6),
          "llama": dict(arch="qwen3", qk_norm=False, n_head=4, n_kv_head=2, head_dim=32),
          "llama with its own head": dict(arch="qwen3", qk_norm=False, n_head=2, tie=False)}


class Llama:
    """llama.cpp's server with a file loaded; float32 cache, no flash attention: exact."""

    def __init__(self, file):
        p = llama.CommonParams()
        p.model.path, p.n_ctx, p.n_gpu_layers = str(file), 0, 0
        p.warmup, p.fit_params, p.verbosity = False, False, -1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        p.cache_type_k = p.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = llama.Server(p)

    def ask(self, path, **body):
        open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        return json.load(open_url(urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(body).encode(),
            {"Content-Type": "application/json"}), timeout=60))

    def encode(self, text, **how):
        return self.ask("tokenize", content=text, **dict(parse_special=False) | how)["tokens"]

    def greedy(self, ids, n):
        return self.ask("completion", prompt=ids, n_predict=n, temperature=0, repeat_penalty=1.0,
                        return_tokens=True)["tokens"]

    def logprobs(self, ids, vocab_size, letter):
        """Return the log-probabilities (vocab_size,) of the token after ids.

        The server reports them only for a token that completes a character, so a bias makes it
        sample letter.
        """
        got = self.ask("completion", prompt=ids, n_predict=1, n_probs=vocab_size, temperature=0,
                       repeat_penalty=1.0, logit_bias=[[letter, 1000]])
        logprobs = torch.full((vocab_size,), torch.nan)
        for t in got["completion_probabilities"][0]["top_logprobs"]:
            logprobs[t["id"]] = t["logprob"]
        return logprobs


def random_folder(place, tok, kind="base", **shape):
    """Write a model folder as a run does, with weights to which every part contributes."""
    torch.manual_seed(3)
    config = GPTConfig(vocab_size=tok.vocab_size, block_size=64,
                       padded_vocab_size=-(-tok.vocab_size // 128) * 128,
                       **dict(n_layer=2, n_embd=64) | shape)
    model = GPT(config)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1 and name.endswith("weight")),
                              std=0.3 if p.dim() == 1 else p.size(1) ** -0.5)
    save_model(place / "best", model, model.state_dict(), tok, kind, {})
    return place / "best"


@pytest.fixture(scope="module")
def own(base):
    return load_tokenizer(base / "out/tiny/best")


@pytest.fixture(scope="module")
def chat(own, tmp_path_factory):
    """Return llama.cpp with a chat model."""
    place = tmp_path_factory.mktemp("chat")
    write_gguf(random_folder(place, own, "chat", arch="qwen3", n_head=1), place / "x.gguf")
    return Llama(place / "x.gguf")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float16", 3e-2)])
def test_llama_cpp_computes_what_we_compute(shape, dtype, tolerance, own, tmp_path):
    folder, file = random_folder(tmp_path, own, **SHAPES[shape]), tmp_path / "x.gguf"
    write_gguf(folder, file, dtype)
    model, server = load_model(folder.as_posix())[0].eval(), Llama(file)
    ids = torch.randint(own.vocab_size, (50,)).tolist()
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0, :, :own.vocab_size].log_softmax(-1)
    if "gpt2" in shape:
        tolerance = max(tolerance, 5e-3)  # ggml looks GELU up in a table of 16-bit numbers
    for n in (1, 2, 7, 20, 49, 50):
        theirs = server.logprobs(ids[:n], own.vocab_size, own.encode("a")[0])
        torch.testing.assert_close(theirs, ours[n - 1], rtol=0, atol=tolerance)
    if dtype == "float32":
        stops = (own.eot, own.im_end)
        new = model.generate(torch.tensor([ids[:9]]), 30, temperature=0, stop_ids=stops)
        assert server.greedy(ids[:9], 30) == [int(i) for i in new]


def test_a_converted_run_begins_texts_as_sample_py_does(base, own, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "models.to_gguf", base / "out/tiny/best", tmp_path / "x.gguf"],
        cwd=ROOT, env=ENV, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and "MB" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    server = Llama(tmp_path / "x.gguf")
    assert server.encode("数学", add_special=True) == [own.eot, *own.encode("数学")]
    props = server.ask("completion", prompt="数学", n_predict=1)["generation_settings"]
    assert [props[k] for k in ("top_k", "repeat_last_n")] == [50, -1]
    assert [props[k] for k in ("temperature", "top_p", "repeat_penalty")] == pytest.approx(
        [0.7, 0.9, 1.2])


def test_llama_cpp_encodes_text_as_we_do(chat, own):
    for text in TEXTS:
        assert chat.encode(text) == own.encode(text), text
    assert chat.encode("数学", add_special=True) == own.encode("数学")


def test_llama_cpp_encodes_any_text_as_we_do(chat, own):
    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def law(text):
        assert chat.encode(text) == own.encode(text)
    law()


def test_llama_cpp_formats_a_dialogue_as_we_do(chat, own):
    messages = [dict(role="system", content="你是小语。"), dict(role="user", content=" 你好\n\n"),
                dict(role="assistant", content="I'm fine.\n真的"), dict(role="user", content="")]
    prompt = chat.ask("apply-template", messages=messages)["prompt"]
    assert chat.encode(prompt, parse_special=True, add_special=True) == (
        own.encode_chat(messages) + own.role_header("assistant"))
    for end in (own.im_end, own.eot):
        got = chat.ask("completion", prompt="数学", n_predict=9, logit_bias=[[end, 1000]])
        assert got["stop_type"] == "eos" and got["tokens_predicted"] == 1


def test_llama_cpp_knows_qwens_own_tokenizer(tmp_path):
    if not (SHARED / "tokenizers").is_dir():
        pytest.skip("no ../shared/tokenizers")
    tok = load_tokenizer(SHARED / "tokenizers/qwen2_5")
    folder = random_folder(tmp_path, tok, arch="qwen3", n_head=1, n_embd=8, n_layer=1)
    write_gguf(folder, tmp_path / "x.gguf")
    server = Llama(tmp_path / "x.gguf")
    for text in (unicodedata.normalize("NFC", text) for text in TEXTS):
        assert server.encode(text) == tok.encode(text), text


def test_errors_are_one_line_and_leave_no_file(own, tmp_path, monkeypatch):
    def fails(words, *messages):
        monkeypatch.setattr(sys, "argv", ["to_gguf.py", *map(str, words)])
        with pytest.raises((UserError, OSError), match=".*".join(messages)):
            to_gguf.main()
    file, shape = tmp_path / "x.gguf", dict(arch="gpt2", n_head=1)
    fails(["a"], "name a model and a file")
    fails([tmp_path / "none", file], "no such folder")
    fails([tmp_path / "x.pt", file], "is a checkpoint")
    folder = random_folder(tmp_path, own, activation="gelu", **shape)
    fails([folder, file], "tanh")
    folder = random_folder(tmp_path, own, **SHAPES["qwen2"], head_dim=32)
    fails([folder, file], "Qwen2's shape only with head_dim")
    (folder / "config.json").write_text('{"model_type": "opt"}', encoding="utf-8")
    fails([folder, file], "'opt'")
    folder = random_folder(tmp_path, own, **shape)
    fails([folder, file, "--dtype=int3"], "int3", "float16")
    fails([folder, tmp_path / "none/x.gguf"], "No such file")
    fails([folder, folder], "best")
    (folder / "generation_config.json").write_text("[]", encoding="utf-8")
    fails([folder, file], "generation_config.json")
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails([folder, file], "pip install gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["best"]

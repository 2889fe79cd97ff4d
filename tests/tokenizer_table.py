"""Measure tokenizers, for the table in the documentation: python tests/tokenizer_table.py

Own tokenizers of three sizes, trained by prepare.py on ../shared/corpora/zh_60mb, and Qwen's, on
the held-out text beside it: characters per token, and the cost of the vocabulary in a model of
width 768 with 12 layers.
"""
import json
import lzma
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
N_EMBD, N_LAYER, ROWS = 768, 12, 8 * 256
sys.path.insert(0, str(ROOT))


def main():
    import prepare
    from corpus.clean import Rules, clean_document
    from tokens.tokenizer_files import load_tokenizer
    with lzma.open(SHARED / "corpora" / "zh_val.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = [clean_document(json.loads(line)["text"], Rules())[0] for line in lines]
    chars, body = sum(map(len, texts)), 12 * N_LAYER * N_EMBD**2
    print("| vocabulary | characters per token | embedding, M | logits of 8 x 256, MB | "
          "MFLOPs per character |\n|---|---|---|---|---|")
    os.chdir(tempfile.mkdtemp())
    for size in (6400, 16384, 32768, 0):
        if size:
            prepare.main(["tokenizer", str(SHARED / "corpora" / "zh_60mb.jsonl.xz"),
                          f"--name=t{size}", f"--vocab_size={size}"])
        tok = load_tokenizer(f"data/t{size}" if size else str(SHARED / "tokenizers" / "qwen2_5"))
        per_token = chars / sum(len(tok.encode(text)) for text in texts)
        rows = -(-tok.vocab_size // 128) * 128
        flops = 6 * (body + rows * N_EMBD) / per_token  # forward and backward, with the head
        print(f"| {tok.vocab_size:,}{'' if size else ' (Qwen)'} | {per_token:.3f} | "
              f"{rows * N_EMBD / 1e6:.1f} | {ROWS * rows * 4 / 1e6:.0f} | {flops / 1e6:.0f} |",
              flush=True)


if __name__ == "__main__":
    main()

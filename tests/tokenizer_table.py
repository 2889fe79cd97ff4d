"""The README's table of vocabularies: python tests/tokenizer_table.py

Own tokenizers of three sizes, trained on ../shared/corpora/zh_60mb by prepare.py, and Qwen's, on
the held-out text beside it: characters per token, and what the vocabulary costs at 768 wide, 12
layers.
"""
import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
N_EMBD, N_LAYER, ROWS = 768, 12, 8 * 256
sys.path.insert(0, str(ROOT))


def main():
    from data.clean import Rules, clean_document
    from data.tokenizer import load_tokenizer
    with lzma.open(SHARED / "corpora" / "zh_val.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = [clean_document(json.loads(line)["text"], Rules())[0] for line in lines]
    chars, body = sum(map(len, texts)), 12 * N_LAYER * N_EMBD**2
    print("| vocabulary | characters per token | embedding, M | logits of 8 x 256, MB | "
          "MFLOPs per character |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for size in (6400, 16384, 32768, 0):
            path = SHARED / "tokenizers" / "qwen2_5"
            if size:
                subprocess.run([sys.executable, str(ROOT / "prepare.py"), "tokenizer",
                                str(SHARED / "corpora" / "zh_60mb.jsonl.xz"), f"--name=t{size}",
                                f"--vocab_size={size}"], cwd=folder, check=True,
                               stdout=subprocess.DEVNULL)
                path = Path(folder) / "data" / f"t{size}"
            tok = load_tokenizer(str(path))
            per_token = chars / sum(len(tok.encode(text)) for text in texts)
            rows = -(-tok.n_ids // 128) * 128
            flops = 6 * (body + rows * N_EMBD) / per_token  # forward and backward, head included
            cells = (f"{size or tok.n_ids:,}{'' if size else ' (Qwen)'}", f"{per_token:.3f}",
                     f"{rows * N_EMBD / 1e6:.1f}", f"{ROWS * rows * 4 / 1e6:.0f}",
                     f"{flops / 1e6:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

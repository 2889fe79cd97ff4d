"""Peak memory of one training step at 151,680 words, 12/12/768, 8 x 256, ours beside nanoGPT's.

    python tests/peak_memory.py                    # ours
    python tests/peak_memory.py PATH_TO_NANOGPT    # both, each in a process of its own

Both in float32, since nanoGPT computes nothing else on a CPU; `ours bfloat16` as words measures
ours in that, which takes minutes where the CPU has no bfloat16 instructions.
"""
import resource
import subprocess
import sys
from pathlib import Path

SHAPE = dict(vocab_size=151_680, block_size=256, n_layer=12, n_head=12, n_embd=768, bias=True)


def measure(which, path_or_dtype):
    import torch
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = torch.randint(SHAPE["vocab_size"], (8, 257))
    if which == "nanoGPT":
        sys.path.insert(0, path_or_dtype)
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(**SHAPE))
        optimizers = [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")]
    else:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from gpt import GPT, GPTConfig
        model = GPT(GPTConfig(**SHAPE))
        optimizers = model.configure_optimizers("adamw", 6e-4, 0, 0.1, (0.9, 0.95))
    for _ in range(2):  # the second step holds the optimizer's state from its beginning
        with torch.autocast("cpu", torch.bfloat16, enabled=path_or_dtype == "bfloat16"):
            out = model(ids[:, :-1], ids[:, 1:].contiguous())
        loss = out[1] if which == "nanoGPT" else out[0] / out[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{which}: loss {loss.item():.4f}, peak {peak / 2**20:.2f} GiB, of these "
          f"{(peak - base) / 2**20:.2f} GiB by the step")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(*sys.argv[1:])
    else:
        for words in [("ours", "float32"), *(("nanoGPT", path) for path in sys.argv[1:])]:
            subprocess.run([sys.executable, __file__, *words], check=True)

"""Tables of memory and time, computed and not measured, for docs/train.md.

    python -m training.tables
"""
from types import SimpleNamespace

import torch

from common.command_line import run_main
from common.device import PEAK_FLOPS
from gpt import GPT, GPTConfig
from training.context import Context
from training.estimate import GIB, memory_plan, suitable_settings
from training.lora import add_adapters

HUB = {  # shapes of models of the hub, 151,936 ids each
    "Qwen3-0.6B": dict(n_layer=28, n_head=16, n_kv_head=8, head_dim=128, n_embd=1024, n_inner=3072),
    "Qwen2.5-0.5B": dict(n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_inner=4864,
                         qkv_bias=True, qk_norm=False),
    "Qwen2.5-1.5B": dict(n_layer=28, n_head=12, n_kv_head=2, n_embd=1536, n_inner=8960,
                         qkv_bias=True, qk_norm=False)}
XIAOYU = dict(arch="qwen3", n_layer=6, n_head=4, n_kv_head=2, n_embd=256, n_inner=704,
              vocab_size=8192, block_size=512)  # data/xiaoyu
# FLOP/s: of two CPU cores as measured in float32, of cards the peak (bfloat16, sums in float32)
DEVICES = {"two CPU cores": 1e11, "8 GB (RTX 4060)": 30e12, "12 GB (RTX 3060)": 25e12,
           "24 GB (RTX 4090)": PEAK_FLOPS["4090"]}


def own_text_table(mfu=0.3):
    """Print what suitable_settings chooses for a size of text, and the hours it takes: on a card at
    an assumed MFU. A token is 1.3 characters for xiaoyu's tokenizer and 1.5 for Qwen's."""
    print("| characters | model | tokens read | steps | GiB | hours: "
          + " | ".join(DEVICES) + " |\n" + "|---" * (5 + len(DEVICES)) + "|")
    for characters in (30_000, 300_000, 3_000_000, 15_000_000, 100_000_000, 1_000_000_000):
        base = GPTConfig(**XIAOYU) if characters <= 15_000_000 else None  # 50 MB
        tokens = round(characters / (1.3 if base else 1.5))
        found, name = suitable_settings("base", tokens, base)
        shape = XIAOYU if base else dict(vocab_size=151_680, block_size=found["block_size"], **{
            key: found[key] for key in ("arch", "n_layer", "n_head", "n_embd")})
        with torch.device("meta"):
            model = GPT(GPTConfig(**shape))
        cfg, T = SimpleNamespace(**found), found["block_size"]
        read = found["max_iters"] * cfg.batch_size * cfg.gradient_accumulation_steps * T
        ctx = Context(torch.device("cuda"), torch.bfloat16)
        gib = sum(memory_plan(model, cfg, ctx, T).values()) / GIB
        hours = [model.flops_per_token(T) * read / (flops * (1 if "CPU" in device else mfu)) / 3600
                 for device, flops in DEVICES.items()]
        print(f"| {characters:,} | {'xiaoyu' if base else name} | {read / 1e6:,.1f}M | "
              f"{cfg.max_iters:,} | {gib:.1f} | " + " | ".join(f"{h:,.2f}" for h in hours) + " |")


def pretraining_table(tokens=(10e9, 100e9), mfu=0.4):
    """Print the table for GPT-2's shapes, 50,304 tokens, context 1,024, bfloat16, assumed MFU."""
    print("| model | GPUs | micro-batch | GiB a GPU | with --fsdp | "
          + " | ".join(f"days for {t / 1e9:.0f}B" for t in tokens) + " |")
    print("|---" * (5 + len(tokens)) + "|")
    for name, n_layer, n_head, n_embd, rows in (
            ("124M", 12, 12, 768, 32), ("350M", 24, 16, 1024, 32), ("1.5B", 48, 25, 1600, 16)):
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size=50_304, block_size=1024, n_layer=n_layer,
                                  n_head=n_head, n_embd=n_embd))
        cfg = SimpleNamespace(batch_size=rows, optimizer="adamw")
        for world in (1, 8, 64):
            gib = []
            for fsdp in (False, True):
                ctx = Context(torch.device("cuda"), torch.bfloat16, fsdp)
                ctx.world_size = world
                gib.append(sum(memory_plan(model, cfg, ctx, 1024).values()) / GIB)
            seconds = [model.flops_per_token(1024) * t / (world * PEAK_FLOPS["H200"] * mfu)
                       for t in tokens]
            print(f"| {name} | {world} | {rows} | {gib[0]:.1f} | "
                  f"{f'{gib[1]:.1f}' if world > 1 else ''} | "
                  + " | ".join(f"{s / 86400:.2f}" for s in seconds) + " |")


def finetuning_table(cards=(8, 12, 24)):
    """Print GiB for one row of 1,024 tokens in bfloat16 with AdamW, and the smallest of cards (in
    GB) that holds it and 1 GiB more, for CUDA itself."""
    print("| model | all weights | and --recompute | --lora_rank=16 | and --recompute |\n"
          + "|---" * 5 + "|")
    cfg = SimpleNamespace(batch_size=1, block_size=1024, optimizer="adamw")
    ctx = Context(torch.device("cuda"), torch.bfloat16)
    for name, shape in HUB.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(arch="qwen3", vocab_size=151_936, block_size=1024, **shape))
        cells = [name]
        for rank in (0, 16):
            if rank:
                tok = SimpleNamespace(im_start=0, im_end=1, vocab_size=151_936)
                add_adapters(model, rank, tok, name)
                ctx.store_frozen(model)
            for model.recompute in (False, True):
                gib = sum(memory_plan(model, cfg, ctx, 1024, packed=True).values()) / GIB
                card = next((f"{size} GB" for size in cards if gib <= size - 1), "more")
                cells.append(f"{gib:.1f} ({card})")
        print(f"| {' | '.join(cells)} |")


def main():
    """Print the tables."""
    for table in (own_text_table, pretraining_table, finetuning_table):
        table()
        print()


if __name__ == "__main__":
    run_main(main, __file__)

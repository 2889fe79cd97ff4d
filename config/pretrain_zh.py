"""A base model on the wiki set (python prepare.py wiki).

GPT-2 small's layers; with Qwen's vocabulary 202M parameters.
"""
out_dir = "out/pretrain_zh"
dataset = "wiki"
arch = "gpt2"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 256
batch_size = 8
gradient_accumulation_steps = 32  # 8 * 32 * 256 = 65,536 tokens a step
optimizer = "adamw"
learning_rate = 6e-4              # at 192 wide 2e-3 was best of 1, 2, 3, 6e-3; less as width grows
min_lr = 6e-5
warmup_iters = 200
max_iters = 10_000                # 655M tokens, about five epochs; lower it for fewer
weight_decay = 0.1

"""The base model of config/pretrain_zh.py made a chat model (python prepare.py chat PATH)."""
out_dir = "out/sft_zh"
dataset = "chat"
batch_size = 8
gradient_accumulation_steps = 4   # 8 * 4 * 256 = 8,192 tokens a step
learning_rate = 5e-5
min_lr = 5e-6
warmup_iters = 50
max_iters = 2000
weight_decay = 0.1

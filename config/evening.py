"""The demo's text for an evening: a wider and deeper model reads it longer. Then
config/evening_sft.py.
"""
out_dir = "out/evening"
dataset = "demo"
arch = "qwen3"
n_layer = 6
n_head = 3
n_kv_head = 1
n_embd = 192
n_inner = 512
batch_size = 8
gradient_accumulation_steps = 1  # 8 * 256 = 2,048 tokens a step
dropout = 0.15           # the text is read seven times
optimizer = "muon"
learning_rate = 0.025
muon_lr = 4e-3
min_lr = 1e-4
warmup_iters = 20
max_iters = 1500
weight_decay = 0.2
grad_clip = 0.0
log_interval = 25
eval_interval = 125
eval_tokens = 0
checkpoint_interval = 125
sample_start = "数学是|长江|春节|计算机"

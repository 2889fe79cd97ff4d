"""The base model of 小语, first phase: open text and a quarter of textbook, at a constant rate.

docs/xiaoyu.md says what the sets hold and gives all commands.
"""
out_dir = "out/xiaoyu"
dataset = "zh_rest:0.6,zh_tech:0.12,book:0.28"
block_size = 512
batch_size = 8
gradient_accumulation_steps = 1  # 8 * 512 = 4,096 tokens a step
arch = "qwen3"
n_layer = 6
n_head = 4
n_kv_head = 2
n_embd = 256
n_inner = 704
optimizer = "muon"
learning_rate = 0.008
muon_lr = 3e-3
min_lr = 0.008           # constant: the second phase lets it fall
warmup_iters = 60
max_iters = 2286
log_interval = 20
eval_interval = 200
eval_tokens = 65_536
checkpoint_interval = 100
sample_start = "数学是|长江|春天来了|从前"

"""The five-minute demo: embedded text, own tokenizer, a small modern model, CPU."""
out_dir = "out/demo"
dataset = "demo"
arch = "qwen3"
n_layer = 4
n_head = 2
n_kv_head = 1
n_embd = 128             # 256 learns no more from so little text, and takes twice as long
n_inner = 384
batch_size = 4
gradient_accumulation_steps = 1  # 4 * 256 = 1,024 tokens a step
dropout = 0.15           # 0.1 over-fits within ten epochs
optimizer = "muon"
learning_rate = 0.02     # embedding and norms: 0.003 lags far behind
muon_lr = 3e-3
min_lr = 1e-4
warmup_iters = 30
max_iters = 1050         # seven epochs
weight_decay = 0.3
grad_clip = 0.0
log_interval = 25
eval_interval = 150
eval_tokens = 0
checkpoint_interval = 150
sample_start = "数学是|长江|春节|计算机"

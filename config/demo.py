"""The five-minute demo: embedded text, own tokenizer, a small modern model, CPU."""
out_dir = "out/demo"
dataset = "demo:0.5,demo_chat:0.5"  # with the dialogues already here, fine-tuning is shorter
arch = "qwen3"
n_layer = 4
n_head = 2
n_kv_head = 1
n_embd = 128
n_inner = 384
batch_size = 8
gradient_accumulation_steps = 1  # 8 * 256 = 2,048 tokens a step
optimizer = "muon"
learning_rate = 0.025    # embedding and norms: 0.003 lags far behind
muon_lr = 4e-3
min_lr = 1e-4
warmup_iters = 20
max_iters = 1100         # two and a half epochs of the texts, seven of the dialogues
grad_clip = 0.0
log_interval = 25
eval_interval = 110
eval_tokens = 0
checkpoint_interval = 110
sample_start = "数学是|长江|春节|计算机"

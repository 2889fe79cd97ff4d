"""The second half of config/evening.py: fine-tune its model on the embedded dialogues."""
out_dir = "out/evening_sft"
init_from = "out/evening/best"
dataset = "demo_chat"
batch_size = 8
gradient_accumulation_steps = 1
dropout = 0.1
optimizer = "muon"
learning_rate = 0.01
muon_lr = 3e-3
min_lr = 5e-5
warmup_iters = 10
max_iters = 780          # ten epochs
grad_clip = 0.0
log_interval = 20
eval_interval = 780
checkpoint_interval = 195

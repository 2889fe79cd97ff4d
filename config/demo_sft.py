"""The demo's second half: the embedded dialogues make the demo's base model a chat model."""
out_dir = "out/demo_sft"
dataset = "demo_chat"
batch_size = 8
gradient_accumulation_steps = 1
dropout = 0.1
optimizer = "muon"
learning_rate = 1e-3
muon_lr = 2e-3
min_lr = 1e-4
warmup_iters = 10
max_iters = 100
weight_decay = 0.3
eval_interval = 25
checkpoint_interval = 50

"""The second half of the demo: fine-tune the demo's base model on the embedded dialogues.

The model memorises so few dialogues: with pretrain.py's default dropout of 0 the loss falls below
0.1; with 0.15 it stays at 2.0, and sentences are broken. The val loss is lowest before the model
writes whole sentences, so it is evaluated only at the start and at the end: use final/, not best/.
"""
out_dir = "out/demo_sft"
dataset = "demo_chat"
batch_size = 4
gradient_accumulation_steps = 1  # 4 * 256 = 1,024 tokens a step
optimizer = "muon"
learning_rate = 0.01
muon_lr = 3e-3
min_lr = 5e-5
warmup_iters = 10
max_iters = 520          # seven and a half epochs
weight_decay = 0.3
grad_clip = 0.0
log_interval = 20
eval_interval = 520
checkpoint_interval = 130

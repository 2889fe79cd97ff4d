"""The demo's second half: the embedded dialogues make the demo's base model a chat model.

So few dialogues are learnt by heart: a dropout of 0.15 stops at a loss of 2.0 and at broken
sentences, 0 (pretrain.py's default) below 0.1. The lowest val loss comes before the first whole
sentence, so this run is evaluated at its ends only and final/ is what talks.
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

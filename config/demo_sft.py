"""The second half of the demo: fine-tune the demo's base model on the embedded dialogues.

Dialogues have to be read many times before whole sentences come back, while the val loss only
rises: this run is evaluated at its ends only, and final/ is what talks.
"""
out_dir = "out/demo_sft"
dataset = "demo_chat"
batch_size = 8
gradient_accumulation_steps = 1  # 8 * 256 = 2,048 tokens a step
multi_turn = 0.6
optimizer = "muon"
learning_rate = 0.014
muon_lr = 4.2e-3
min_lr = 5e-5
warmup_iters = 10
max_iters = 640          # eight epochs, after seven in pretraining
grad_clip = 0.0
log_interval = 20
eval_interval = 640
checkpoint_interval = 160

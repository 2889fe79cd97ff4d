"""小语's chat model: fine-tune its base model on the textbook's dialogues and more questions."""
out_dir = "out/xiaoyu_sft"
init_from = "out/xiaoyu_textbook/final"
dataset = "xiaoyu_chat"
batch_size = 4
gradient_accumulation_steps = 1  # 4 * 512 = 2,048 tokens a step
multi_turn = 0.6
dropout = 0.1
optimizer = "muon"
learning_rate = 0.004
muon_lr = 1.5e-3
min_lr = 0.0
warmup_iters = 20
max_iters = 600          # three epochs
log_interval = 20
eval_interval = 600      # at the ends only: the val loss rises
checkpoint_interval = 100

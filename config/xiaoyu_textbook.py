"""The base model of 小语, second phase: mostly textbook, while the rate falls to zero."""
out_dir = "out/xiaoyu_textbook"
init_from = "out/xiaoyu/final"
dataset = "book:0.35,xiaoyu_chat:0.45,zh_rest:0.15,zh_tech:0.05"
block_size = 512
batch_size = 8
gradient_accumulation_steps = 1
optimizer = "muon"
learning_rate = 0.008
muon_lr = 3e-3
min_lr = 0.0
warmup_iters = 20        # the optimizer starts without its averages
max_iters = 1000
log_interval = 20
eval_interval = 100
eval_tokens = 65_536
checkpoint_interval = 100
sample_start = "数学是|长江|春天来了|从前"

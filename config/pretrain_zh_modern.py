"""The depth and width of config/pretrain_zh.py with Qwen3's architecture, Muon and own tokenizer.

    python prepare.py wiki --tokenizer=bytebpe --vocab_size=16384 --name=wiki_16k
    python pretrain.py config/pretrain_zh_modern.py

At 192 wide it reached GPT-2 with AdamW's loss on a fifth of the tokens (LOG.md). Every other
setting is pretrain.py's default.
"""
out_dir = "out/pretrain_zh_modern"
dataset = "wiki_16k"
arch = "qwen3"
n_kv_head = 4         # a third of the cache when sampling
optimizer = "muon"
learning_rate = 5e-3  # embedding and norms: 2e-2 at 192 wide, less as width grows
muon_lr = 3e-3        # 3e-3, 6e-3, 1e-2 reached 6.75, 6.82, 6.97 at 192 wide

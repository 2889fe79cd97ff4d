"""The base model of config/pretrain_zh.py made a chat model (python prepare.py chat PATH).

Every other setting is sft.py's default: 2,000 steps of 8 * 4 * 256 = 8,192 tokens.
"""
out_dir = "out/sft_zh"

"""A base model on the wiki set (python prepare.py wiki).

GPT-2 small's layers; with Qwen's vocabulary 202M parameters. Every other setting is pretrain.py's
default: 10,000 steps of 65,536 tokens are 655M tokens, about five epochs. The learning rate: at 192
wide 2e-3 was the best of 1, 2, 3 and 6e-3; less as width grows.
"""
out_dir = "out/pretrain_zh"

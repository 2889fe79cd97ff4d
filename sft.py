"""Fine-tune a base model on dialogues, with pretrain.py's loop; the loss covers the answers only.

    python sft.py config/demo_sft.py          # after pretrain.py config/demo.py
    python sft.py config/sft_zh.py --init_from=out/pretrain_zh/best

The same command resumes from the newest checkpoint. pretrain.py's settings can be set too, except
the shape of the model, which comes from the base model.
"""
# ---- run ----
out_dir = "out/sft"
init_from = "auto"       # auto: resume out_dir, else start from the newest base model under out/,
#                          else xiaoyu; or xiaoyu, a folder or a hub id
# ---- data ----
dataset = "chat"         # folder under data/, written by prepare.py chat
batch_size = 8           # rows of packed dialogues per micro-batch and per process
gradient_accumulation_steps = 4
multi_turn = 0.5         # share of the rows whose dialogues are joined to one conversation, so that
#                          a model answers after a change of subject, too; 0 = none, 1 = every row
# ---- optimizer ----
learning_rate = 5e-5     # 10 times below pretraining, to limit forgetting
warmup_iters = 50
max_iters = 2000
# ---- watching ----
eval_interval = 100
checkpoint_interval = 100
sample_start = "你好|你是谁？|什么是细胞？"  # questions asked at each evaluation

import pretrain
from common.command_line import UserError, run_main
from common.settings import check_ranges, configure
from models.folders import find_model, load_base_model
from tokens.chat_batches import ChatData
from training.checkpoint import SHAPE
from training.context import end_together


def make_model(cfg, bins):
    """Load the base model that init_from names, or the newest one."""
    if cfg.init_from == "scratch":
        raise UserError("init_from=scratch: fine-tuning starts from a base model, so name one")
    path = find_model("" if cfg.init_from == "auto" else cfg.init_from, "base", "init_from")
    print(f"base model: {path}")
    return load_base_model(path, bins, cfg.dropout)


@end_together
def main():
    """Fine-tune as the command line says."""
    cfg, arguments = configure(__file__, base=pretrain.__file__, fixed=SHAPE)
    pretrain.check_settings(cfg, arguments)
    check_ranges(cfg, dict(multi_turn=(0, 1)))
    if pretrain.train(cfg, make_model, ChatData, "chat"):
        print("\nnext:  python sample.py --chat")


if __name__ == "__main__":
    run_main(main, __file__)

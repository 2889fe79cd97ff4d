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
block_size = 0           # a longer dialogue becomes windows of so many tokens; 0 = the context of
#                          the base model, which is the most
batch_size = 8           # rows of packed dialogues per micro-batch and per process
gradient_accumulation_steps = 4
multi_turn = 0.5         # share of the rows whose dialogues are joined to one conversation, so that
#                          a model answers after a change of subject, too; 0 = none, 1 = every row
# ---- optimizer ----
learning_rate = 5e-5     # 10 times below pretraining, to limit forgetting
warmup_iters = 50
max_iters = 2000
# ---- adapters ----
lora_rank = 0            # 0: train all weights; 16: freeze them and train adapters of this rank
#                          (LoRA), in a third of the memory; then learning_rate=5e-4 (docs/train.md)
# ---- watching ----
eval_interval = 100
checkpoint_interval = 100
sample_start = "你好|你是谁？|什么是细胞？"  # questions asked at each evaluation

from pathlib import Path
from types import SimpleNamespace

import pretrain
from common.command_line import UserError, run_main
from common.files import read_json
from common.settings import configure
from models.folders import find_model, load_base_model
from tokens.batches import TextData
from tokens.bins import open_sets
from tokens.chat_batches import ChatData
from training.checkpoint import SHAPE
from training.context import end_together
from training.lora import add_adapters

FIXED = tuple(name for name in SHAPE if name != "block_size")
RANGES = pretrain.RANGES | dict(block_size=(0, 2**24), multi_turn=(0, 1),
                                lora_rank=(0, 2**16))
BASE_TOKENS = 2**15  # of the base model's val set, evaluated to see what it forgets


def make_model(cfg, bins):
    """Load the base model that init_from names, or the newest one."""
    if cfg.init_from == "scratch":
        raise UserError("init_from=scratch: fine-tuning starts from a base model, so name one")
    path = find_model("" if cfg.init_from == "auto" else cfg.init_from, "base", "init_from")
    print(f"base model: {path}")
    model, cfg.base_model = load_base_model(path, bins, cfg.dropout), path
    if cfg.block_size > model.config.block_size:
        raise UserError(f"block_size={cfg.block_size} is more than {path} was made for "
                        f"({model.config.block_size})")
    if cfg.lora_rank:
        add_adapters(model, cfg.lora_rank, bins.tokenizer, path)
    return model


def make_data(bins, cfg):
    """Return the batches of dialogues; .base: those of the texts that the base model learnt."""
    data = ChatData(bins, cfg)
    data.base = base_texts(cfg, data)
    return data


def base_texts(cfg, data):
    """Return the base run's prepared texts, as TextData; None, with a message, if they are gone."""
    if not hasattr(cfg, "base_model"):  # a resumed run
        run = read_json(Path(cfg.out_dir) / "run.json")
        cfg.base_model = run.get("settings", {}).get("base_model", "")
    run = read_json(Path(cfg.base_model).parent / "run.json")
    try:
        bins = open_sets(run["settings"]["dataset"])
        if bins.tokenizer.fingerprint != data.tokenizer.fingerprint:
            raise UserError(f"{bins.folder} has another tokenizer now")
        return TextData(bins, SimpleNamespace(**vars(cfg) | dict(
            block_size=data.row_length, eval_tokens=BASE_TOKENS)))
    except (KeyError, TypeError, UserError) as e:
        why = e if isinstance(e, UserError) else "its prepared set is not known"
        print(f"no base_bpc, the bits per character of {cfg.base_model or 'the base model'} on the "
              f"texts it was trained on: {why}")


@end_together
def main():
    """Fine-tune as the command line says."""
    cfg, arguments = configure(__file__, base=pretrain.__file__, fixed=FIXED)
    pretrain.check_settings(cfg, arguments, RANGES)
    if cfg.lora_rank and (cfg.fsdp or cfg.optimizer != "adamw"):
        raise UserError("lora_rank works with optimizer=adamw and without fsdp only")
    if pretrain.train(cfg, make_model, make_data, "chat"):
        print("\nnext:  python sample.py --chat")


if __name__ == "__main__":
    run_main(main, __file__)

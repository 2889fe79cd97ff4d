"""Halve the size of a model folder: the weights become bfloat16. It is loaded like any other.

    python -m models.to_bfloat16 out/demo_sft/final data/small
"""
# ---- average ----
other = ""    # a second fine-tuning of the same base; the weights are averaged (arXiv:2203.05482)
share = 0.3   # its part in the average

import shutil
from pathlib import Path

import torch

from common.command_line import UserError, run_main
from common.files import current_folder, read_json, replace_folder, write_json
from common.settings import check_range, configure
from models.folders import is_checkpoint, load_model, model_folder
from models.hf import save_pretrained, write_errors_as_user_error


def write_bfloat16(source, target, other="", share=0.3):
    """Write the model folder source, averaged with other if that is given, with bfloat16 weights to
    target, a new folder."""
    target = Path(target)
    if is_checkpoint(source):
        raise UserError(f"{source} is a checkpoint; name best/ or final/ of its run")
    if target.exists():
        raise UserError(f"{target} exists already; name another folder")
    model, tok = load_model(source)
    if other:
        second, its_tok = load_model(other)
        if (second.config, its_tok.fingerprint) != (model.config, tok.fingerprint):
            raise UserError(f"{other} and {source} are not of the same shape and tokenizer")
        weights = second.state_dict()
        model.load_state_dict({name: torch.lerp(w, weights[name], share)
                               for name, w in model.state_dict().items()})
    source, part = current_folder(model_folder(source)), Path(f"{target}.part")
    config = read_json(source / "config.json")
    generation = read_json(source / "generation_config.json")
    kept = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    ends = config.get("eos_token_id")
    chat = tok.im_end in (ends if isinstance(ends, list) else [ends])
    shutil.rmtree(part, ignore_errors=True)
    with write_errors_as_user_error(part):
        save_pretrained(model, part, dtype=torch.bfloat16, **kept)
        tok.save(part, chat)
        write_json(part / "generation_config.json", generation)
        replace_folder(part, target)


def main():
    """Convert the model that the command line names."""
    cfg, arguments = configure(__file__, files=False)
    if len(arguments) != 2:
        raise UserError("name a model folder and a new one: "
                        "python -m models.to_bfloat16 out/demo/best data/small")
    check_range("share", cfg.share, 0, 1)
    write_bfloat16(*arguments, cfg.other, cfg.share)
    size = sum(file.stat().st_size for file in Path(arguments[1]).iterdir())
    print(f"{arguments[1]}: {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run_main(main, __file__)

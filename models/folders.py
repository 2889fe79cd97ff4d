"""Model folders and checkpoints: find the newest, load one with its tokenizer, its settings."""
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from common.command_line import UserError, first_line, is_out_of_memory
from common.files import current_folder, exists, read_json
from common.settings import check_range
from models.hf import SAMPLING, model_of_checkpoint, saved_value
from models.load import download_model, from_pretrained, shorten_context
from tokens.bins import open_sets
from tokens.tokenizer_files import load_tokenizer

SHIPPED = Path(__file__).parents[1] / "data" / "xiaoyu"  # the model that comes with the code

# The value of a setting that generation_config.json leaves out; the range of each setting.
DEFAULTS = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
RANGES = dict(temperature=(0.0, 1e3), top_k=(0, 2**31), top_p=(1e-6, 1.0), min_p=(0.0, 1.0),
              repetition_penalty=(1e-3, 1e3))


# ---- finding ----

def run_models(folder):
    """Return the model folders of a run, best/ before final/."""
    models = [current_folder(Path(folder) / name) for name in ("best", "final")]
    return [model for model in models if (model / "config.json").is_file()]


def newest_model(kind, root="out"):
    """Return the folder of the newest base or chat run's model, best/ before final/; or None.

    Print its name. A newer run that trained on less than 1 % of the tokens of the longest run of
    this kind is skipped, with a message.
    """
    runs = []
    for file in Path(root).glob("**/run.json"):
        run, models = read_json(file), run_models(file.parent)
        if models and run.get("kind") == kind:
            saved = max((m / "config.json").stat().st_mtime for m in models)
            runs.append((saved, models[0].as_posix(), tokens_of(run, models)))
    longest = max((tokens for *_, tokens in runs if not math.isnan(tokens)), default=0)
    for saved, model, tokens in sorted(runs, reverse=True):
        if tokens < longest / 100:
            show(f"passed over {model}, which trained on {tokens:,.0f} tokens, under 1 % of the "
                 f"longest {kind} run")
            continue
        facts = (("step {:,.0f}", saved_value(model, "step")), ("saved {} ago", age(saved)),
                 ("val loss {:.3f}", saved_value(model, "val_loss")))
        known = ", ".join(text.format(value) for text, value in facts if value is not None)
        show(f"newest {kind} model: {model} ({known})")
        return Path(model)
    return None


def tokens_of(run, models):
    """Return the tokens that a run's latest model trained on; nan if older files do not tell."""
    try:
        settings = run["settings"]
        rows = settings["batch_size"] * settings["gradient_accumulation_steps"]
        tokens = rows * run.get("row_length", settings["block_size"])  # of a step
        return tokens * max(saved_value(model, "step") for model in models)
    except (KeyError, TypeError):
        return math.nan


def age(moment):
    """Return the time since a moment, as "5 minutes"."""
    seconds = max(0, time.time() - moment)
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1)):
        if seconds >= 2 * size or unit == "seconds":
            return f"{seconds / size:.0f} {unit}"


def show(line):
    """Print a line to stderr, once of several processes: stdout is for generated text."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def find_model(name, kind, setting="model"):
    """Return name (a folder, checkpoint or hub id) if given, else the newest base or chat model, or
    where there is none the one that comes with the code, which "xiaoyu" names.

    UserError if there is none at all; it advises to name one with --setting.
    """
    if name == "xiaoyu" and not exists(name):
        return shown_path(SHIPPED / kind)
    own = name or newest_model(kind)
    if not own and (SHIPPED / kind / "config.json").is_file():
        own = shown_path(SHIPPED / kind)
        show(f"no {kind} run under out/ yet: taking {own}, which comes with the code")
    if not own:
        script = "sft.py config/demo_sft.py" if kind == "chat" else "pretrain.py config/demo.py"
        raise UserError(f"no {kind} model under out/ yet ({Path('out').absolute()}). Run: python "
                        f"{script}, or name one: --{setting}=FOLDER_OR_HUB_ID")
    return Path(own).as_posix()


def shown_path(path):
    """Return a path relative to the working folder, if it is on the same drive, with slashes."""
    with suppress(ValueError):
        path = os.path.relpath(path)
    return Path(path).as_posix()


def model_folder(path):
    """Return the model folder that path names; of a hub id the downloaded or cached one."""
    folder = current_folder(path)
    if folder.is_dir():
        models = run_models(folder) or sorted(folder.glob("ckpt_step_*.pt"))
        if (folder / "config.json").is_file() or not models:
            return folder
        names = " or ".join(model.as_posix() for model in models)
        raise UserError(f"{path} is a run; name its model: {names}")
    if folder.suffix in (".bin", ".pth"):
        raise UserError(f"{path} is not read, because a pickle can run code; name a folder with "
                        "config.json and .safetensors")
    if exists(folder):
        raise UserError(f"{path} is not a folder; name the folder of a model")
    if folder.name in ("best", "final") and (others := run_models(folder.parent)):
        raise UserError(f"there is no {path}, only {others[0].as_posix()}")
    name = str(path)
    own = name.startswith(("data/", "out/"))  # in another working folder
    if own or name.count("/") > 1 or "/" in name and folder.parent.is_dir() or not name:
        raise UserError(f"{folder.absolute()}: no such folder, and {path} is not a hub id like "
                        "Qwen/Qwen3-0.6B")
    return download_model(name)


# ---- loading ----

def load_model(path, dropout=0.0, block_size=0, add_chat_tokens=False):
    """Return (GPT, Tokenizer) of a model folder, a checkpoint ckpt_step_<step>.pt or a hub id;
    UserError says what is wrong with it.

    block_size > 0 shortens the context. add_chat_tokens: add rows for the control tokens of chats
    where the vocabulary lacks them; such a model can't chat otherwise, but continue texts.
    """
    try:
        if is_checkpoint(path):
            model, tok = load_checkpoint(current_folder(path), dropout)
        else:
            folder = model_folder(path)
            model, tok = from_pretrained(folder, dropout), load_tokenizer(folder)
    except (OSError, ValueError, RuntimeError, OverflowError, TypeError, KeyError) as e:
        if is_out_of_memory(e):
            raise
        hint = "" if exists(path) else (
            ". No such folder; where the hub can't be reached, set HF_ENDPOINT to a mirror")
        raise UserError(f"{path} can't be loaded: {first_line(e)}{hint}") from e
    shorten_context(model, block_size)
    rows = model.config.padded_vocab_size
    if add_chat_tokens and tok.vocab_size > rows:
        model.grow_vocab(tok.vocab_size, tok.padded_vocab_size)
    elif rows < tok.vocab_size - 2 or rows <= tok.eot:  # without the two control tokens of chats
        raise UserError(f"{path}: its tokenizer has {tok.vocab_size} ids, its model {rows} rows")
    model.config.vocab_size = min(tok.vocab_size, model.config.padded_vocab_size)
    return model, tok


def check_chat_tokens(model, tok):
    """Raise a UserError if the model has no embedding of the control tokens of chats."""
    if tok.vocab_size > model.config.padded_vocab_size:
        raise UserError("this base model has no chat tokens; sft.py makes a chat model of it")


def is_checkpoint(path):
    """Return whether path names a training checkpoint."""
    return Path(path).suffix == ".pt"


def load_checkpoint(file, dropout=0.0):
    """Return (GPT, Tokenizer) of a training checkpoint. The tokenizer is that of the models beside
    it, else that of its prepared set."""
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint.get("lora"):
            raise UserError(f"{file} holds adapters without their base; name best/ or final/ of "
                            "its run")
        model, dataset = model_of_checkpoint(checkpoint, dropout), checkpoint["cfg"]["dataset"]
    except Exception as e:  # a damaged file raises almost anything
        if is_out_of_memory(e) or isinstance(e, (PermissionError, UserError)):
            raise
        raise UserError(f"{file} is damaged or no checkpoint of pretrain.py or sft.py "
                        f"({type(e).__name__}: {first_line(e)})") from e
    models, want = run_models(file.parent), read_json(file.parent / "run.json").get("tokenizer")
    tok = load_tokenizer(models[0]) if models else open_sets(dataset).tokenizer
    if want not in (None, tok.fingerprint):
        raise UserError(f"{file} was made with another tokenizer than {dataset} has now. Prepare "
                        "the set again as it was, or name a model folder")
    return model, tok


def load_base_model(path, bins, dropout, block_size=0):
    """Return the model to start from; its tokenizer must be the one that made bins."""
    model, tok = load_model(path, dropout, block_size, add_chat_tokens=True)
    if tok.fingerprint != bins.tokenizer.fingerprint:
        made_with, has = bins.tokenizer.fingerprint[:8], tok.fingerprint[:8]
        raise UserError(f"{bins.folder} was made with another tokenizer (sha256 {made_with}) than "
                        f"{path} has ({has}). Prepare it again with --tokenizer={path}")
    return model


def read_generation_config(path):
    """Return (sampling settings, ids that end a text) of a loaded model folder or hub id.

    They are read from its generation_config.json; a missing setting has its value in DEFAULTS. A
    checkpoint has those that its run would write.
    """
    if is_checkpoint(path):
        kind = read_json(current_folder(path).parent / "run.json").get("kind")
        return DEFAULTS | SAMPLING["chat" if kind == "chat" else "base"], []
    file = current_folder(path) / "generation_config.json"
    if not file.parent.is_dir():
        from huggingface_hub import try_to_load_from_cache
        cached = try_to_load_from_cache(str(path), file.name)
        file = Path(cached) if isinstance(cached, str) else file
    try:
        own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        settings = {name: type(default)(default if own.get(name) is None else own[name])
                    for name, default in DEFAULTS.items()}
        if own.get("do_sample") is False:
            settings["temperature"] = 0.0
        eos = own.get("eos_token_id")
        eos = [int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{file} can't be read ({type(e).__name__})") from e
    for name, value in settings.items():
        check_range(name, value, *RANGES[name], f"{file}: ")
    return settings, eos

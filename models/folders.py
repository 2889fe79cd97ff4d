"""Model folders: find the newest, load one with its tokenizer, write one, its sampling settings."""
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from common.command_line import UserError
from common.files import current_folder, replace_folder, write_file
from common.settings import check_range
from models.hf import from_pretrained, save_pretrained
from tokens.tokenizer import load_tokenizer

# Small models loop, so penalise repetition; less in chats: answers repeat the question's words.
SAMPLING = {
    "base": dict(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.2),
    "chat": dict(temperature=0.5, top_k=50, top_p=0.9, repetition_penalty=1.05)}
# What generation_config.json leaves out, and the range of each setting.
DEFAULTS = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
RANGES = dict(temperature=(0.0, 1e3), top_k=(0, 2**31), top_p=(1e-6, 1.0), min_p=(0.0, 1.0),
              repetition_penalty=(1e-3, 1e3))


def read_json(file):
    """Return the object in a JSON file; {} if it can't be read."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def newest_model(kind, root="out"):
    """Return the folder of the newest base or chat run's model, best/ before final/; or None."""
    runs = []
    for file in Path(root).glob("**/run.json"):
        configs = [current_folder(file.parent / m) / "config.json" for m in ("best", "final")]
        configs = [config for config in configs if config.is_file()]
        if configs and read_json(file).get("kind") == kind:
            runs.append((max(c.stat().st_mtime for c in configs), configs[0].parent))
    return max(runs)[1] if runs else None


def find_model(name, kind, setting="model"):
    """Return name (a folder or hub id) if given, else the newest base or chat model.

    UserError: there is none; it says to name one with --setting.
    """
    path = name or newest_model(kind)
    if not path:
        script = "sft.py config/demo_sft.py" if kind == "chat" else "pretrain.py config/demo.py"
        raise UserError(f"no {kind} model under out/ yet ({Path('out').absolute()}). Run: python "
                        f"{script}, or name one: --{setting}=FOLDER_OR_HUB_ID")
    return Path(path).as_posix()


def saved_value(folder, name):
    """Return the number `name` (step, val_loss) in a model folder's config.json, or None."""
    value = read_json(current_folder(folder) / "config.json").get(name)
    return float(value) if isinstance(value, (int, float)) else None


# ---- reading ----

def load_model(path, dropout=0.0, block_size=0, add_chat_tokens=False):
    """Return (GPT, Tokenizer) of a model folder or hub id; UserError says what is wrong with it.

    add_chat_tokens: add rows for the control tokens of chats where the vocabulary lacks them.
    """
    path = str(current_folder(path)) if Path(f"{path}.replaced").is_dir() else path
    if (Path(path) / "best" / "config.json").is_file():
        raise UserError(f"{path} is a run; its models are {path}/best and {path}/final")
    if Path(path).is_file():
        raise UserError(f"{path} is a file; name the folder of a model")
    if not Path(path).exists() and (path.count("/") > 1 or Path(path).parent.is_dir()
                                    and "/" in path):
        raise UserError(f"{Path(path).absolute()}: no such folder, and {path} is not a hub id like "
                        "Qwen/Qwen3-0.6B")
    try:
        model = from_pretrained(path, dropout, block_size)
    except (OSError, ValueError, RuntimeError, OverflowError, TypeError, KeyError) as e:
        hint = "" if Path(path).exists() else (
            ". No such folder; where the hub can't be reached, set HF_ENDPOINT to a mirror")
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path} can't be loaded: {reason}{hint}") from e
    tok = load_tokenizer(path)
    rows = model.config.padded_vocab_size
    if add_chat_tokens and tok.vocab_size > rows:
        model.grow_vocab(tok.vocab_size, -(-tok.vocab_size // 128) * 128)
    elif tok.vocab_size > rows:
        raise UserError(f"{path}: its tokenizer has {tok.vocab_size} ids, its model {rows} rows")
    model.config.vocab_size = tok.vocab_size
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

    They are read from its generation_config.json; a missing setting has its value in DEFAULTS.
    """
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


# ---- writing ----

def save_model(folder, model, weights, tok, kind, values):
    """Write best/ or final/ atomically: what transformers, vLLM and sample.py load.

    weights: the full state dict. values: step and scores, kept in config.json.
    """
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    ids = dict(bos_token_id=tok.eot, pad_token_id=tok.eot,
               eos_token_id=[tok.im_end, tok.eot] if kind == "chat" else tok.eot)
    generation = ids | dict(do_sample=True) | SAMPLING[kind]
    with atomic_write(part):
        save_pretrained(model, part, weights, **ids, **values)
        tok.save(part, chat=kind == "chat")
        write_file(part / "generation_config.json", json.dumps(generation, indent=1) + "\n")
        replace_folder(part, folder)


@contextmanager
def atomic_write(part):
    """Remove the file or folder `part` if writing it fails, and report that as a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        question = "" if isinstance(e, PermissionError) else " Is the disk full?"
        raise UserError(f"{part} can't be written ({reason}).{question} The same command resumes "
                        "from the checkpoint before, where there is one") from e

"""Laws of older files: model folders and checkpoints with n_ids load as the newer ones do."""
import json

import torch
from test_scripts import back_to_the_checkpoint_before, train, weights

from gpt import GPT, GPTConfig
from models.hf import from_pretrained, save_pretrained
from training.checkpoint import checkpoint_files


def test_an_older_model_folder_loads_as_the_newer_one(tmp_path):
    model = GPT(GPTConfig(vocab_size=300, padded_vocab_size=384, block_size=16, n_layer=1,
                          n_head=1, n_embd=8))
    save_pretrained(model, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["n_ids"] = config.pop("unpadded_vocab_size")
    file.write_text(json.dumps(config), encoding="utf-8")
    old = from_pretrained(tmp_path)
    assert old.config == model.config
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in old.state_dict().items())


def test_a_run_resumes_from_an_older_checkpoint(place):
    train(place, "--out_dir=newer")
    back_to_the_checkpoint_before(place / "newer", place / "older")
    file = checkpoint_files(place / "older")[0]
    checkpoint = torch.load(file, weights_only=True)
    config = checkpoint["model_config"]
    config["n_ids"], config["vocab_size"] = config["vocab_size"], config.pop("padded_vocab_size")
    torch.save(checkpoint, file)
    assert "resuming from" in train(place, "--out_dir=older").stdout
    assert weights(place / "older") == weights(place / "newer")

"""The embedded demo set, prepared on first use."""
import subprocess
import sys
from pathlib import Path

from common.command_line import UserError
from tokens.bins import set_folder


def demo_sets(dataset):
    """Return which of the demo sets the setting `dataset` names."""
    names = {part.partition(":")[0].strip().removeprefix("data/") for part in dataset.split(",")}
    return names & {"demo", "demo_chat"}


def prepare_demo(dataset):
    """Prepare the demo sets if the setting `dataset` names one of them that is missing."""
    if all((set_folder(name) / "meta.json").is_file() for name in demo_sets(dataset)):
        return
    print("preparing the embedded text", flush=True)
    script = Path(__file__).parent.parent / "prepare.py"
    if subprocess.run([sys.executable, str(script), "demo"]).returncode:
        raise UserError("the demo set was not prepared")

"""The embedded demo set, prepared on first use."""
import subprocess
import sys
from pathlib import Path

from common.command_line import UserError
from tokens.bins import set_folder


def prepare_demo(name):
    """Prepare the demo sets if `name` is one of them and is missing."""
    if name not in ("demo", "demo_chat") or (set_folder(name) / "meta.json").is_file():
        return
    print("preparing the embedded text", flush=True)
    script = Path(__file__).parent.parent / "prepare.py"
    if subprocess.run([sys.executable, str(script), "demo"]).returncode:
        raise UserError("the demo set was not prepared")

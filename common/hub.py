"""Models and tokenizers from the Hugging Face hub or the mirror in HF_ENDPOINT, or from its cache.
(Data sets: corpus/hub.py.)"""
import os
import threading
from pathlib import Path

from common.command_line import first_line


def from_hub(download, *arguments, **more):
    """Return the Path that a download function of huggingface_hub gives. OSError says why not.

    The hub's client retries for half a minute where nothing answers; here one request asks first,
    and without an answer only the cache is used.
    """
    from huggingface_hub import logging
    logging.set_verbosity_error()  # it would print every retry
    problem = why_unreachable()
    try:
        return Path(download(*arguments, **more, local_files_only=bool(problem)))
    except Exception as e:  # the client raises errors of four libraries
        raise OSError(problem or f"{type(e).__name__}: {first_line(e)}") from e


def why_unreachable():
    """Return why the hub can't be used, "" if it answers within 4 seconds (or as many as
    HF_HUB_ETAG_TIMEOUT says)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 4)
    problems = [f"no answer from {constants.ENDPOINT} within {seconds:g} s"]

    def ask():
        try:
            get_session().head(constants.ENDPOINT, timeout=60)  # join() below ends the waiting
            problems[0] = ""  # any status is an answer
        except Exception as e:  # the client raises errors of two libraries
            problems[0] = f"{constants.ENDPOINT}: {e}"

    thread = threading.Thread(target=ask, daemon=True)  # the search for a name has no time limit
    thread.start()
    thread.join(seconds)
    return problems[0]

"""Download a file of a dataset from the Hugging Face hub, or from the mirror in HF_ENDPOINT.

hf_hub_download restarts an interrupted download from zero in a new process, so that half a gigabyte
may never arrive over a slow connection, and does not compare the content with its hash. Here
huggingface_hub gives only the address, the size and the hash.
"""
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from common.command_line import UserError, first_line
from common.files import lock, replace


def download(dataset, file, folder, advice):
    """Download a file into folder; an interrupted download is resumed by the next call.

    The file gets its name only when it is complete and, where the hub tells its sha256, verified.
    UserError, which ends with advice: it can't be downloaded, or another process is doing it.
    """
    print(f"downloading {dataset} into {folder} (resumes if interrupted)", flush=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with lock(Path(folder) / ".lock", f"{folder} is being downloaded by another process"):
        try:
            fetch(dataset, file, Path(folder))
        except Exception as e:  # the hub client raises errors of four libraries
            raise UserError(
                f"{dataset} can't be downloaded ({type(e).__name__}: {first_line(e)}) into "
                f"{folder}. Set HF_ENDPOINT to a mirror and start again; or {advice}") from e


def fetch(dataset, file, folder):
    """Download a file into folder, as download() does. Raises the errors of the hub client and
    urllib, and OSError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers
    url = hf_hub_url(dataset, file, repo_type="dataset")
    found = get_hf_file_metadata(url, timeout=20)
    if not found.size:
        raise OSError("the hub does not tell the size of the file")
    headers, etag = build_hf_headers(), found.etag or ""
    if urlsplit(found.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub only, not for its storage
    part = folder / f".{file}.{re.sub(r'[^0-9a-zA-Z]', '', etag)[:16]}.part"
    for _ in range(2):  # once more from zero if the part of an earlier start was damaged
        with open(part, "a+b") as out:
            if out.tell() > found.size:
                out.truncate(out.seek(0))
            while (start := out.tell()) < found.size:
                more = headers | {"Range": f"bytes={start}-"}
                with suppress(ConnectionError, TimeoutError):
                    append(Request(found.location, headers=more), out, found.size)
                if out.tell() <= start:  # else it broke, but some data came: resume
                    raise ConnectionError("the server sent no more data")
            out.seek(0)
            right = hashlib.file_digest(out, "sha256").hexdigest() == etag
            os.fsync(out.fileno())
        if right or not re.fullmatch("[0-9a-f]{64}", etag):  # other ETags are no sha256
            return replace(part, folder / file)
        part.unlink()
    raise OSError("what the server sends has another sha256 than it tells")


def append(request, out, size):
    """Append the response to out, up to size bytes in all."""
    with urlopen(request, timeout=30) as response:
        if response.status != 206:  # the server ignored the Range header and sends the whole file
            out.truncate(out.seek(0))
        with tqdm(total=size, initial=out.tell(), unit="B", unit_scale=True,
                  disable=None) as progress:
            while out.tell() < size and (chunk := response.read1(min(2**20, size - out.tell()))):
                out.write(chunk)
                progress.update(len(chunk))

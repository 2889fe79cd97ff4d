"""A file of a dataset on the Hugging Face hub, or on the mirror that HF_ENDPOINT names.

huggingface_hub itself begins a download anew in every process; over a slow line half a gigabyte
would never arrive. So its address and size are asked of it, and the bytes fetched here.
"""
import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

TRIES = 20  # times one call goes on after a line that broke, as long as something comes


def fetch(dataset, file, folder):
    """Download a file into folder; what came is kept, and the next call goes on from there.

    Whole or not at all under its own name. Raises what the hub client, urllib and the disk raise.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers
    url = hf_hub_url(dataset, file, repo_type="dataset")
    found = get_hf_file_metadata(url, timeout=20)
    if not found.size:
        raise OSError("the hub does not say how long the file is")
    headers = build_hf_headers()
    if urlsplit(found.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is not for the storage behind the hub
    part = Path(folder) / f".{file}.{found.etag[:16]}.part"  # another version starts anew
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as out:
        for _ in range(TRIES):
            before = out.tell()
            if before == found.size:
                break
            request = Request(found.location, headers=headers | {"Range": f"bytes={before}-"})
            try:
                copy(request, out, found.size)
            except (ConnectionError, TimeoutError):
                if out.tell() == before:
                    raise
        else:
            raise ConnectionError(f"it broke off {TRIES} times, at {out.tell():,} bytes the last")
        os.fsync(out.fileno())
    os.replace(part, Path(folder) / file)


def copy(request, out, size):
    """Append what the request brings."""
    with urlopen(request, timeout=30) as response:
        if response.status != 206:  # it sends all of it again
            out.truncate(0)
        with tqdm(total=size, initial=out.tell(), unit="B", unit_scale=True,
                  disable=None) as progress:
            while out.tell() < size and (chunk := response.read1(min(2**20, size - out.tell()))):
                out.write(chunk)
                progress.update(len(chunk))

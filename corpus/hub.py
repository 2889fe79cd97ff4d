"""Download a file of a dataset from the Hugging Face hub, or from the mirror in HF_ENDPOINT.

huggingface_hub restarts an interrupted download from zero in a new process, so that half a gigabyte
may never arrive over a slow connection. Here huggingface_hub gives only the address and the size;
the download itself resumes.
"""
import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm


def fetch(dataset, file, folder):
    """Download a file into folder; an interrupted download is resumed by the next call.

    The file gets its name only when it is complete. Raises the errors of the hub client and urllib,
    and OSError.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers
    url = hf_hub_url(dataset, file, repo_type="dataset")
    found = get_hf_file_metadata(url, timeout=20)
    if not found.size:
        raise OSError("the hub does not tell the size of the file")
    headers = build_hf_headers()
    if urlsplit(found.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub only, not for its storage
    part = Path(folder) / f".{file}.{found.etag[:16]}.part"  # one for each version of the file
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as out:
        while (start := out.tell()) < found.size:
            request = Request(found.location, headers=headers | {"Range": f"bytes={start}-"})
            error = ConnectionError("the server sent no more data")
            try:
                copy(request, out, found.size)
            except (ConnectionError, TimeoutError) as e:
                error = e
            if out.tell() <= start:  # else it broke, but some data came: resume
                raise error
        os.fsync(out.fileno())
    os.replace(part, Path(folder) / file)


def copy(request, out, size):
    """Append the response to out, up to size bytes in all."""
    with urlopen(request, timeout=30) as response:
        if response.status != 206:  # the server ignored the Range header and sends the whole file
            out.truncate(0)
        with tqdm(total=size, initial=out.tell(), unit="B", unit_scale=True,
                  disable=None) as progress:
            while out.tell() < size and (chunk := response.read1(min(2**20, size - out.tell()))):
                out.write(chunk)
                progress.update(len(chunk))

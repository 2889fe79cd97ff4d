"""Download files of a dataset from the Hugging Face hub, from the mirror in HF_ENDPOINT, or with
HUB=modelscope from ModelScope.

hf_hub_download restarts an interrupted download from zero in a new process, so that half a gigabyte
may never arrive over a slow connection, and does not compare the content with its hash. Here
huggingface_hub gives only the address, the size and the hash.
"""
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from common.command_line import UserError, first_line, optional_package
from common.files import lock, replace


def download(ids, files, folder, advice):
    """Download the files that folder lacks; an interrupted download is resumed by the next call.

    ids: the data set's id on the Hugging Face hub and, if it is another, on ModelScope. A file
    gets its name only when it is complete and, where the hub tells its sha256, verified.
    UserError, which ends with advice: it can't be downloaded, or another process is doing it.
    """
    hub, folder = os.environ.get("HUB") or "huggingface", Path(folder)
    if hub not in ("huggingface", "modelscope"):
        raise UserError(f"HUB={hub} is unknown; set it to modelscope, or not at all")
    locate, dataset = ((on_modelscope, ids[-1]) if hub == "modelscope" else
                       (on_hugging_face, ids[0]))
    if files[0].endswith(".parquet"):
        with optional_package(f"{dataset}: reading .parquet", "pyarrow"):
            import pyarrow  # noqa: F401  (missed before the download, not after it)
    print(f"downloading {dataset} into {folder} (resumes if interrupted)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"{folder} is being downloaded by another process"):
        try:
            for file in files:
                if not (path := folder / Path(file).name).exists():
                    fetch(*locate(dataset, file), path)
        except Exception as e:  # the hub client raises errors of four libraries
            raise UserError(
                f"{dataset} can't be downloaded ({type(e).__name__}: {first_line(e)}) into "
                f"{folder}. Set HF_ENDPOINT to a mirror, or HUB to modelscope, and start again; or "
                + advice) from e


def on_hugging_face(dataset, file):
    """Return (address, headers to send, size, ETag) of a file. Raises the errors of the client."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers
    url = hf_hub_url(dataset, file, repo_type="dataset")
    found, headers = get_hf_file_metadata(url, timeout=20), build_hf_headers()
    if urlsplit(found.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub only, not for its storage
    return found.location, headers, found.size, found.etag or ""


def on_modelscope(dataset, file):
    """Return the same of a file on ModelScope, or on the site in MODELSCOPE_ENDPOINT. The address
    is not that of its storage, which expires. Raises the errors of the client, and OSError."""
    from huggingface_hub import get_session
    site = os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn"
    url, told = f"{site.rstrip('/')}/datasets/{dataset}/resolve/master/{quote(file)}", {}
    asked = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}  # GET, as signed addresses want
    with get_session().stream("GET", url, headers=asked, timeout=20,
                              follow_redirects=True) as response:
        for one in (*response.history, response.raise_for_status()):
            told |= one.headers
    if told.get("content-type", "").startswith("text/html"):
        raise OSError(f"{url} is a web page, not a file")
    size = told.get("content-range", "").rpartition("/")[2] or told.get("content-length", "")
    return url, {}, int(size) if size.isdigit() else 0, told.get("x-linked-etag", "").strip('"')


def fetch(url, headers, size, etag, path):
    """Download what stands at url to path, as download() does. Raises the errors of urllib, and
    OSError."""
    if not size:
        raise OSError("the hub does not tell the size of the file")
    if not (has_hash := re.fullmatch("[0-9a-f]{64}", etag)):  # other ETags are no sha256
        print(f"{path.name}: the hub tells no sha256; only the size will be compared")
    part = path.with_name(f".{path.name}.{re.sub(r'[^0-9a-zA-Z]', '', etag)[:16] or size}.part")
    for _ in range(2):  # once more from zero if the part of an earlier start was damaged
        with open(part, "a+b") as out:
            if out.tell() > size:
                out.truncate(out.seek(0))
            while (start := out.tell()) < size:
                more = headers | {"Range": f"bytes={start}-"}
                with suppress(ConnectionError, TimeoutError):
                    append(Request(url, headers=more), out, size)
                if out.tell() <= start:  # else it broke, but some data came: resume
                    raise ConnectionError("the server sent no more data")
            out.seek(0)
            right = not has_hash or hashlib.file_digest(out, "sha256").hexdigest() == etag
            os.fsync(out.fileno())
        if right:
            return replace(part, path)
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

"""Text to .bin with Qwen's tokenizer, three ways, in turns: python tests/prepare_speed.py

    hf        one document at a time through the fast tokenizer of transformers, one process
    nanogpt   as its data/openwebtext/prepare.py: datasets.map with tiktoken, two processes, then
              1,024 batches into a memmap
    ours      python prepare.py text, two workers

Needs `datasets` and ../shared. Each way reads the same JSON lines, cleaned beforehand, and is timed
in a process of its own without its imports and without loading the tokenizer.
"""
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
QWEN = SHARED / "tokenizers" / "qwen2_5"
sys.path.insert(0, str(ROOT))


def hf(file):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(QWEN)
    eot, began, ids = tok.convert_tokens_to_ids("<|endoftext|>"), time.time(), []
    with open(file, encoding="utf-8") as lines, open("hf.bin", "wb") as out:
        for line in lines:
            ids = tok(json.loads(line)["text"], split_special_tokens=True)["input_ids"]
            out.write(np.array([*ids, eot], dtype=np.uint32).tobytes())
    return time.time() - began


def nanogpt(file):
    import datasets
    from data.tokenizer import load_tokenizer
    tok = load_tokenizer(str(QWEN))
    datasets.disable_progress_bars()
    texts = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir="cache")

    def process(example):
        ids = tok.fast.encode_ordinary(example["text"])
        ids.append(tok.eot)
        return dict(ids=ids, len=len(ids))

    began = time.time()
    tokenized = texts.map(process, remove_columns=texts.column_names, num_proc=2,
                          load_from_cache_file=False)
    total = np.sum(tokenized["len"], dtype=np.uint64)
    arr, at = np.memmap("nanogpt.bin", dtype=np.uint32, mode="w+", shape=(int(total),)), 0
    for i in range(1024):
        batch = tokenized.shard(num_shards=1024, index=i, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        arr[at:at + len(ids)] = ids
        at += len(ids)
    arr.flush()
    return time.time() - began


def ours(file):
    command = [sys.executable, str(ROOT / "prepare.py"), "text", str(file), f"--tokenizer={QWEN}",
               "--workers=2", "--name=speed"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(Path("data/speed/meta.json").read_text(encoding="utf-8"))["run"]["seconds"]


def main():
    if len(sys.argv) == 3:
        print(globals()[sys.argv[1]](sys.argv[2]))
        return
    from data.bins import Bins
    from data.clean import Rules, clean_document
    with tempfile.TemporaryDirectory() as folder:
        file, size = Path(folder) / "texts.jsonl", 0
        with open(file, "w", encoding="utf-8") as out:
            for line in lzma.open(SHARED / "corpora" / "zh_60mb.jsonl.xz", "rt", encoding="utf-8"):
                text, reason, _ = clean_document(json.loads(line)["text"], Rules())
                if not reason:
                    out.write(json.dumps(dict(text=text), ensure_ascii=False) + "\n")
                    size += len(text.encode())
        times = {way: [] for way in ("hf", "nanogpt", "ours")}
        for _ in range(3):
            for way in times:
                done = subprocess.run([sys.executable, __file__, way, str(file)], cwd=folder,
                                      check=True, stdout=subprocess.PIPE, text=True)
                times[way].append(float(done.stdout.split()[-1]))
        for way, seconds in times.items():
            middle = statistics.median(seconds)
            ratio = middle / statistics.median(times["ours"])
            shown = ", ".join(f"{s:.1f}" for s in seconds)
            print(f"{way:8} {size / 1e6 / middle:6.2f} MB/s  "
                  f"({shown} s), ours is {ratio:.2f} times as fast")
        bins, docs = Bins("speed", Path(folder) / "data"), {}
        for split in ("train", "val"):
            starts, ids = bins.starts(split), bins.tokens(split)
            docs |= {ids[a:b].tobytes(): split for a, b in zip(starts, starts[1:])}
        for way in ("hf", "nanogpt"):
            ids = np.fromfile(Path(folder) / f"{way}.bin", dtype=np.uint32)
            ends = np.flatnonzero(ids == bins.tokenizer.eot) + 1
            theirs = {doc.tobytes() for doc in np.split(ids, ends) if len(doc)}
            print(f"{way}: {len(theirs):,} documents, the same ids: {theirs == docs.keys()}")


if __name__ == "__main__":
    main()

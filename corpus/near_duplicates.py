"""Near-duplicates: documents that share most of their 5-grams of characters with an earlier one.

Found by MinHash and locality-sensitive hashing (Broder 1997), as implemented in datasketch, which
is an optional requirement and therefore imported late.
"""
from common.command_line import optional_package

N_PERMUTATIONS = 64   # hash functions of a signature; estimates similarity to about 0.1
NGRAM = 5             # characters


def signature(text):
    """Return the MinHash of a text's n-grams, in the form that is cheap to send to a process."""
    from datasketch import LeanMinHash, MinHash
    ngrams = list({text[i:i + NGRAM] for i in range(max(1, len(text) - NGRAM + 1))})
    minhash = MinHash(N_PERMUTATIONS)
    for i in range(0, len(ngrams), 10_000):  # in parts, to limit memory: 64 hashes per n-gram
        minhash.update_batch([ngram.encode() for ngram in ngrams[i:i + 10_000]])
    return LeanMinHash(minhash)


def similarity_index(similarity):
    """Return an index of signatures: query(signature) gives the keys of those that are
    at least as similar as `similarity` (0 to 0.95), insert(key, signature) adds one."""
    with optional_package("near_duplicates", "datasketch"):
        from datasketch import MinHashLSH
    return MinHashLSH(similarity, N_PERMUTATIONS)

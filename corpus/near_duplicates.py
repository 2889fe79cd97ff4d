"""Near-duplicates: documents whose five-character pieces are mostly those of an earlier one.

MinHash and its index (Broder 1997) are datasketch's; nothing is imported before it is asked for.
"""
from config import UserError

N_PERMUTATIONS = 64   # numbers a document is known by: similarity is exact to about 0.1
PIECE = 5             # characters


def signature(text):
    """MinHash of a text's pieces, in the form that travels between processes."""
    from datasketch import LeanMinHash, MinHash
    pieces = list({text[i:i + PIECE] for i in range(max(1, len(text) - PIECE + 1))})
    minhash = MinHash(N_PERMUTATIONS)
    for i in range(0, len(pieces), 10_000):  # it holds N_PERMUTATIONS numbers for each at once
        minhash.update_batch([piece.encode() for piece in pieces[i:i + 10_000]])
    return LeanMinHash(minhash)


class NearDuplicates:
    def __init__(self, similarity):
        try:
            from datasketch import MinHashLSH
        except ImportError as e:
            raise UserError("near_duplicates needs datasketch: pip install datasketch") from e
        try:
            self.index = MinHashLSH(similarity, N_PERMUTATIONS)
        except ValueError as e:
            raise UserError(f"near_duplicates={similarity} is too near to 0 or 1") from e

    def has(self, key, minhash):
        """Whether a document like this one came before; if not, it is remembered."""
        if self.index.query(minhash):
            return True
        self.index.insert(key, minhash)
        return False

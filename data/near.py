"""Near-duplicates: documents whose five-character pieces are mostly those of an earlier one.

MinHash and its index (Broder 1997) are datasketch's; nothing is imported before it is asked for.
"""
from config import UserError

N_PERMUTATIONS = 64   # numbers a document is known by: similarity is exact to about 0.1
PIECE = 5             # characters


def signature(text):
    """MinHash of a text's pieces, in the form that travels between processes."""
    from datasketch import LeanMinHash, MinHash
    pieces = {text[i:i + PIECE] for i in range(max(1, len(text) - PIECE + 1))}
    minhash = MinHash(N_PERMUTATIONS)
    minhash.update_batch([piece.encode() for piece in pieces])
    return LeanMinHash(minhash)


class NearDuplicates:
    def __init__(self, similarity):
        try:
            from datasketch import MinHashLSH
        except ImportError as e:
            raise UserError("near_duplicates needs datasketch: pip install datasketch") from e
        self.index = MinHashLSH(similarity, N_PERMUTATIONS)

    def has(self, key, minhash):
        """Whether a document like this one came before; if not, it is remembered."""
        if self.index.query(minhash):
            return True
        self.index.insert(key, minhash)
        return False

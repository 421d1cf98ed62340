"""Commit an accepted path: its K and V rows move to where the prefix ends, and nothing else moves.

Bytes: P rows of D elements per layer and KV head, read and written once, for K and for V.
"""


def commit_ref(k, v, src, dst):
    """Copy cache slots src[b, i] to dst[b, i] for all layers and heads, as if all rows were read before any is written.

    k, v [L, B, KV, C, D] in place; src, dst [B, P] int64. Two entries may share a dst only if they share their src.
    """
    for cache in (k, v):
        L, B, KV, _, D = cache.shape
        index = lambda slots: slots[None, :, None, :, None].expand(L, B, KV, slots.shape[1], D)
        cache.scatter_(3, index(dst), cache.gather(3, index(src)))


commit = commit_ref

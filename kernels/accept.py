"""Walk a verified token tree along the target's own tokens: accept for greedy decoding and for coupled sampling."""
import torch


def walk_ref(tokens, parent, depth, own):
    """From the root, step to the child that holds the target's token for as long as there is one.

    tokens [B, M+1]: the tree's tokens, node 0 the root; -1 marks an empty node, which is never accepted.
    parent [M+1]: parent of each node (-1 for the root), depth: the tree's depth (int). own [B, M+1]: the target's token
    after each node. Returns path [B, depth+1] (accepted nodes, root first, the last one repeated) and length [B] (how
    many of them follow the root: k).
    """
    B = tokens.shape[0]
    node = torch.zeros(B, dtype=torch.int64, device=tokens.device)
    path, length = [node], torch.zeros_like(node)
    for _ in range(depth):
        want = own.gather(1, node[:, None])                                 # [B, 1]
        match = (parent[None] == node[:, None]) & (tokens == want)          # [B, M+1]: at most one child can match
        found, child = match.int().max(dim=1)
        node = torch.where(found > 0, child, node)
        length = length + found
        path.append(node)
    return torch.stack(path, dim=1), length


walk = walk_ref

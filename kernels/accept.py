"""Walk a verified token tree along the target's own tokens: accept for greedy decoding and for coupled sampling.

Bytes: a few hundred; it is a kernel because ten torch ops a depth would each cost a launch. Grid: one program a sequence.
"""
import torch
import triton
import triton.language as tl

from kernels.launch import launch_options, pdl, wait_for_inputs


def walk_ref(tokens, parent, depth, own):
    """From the root, step to the child that holds the target's token for as long as there is one.

    tokens [B, M+1]: the tree's tokens, node 0 the root; -1 marks an empty node, which is never accepted.
    parent [M+1]: parent of each node (-1 for the root), depth: the tree's depth (int). own [B, M+1]: the target's token
    after each node. Returns path [B, depth+1] (accepted nodes, root first, the last one repeated), length [B] (how many
    of them follow the root: k) and bonus [B] (the target's token after the last one).
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
    return torch.stack(path, dim=1), length, own.gather(1, node[:, None])[:, 0]


@triton.jit
def walk_kernel(token_ptr, parent_ptr, own_ptr, path_ptr, length_ptr, bonus_ptr, size, depth, BLOCK: tl.constexpr,
                PDL: tl.constexpr):
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    tokens = tl.load(token_ptr + b * size + i, mask=i < size, other=-1)
    parent = tl.load(parent_ptr + i, mask=i < size, other=-2)
    own = tl.load(own_ptr + b * size + i, mask=i < size, other=0)
    node = b * 0
    length = b * 0
    tl.store(path_ptr + b * (depth + 1), node)
    want = tl.sum(tl.where(i == 0, own, 0), axis=0)
    for d in range(depth):
        child = tl.max(tl.where((parent == node) & (tokens == want), i, 0), axis=0).to(tl.int64)
        length += (child > 0).to(tl.int64)
        node = tl.where(child > 0, child, node)
        want = tl.sum(tl.where(i == node, own, 0), axis=0)
        tl.store(path_ptr + b * (depth + 1) + d + 1, node)
    tl.store(length_ptr + b, length)
    tl.store(bonus_ptr + b, want)


def walk(tokens, parent, depth, own):
    """As walk_ref."""
    B, size = tokens.shape
    new = lambda *shape: torch.empty(B, *shape, device=tokens.device, dtype=torch.int64)
    path, length, bonus = new(depth + 1), new(), new()      # apart, so that bonus is as aligned as any token
    walk_kernel[(B,)](tokens.contiguous(), parent, own.contiguous(), path, length, bonus, size, depth,
                      triton.next_power_of_2(size), PDL=pdl(tokens.device), num_warps=1, **launch_options(tokens.device))
    return path, length, bonus

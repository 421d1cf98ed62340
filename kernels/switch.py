"""The end of a round on the draft's side: look the outcome up, take over its branch, write the text down, move on.

Bytes: a branch's tokens and guesses, a few kB; it is a kernel because thirty torch ops would each cost a launch. Grid: one
program a sequence.
"""
import torch
import triton
import triton.language as tl

from kernels.commit import path_slots, path_slots_ref


def switch_ref(path, length, bonus, tokens, guesses, history, prefix_len, outcomes=None):
    """Take over the branch that answers a verdict (path [B, K+1], length [B], bonus [B]).

    In place: tokens [B, M+1] and guesses [B, M+1, F] become the branch's, the root bonus; history [B, room] gets the
    accepted tokens and bonus; prefix_len [B] moves behind the path. outcomes: nodes [N], roots [B, N], tokens [B, N, M+1]
    and guesses [B, N, M+1, F] of the branches, where branch i answers the outcome (nodes[i], roots[b, i]); None: there are
    none, and all but the root stays. Returns found [B, 2], hit (0 or 1) and branch (any on a miss) or None, and src, dst
    for `commit`: the path behind the prefix and, on a hit, the branch behind the path.
    """
    start = prefix_len[:, None].clone()
    src, dst = path_slots_ref(path, length, prefix_len)
    history.scatter_(1, dst, tokens.gather(1, src - start))
    prefix_len += length + 1
    history.scatter_(1, prefix_len[:, None], bonus[:, None])
    tokens[:, 0] = bonus
    if outcomes is None:
        return None, src, dst
    nodes, roots, branch_tokens, branch_guesses = outcomes
    same = (nodes == path[:, -1:]) & (roots == bonus[:, None])              # [B, N]
    hit, branch = same.int().max(dim=1)
    batch = torch.arange(len(branch), device=branch.device)
    tokens[:, 1:] = branch_tokens[batch, branch, 1:]
    guesses.copy_(branch_guesses[batch, branch])
    i, moves = torch.arange(tokens.shape[1], device=tokens.device), hit[:, None]
    src = torch.cat([src, start + moves * ((branch[:, None] + 1) * len(i) + i)], 1)
    dst = torch.cat([dst, start + moves * (length[:, None] + 1 + i)], 1)
    return torch.stack([hit, branch], 1), src, dst


@triton.jit
def switch_kernel(path_ptr, length_ptr, bonus_ptr, token_ptr, guess_ptr, history_ptr, prefix_ptr, node_ptr, root_ptr,
                  branch_token_ptr, branch_guess_ptr, found_ptr, src_ptr, dst_ptr, DEPTH, P, size, F, room, N,
                  BLOCK: tl.constexpr, MANY: tl.constexpr):
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    start, length, bonus = tl.load(prefix_ptr + b), tl.load(length_ptr + b), tl.load(bonus_ptr + b)
    path_ptr, token_ptr, src_ptr, dst_ptr = path_ptr + b * (DEPTH + 1), token_ptr + b * size, src_ptr + b * P, dst_ptr + b * P
    path = tl.load(path_ptr + i, mask=i <= DEPTH, other=0)
    accepted = tl.load(token_ptr + path)
    path_slots(path, i, length, start, src_ptr, dst_ptr, DEPTH)
    after = start + length + 1
    text_ptr = history_ptr + b * room
    tl.store(text_ptr + start + i, accepted, mask=(i <= DEPTH) & (i <= length))
    tl.store(text_ptr + after, bonus)
    tl.debug_barrier()                                                      # all have read prefix_len and tokens
    tl.store(prefix_ptr + b, after)
    tl.store(token_ptr, bonus)
    if N > 0:
        nodes, roots = tl.load(node_ptr + i, mask=i < N, other=-1), tl.load(root_ptr + b * N + i, mask=i < N, other=-1)
        here = (nodes == tl.load(path_ptr + DEPTH)) & (roots == bonus)
        hit = tl.max(here.to(tl.int64), axis=0)
        branch = tl.max(tl.where(here, i, 0), axis=0).to(tl.int64)
        tl.store(found_ptr + 2 * b, hit)
        tl.store(found_ptr + 2 * b + 1, branch)
        tree = b * N + branch
        below = (i > 0) & (i < size)
        tl.store(token_ptr + i, tl.load(branch_token_ptr + tree * size + i, mask=below), mask=below)
        for j in range(0, size * F, MANY):
            g = j + tl.arange(0, MANY)
            guesses = tl.load(branch_guess_ptr + tree * size * F + g, mask=g < size * F)
            tl.store(guess_ptr + b * size * F + g, guesses, mask=g < size * F)
        tl.store(src_ptr + DEPTH + 1 + i, start + hit * ((branch + 1) * size + i), mask=i < size)
        tl.store(dst_ptr + DEPTH + 1 + i, start + hit * (length + 1 + i), mask=i < size)


def switch(path, length, bonus, tokens, guesses, history, prefix_len, outcomes=None):
    """As switch_ref. It stands first in its CUDA graph, so there's no kernel before it that it could overlap with."""
    (B, size), P = tokens.shape, path.shape[1] + (0 if outcomes is None else tokens.shape[1])
    new = lambda n: torch.empty(B, n, device=tokens.device, dtype=torch.int64)
    found, src, dst = new(2), new(P), new(P)
    nodes, roots, branch_tokens, branch_guesses = [tokens] * 4 if outcomes is None else outcomes
    N = 0 if outcomes is None else len(nodes)
    assert all(x.is_contiguous() for x in (path, tokens, guesses, history, roots, branch_tokens, branch_guesses))
    switch_kernel[(B,)](path, length, bonus, tokens, guesses, history, prefix_len, nodes, roots, branch_tokens, branch_guesses,
                        found, src, dst, path.shape[1] - 1, P, size, guesses.shape[-1], history.shape[1], N,
                        triton.next_power_of_2(max(size, N)), 256, num_warps=4)
    return None if outcomes is None else found, src, dst

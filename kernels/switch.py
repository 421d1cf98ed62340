"""The end of a round on the draft's side: look the outcome up, take over its branch, write the text down, move on.

Bytes: a branch's tokens and guesses, a few kB; it is a kernel because thirty torch ops would each cost a launch. Grid: one
program a sequence.
"""
import torch
import triton
import triton.language as tl

from kernels.commit import path_slots, path_slots_ref


def switch_ref(path, length, bonus, tokens, guesses, odds, history, prefix_len, found, outcomes=None):
    """Take over the branch that answers a verdict (path [B, K+1], length [B], bonus [B]).

    In place: tokens [B, M+1], guesses [B, M+1, F] and their odds (as in kernels/grow.py, or None) become the branch's, the root
    bonus; history [B, room] gets the accepted tokens and bonus; prefix_len [B] moves behind the path; found [B, 4] becomes hit (0
    or 1), the branch (any on a miss), how many guesses at its node came before it, how many there were at the outcome's node.
    outcomes: nodes [B, N], roots [B, N], and tokens [B, N, M+1], guesses [B, N, M+1, F] and odds of the branches, where branch i
    answers the outcome (nodes[b, i], roots[b, i]); None: there are none, and all but the root stays, found too. Returns src, dst
    for `commit`: the path behind the prefix and, on a hit, the branch behind the path.
    """
    start = prefix_len[:, None].clone()
    src, dst = path_slots_ref(path, length, prefix_len)
    history.scatter_(1, dst, tokens.gather(1, src - start))
    prefix_len += length + 1
    history.scatter_(1, prefix_len[:, None], bonus[:, None])
    tokens[:, 0] = bonus
    if outcomes is None:
        return src, dst
    nodes, roots, branch_tokens, branch_guesses, branch_odds = outcomes
    here = nodes == path[:, -1:]                                            # [B, N]
    hit, branch = (here & (roots == bonus[:, None])).int().max(dim=1)
    batch = torch.arange(len(branch), device=branch.device)
    tokens[:, 1:] = branch_tokens[batch, branch, 1:]
    for mine, theirs in zip((guesses, *(odds or ())), (branch_guesses, *(branch_odds or ()))):
        mine.copy_(theirs[batch, branch])
    before = (here & (torch.arange(nodes.shape[1], device=nodes.device) < branch[:, None])).sum(1)
    i, moves = torch.arange(tokens.shape[1], device=tokens.device), hit[:, None]
    src = torch.cat([src, start + moves * ((branch[:, None] + 1) * len(i) + i)], 1)
    dst = torch.cat([dst, start + moves * (length[:, None] + 1 + i)], 1)
    torch.stack([hit, branch, before, here.sum(1)], 1, out=found)
    return src, dst


@triton.jit
def switch_kernel(path_ptr, length_ptr, bonus_ptr, token_ptr, guess_ptr, guess_odds_ptr, node_odds_ptr, history_ptr, prefix_ptr,
                  node_ptr, root_ptr, branch_token_ptr, branch_guess_ptr, branch_guess_odds_ptr, branch_node_odds_ptr, found_ptr,
                  src_ptr, dst_ptr, DEPTH, P, size, F, room, N, ODDS: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr):
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
        at_node = tl.load(node_ptr + b * N + i, mask=i < N, other=-1) == tl.load(path_ptr + DEPTH)
        right = at_node & (tl.load(root_ptr + b * N + i, mask=i < N, other=-1) == bonus)
        hit = tl.max(right.to(tl.int64), axis=0)
        branch = tl.min(tl.where(right, i, BLOCK), axis=0).to(tl.int64) * hit
        tl.store(found_ptr + 4 * b, hit)
        tl.store(found_ptr + 4 * b + 1, branch)
        tl.store(found_ptr + 4 * b + 2, tl.sum((at_node & (i < branch)).to(tl.int64), axis=0))
        tl.store(found_ptr + 4 * b + 3, tl.sum(at_node.to(tl.int64), axis=0))
        tree = b * N + branch
        below = (i > 0) & (i < size)
        tl.store(token_ptr + i, tl.load(branch_token_ptr + tree * size + i, mask=below), mask=below)
        for j in range(0, size * F, MANY):
            g = j + tl.arange(0, MANY)
            mask, here, there = g < size * F, b * size * F + g, tree * size * F + g
            tl.store(guess_ptr + here, tl.load(branch_guess_ptr + there, mask=mask), mask=mask)
            if ODDS:
                tl.store(guess_odds_ptr + here, tl.load(branch_guess_odds_ptr + there, mask=mask), mask=mask)
        if ODDS:
            tl.store(node_odds_ptr + b * size + i, tl.load(branch_node_odds_ptr + tree * size + i, mask=i < size), mask=i < size)
        tl.store(src_ptr + DEPTH + 1 + i, start + hit * ((branch + 1) * size + i), mask=i < size)
        tl.store(dst_ptr + DEPTH + 1 + i, start + hit * (length + 1 + i), mask=i < size)


def switch(path, length, bonus, tokens, guesses, odds, history, prefix_len, found, outcomes=None):
    """As switch_ref. What it waits for are the ends of two streams, so it doesn't start before them (no PDL)."""
    (B, size), P = tokens.shape, path.shape[1] + (0 if outcomes is None else tokens.shape[1])
    new = lambda n: torch.empty(B, n, device=tokens.device, dtype=torch.int64)
    src, dst, none = new(P), new(P), (tokens, tokens)
    *branches, branch_odds = (*none, *none, None) if outcomes is None else outcomes
    N = 0 if outcomes is None else branches[0].shape[1]
    assert all(x.is_contiguous() for x in (path, tokens, guesses, history, found, *(odds or ()), *branches, *(branch_odds or ())))
    switch_kernel[(B,)](path, length, bonus, tokens, guesses, *(odds or none), history, prefix_len, *branches,
                        *(branch_odds or none), found, src, dst, path.shape[1] - 1, P, size, guesses.shape[-1], history.shape[1], N,
                        branch_odds is not None, triton.next_power_of_2(max(size, N)), 256, num_warps=4)
    return src, dst

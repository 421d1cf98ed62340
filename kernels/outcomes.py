"""Choose the outcomes to draft for: where this round's draft is unsure, more of them.

Theorem 12 of the paper spreads the guesses by how often verification ends at each depth. But the draft knows more: where it was
sure, the target hardly ever disagrees, and where two tokens were close, the second is a likely outcome. So every guess gets a
chance: that of reaching its node, times that of the guess behind it, both by the draft's own scores (kernels/grow.py); and the N
best of all nodes get a branch. What hangs on the node that a branch starts from, positions and ancestors, is then known only here.

Bytes: a few kB; it is a kernel because fifty torch ops would each cost a launch. Grid: one program a sequence.
"""
import torch
import triton
import triton.language as tl

from kernels.launch import MAX_ROWS
from kernels.tree_attention import Ancestors


def each_row(x, level):
    """What is known of each branch, x [B, N, ...], for each row of a level [B, T, ...]."""
    B, N, *more = x.shape
    return x[:, :, None].expand(B, N, level.rows.shape[1] // N, *more).flatten(1, 2)


def level_mask(level, nodes, tree):
    """What the rows of a level see [B, T, S], if its branches hang on nodes [B, N]."""
    inside = level.ancestors.mask[:, tree.size:].expand(len(nodes), -1, -1)
    return torch.cat([each_row(tree.mask[nodes], level), inside], 2)


def outcomes_ref(guesses, odds, prefix_len, tree, branching):
    """The N most likely outcomes of a verification, and what drafting behind them must know.

    guesses [B, M+1, F] int64, -1 where there is none; odds: log-chances float32, of the guesses [B, M+1, F] and of each node behind
    its parent [B, M+1]; branching: a layout.Branching. Returns nodes [B, N], roots [B, N] (their guesses), and for each of its
    levels (level, (position, position of the next token, slot) [B, T] each, Ancestors of each sequence: masks; from the kernel
    lists, and masks only of levels with too many rows for the Triton attention).
    """
    (B, size, F), device = guesses.shape, guesses.device
    edges = odds[1].masked_fill(torch.arange(size, device=device) == 0, 0.0)
    reach = torch.where(tree.mask, edges[:, None], 0.0).sum(-1)             # [B, M+1]
    chance = reach[..., None] + odds[0]
    chance = torch.where((guesses >= 0) & (chance > -1e30), chance, -1e30).flatten(1)           # NaN, too
    best = chance.argsort(dim=1, descending=True, stable=True)[:, :branching.N]
    nodes, roots = best // F, guesses.flatten(1).gather(1, best)
    start, forwards = prefix_len[:, None] + tree.node_depth[nodes] + 1, []  # [B, N] the root's position
    for level in branching.levels:
        own, _, slot = level.rows
        position = each_row(start, level) + own
        ancestors = Ancestors(level_mask(level, nodes, tree), None, None)
        forwards.append((level, (position, position + 1, prefix_len[:, None] + slot), ancestors))
    return nodes, roots, forwards


@triton.jit
def outcomes_kernel(guess_ptr, guess_odds_ptr, node_odds_ptr, prefix_ptr, mask_ptr, path_ptr, depth_ptr, row_ptr, node_ptr,
                    root_ptr, place_ptr, slot_ptr, count_ptr, size, F, N, rows, P, OWN, SIZE: tl.constexpr, FAN: tl.constexpr,
                    WIDE: tl.constexpr, BLOCK: tl.constexpr):
    b, B = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i, j, f = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, FAN)[None, :]
    edges = tl.load(node_odds_ptr + b * size + j, mask=(j > 0) & (j < size), other=0.0)
    above = tl.load(mask_ptr + i * size + j, mask=(i < size) & (j < size), other=0).to(tl.int1)
    reach = tl.sum(tl.where(above, edges, 0.0), axis=1)[:, None]            # [SIZE, 1]
    there = (i < size) & (f < F)
    guesses = tl.load(guess_ptr + (b * size + i) * F + f, mask=there, other=-1)
    chance = reach + tl.load(guess_odds_ptr + (b * size + i) * F + f, mask=there & (guesses >= 0), other=0.0)
    chance = tl.where((guesses >= 0) & (chance > -1e30), chance, -1e30)     # NaN, too
    chance, number = tl.where(there, chance, float("-inf")), i * FAN + f
    for n in range(N):
        best = tl.max(tl.max(chance, axis=1), axis=0)
        at = tl.min(tl.min(tl.where(chance == best, number, SIZE * FAN), axis=1), axis=0)
        chance = tl.where(number == at, float("-inf"), chance)
        tl.store(node_ptr + b * N + n, (at // FAN).to(tl.int64))
        tl.store(root_ptr + b * N + n, tl.load(guess_ptr + (b * size + at // FAN) * F + at % FAN))
    tl.debug_barrier()                                                      # all may read the nodes
    prefix = tl.load(prefix_ptr + b)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        table = row_ptr + row * (5 + OWN)
        start, width = tl.load(table, mask=row < rows, other=0), tl.load(table + 1, mask=row < rows, other=0)
        live = row - start < width                                          # else it only fills up a level
        branch, own = tl.load(table + 2, mask=live, other=0), tl.load(table + 3, mask=live, other=0)
        node = tl.load(node_ptr + b * N + branch, mask=live, other=0)
        depth = tl.load(depth_ptr + node, mask=live, other=0)
        line = place_ptr + 3 * B * start + b * width + row - start
        position = prefix + depth + 1 + own
        tl.store(line, position, mask=live)
        tl.store(line + B * width, position + 1, mask=live)
        tl.store(line + 2 * B * width, prefix + tl.load(table + 4, mask=live, other=0), mask=live)
        line = B * start + b * width + row - start
        tl.store(count_ptr + line, (depth + own + 2).to(tl.int32), mask=live)
        a = tl.arange(0, WIDE)[None, :]
        mine = a - depth[:, None] - 1                                       # behind the path to the node the branch's own
        slots = tl.load(path_ptr + node[:, None] * P + a, mask=live[:, None] & (a < P), other=0)
        own_slots = tl.load(table[:, None] + 5 + mine, mask=live[:, None] & (mine >= 0) & (mine < OWN), other=0)
        slots = tl.where(mine < 0, slots, own_slots)
        tl.store(slot_ptr + line[:, None] * (P + OWN) + a, slots, mask=live[:, None] & (a < P + OWN))


def outcomes(guesses, odds, prefix_len, tree, branching):
    """As outcomes_ref."""
    (B, size, F), device, (rows, columns) = guesses.shape, guesses.device, branching.table.shape
    P, OWN, N = branching.paths.shape[1], columns - 5, branching.N
    new = lambda *shape, dtype=torch.int64: torch.empty(*shape, device=device, dtype=dtype)
    nodes, roots, places = new(B, N), new(B, N), new(3 * B * rows)
    slots, counts = new(B * rows, P + OWN, dtype=torch.int32), new(B * rows, dtype=torch.int32)
    assert guesses.is_contiguous() and all(x.is_contiguous() for x in odds) and N <= size * F
    SIZE, FAN = triton.next_power_of_2(size), triton.next_power_of_2(F)
    outcomes_kernel[(B,)](guesses, *odds, prefix_len, tree.mask, branching.paths, tree.node_depth, branching.table, nodes, roots,
                          places, slots, counts, size, F, N, rows, P, OWN, SIZE, FAN, triton.next_power_of_2(P + OWN), 32,
                          num_warps=1 if SIZE <= 16 else 4)
    forwards = []
    for level, start in zip(branching.levels, branching.starts):
        T = level.rows.shape[1]
        of = lambda x, n=1: x[n * B * start:n * B * (start + T)]
        mask = level_mask(level, nodes, tree) if T > MAX_ROWS else None
        ancestors = Ancestors(mask, of(slots).view(B, T, -1), of(counts).view(B, T))
        forwards.append((level, tuple(of(places, 3).view(3, B, T)), ancestors))
    return nodes, roots, forwards

"""Attention of a token tree over its prefix: the one attention of this project.

T new tokens of a sequence see its whole committed prefix (slots 0..prefix_len-1) and, of the S speculative slots behind
it, those that their row of the ancestor mask allows. A chain is a lower triangle, decoding is T = S = 1, N parallel
branches are N diagonals over a trunk, a prefill chunk is a big triangle. Bytes moved: K and V of the prefix, once a
KV head and tile of 16 rows; the G = H / KV query heads that share a KV head are packed into the rows.

Split-KV flash-decoding, bit-exact whatever surrounds a token. Every token sees its keys in the order of their positions
in the text, in blocks that start at fixed positions. A block that lies in the prefix whole is the same for all tokens;
the blocks behind it are gathered token by token along the token's own ancestors, so that a branch of a tree computes
what plain decoding of that branch would, in the same order.

Grid: (splits, tiles of 16 rows (token, head of the group), B * KV). The program of a tile that finishes last adds the
splits up, in order.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.launch import MAX_ROWS, launch_options, pdl, wait_for_inputs

ROWS = 16               # (token, head) rows a tile: the narrowest operand of a tensor core product
BLOCK = 64              # positions a block
LOG2_E = 1.4426950408889634             # softmax in powers of two
WARPS = 2               # two, so that the products are mma.sync: as wgmma, Triton 3.6 gets this kernel wrong
LONGEST = 2 * MAX_ROWS + 2      # most speculative slots that one token can see, itself included


class Ancestors(NamedTuple):
    """An ancestor mask, and the same as lists: which speculative slots each new token sees, oldest first."""
    mask: torch.Tensor                  # [T, S] bool
    slots: torch.Tensor                 # [T, A] int32
    count: torch.Tensor                 # [T] int32: how many of them

    @classmethod
    def of(cls, mask):
        """mask [T, S] bool; slots must be in the order of positions, i.e. parents stand before their children."""
        order = mask.to(torch.int32).argsort(dim=1, descending=True, stable=True)[:, :LONGEST]
        return cls(mask, order.to(torch.int32).contiguous(), mask.sum(1, dtype=torch.int32))


def visibility_ref(prefix_len, mask, end):
    """Which slot each new token sees. prefix_len [B] int64, mask [T, S] bool or Ancestors -> [B, 1, T, end] bool.

    Speculative slot j of a sequence is cache slot prefix_len + j. Built once a forward, shared by all layers.
    """
    mask = mask.mask if isinstance(mask, Ancestors) else mask
    S = mask.shape[1]
    j = torch.arange(end, device=mask.device) - prefix_len[:, None]         # [B, end] index of the speculative slot
    tail = mask[:, j.clamp(0, S - 1)].transpose(0, 1)                       # [B, T, end]
    return ((j < 0)[:, None] | (tail & (j >= 0)[:, None] & (j < S)[:, None]))[:, None]


def tree_attention_ref(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v over the visible slots.

    q [B, T, H, D]; k, v [B, KV, C, D]; visible [B, 1, T, end] with end <= C. Returns [B, T, H, D].
    """
    B, T, H, D = q.shape
    KV, end = k.shape[1], visible.shape[-1]
    G = H // KV
    q = q.view(B, T, KV, G, D).permute(0, 2, 3, 1, 4).reshape(B, KV, G * T, D)
    visible = visible if T == 1 else visible.repeat(1, 1, G, 1)
    out = F.scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end], attn_mask=visible)
    return out.view(B, KV, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


class View(NamedTuple):
    """What `tree_attention` needs to know about a step, made once for all layers."""
    prefix_len: torch.Tensor            # [B] int64
    ancestors: Ancestors
    splits: int                         # programs that share the blocks of a sequence
    arrivals: torch.Tensor              # int32 zeros, and left as zeros: counts the programs of a tile that are done


def visibility(prefix_len, mask, end):
    """mask: [T, S] bool, or the Ancestors made of it beforehand, which saves sorting it. Returns a View."""
    ancestors = mask if isinstance(mask, Ancestors) else Ancestors.of(mask)
    arrivals = torch.zeros(len(prefix_len) * MAX_ROWS * 8, dtype=torch.int32, device=prefix_len.device)
    return View(prefix_len, ancestors, min(32, triton.cdiv(end, BLOCK)), arrivals)


@triton.jit
def gathered(position, prefix, slot_ptr, token, A):
    """The cache slot of each position as `token` sees it: the prefix, then the token's ancestors. [BLOCK]"""
    j = position - prefix
    return tl.where(j < 0, position, prefix + tl.load(slot_ptr + token * A + j, mask=(j >= 0) & (j < A), other=0))


@triton.jit
def scores(k, q, position, seen, own, scale, s):
    """s [BLOCK, ROWS] with the columns `own` [ROWS] replaced by their scores for k, -inf where they don't look."""
    looks = own[None, :] & (position[:, None] < seen[None, :])
    return tl.where(looks, tl.dot(k, q, input_precision="ieee") * scale, s)


@triton.jit
def weighted(v, p, own, acc):
    """acc [D, ROWS] + v^T p for the columns `own`. Adding the zeros of the others is exact."""
    return tl.dot(tl.trans(v), tl.where(own[None, :], p, 0.0).to(v.dtype), acc, input_precision="ieee")


@triton.jit
def combine(part, stat, live, working, D: tl.constexpr, ROWS: tl.constexpr):
    """Add the splits up in order, eight at a time so that their loads overlap. Returns mass [ROWS], acc [D, ROWS]."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(0, working, 8):
        index = tl.zeros([ROWS], tl.int32) + first
        for i in tl.static_range(8):
            top = tl.maximum(top, tl.load(stat + (first + i) * 2 * ROWS, mask=live & (index + i < working),
                                          other=float("-inf"), volatile=True))
    safe = tl.where(top == float("-inf"), 0.0, top)
    acc, mass = tl.zeros([D, ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, working, 8):
        index = tl.zeros([ROWS], tl.int32) + first
        for i in tl.static_range(8):
            there = live & (index + i < working)
            at = stat + (first + i) * 2 * ROWS
            weight = tl.exp2(tl.load(at, mask=there, other=float("-inf"), volatile=True) - safe)
            mass += weight * tl.load(at + ROWS, mask=there, other=0.0, volatile=True)
            acc += weight[None, :] * tl.load(part + (first + i) * D * ROWS, mask=there[None, :], other=0.0, volatile=True)
    return mass, acc


@triton.jit
def tree_attention_kernel(q_ptr, k_ptr, v_ptr, prefix_ptr, slot_ptr, count_ptr, out_ptr, part_ptr, stat_ptr, arrival_ptr,
                          T, A, stride_b, stride_h, scale, KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                          BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
    split, tile, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    b, h = tl.program_id(2) // KV, tl.program_id(2) % KV
    d, r = tl.arange(0, D), tile * ROWS + tl.arange(0, ROWS)
    t = r // G                                                              # [ROWS] token of each row
    live = t < T
    prefix = tl.load(prefix_ptr + b).to(tl.int32)                           # written before the step: no need to wait
    seen = prefix + tl.load(count_ptr + t, mask=live, other=0)              # keys of each token, itself included
    at = ((b * T + t) * KV + h) * G + r % G                                 # [ROWS] row of q and out
    blocks = tl.cdiv(tl.max(seen, axis=0), BLOCK)
    k_ptr += b.to(tl.int64) * stride_b + h * stride_h
    v_ptr += b.to(tl.int64) * stride_b + h * stride_h
    wait_for_inputs(PDL)
    q = tl.load(q_ptr + at[None, :] * D + d[:, None], mask=live[None, :], other=0.0)                    # [D, ROWS]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([D, ROWS], tl.float32)
    for block in range(split, blocks, splits):
        position = block * BLOCK + tl.arange(0, BLOCK)                      # [BLOCK]
        # One pass serves all tokens where the block lies in the prefix, else it takes one pass a token.
        shared = (block + 1) * BLOCK <= prefix
        first = tile * ROWS // G
        after = tl.where(shared, first + 1, tl.minimum((tile * ROWS + ROWS - 1) // G + 1, T))
        slot = gathered(position, prefix, slot_ptr, first, A)
        k = tl.load(k_ptr + slot[:, None] * D + d[None, :])                 # [BLOCK, D]
        v = tl.load(v_ptr + slot[:, None] * D + d[None, :])
        s = scores(k, q, position, seen, shared | (t == first), scale, tl.full([BLOCK, ROWS], float("-inf"), tl.float32))
        for token in range(first + 1, after):
            other = gathered(position, prefix, slot_ptr, token, A)
            s = scores(tl.load(k_ptr + other[:, None] * D + d[None, :]), q, position, seen, t == token, scale, s)
        new_top = tl.maximum(top, tl.max(s, axis=0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe[None, :])                                      # [BLOCK, ROWS]
        shrink = tl.exp2(top - safe)
        mass = mass * shrink + tl.sum(p, axis=0)
        top = new_top
        acc = weighted(v, p, shared | (t == first), acc * shrink[None, :])
        for token in range(first + 1, after):
            other = gathered(position, prefix, slot_ptr, token, A)
            acc = weighted(tl.load(v_ptr + other[:, None] * D + d[None, :]), p, t == token, acc)
    working = tl.minimum(splits, blocks)                                    # splits that have any block
    if split < working:
        last = working == 1
        if working > 1:
            group = tl.program_id(2) * tl.num_programs(1) + tile
            part = part_ptr + group * splits * D * ROWS + d[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
            stat = stat_ptr + group * splits * 2 * ROWS + tl.arange(0, ROWS)
            tl.store(part + split * D * ROWS, acc, mask=live[None, :])
            tl.store(stat + split * 2 * ROWS, top, mask=live)
            tl.store(stat + split * 2 * ROWS + ROWS, mass, mask=live)
            tl.debug_barrier()
            last = tl.atomic_add(arrival_ptr + group, 1, sem="acq_rel") == working - 1
            if last:
                tl.debug_barrier()
                mass, acc = combine(part, stat, live, working, D, ROWS)
                tl.store(arrival_ptr + group, 0)
        if last:
            out = acc / tl.where(mass == 0.0, 1.0, mass)[None, :]
            tl.store(out_ptr + at[None, :] * D + d[:, None], out.to(out_ptr.dtype.element_ty), mask=live[None, :])


def tree_attention(q, k, v, view):
    """As tree_attention_ref, over a View instead of a bool mask; D a power of two, k and v contiguous in [C, D]."""
    B, T, H, D = q.shape
    KV = k.shape[1]
    tiles, device = triton.cdiv(T * H // KV, ROWS), q.device
    out = torch.empty_like(q)
    part = torch.empty(B * KV * tiles * view.splits * D * ROWS, device=device)
    stat = torch.empty(B * KV * tiles * view.splits * 2 * ROWS, device=device)
    ancestors = view.ancestors
    assert B * KV * tiles <= view.arrivals.numel(), "more heads than the arrival counters are for"
    tree_attention_kernel[(view.splits, tiles, B * KV)](
        q, k, v, view.prefix_len, ancestors.slots, ancestors.count, out, part, stat, view.arrivals, T,
        ancestors.slots.shape[1], k.stride(0), k.stride(1), D ** -0.5 * LOG2_E, KV, H // KV, D, BLOCK, ROWS,
        PDL=pdl(device), num_warps=WARPS, **launch_options(device))
    return out

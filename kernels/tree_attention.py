"""Attention of a token tree over its prefix: the one attention of this project.

T new tokens of a sequence see its whole committed prefix (slots 0..prefix_len-1) and, of the S speculative slots behind
it, those that their row of the ancestor mask allows. A chain is a lower triangle, decoding is T = S = 1, N parallel
branches are N diagonals over a trunk, a prefill chunk is a big triangle.

Split-KV flash-decoding, bit-exact whatever surrounds a token. A token's keys, in the order of their positions in the
text, are cut into units of BLOCK at fixed positions. Each unit is attended to from zero by tensor core products, maxima
and elementwise maths, none of which depends on the tile that a row stands in. Unit u belongs to split u % SPLITS; a split
merges its units in order, always by `merge`, and at last the splits are added up. Merging what is absent changes no bit,
so it doesn't matter where a unit is attended to: those that lie in the prefix whole are the same for all tokens, and
programs of many rows share them (as many splits as the cache has room for: with less than SPLITS every unit has a split of
its own, as it would in a larger cache); the few behind them are gathered token by token along the token's own ancestors,
so that a branch of a tree computes what plain decoding of that branch would.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.launch import launch_options, pdl, wait_for_inputs

BLOCK = 64              # positions a unit
SPLITS = 32             # most programs that share the units of a prefix
ROWS = 64               # most (token, head) rows a tile; at least 16, the narrowest operand of a tensor core product
WARPS = 4               # a program
CHUNK = 16              # splits that are added up at once ...
COMBINE_WARPS = 2       # ... by a program of so many warps
STAGES = 2              # units in flight in the loop over a long prefix
LOG2_E = 1.4426950408889634             # softmax in powers of two


class Ancestors(NamedTuple):
    """An ancestor mask, and the same as lists: which speculative slots each new token sees, oldest first.

    Where they differ from sequence to sequence there's a B in front, and only the mask, for plain torch, or only the lists.
    """
    mask: torch.Tensor | None           # [T, S] bool
    slots: torch.Tensor | None          # [T, A] int32, A: the most that a token sees
    count: torch.Tensor | None          # [T] int32: how many of them

    @classmethod
    def of(cls, mask):
        """mask [T, S] bool; slots must be in the order of positions, i.e. parents stand before their children.

        Waits for the GPU to know A: make it of a topology, beforehand.
        """
        count = mask.sum(1, dtype=torch.int32)
        order = mask.to(torch.int32).argsort(dim=1, descending=True, stable=True)[:, :max(1, int(count.max()))]
        return cls(mask, order.to(torch.int32).contiguous(), count)


def sequences(ancestors, first, last):
    """Those of the sequences first..last-1, where each has its own; a mask or Ancestors of all are everybody's."""
    if not isinstance(ancestors, Ancestors) or (ancestors.mask if ancestors.count is None else ancestors.slots).dim() == 2:
        return ancestors
    return Ancestors(*(None if x is None else x[first:last] for x in ancestors))


def visibility_ref(prefix_len, mask, end):
    """Which slot each new token sees. prefix_len [B] int64, mask [T, S] or [B, T, S] bool or Ancestors -> [B, 1, T, end] bool.

    Speculative slot j of a sequence is cache slot prefix_len + j. Built once a forward, shared by all layers.
    """
    mask = mask.mask if isinstance(mask, Ancestors) else mask
    B, (T, S) = len(prefix_len), mask.shape[-2:]
    j = torch.arange(end, device=mask.device) - prefix_len[:, None]         # [B, end] index of the speculative slot
    tail = mask.expand(B, T, S).gather(2, j.clamp(0, S - 1)[:, None].expand(B, T, end))
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
    splits: int                         # programs that share the whole units of a prefix


def visibility(prefix_len, mask, end):
    """mask: [T, S] bool, or the Ancestors made of it beforehand, which saves sorting it. Returns a View."""
    ancestors = mask if isinstance(mask, Ancestors) else Ancestors.of(mask)
    return View(prefix_len, ancestors, min(SPLITS, end // BLOCK))


@triton.jit
def attend(q, k, v, keys, scale, BLOCK: tl.constexpr):
    """q [ROWS, D] attend to the first `keys` of k [D, BLOCK], v [BLOCK, D]. Returns top [ROWS], mass [ROWS], acc [ROWS, D].

    top is the largest product, not yet scaled: a product that is scaled and then subtracted from, the compiler would fuse
    in some places and not in others. The mass is a product with ones: the order of a sum over lanes would depend on the
    shape of the tile.
    """
    s = tl.dot(q, k, input_precision="ieee")                      # [ROWS, BLOCK]
    s = tl.where(tl.arange(0, BLOCK)[None, :] < keys, s, float("-inf"))
    top = tl.max(s, axis=1)
    p = tl.exp2((s - top[:, None]) * scale).to(v.dtype)
    mass = tl.max(tl.dot(p, tl.full([BLOCK, 16], 1.0, v.dtype), input_precision="ieee"), axis=1)
    return top, mass, tl.dot(p, v, input_precision="ieee")


@triton.jit
def merge(top1, mass1, acc1, top2, mass2, acc2, scale):
    """Two attentions over different keys made one; absent is (-inf, 0, 0). top, mass [R], acc [R, D]."""
    top = tl.maximum(top1, top2)
    safe = tl.where(top == float("-inf"), 0.0, top)
    w1, w2 = tl.exp2((top1 - safe) * scale), tl.exp2((top2 - safe) * scale)
    return top, tl.fma(mass1, w1, mass2 * w2), tl.fma(acc1, w1[:, None], acc2 * w2[:, None])


@triton.jit
def save(stat_ptr, part_ptr, at, live, top, mass, acc, d):
    """Leave partial results to combine_kernel; at [ROWS]: where each row's goes."""
    tl.store(stat_ptr + at * 2, top, mask=live)
    tl.store(stat_ptr + at * 2 + 1, mass, mask=live)
    tl.store(part_ptr + at[:, None] * acc.shape[1] + d[None, :], acc, mask=live[:, None])


@triton.jit
def tree_attention_kernel(q_ptr, k_ptr, v_ptr, prefix_ptr, slot_ptr, count_ptr, stat_ptr, part_ptr, T, A, stride_a, tiles, splits,
                          tails, stride_b, stride_h, scale, KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                          BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, TAIL_ROWS: tl.constexpr,
                          PDL: tl.constexpr):
    """Partial attention: rows (token, head of the group) x units of keys -> stat [B*T*H, splits + tails, 2], part [.., D].

    Bytes moved: K and V of the prefix once a tile of rows, of the rest once a token; part once. stride_a: from one
    sequence's ancestors to the next one's, in tokens: T, or 0 where all have the same.
    Grid: (tiles * splits prefix programs, then T tail programs; B * KV).
    """
    program, b, h = tl.program_id(0), tl.program_id(1) // KV, tl.program_id(1) % KV
    prefix = tl.load(prefix_ptr + b).to(tl.int32)                           # written before the step: no need to wait
    full = prefix // BLOCK                                                  # units that lie in the prefix whole
    split = program // tiles
    d, n = tl.arange(0, D), tl.arange(0, BLOCK)
    k_ptr += b.to(tl.int64) * stride_b + h * stride_h
    v_ptr += b.to(tl.int64) * stride_b + h * stride_h
    if split < splits:
        if split < full:
            r = program % tiles * ROWS + tl.arange(0, ROWS)
            t = r // G                                                      # [ROWS] token of each row
            live = t < T
            row = ((b * T + t) * KV + h) * G + r % G                        # [ROWS] of q
            slot = split * BLOCK + n                                        # [BLOCK]
            # The step writes nothing below its prefix, but for a draft that feeds the last token of it again.
            if (split + 1) * BLOCK == prefix:
                wait_for_inputs(PDL)
            k = tl.load(k_ptr + slot[None, :] * D + d[:, None])             # [D, BLOCK]
            v = tl.load(v_ptr + slot[:, None] * D + d[None, :])             # [BLOCK, D]
            wait_for_inputs(PDL)
            q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=live[:, None], other=0.0)       # [ROWS, D]
            top, mass, acc = attend(q, k, v, BLOCK, scale, BLOCK)
            for unit in tl.range(split + splits, full, splits, num_stages=STAGES):
                slot = unit * BLOCK + n
                k = tl.load(k_ptr + slot[None, :] * D + d[:, None])
                v = tl.load(v_ptr + slot[:, None] * D + d[None, :])
                top2, mass2, acc2 = attend(q, k, v, BLOCK, scale, BLOCK)
                top, mass, acc = merge(top, mass, acc, top2, mass2, acc2, scale)
            save(stat_ptr, part_ptr, row * (splits + tails) + split, live, top, mass, acc, d)
    else:
        t = program - tiles * splits
        line = b * stride_a + t                                             # written by none of the last kernels: no need to wait
        keys = prefix + tl.load(count_ptr + line) - full * BLOCK            # that the token sees in the units from `full` on
        # Some token sees itself, and so has a key here: some program of the grid always waits.
        if keys > 0:
            g = tl.arange(0, TAIL_ROWS)
            row = ((b * T + t) * KV + h) * G + g
            live = g < G                                                    # the rows are one token's heads
            place = n - prefix % BLOCK                                      # [BLOCK] among its speculative slots
            slot = tl.load(slot_ptr + line * A + place, mask=(place >= 0) & (n < keys), other=0)
            slot = prefix + tl.where(place < 0, place, slot)
            wait_for_inputs(PDL)
            q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
            for j in range(tl.cdiv(keys, BLOCK)):                           # nearly always a single unit
                left = keys - j * BLOCK
                k = tl.load(k_ptr + slot[None, :] * D + d[:, None], mask=(n < left)[None, :], other=0.0)
                v = tl.load(v_ptr + slot[:, None] * D + d[None, :], mask=(n < left)[:, None], other=0.0)
                top, mass, acc = attend(q, k, v, left, scale, BLOCK)
                save(stat_ptr, part_ptr, row * (splits + tails) + splits + j, live, top, mass, acc, d)
                place += BLOCK
                slot = prefix + tl.load(slot_ptr + line * A + place, mask=n < left - BLOCK, other=0)


@triton.jit
def partial(stat_ptr, part_ptr, at, there, d):
    """What `save` left at `at` [CHUNK], absent where it is not `there`."""
    top = tl.load(stat_ptr + at * 2, mask=there, other=float("-inf"))
    mass = tl.load(stat_ptr + at * 2 + 1, mask=there, other=0.0)
    acc = tl.load(part_ptr + at[:, None] * d.shape[0] + d[None, :], mask=there[:, None], other=0.0)
    return top, mass, acc


@triton.jit(do_not_specialize=["H", "stride_a", "splits", "tails"])
def combine_kernel(stat_ptr, part_ptr, prefix_ptr, count_ptr, out_ptr, H, stride_a, splits, tails, scale, D: tl.constexpr,
                   BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """out [B, T, H, D] from the partial results, which are the bytes moved. Grid: (T * H, B).

    There is one compiled kernel for all steps of a model, and so one order of the sums over the splits: those of a chunk
    at once, chunk after chunk.
    """
    prefix = tl.load(prefix_ptr + tl.program_id(1)).to(tl.int32)
    seen = prefix + tl.load(count_ptr + tl.program_id(1) * stride_a + tl.program_id(0) // H)
    full, units = prefix // BLOCK, tl.cdiv(seen, BLOCK)
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at, d = row * (splits + tails), tl.arange(0, D)
    wait_for_inputs(PDL)
    top, mass = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    out = tl.zeros([1, D], tl.float32)
    for first in range(0, tl.minimum(units, SPLITS), CHUNK):
        split = first + tl.arange(0, CHUNK)
        place = tl.where(split < full, split, splits + split - full)
        top1, mass1, acc1 = partial(stat_ptr, part_ptr, at + place, split < units, d)       # [CHUNK], .., [CHUNK, D]
        if units > SPLITS:                              # some splits have units of both sorts
            j = (split - full) & (SPLITS - 1)
            both = (split < full) & (full + j < units)
            top2, mass2, acc2 = partial(stat_ptr, part_ptr, at + splits + j, both, d)
            top1, mass1, acc1 = merge(top1, mass1, acc1, top2, mass2, acc2, scale)
        highest = tl.max(top1, axis=0, keep_dims=True)
        weight = tl.exp2((top1 - highest) * scale)
        mass1, acc1 = tl.sum(weight * mass1, axis=0, keep_dims=True), tl.sum(weight[:, None] * acc1, axis=0, keep_dims=True)
        top, mass, out = merge(top, mass, out, highest, mass1, acc1, scale)
    out = out / mass[:, None]
    tl.store(out_ptr + row * D + d[None, :], out.to(out_ptr.dtype.element_ty))


def tree_attention(q, k, v, view):
    """As tree_attention_ref, over a View instead of a bool mask; D a power of two, k and v contiguous in [C, D]."""
    B, T, H, D = q.shape
    KV, G, device = k.shape[1], H // k.shape[1], q.device
    prefix_len, (_, slots, count), splits = view
    A, stride_a = slots.shape[-1], T * (slots.dim() == 3)
    tails = triton.cdiv(A - 1, BLOCK) + 1                                   # units that A positions may touch
    rows = min(ROWS, max(16, triton.next_power_of_2(T * G)))
    tiles = triton.cdiv(T * G, rows)
    out = torch.empty_like(q)
    stat = torch.empty(B * T * H, splits + tails, 2, device=device)
    part = torch.empty(B * T * H, splits + tails, D, device=device)
    scale, options = D ** -0.5 * LOG2_E, dict(PDL=pdl(device), **launch_options(device))
    tree_attention_kernel[(tiles * splits + T, B * KV)](
        q, k, v, prefix_len, slots, count, stat, part, T, A, stride_a, tiles, splits, tails, k.stride(0), k.stride(1), scale,
        KV, G, D, BLOCK, rows, STAGES, max(16, triton.next_power_of_2(G)), num_warps=WARPS, **options)
    combine_kernel[(T * H, B)](stat, part, prefix_len, count, out, H, stride_a, splits, tails, scale, D, BLOCK, SPLITS,
                               min(CHUNK, SPLITS), num_warps=COMBINE_WARPS, **options)
    return out

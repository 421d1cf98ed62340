"""Skinny linear layers with everything that touches their input or output folded in.

At batch 1 a linear streams its weight once (N*K elements) and moves next to nothing else, so every op that is no weight
stream is a launch to get rid of: the residual, RMSNorm, SwiGLU, and QKV-split + RoPE + KV write go into the epilogues.
Four linears and one attention are then a whole Transformer layer. (What is written here is for weights that take a while to
stream; small ones are taken at once, see kernels/at_once.py. What becomes of a product is in kernels/finish.py.)

RMSNorm costs nothing: whoever writes the residual stream x also writes x times the weight of the norm that reads it next,
and adds up the squares of each row. The reader multiplies with the former, and scales its result by the latter.

Grid: one program per block of output rows, or fewer that take several blocks in turn. Blocks and steps along K are one
loop then: the first weights of the next block are on their way while this one ends. A program computes
W[BN, K] @ x.T[K, BM]: the weight is the left operand, so that rows of x are only columns of the result, and the order of
every sum is the same for 1 row of x and for 128. That makes decoding and verifying bit-exact:
  - the split of K depends on the shape of W alone, on one kind of GPU (the width of a program, BK, stages and warps don't change the order
    of a sum: mma.sync and wgmma add the products of 16 k, then the next 16, whatever the tile);
  - split-K partials are added in order by whichever program of a block comes last;
  - sums are fixed-point integers, which add up to the same in any order.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import at_once
from kernels.finish import angles_at, finish, finish_qkv, finish_swiglu, paired_rows, rms_scale, stream_at, weight_scale
from kernels.launch import AtOnce, Int8Weight, Launch, dense, next_may_start, prefetch, wait_for_inputs


# ---------------------------------------------------------------------------------------------------------------------
# In plain torch: what correct means

def rms_norm_ref(x, weight, eps, sums=None):
    """x / rms(x) * weight over the last axis; the statistics are fp32 whatever the dtype (Zhang & Sennrich 2019).

    sums [...] float32: the sums of squares of x, if they are known already.
    """
    h = x.float()
    sums = h.pow(2).sum(-1) if sums is None else sums
    h = h * torch.rsqrt(sums / x.shape[-1] + eps)[..., None]
    return weight * h.to(x.dtype)


class Stream(NamedTuple):
    """The residual stream behind a layer's half."""
    x: torch.Tensor                     # [..., dim]
    weighed: torch.Tensor | None        # [..., dim] x * weight of the norm that reads it next, in x's dtype (twins: None)
    sums: torch.Tensor                  # [...] sums of x^2: float32 in the twins, int64 in units of 2^-28 in Triton


def linear_ref(x, w, out_dtype=None):
    """x [..., K] @ w [N, K].T -> y [..., N]. w is a tensor or an Int8Weight, here and below. out_dtype: of y, default x's."""
    return F.linear(x, dense(w, x)).to(out_dtype or x.dtype)


def add_linear_ref(x, w, stream, norm, sums):
    """x [..., K] @ w [N, K].T added to a Stream: the next Stream. norm [N]: weight of the norm that reads it next; sums
    [...]: zeros, which become the next Stream's."""
    y = stream.x + F.linear(x, dense(w, x))
    return Stream(y, None, sums.copy_(y.float().pow(2).sum(-1)))


def swiglu_linear_ref(stream, norm, eps, w):
    """SwiGLU of the normed Stream [..., K]: w [2F, K] holds the gate rows, then the up rows. Returns [..., F]."""
    h = rms_norm_ref(stream.x, norm, eps, stream.sums)
    gate, up = F.linear(h, dense(w, h)).chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x, cos, sin):
    """RoPE in HF's half-split layout: pairs (i, i + D/2). x [B, T, heads, D]; cos, sin [B, T, D/2] fp32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]                             # [B, T, 1, D/2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def qkv_rope_ref(stream, norm, eps, w, cos, sin, slots, k_cache, v_cache):
    """Norm, project, rotate, and write K and V into their cache slots.

    stream [B, T, K]; w [(H + 2 KV) D, K], rows q then k then v; cos, sin [B, T, D/2]; slots [B, T];
    k_cache, v_cache [B, KV, C, D], written in place. Returns q [B, T, H, D].
    """
    B, T, _ = stream.x.shape
    KV, D = k_cache.shape[1], k_cache.shape[3]
    h = rms_norm_ref(stream.x, norm, eps, stream.sums)
    qkv = F.linear(h, dense(w, h)).view(B, T, -1, D)                        # [B, T, H + 2 KV, D]
    q, k, v = qkv.split([qkv.shape[2] - 2 * KV, KV, KV], dim=2)
    batch = torch.arange(B, device=h.device)[:, None]
    k_cache[batch, :, slots] = rotate(k, cos, sin)                          # [B, T, KV, D]
    v_cache[batch, :, slots] = v
    return rotate(q, cos, sin)


# ---------------------------------------------------------------------------------------------------------------------
# In Triton

@triton.jit
def multiply(x_ptr, w_ptr, rows, k, M, N, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, acc):
    """acc [BN, BM] + W[rows, k:k+BK] @ x.T[k:k+BK]."""
    m, kk = tl.arange(0, BM), k + tl.arange(0, BK)
    w_mask, x_mask = (rows < N)[:, None], (m < M)[None, :]
    if K % BK:
        w_mask, x_mask = w_mask & (kk < K)[None, :], x_mask & (kk < K)[:, None]
    w = tl.load(w_ptr + rows[:, None].to(tl.int64) * K + kk[None, :], mask=w_mask, other=0.0, eviction_policy="evict_first")
    x = tl.load(x_ptr + m[None, :] * K + kk[:, None], mask=x_mask, other=0.0)
    return tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")


@triton.jit
def linear_kernel(x_ptr, w_ptr, scale_ptr, residual_ptr, norm_ptr, y_ptr, weighed_ptr, sums_ptr, M, N, K: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  INT8: tl.constexpr, ADD: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr):
    """y = x W^T, or the next stream."""
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    first, programs = tl.program_id(0), tl.num_programs(0)
    prefetch(w_ptr, first * BN, N, K, 0, BN, PREFETCH, PDL)
    wait_for_inputs(PDL, LATER=True)
    residual, norm = stream_at(residual_ptr, norm_ptr, first * BN + n, m, M, N, ADD)
    acc = tl.zeros([BN, BM], tl.float32)
    steps = tl.cdiv(tl.cdiv(N, BN) - first, programs) * STEPS
    for step in range(steps):
        next_may_start(steps - step, PDL)
        block = first + step // STEPS * programs
        acc = multiply(x_ptr, w_ptr, block * BN + n, step % STEPS * BK, M, N, K, BM, BK, acc)
        if step % STEPS == STEPS - 1:
            finish(acc, residual, norm, scale_ptr, y_ptr, weighed_ptr, sums_ptr, block * BN + n, m, M, N, INT8, ADD)
            acc = tl.zeros([BN, BM], tl.float32)
            residual, norm = stream_at(residual_ptr, norm_ptr, (block + programs) * BN + n, m, M, N, ADD)


@triton.jit
def split_kernel(x_ptr, w_ptr, scale_ptr, residual_ptr, norm_ptr, y_ptr, weighed_ptr, sums_ptr, part_ptr, count_ptr, M, N,
                 K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 SPLIT: tl.constexpr, INT8: tl.constexpr, ADD: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr):
    """The same with SPLIT programs a block. Work p is part p % SPLIT of K of block p // SPLIT; whoever is last adds up."""
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    SPAN: tl.constexpr = (K + 512 * SPLIT - 1) // (512 * SPLIT) * 512       # of K a part: whole steps for any BK up to 512
    first = tl.program_id(0)
    prefetch(w_ptr, first // SPLIT * BN, N, K, (first % SPLIT) * SPAN, BN, PREFETCH, PDL)
    wait_for_inputs(PDL, LATER=True)
    for work in range(first, tl.cdiv(N, BN) * SPLIT, tl.num_programs(0)):
        block, part = work // SPLIT, work % SPLIT
        rows = block * BN + n
        if BM == 16:                                                        # asked for early, it is here when needed
            residual, norm = stream_at(residual_ptr, norm_ptr, rows, m, M, N, ADD)
        acc = tl.zeros([BN, BM], tl.float32)
        end = tl.minimum(part * SPAN + SPAN, K)
        for k in range(part * SPAN, end, BK):
            next_may_start(tl.cdiv(end - k, BK), PDL)
            acc = multiply(x_ptr, w_ptr, rows, k, M, N, K, BM, BK, acc)
        tile = part_ptr + block * SPLIT * BN * BM + n[:, None] * BM + m[None, :]
        tl.store(tile + part * BN * BM, acc)
        tl.debug_barrier()                                                  # all of the tile is out before we say so
        if tl.atomic_add(count_ptr + block, 1, sem="acq_rel") == SPLIT - 1:
            tl.debug_barrier()
            acc = tl.load(tile, volatile=True)
            for other in tl.static_range(1, SPLIT):
                acc += tl.load(tile + other * BN * BM, volatile=True)
            tl.store(count_ptr + block, 0)                                  # ready for the next launch
            if BM > 16:
                residual, norm = stream_at(residual_ptr, norm_ptr, rows, m, M, N, ADD)
            finish(acc, residual, norm, scale_ptr, y_ptr, weighed_ptr, sums_ptr, rows, m, M, N, INT8, ADD)


@triton.jit
def swiglu_kernel(x_ptr, sums_ptr, eps, w_ptr, scale_ptr, y_ptr, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, INT8: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr):
    """y [M, N/2] = silu(gate) * up; a block holds BN/2 gate rows and the up rows that go with them."""
    m = tl.arange(0, BM)
    half = N // 2
    STEPS: tl.constexpr = (K + BK - 1) // BK
    first, programs = tl.program_id(0), tl.num_programs(0)
    prefetch(w_ptr, first * (BN // 2), half, K, 0, BN // 2, PREFETCH // 2, PDL)
    prefetch(w_ptr + half * K, first * (BN // 2), half, K, 0, BN // 2, PREFETCH // 2, PDL)
    wait_for_inputs(PDL, LATER=True)
    sums = tl.load(sums_ptr + m, mask=m < M, other=0)                       # used at last: asking for it delays nothing
    acc = tl.zeros([BN, BM], tl.float32)
    steps = tl.cdiv(tl.cdiv(half, BN // 2) - first, programs) * STEPS
    for step in range(steps):
        next_may_start(steps - step, PDL)
        block = first + step // STEPS * programs
        rows = paired_rows(block, half, BN)
        acc = multiply(x_ptr, w_ptr, rows, step % STEPS * BK, M, N, K, BM, BK, acc)
        if step % STEPS == STEPS - 1:
            y = weight_scale(acc, scale_ptr, rows, N, INT8) * rms_scale(sums, eps, K)[None, :]
            finish_swiglu(y, y_ptr, block * (BN // 2), m, M, half, BN, BM)
            acc = tl.zeros([BN, BM], tl.float32)


@triton.jit
def qkv_kernel(x_ptr, sums_ptr, eps, w_ptr, scale_ptr, cos_ptr, sin_ptr, slot_ptr, q_ptr, k_ptr, v_ptr, M, T,
               H: tl.constexpr, KV: tl.constexpr, stride_b, stride_h, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BK: tl.constexpr, INT8: tl.constexpr, PREFETCH: tl.constexpr,
               PDL: tl.constexpr):
    """q [M, H, D], and K, V in their slots; a block holds BN/2 RoPE pairs (i, i + D/2) of one head."""
    m, pairs = tl.arange(0, BM), tl.arange(0, BN // 2)
    N: tl.constexpr = (H + 2 * KV) * D
    BLOCKS: tl.constexpr = D // BN                                          # a head
    STEPS: tl.constexpr = (K + BK - 1) // BK
    first, programs = tl.program_id(0), tl.num_programs(0)
    top = first // BLOCKS * D + first % BLOCKS * (BN // 2)
    prefetch(w_ptr, top, N, K, 0, BN // 2, PREFETCH // 2, PDL)
    prefetch(w_ptr, top + D // 2, N, K, 0, BN // 2, PREFETCH // 2, PDL)
    wait_for_inputs(PDL, LATER=True)
    sums, slot = tl.load(sums_ptr + m, mask=m < M, other=0), tl.load(slot_ptr + m, mask=m < M, other=0)
    cos, sin = angles_at(cos_ptr, sin_ptr, first % BLOCKS * (BN // 2) + pairs, m, M, D)
    acc = tl.zeros([BN, BM], tl.float32)
    steps = tl.cdiv(N // BN - first, programs) * STEPS
    for step in range(steps):
        next_may_start(steps - step, PDL)
        block = first + step // STEPS * programs
        rows = block // BLOCKS * D + paired_rows(block % BLOCKS, D // 2, BN)
        acc = multiply(x_ptr, w_ptr, rows, step % STEPS * BK, M, N, K, BM, BK, acc)
        if step % STEPS == STEPS - 1:
            y = weight_scale(acc, scale_ptr, rows, N, INT8) * rms_scale(sums, eps, K)[None, :]
            finish_qkv(y, cos, sin, slot, q_ptr, k_ptr, v_ptr, block, m, M, T, H, KV, stride_b, stride_h, D, BN, BM)
            acc = tl.zeros([BN, BM], tl.float32)
            cos, sin = angles_at(cos_ptr, sin_ptr, (block + programs) % BLOCKS * (BN // 2) + pairs, m, M, D)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers: the contract of the twins, for up to MAX_ROWS rows (B*T) of contiguous tensors

def linear(x, w, out_dtype=None, share=None):
    """As linear_ref."""
    N = len(w.scale if isinstance(w, Int8Weight) else w)
    y = torch.empty(*x.shape[:-1], N, device=x.device, dtype=out_dtype or x.dtype)
    launch_linear(x, w, (x, x, y, x, x), False, share)
    return y


def add_linear(x, w, stream, norm, sums, share=None):
    """As add_linear_ref."""
    y, weighed = torch.empty_like(stream.x), torch.empty_like(stream.x)
    launch_linear(x, w, (stream.x, norm, y, weighed, sums), True, share)
    return Stream(y, weighed, sums)


def launch_linear(x, w, outputs, add, share):
    """Launch one of the kernels. outputs: what stands between scale_ptr and M among their arguments."""
    launch = AtOnce(x, w)
    if launch.warps:
        at_once.linear_kernel[launch.grid](x, launch.weight, launch.scale, *outputs, launch.M, launch.N, launch.K, ADD=add,
                                           **launch.shape)
        return
    launch = Launch(x, w, share=share)
    shape = launch.M, launch.N, launch.K, launch.BM, launch.BN, launch.BK
    if launch.SPLIT == 1:
        linear_kernel[launch.grid](x, launch.weight, launch.scale, *outputs, *shape, launch.INT8, add, **launch.options)
    else:
        split_kernel[launch.grid](x, launch.weight, launch.scale, *outputs, *launch.scratch(), *shape, launch.SPLIT,
                                  launch.INT8, add, **launch.options)


def swiglu_linear(stream, norm, eps, w, share=None):
    """As swiglu_linear_ref; the norm's weight is in stream.weighed."""
    x, launch = stream.weighed, AtOnce(stream.weighed, w)
    y = torch.empty(*x.shape[:-1], launch.N // 2, device=x.device, dtype=x.dtype)
    if launch.warps:
        at_once.swiglu_kernel[launch.grid](x, stream.sums, eps, launch.weight, launch.scale, y, launch.M, launch.N, launch.K,
                                           **launch.shape)
        return y
    launch = Launch(x, w, share=share)
    swiglu_kernel[launch.grid](
        x, stream.sums, eps, launch.weight, launch.scale, y, launch.M, launch.N, launch.K, launch.BM, launch.BN, launch.BK,
        launch.INT8, **launch.options)
    return y


def qkv_rope(stream, norm, eps, w, cos, sin, slots, k_cache, v_cache, share=None):
    """As qkv_rope_ref; the norm's weight is in stream.weighed."""
    x = stream.weighed
    B, T, _ = x.shape
    _, KV, _, D = k_cache.shape
    launch = AtOnce(x, w)
    H = launch.N // D - 2 * KV
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[2:] == (D, 1)
    q = torch.empty(B, T, H, D, device=x.device, dtype=x.dtype)
    inputs = x, stream.sums, eps, launch.weight, launch.scale, cos, sin, slots.contiguous()
    shape = launch.M, T, H, KV, k_cache.stride(0), k_cache.stride(1), launch.K, D
    if launch.warps and D >= 16:
        at_once.qkv_kernel[launch.grid](*inputs, q, k_cache, v_cache, *shape, **launch.shape)
        return q
    launch = Launch(x, w, most=D, share=share)
    qkv_kernel[launch.grid](*inputs, q, k_cache, v_cache, *shape, launch.BM, launch.BN, launch.BK, launch.INT8,
                            **launch.options)
    return q

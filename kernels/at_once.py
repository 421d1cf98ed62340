"""Linears of small models, where a weight is so small that latency is all they cost: everything is asked for at once.

A weight of 576 x 576 streams in half a microsecond; a loop along K whose tiles arrive in turn takes two, and so does one
chain of tensor core products. So there is no loop here. A program asks for its 16 rows of the weight before it waits for
its inputs, then for its 16 rows of x, all of K in one go, and each warp multiplies a part of K of its own.

Grid: (blocks of 16 weight rows, tiles of 16 rows of x). It's the same program for any number of rows of x, with the same
order of every sum: bit-exactness needs no more care. Bytes moved: the weight once a tile (what a small one costs, the L2
cache pays); for what becomes of the result see kernels/finish.py.
"""
import triton
import triton.language as tl

from kernels.finish import angles_at, finish, finish_qkv, finish_swiglu, paired_rows, rms_scale, stream_at, weight_scale
from kernels.launch import wait_for_inputs


@triton.jit
def columns(ptr, rows, live, k, COUNT: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr):
    """COUNT columns from k on of some rows [R] of a matrix [.., K], cut into parts: [PARTS, R, COUNT / PARTS]."""
    part, i = tl.arange(0, PARTS)[:, None, None], tl.arange(0, COUNT // PARTS)[None, None, :]
    at = rows[None, :, None].to(tl.int64) * K + k + part * (COUNT // PARTS) + i
    return tl.load(ptr + at, mask=live[None, :, None], other=0.0)


@triton.jit
def all_columns(ptr, rows, live, K: tl.constexpr, PARTS: tl.constexpr):
    """All K of them, a piece for each power of two that K consists of (blocks have such sizes)."""
    pieces = ()
    for i in tl.static_range(6):                        # 2048 to 64
        if (K >> (11 - i)) & 1:
            pieces = pieces + (columns(ptr, rows, live, (K >> (12 - i)) << (12 - i), 2048 >> i, K, PARTS),)
    return pieces


@triton.jit
def multiply_all(x, w, M, PIECES: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """W x.T [BN, BM] fp32 of pieces of x [BM, K] and W [BN, K]: the parts, each in a warp of its own, are added up last.

    x is multiplied by a 1 that the compiler doesn't know to be one: what goes into a product as it is, it waits for right
    where it is loaded, and one piece would be asked for after the other. (The weight does go as it is: it is waited for before
    the inputs are. To start the next kernel sooner, while this one's weight is still on its way, made both slower.)
    """
    one = (M > 0).to(x[0].dtype)
    acc = tl.zeros([PARTS, BN, BM], tl.float32)
    for i in tl.static_range(PIECES):
        acc = tl.dot(w[i].to(x[i].dtype), tl.permute(x[i] * one, (0, 2, 1)), acc, input_precision="ieee")
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(x_ptr, w_ptr, scale_ptr, residual_ptr, norm_ptr, y_ptr, weighed_ptr, sums_ptr, M, N, K: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr, INT8: tl.constexpr,
                  ADD: tl.constexpr, PDL: tl.constexpr):
    """y = x W^T, or the next stream."""
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    w = all_columns(w_ptr, n, n < N, K, PARTS)
    wait_for_inputs(PDL)
    x = all_columns(x_ptr, m, m < M, K, PARTS)
    residual, norm = stream_at(residual_ptr, norm_ptr, n, m, M, N, ADD)
    y = multiply_all(x, w, M, PIECES, PARTS, BN, BM)
    finish(y, residual, norm, scale_ptr, y_ptr, weighed_ptr, sums_ptr, n, m, M, N, INT8, ADD)


@triton.jit(do_not_specialize=["M"])
def swiglu_kernel(x_ptr, sums_ptr, eps, w_ptr, scale_ptr, y_ptr, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  PARTS: tl.constexpr, PIECES: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr):
    """y [M, N/2] = silu(gate) * up."""
    block, m = tl.program_id(0), tl.program_id(1) * BM + tl.arange(0, BM)
    rows = paired_rows(block, N // 2, BN)
    w = all_columns(w_ptr, rows, rows < N, K, PARTS)
    wait_for_inputs(PDL)
    x = all_columns(x_ptr, m, m < M, K, PARTS)
    sums = tl.load(sums_ptr + m, mask=m < M, other=0)
    y = multiply_all(x, w, M, PIECES, PARTS, BN, BM)
    y = weight_scale(y, scale_ptr, rows, N, INT8) * rms_scale(sums, eps, K)[None, :]
    finish_swiglu(y, y_ptr, block * (BN // 2), m, M, N // 2, BN, BM)


@triton.jit(do_not_specialize=["M"])
def qkv_kernel(x_ptr, sums_ptr, eps, w_ptr, scale_ptr, cos_ptr, sin_ptr, slot_ptr, q_ptr, k_ptr, v_ptr, M, T,
               H: tl.constexpr, KV: tl.constexpr, stride_b, stride_h, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr):
    """q [M, H, D], and K, V in their slots."""
    block, m = tl.program_id(0), tl.program_id(1) * BM + tl.arange(0, BM)
    BLOCKS: tl.constexpr = D // BN                                          # a head
    N: tl.constexpr = (H + 2 * KV) * D
    rows = block // BLOCKS * D + paired_rows(block % BLOCKS, D // 2, BN)
    w = all_columns(w_ptr, rows, rows < N, K, PARTS)
    wait_for_inputs(PDL)
    x = all_columns(x_ptr, m, m < M, K, PARTS)
    sums, slot = tl.load(sums_ptr + m, mask=m < M, other=0), tl.load(slot_ptr + m, mask=m < M, other=0)
    cos, sin = angles_at(cos_ptr, sin_ptr, block % BLOCKS * (BN // 2) + tl.arange(0, BN // 2), m, M, D)
    y = multiply_all(x, w, M, PIECES, PARTS, BN, BM)
    y = weight_scale(y, scale_ptr, rows, N, INT8) * rms_scale(sums, eps, K)[None, :]
    finish_qkv(y, cos, sin, slot, q_ptr, k_ptr, v_ptr, block, m, M, T, H, KV, stride_b, stride_h, D, BN, BM)

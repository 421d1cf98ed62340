"""What becomes of a block y [BN, BM] of x W^T before it is written: the ends of all linears.

BN rows of the weight, BM rows of x. Nothing here adds up along a row of y but fixed-point integers, so that no bit depends
on the shape of a block.
"""
import triton
import triton.language as tl

FIXED = tl.constexpr(2.0**28)           # a sum of squares is an int64 in units of 2^-28: up to 3.4e10, and off by less than eps notices


@triton.jit
def rms_scale(total, eps, K: tl.constexpr):
    """1 / rms of each row of x, [BM] fp32, from its sums of squares."""
    return tl.rsqrt(total.to(tl.float32) / FIXED / K + eps)


@triton.jit
def weight_scale(acc, scale_ptr, rows, N, INT8: tl.constexpr):
    """Undo the per-row scale of an int8 weight."""
    if INT8:
        acc = acc * tl.load(scale_ptr + rows, mask=rows < N, other=0.0)[:, None]
    return acc


@triton.jit
def stream_at(residual_ptr, norm_ptr, rows, m, M, N, ADD: tl.constexpr):
    """What a block of the stream was [BN, BM], and the next norm's weight for it [BN] (without ADD: anything)."""
    inside = (rows < N)[:, None] & (m < M)[None, :] & ADD
    return (tl.load(residual_ptr + m[None, :] * N + rows[:, None], mask=inside, other=0.0),
            tl.load(norm_ptr + rows, mask=(rows < N) & ADD, other=0.0))


@triton.jit
def finish(y, residual, norm, scale_ptr, y_ptr, weighed_ptr, sums_ptr, rows, m, M, N, INT8: tl.constexpr, ADD: tl.constexpr):
    """Write y; with ADD, of the stream: + residual, then y * norm and the sums of y^2 too. rows [BN], m [BM]: which they are."""
    inside = (rows < N)[:, None] & (m < M)[None, :]
    at = m[None, :] * N + rows[:, None]
    y = weight_scale(y, scale_ptr, rows, N, INT8)
    if ADD:
        y += residual.to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=inside)
    if ADD:
        y = tl.where(inside, y.to(tl.float32), 0.0)
        tl.store(weighed_ptr + at, (y * norm.to(tl.float32)[:, None]).to(y_ptr.dtype.element_ty), mask=inside)
        tl.atomic_add(sums_ptr + m, tl.sum((y * y * FIXED).to(tl.int64), axis=0), mask=m < M, sem="relaxed")


@triton.jit
def paired_rows(block, half, BN: tl.constexpr):
    """Rows of a block that takes BN/2 rows each from two places `half` apart, interleaved: [BN]."""
    n = tl.arange(0, BN)
    return block * (BN // 2) + n // 2 + (n % 2) * half


@triton.jit
def unpair(acc, BN: tl.constexpr, BM: tl.constexpr):
    """Split the interleaved rows of acc [BN, BM] again: two [BN/2, BM]."""
    return tl.split(tl.permute(tl.reshape(acc, [BN // 2, 2, BM]), [0, 2, 1]))


@triton.jit
def finish_swiglu(y, y_ptr, first, m, M, half, BN: tl.constexpr, BM: tl.constexpr):
    """Write silu(gate) * up of BN/2 paired rows to columns first.. of y [M, half]; m [BM]: the rows of x."""
    gate, up = unpair(y, BN, BM)
    y = gate * tl.sigmoid(gate) * up
    n = first + tl.arange(0, BN // 2)
    tl.store(y_ptr + m[None, :] * half + n[:, None], y.to(y_ptr.dtype.element_ty),
             mask=(n < half)[:, None] & (m < M)[None, :])


@triton.jit
def angles_at(cos_ptr, sin_ptr, pair, m, M, D: tl.constexpr):
    """cos and sin of some RoPE pairs [P] of the rows m [BM]: [P, BM]."""
    at, live = m[None, :] * (D // 2) + pair[:, None], (m < M)[None, :]
    return tl.load(cos_ptr + at, mask=live, other=0.0), tl.load(sin_ptr + at, mask=live, other=0.0)


@triton.jit
def finish_qkv(y, cos, sin, slot, q_ptr, k_ptr, v_ptr, block, m, M, T, H: tl.constexpr, KV: tl.constexpr, stride_b, stride_h,
               D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Rotate BN/2 RoPE pairs (i, i + D/2) of a head, if it is one of q or k; write them to q [M, H, D], or K or V to its slot."""
    BLOCKS: tl.constexpr = D // BN                                          # a head
    head, live = block // BLOCKS, (m < M)[None, :]
    a, b = unpair(y.to(q_ptr.dtype.element_ty).to(tl.float32), BN, BM)
    i = (block % BLOCKS * (BN // 2) + tl.arange(0, BN // 2))[:, None]       # pair within the head
    if head < H + KV:
        a, b = a * cos - b * sin, b * cos + a * sin
    a, b = a.to(q_ptr.dtype.element_ty), b.to(q_ptr.dtype.element_ty)
    if head < H:
        at = q_ptr + (m[None, :] * H + head) * D + i
        tl.store(at, a, mask=live)
        tl.store(at + D // 2, b, mask=live)
    else:
        row = (m // T).to(tl.int64) * stride_b + ((head - H) % KV) * stride_h + slot * D                 # [BM] int64
        if head < H + KV:
            tl.store(k_ptr + row[None, :] + i, a, mask=live)
            tl.store(k_ptr + row[None, :] + i + D // 2, b, mask=live)
        else:
            tl.store(v_ptr + row[None, :] + i, a, mask=live)
            tl.store(v_ptr + row[None, :] + i + D // 2, b, mask=live)

"""The end of a step: final norm, and the vocabulary projection (V * dim elements) down to the few best tokens.

Logits of 128k words for every row of a tree are megabytes that nobody needs when the question is "which token" or
"which F tokens": `best` adds the sampling noise to a block of logits while it is still in registers and keeps the
block's F best; a second, small kernel picks the F best of all blocks. Grid: blocks of the vocabulary; then rows.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.launch import Launch, dense, launch_options, pdl, prefetch, wait_for_inputs
from kernels.linear import linear, multiply, weight_scale
from kernels.noise import gumbel32, gumbel_ref


def head_ref(hidden, w):
    """hidden [..., dim] after the final norm, w [V, dim] -> logits [..., V] float32."""
    return F.linear(hidden, dense(w, hidden)).float()


def best_ref(hidden, w, n, temperature, seeds, stream, positions, ids=None):
    """The n best tokens (indices of w's rows) of each position, best first, by logits / temperature + Gumbel noise.

    hidden [B, T, dim]; temperature 0: by the logits alone; seeds [B], positions [B, T], ids [V] or None: see `gumbel`;
    a row with id -1 is no token and never chosen. Returns tokens [B, T, n] int64 and their scores [B, T, n] float32.
    """
    scores = head_ref(hidden, w)
    if temperature > 0:
        noise_ids = torch.arange(scores.shape[-1], device=scores.device) if ids is None else ids
        scores = scores / temperature + gumbel_ref(seeds, stream, positions, noise_ids)
    if ids is not None:
        scores = scores.masked_fill(ids < 0, -torch.inf)
    best = scores.topk(min(n, scores.shape[-1]))
    return best.indices, best.values


@triton.jit
def norm_kernel(x_ptr, weight_ptr, y_ptr, eps, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * K + i, mask=i < K, other=0.0)
    h = x.to(tl.float32)
    h = (h * tl.rsqrt(tl.sum(h * h, axis=0) / K + eps)).to(x.dtype)
    tl.store(y_ptr + tl.program_id(0) * K + i, h * tl.load(weight_ptr + i, mask=i < K, other=0.0), mask=i < K)


@triton.jit
def take_best(values, ids, order, NONE: tl.constexpr):
    """Column maxima of values [N, M]: (value, id of it, values without it); ties go to the lowest order [N, 1]."""
    value = tl.max(values, axis=0)
    at = tl.min(tl.where(values == value[None, :], order, NONE), axis=0)
    chosen = order == at[None, :]
    return value, tl.sum(tl.where(chosen, ids, 0), axis=0), tl.where(chosen, float("-inf"), values)


@triton.jit
def best_kernel(x_ptr, w_ptr, scale_ptr, seed_ptr, position_ptr, id_ptr, value_ptr, index_ptr, temperature, stream, M, T,
                N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, n: tl.constexpr,
                NOISE: tl.constexpr, IDS: tl.constexpr, INT8: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr):
    m = tl.arange(0, BM)
    live = m < M
    STEPS: tl.constexpr = (K + BK - 1) // BK
    first, programs = tl.program_id(0), tl.num_programs(0)
    prefetch(w_ptr, first * BN, N, K, 0, BN, PREFETCH, PDL)
    wait_for_inputs(PDL)
    acc = tl.zeros([BN, BM], tl.float32)
    for step in range(tl.cdiv(tl.cdiv(N, BN) - first, programs) * STEPS):
        block = first + step // STEPS * programs
        rows = block * BN + tl.arange(0, BN)
        acc = multiply(x_ptr, w_ptr, rows, step % STEPS * BK, M, N, K, BM, BK, acc)
        if step % STEPS == STEPS - 1:
            scores = weight_scale(acc, scale_ptr, rows, N, INT8)
            ids = rows.to(tl.int64)
            if IDS:
                ids = tl.load(id_ptr + rows, mask=rows < N, other=-1)
            if NOISE:
                seed = tl.load(seed_ptr + m // T, mask=live, other=0)
                position = tl.load(position_ptr + m, mask=live, other=0)
                scores = scores / temperature + gumbel32(seed, stream, position, ids)
            scores = tl.where((rows < N)[:, None] & (ids >= 0)[:, None], scores, float("-inf"))
            order = tl.arange(0, BN)[:, None]
            for i in tl.static_range(n):
                value, at, scores = take_best(scores, order, order, BN)
                tl.store(value_ptr + (m * tl.cdiv(N, BN) + block) * n + i, value, mask=live)
                tl.store(index_ptr + (m * tl.cdiv(N, BN) + block) * n + i, block * BN + at, mask=live)
            acc = tl.zeros([BN, BM], tl.float32)


@triton.jit
def pick_kernel(value_ptr, index_ptr, out_ptr, score_ptr, C, n: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The n best of C candidates of a row."""
    wait_for_inputs(PDL)
    m = tl.program_id(0)
    i = tl.arange(0, BLOCK)[:, None]
    values = tl.load(value_ptr + m * C + i, mask=i < C, other=float("-inf"))
    ids = tl.load(index_ptr + m * C + i, mask=i < C, other=2147483647)
    for j in tl.static_range(n):                        # candidates of equal value stand in the order of their ids
        score, best, values = take_best(values, ids, i, BLOCK)
        tl.store(out_ptr + m * n + j + tl.arange(0, 1), best.to(tl.int64))
        tl.store(score_ptr + m * n + j + tl.arange(0, 1), score)


def rms_norm(x, weight, eps):
    """As linear.rms_norm_ref: the final norm, one program a row."""
    y, K = torch.empty_like(x), x.shape[-1]
    norm_kernel[(x.numel() // K,)](x, weight, y, eps, K, triton.next_power_of_2(K), PDL=pdl(x.device), num_warps=4,
                                   **launch_options(x.device))
    return y


def head(hidden, w, share=None):
    """As head_ref."""
    return linear(hidden, w, out_dtype=torch.float32, share=share)


MAX_BEST = 16           # most tokens a row: each is a pass over a block of logits in registers


def best(hidden, w, n, temperature, seeds, stream, positions, ids=None, share=None):
    """As best_ref; ties go to the lowest index."""
    launch = Launch(hidden, w, share=share)
    blocks = launch.blocks
    n = min(n, launch.N)
    values = torch.empty(launch.M, blocks * n, device=hidden.device)
    indices = torch.empty(launch.M, blocks * n, device=hidden.device, dtype=torch.int32)
    out = torch.empty(*hidden.shape[:-1], n, device=hidden.device, dtype=torch.int64)
    scores = torch.empty(out.shape, device=hidden.device)
    best_kernel[launch.grid](
        hidden, launch.weight, launch.scale, seeds, positions.contiguous(), hidden if ids is None else ids, values, indices,
        temperature or 1.0, stream, launch.M, hidden.shape[1], launch.N, launch.K, launch.BM, launch.BN, launch.BK, n,
        temperature > 0, ids is not None, launch.INT8, **launch.options)
    pick_kernel[(launch.M,)](values, indices, out, scores, blocks * n, n, triton.next_power_of_2(blocks * n),
                             PDL=pdl(hidden.device), num_warps=8, **launch_options(hidden.device))
    return out, scores

"""Thousands of texts, one new token each: what mass sampling (bulk.py) needs between the matrix products.

The rest of this project is about few rows and streams weights; here the KV cache is the traffic, and logits of all rows
are as large as the weights. Every text stands at a position of its own, which lies on the device: so one CUDA graph serves
all steps. Grid: one program a text (attention: and KV head).

Shapes: B texts, H query heads, KV key/value heads, D head_dim, C cache slots, V vocabulary, S longest text.
"""
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.linear import rotate
from kernels.noise import TARGET, gumbel_of, gumbel_ref, key32

KEYS, ATTEND_WARPS, ATTEND_STAGES = 32, 2, 4    # a block of the attention's loop
TOKENS = 4096                                   # a block of logits


# ---------------------------------------------------------------------------------------------------------------------
# In plain torch: what correct means

def add_norm_ref(x, y, weight, eps):
    """x + y, and that normed; x, y [..., dim]."""
    x = x + y
    return x, F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def swiglu_ref(x):
    """x [..., 2 F]: gates, then ups -> [..., F]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def attend_ref(qkv, at, freqs, k, v):
    """Attention of each text's newest token, at position at[b], over the at[b] tokens before it and itself.

    qkv [B, (H + 2 KV) D], not yet rotated; at [B] int64; freqs [D/2]; k, v [B, KV, C, D], which take the new K and V at
    slot at[b]. Returns [B, H D].
    """
    B, KV, C, D = k.shape
    x = qkv.view(B, 1, -1, D)
    angles = at[:, None, None].float() * freqs                              # [B, 1, D/2]
    q, new = rotate(x[:, :, :-KV], angles.cos(), angles.sin()).split([x.shape[2] - 2 * KV, KV], dim=2)
    each = torch.arange(B, device=at.device)
    k[each, :, at], v[each, :, at] = new[:, 0], x[:, 0, -KV:]
    seen = torch.arange(C, device=at.device) <= at[:, None]                 # [B, C]
    return F.scaled_dot_product_attention(q.reshape(B, KV, -1, D), k, v, attn_mask=seen[:, None, None]).flatten(1)


def choose_ref(logits, row, at, temperature, min_p, seed):
    """The next token of each text, [B] int64, by Gumbel noise that depends on (seed, row, position, token) alone.

    logits [B, V]; row, at [B] int64: the batch's texts and the positions they have reached; temperature [R] float32 of all
    texts, 0: the best token. Tokens less likely than min_p times the likeliest are left out.
    """
    T = temperature[row, None]
    scores = logits.float() / torch.where(T > 0, T, 1.0)
    if min_p:
        scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    ids = torch.arange(logits.shape[1], device=at.device)
    noise = gumbel_ref(seed + row, TARGET, at[:, None], ids)[:, 0]          # [B, V]
    return torch.where(T > 0, scores + noise, scores).argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# In Triton

@triton.jit
def add_norm_kernel(x_ptr, y_ptr, weight_ptr, sum_ptr, normed_ptr, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * K + i
    x = tl.load(x_ptr + at, mask=i < K, other=0.0)
    x = (x.to(tl.float32) + tl.load(y_ptr + at, mask=i < K, other=0.0).to(tl.float32)).to(x.dtype).to(tl.float32)
    h = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps) * tl.load(weight_ptr + i, mask=i < K, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, x, mask=i < K)
    tl.store(normed_ptr + at, h, mask=i < K)


@triton.jit
def swiglu_kernel(x_ptr, y_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(x_ptr + row * 2 * K + i, mask=i < K, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * K + K + i, mask=i < K, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * K + i, gate / (1 + tl.exp(-gate)) * up, mask=i < K)


@triton.jit
def attend_kernel(qkv_ptr, at_ptr, freq_ptr, k_ptr, v_ptr, y_ptr, scale, C, KV: tl.constexpr, G: tl.constexpr,
                  D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    b, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.load(at_ptr + b).to(tl.int32)
    dtype = k_ptr.dtype.element_ty
    d, g = tl.arange(0, D), tl.arange(0, ROWS)
    live = (g < G)[:, None]
    # RoPE: each dimension d and its partner half a head away
    partner = (d + D // 2) % D
    angle = at.to(tl.float32) * tl.load(freq_ptr + d % (D // 2))
    cos, sin = tl.cos(angle), tl.where(d < D // 2, -tl.sin(angle), tl.sin(angle))
    line = qkv_ptr + b * (KV * G + 2 * KV) * D
    heads = line + (kv * G + g)[:, None] * D
    q = tl.load(heads + d[None, :], mask=live, other=0.0).to(tl.float32) * cos[None, :]
    q = (q + tl.load(heads + partner[None, :], mask=live, other=0.0).to(tl.float32) * sin[None, :]).to(dtype)   # [ROWS, D]
    new = line + (KV * G + kv) * D
    k = (tl.load(new + d).to(tl.float32) * cos + tl.load(new + partner).to(tl.float32) * sin).to(dtype)         # [D]
    v = tl.load(new + KV * D + d)
    first = (b * KV + kv) * C * D
    tl.store(k_ptr + first + at * D + d, k)
    tl.store(v_ptr + first + at * D + d, v)
    # The new token first, from registers; then those before it, a block at a time
    top = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1)      # [ROWS], not yet scaled
    mass = tl.full([ROWS], 1.0, tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32) + v.to(tl.float32)[None, :]
    for start in range(0, at, KEYS):
        n = start + tl.arange(0, KEYS)
        keys = tl.load(k_ptr + first + n[None, :] * D + d[:, None], mask=(n < at)[None, :], other=0.0)          # [D, KEYS]
        values = tl.load(v_ptr + first + n[:, None] * D + d[None, :], mask=(n < at)[:, None], other=0.0)
        s = tl.where((n < at)[None, :], tl.dot(q, keys, input_precision="ieee"), float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        p, keep = tl.exp2((s - higher[:, None]) * scale), tl.exp2((top - higher) * scale)
        mass = mass * keep + tl.sum(p, axis=1)
        acc = tl.dot(p.to(dtype), values, acc * keep[:, None], input_precision="ieee")
        top = higher
    out = y_ptr + (b * KV * G + kv * G + g)[:, None] * D + d[None, :]
    tl.store(out, (acc / mass[:, None]).to(dtype), mask=live)


@triton.jit
def choose_kernel(logits_ptr, row_ptr, at_ptr, temperature_ptr, token_ptr, log_min_p, seed, stream, V, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    row, at = tl.load(row_ptr + b), tl.load(at_ptr + b)
    T = tl.load(temperature_ptr + row)
    line = logits_ptr + b * V
    i = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        top = tl.maximum(top, tl.load(line + start + i, mask=start + i < V, other=float("-inf")).to(tl.float32))
    scale = 1 / tl.where(T > 0, T, 1.0)
    floor = tl.max(top, axis=0) * scale + log_min_p
    key = key32(seed + row, stream, at)
    best, token = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], 0, tl.int32)
    for start in range(0, V, BLOCK):
        ids = start + i
        scores = tl.load(line + ids, mask=ids < V, other=float("-inf")).to(tl.float32) * scale
        if tl.max(scores, axis=0) >= floor:                                 # most blocks hold no candidate
            noisy = scores + tl.where(T > 0, gumbel_of(key, ids.to(tl.int64)), 0.0)
            noisy = tl.where(scores >= floor, noisy, float("-inf"))
            token = tl.where(noisy > best, ids, token)
            best = tl.maximum(best, noisy)
    token = tl.where(best == tl.max(best, axis=0), token, 2147483647)
    tl.store(token_ptr + b, tl.min(token, axis=0).to(tl.int64))


def add_norm(x, y, weight, eps):
    """As add_norm_ref."""
    total, normed, K = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    add_norm_kernel[(x.numel() // K,)](x, y, weight, total, normed, eps, K, triton.next_power_of_2(K), num_warps=4)
    return total, normed


def swiglu(x):
    """As swiglu_ref."""
    K = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], K, device=x.device, dtype=x.dtype)
    swiglu_kernel[(y.numel() // K,)](x, y, K, triton.next_power_of_2(K), num_warps=4)
    return y


def attend(qkv, at, freqs, k, v):
    """As attend_ref; D is a power of two."""
    B, KV, C, D = k.shape
    H = qkv.shape[1] // D - 2 * KV
    y = torch.empty(B, H * D, device=qkv.device, dtype=qkv.dtype)
    attend_kernel[(B, KV)](qkv, at, freqs, k, v, y, D**-0.5 * math.log2(math.e), C, KV, H // KV, D,
                           max(16, triton.next_power_of_2(H // KV)), KEYS, num_warps=ATTEND_WARPS, num_stages=ATTEND_STAGES)
    return y


def choose(logits, row, at, temperature, min_p, seed):
    """As choose_ref."""
    token = torch.empty_like(row)
    choose_kernel[(len(row),)](logits, row, at, temperature, token, math.log(min_p) if min_p else -math.inf, seed, TARGET,
                               logits.shape[1], TOKENS, num_warps=8)
    return token


class Ops(NamedTuple):
    add_norm: Callable
    swiglu: Callable
    attend: Callable
    choose: Callable


TORCH = Ops(add_norm_ref, swiglu_ref, attend_ref, choose_ref)
TRITON = Ops(add_norm, swiglu, attend, choose)

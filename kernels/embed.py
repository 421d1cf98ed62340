"""The start of a step: token embedding, RoPE angles, and the zeroed sums of squares that the layers will add to.

Bytes: one embedding row a token. Grid: one program a token.
"""
import torch
import triton
import triton.language as tl

from kernels.finish import FIXED
from kernels.launch import launch_options, pdl, wait_for_inputs
from kernels.linear import Stream


def embed_ref(tokens, positions, weight, freqs, norm, n):
    """tokens, positions [B, T] int64 (token -1, an empty tree node, reads as 0); weight [V, dim]; freqs [D/2]; norm [dim].

    Returns the Stream x [B, T, dim] that `norm` reads next, cos, sin [B, T, D/2] float32, and zeros [n, B, T] for sums.
    """
    x = weight[tokens.clamp(min=0)]
    angles = positions[..., None].float() * freqs
    return Stream(x, None, x.float().pow(2).sum(-1)), angles.cos(), angles.sin(), torch.zeros(n, *tokens.shape, device=x.device)


@triton.jit
def embed_kernel(token_ptr, position_ptr, weight_ptr, freq_ptr, norm_ptr, x_ptr, weighed_ptr, cos_ptr, sin_ptr, sums_ptr, M,
                 DIM: tl.constexpr, HALF: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    m = tl.program_id(0)
    token = tl.maximum(tl.load(token_ptr + m), 0)
    i = tl.arange(0, BLOCK)
    x = tl.load(weight_ptr + token * DIM + i, mask=i < DIM, other=0.0)
    norm = tl.load(norm_ptr + i, mask=i < DIM, other=0.0)
    tl.store(x_ptr + m * DIM + i, x, mask=i < DIM)
    tl.store(weighed_ptr + m * DIM + i, (x.to(tl.float32) * norm.to(tl.float32)).to(x.dtype), mask=i < DIM)
    row = tl.arange(0, triton.next_power_of_2(SUMS))
    x = x.to(tl.float32)
    total = tl.sum((x * x * FIXED).to(tl.int64), axis=0)
    tl.store(sums_ptr + row * M + m, tl.where(row == 0, total, 0), mask=row < SUMS)
    pair = tl.arange(0, HALF)
    angle = tl.load(position_ptr + m).to(tl.float32) * tl.load(freq_ptr + pair)
    tl.store(cos_ptr + m * HALF + pair, tl.cos(angle))
    tl.store(sin_ptr + m * HALF + pair, tl.sin(angle))


def embed(tokens, positions, weight, freqs, norm, n):
    """As embed_ref, with sums in int64 units of 2^-28."""
    M, DIM, HALF, device = tokens.numel(), weight.shape[1], freqs.shape[0], tokens.device
    x, weighed = torch.empty(2, *tokens.shape, DIM, device=device, dtype=weight.dtype)
    cos, sin = torch.empty(2, *tokens.shape, HALF, device=device)
    sums = torch.empty(n + 1, *tokens.shape, device=device, dtype=torch.int64)
    embed_kernel[(M,)](tokens.contiguous(), positions.contiguous(), weight, freqs, norm, x, weighed, cos, sin, sums, M, DIM,
                       HALF, n + 1, triton.next_power_of_2(DIM), PDL=pdl(device), num_warps=4, **launch_options(device))
    return Stream(x, weighed, sums[0]), cos, sin, sums[1:]

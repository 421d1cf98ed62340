"""Linear layers with everything that touches their input or output folded in.

At batch 1 a linear moves its weight once (N*K elements) and next to nothing else, so every op that is not a weight
stream is a launch to get rid of: RMSNorm goes into the prologue; the residual, SwiGLU, and QKV-split + RoPE + KV write
go into the epilogue. Four linears and one attention are then a whole Transformer layer.
"""
import torch
import torch.nn.functional as F


def rms_norm_ref(x, weight, eps):
    """x / rms(x) * weight over the last axis; the statistics are fp32 whatever the dtype (Zhang & Sennrich 2019)."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def linear_ref(x, w, residual=None):
    """x [..., K] @ w [N, K].T (+ residual [..., N]) -> [..., N]."""
    y = F.linear(x, w)
    return y if residual is None else residual + y


def swiglu_linear_ref(x, norm, eps, w):
    """SwiGLU of the normed input: w [2F, K] holds the gate rows, then the up rows. x [..., K] -> [..., F]."""
    gate, up = F.linear(rms_norm_ref(x, norm, eps), w).chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x, cos, sin):
    """RoPE in HF's half-split layout: pairs (i, i + D/2). x [B, T, heads, D]; cos, sin [B, T, D/2] fp32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]                             # [B, T, 1, D/2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def qkv_rope_ref(x, norm, eps, w, cos, sin, slots, k_cache, v_cache):
    """Norm, project, rotate, and write K and V into their cache slots.

    x [B, T, K]; w [(H + 2 KV) D, K], rows q then k then v; cos, sin [B, T, D/2]; slots [B, T];
    k_cache, v_cache [B, KV, C, D], written in place. Returns q [B, T, H, D].
    """
    B, T, _ = x.shape
    KV, D = k_cache.shape[1], k_cache.shape[3]
    qkv = F.linear(rms_norm_ref(x, norm, eps), w).view(B, T, -1, D)         # [B, T, H + 2 KV, D]
    q, k, v = qkv.split([qkv.shape[2] - 2 * KV, KV, KV], dim=2)
    batch = torch.arange(B, device=x.device)[:, None]
    k_cache[batch, :, slots] = rotate(k, cos, sin)                          # [B, T, KV, D]
    v_cache[batch, :, slots] = v
    return rotate(q, cos, sin)


rms_norm, linear, swiglu_linear, qkv_rope = rms_norm_ref, linear_ref, swiglu_linear_ref, qkv_rope_ref

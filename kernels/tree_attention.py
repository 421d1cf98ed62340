"""Attention of a token tree over its prefix: the one attention of this project.

T new tokens of a sequence see its whole committed prefix (slots 0..prefix_len-1) and, of the S speculative slots behind
it, those that their row of the ancestor mask allows. A chain is a lower triangle, decoding is T = S = 1, N parallel
branches are N diagonals over a trunk, a prefill chunk is a big triangle. Bytes moved: K and V of the prefix, once a
KV head; the G = H / KV query heads that share it are packed into the rows.
"""
import torch
import torch.nn.functional as F


def visibility(prefix_len, mask, end):
    """Which slot each new token sees. prefix_len [B] int64, mask [T, S] bool -> [B, 1, T, end] bool.

    Speculative slot j of a sequence is cache slot prefix_len + j. Built once a forward, shared by all layers.
    """
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
    out = F.scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end], attn_mask=visible.repeat(1, 1, G, 1))
    return out.view(B, KV, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


tree_attention = tree_attention_ref

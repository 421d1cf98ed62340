"""Embed a small Llama in a larger shape that computes the same function: real text at the cost of a big model.

Speed depends on shapes, text on the function. Weights that meet only zeros are filled with noise, so that the bytes are
real; those that would change the function are zero. A padded model is for measuring, and is labelled so.
"""
from dataclasses import replace

import torch

from errors import UserError
from model import Llama

BIAS = 1e-4             # a constant in one spare dimension of the residual stream, small beside what RMSNorm averages
BIAS_GAIN = 1e6         # ... and how much the final norm makes of it: vocabulary entries that are padding get far below all


def padded_config(small, shape):
    """The config of `small` in `shape` (a LlamaConfig whose sizes count). Raises UserError if it can't be embedded."""
    for name in ("vocab_size", "dim", "n_layers", "head_dim", "ffn_dim"):
        if getattr(shape, name) < getattr(small, name) + (name == "dim"):
            raise UserError(f"the model doesn't fit into that shape: {name} {getattr(small, name)} "
                            f"against {getattr(shape, name)}")
    if shape.n_kv_heads < small.n_kv_heads * copies(small, shape):
        raise UserError(f"the model doesn't fit into that shape: {small.n_heads} heads over {small.n_kv_heads} KV heads "
                        f"against {shape.n_heads} over {shape.n_kv_heads}")
    if small.target_vocab_size is not None:
        raise UserError("a draft with a trimmed vocabulary can't be padded")
    growth = shape.head_dim // small.head_dim
    if small.rope_scaling is not None or shape.head_dim != growth * small.head_dim:
        raise UserError("only models with plain RoPE whose head_dim divides the shape's can be padded")
    return replace(small, vocab_size=shape.vocab_size, dim=shape.dim, n_layers=shape.n_layers, n_heads=shape.n_heads,
                   n_kv_heads=shape.n_kv_heads, head_dim=shape.head_dim, ffn_dim=shape.ffn_dim, tie_embeddings=False,
                   norm_eps=small.norm_eps * small.dim / shape.dim, rope_theta=small.rope_theta ** growth)


def copies(small, shape):
    """KV heads of `shape` that hold the same KV head of `small`: as many as its query heads need to find a place."""
    return -(-(small.n_heads // small.n_kv_heads) // (shape.n_heads // shape.n_kv_heads))


@torch.no_grad()
def trim(draft, vocab_size):
    """Let a draft serve a target whose vocabulary is longer, in place: the ids it knows are the target's first ones.

    It becomes a draft with a trimmed vocabulary, if it isn't one, where id 0 stands for all other tokens: it never proposes
    token 0.
    """
    draft.config = replace(draft.config, target_vocab_size=vocab_size)
    if draft.d2t is None:
        draft.d2t = torch.arange(draft.config.vocab_size, device=draft.device)
        draft.d2t[0] = -1
    return draft


@torch.no_grad()
def pad(small, shape, seed=0, device=None, dtype=None):
    """A model of `shape` with the tokens of `small`. Noise has the size of a fresh model's weights (dim^-1/2)."""
    s, c = small.config, padded_config(small.config, shape)
    big = Llama(c, device or small.device, dtype or small.dtype)
    generator = torch.Generator(big.device).manual_seed(seed)
    noise = lambda weight: weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    to = lambda x: x.to(big.device, big.dtype)
    d, spare = s.dim, s.dim                         # dimension `spare`, the first new one, carries the bias
    shrink = (d / c.dim) ** 0.5                     # RMSNorm averages over c.dim numbers, of which d aren't zero

    big.embed.zero_()
    big.embed[:s.vocab_size, :d] = to(small.embed)
    big.embed[:, spare] = BIAS
    noise(big.head)[:, :d] = 0
    big.head[:s.vocab_size, :d] = to(small.head)
    big.head[:s.vocab_size, spare] = 0
    big.head[s.vocab_size:, spare] = -1
    big.norm.zero_()
    big.norm[:d] = to(small.norm * shrink)
    big.norm[spare] = BIAS_GAIN

    # The pairs (i, i + D/2) of RoPE keep their frequencies theta^(-2i/D) if theta grows as D does: theta'^(-2i/D') is that.
    half, new_half = s.head_dim // 2, c.head_dim // 2
    dims = torch.cat([torch.arange(half), new_half + torch.arange(half)])           # where a head's dimensions go
    # A KV head with more query heads than the shape has a KV head is held several times, and they spread over its copies.
    held = copies(s, c)
    kv = torch.arange(s.n_kv_heads * held)                                          # where the KV heads and their copies go
    group, new_group = s.n_heads // s.n_kv_heads, c.n_heads // c.n_kv_heads
    heads = (kv.view(-1, held)[:, :1] * new_group + torch.arange(group)).flatten()  # where the query heads go
    repeat = lambda x: to(x).view(s.n_kv_heads, 1, s.head_dim, d).expand(-1, held, -1, -1).reshape(-1, d)
    rows = lambda heads, start=0: (((start + heads)[:, None]) * c.head_dim + dims).flatten().to(big.device)
    q_rows, k_rows = rows(heads), rows(kv, c.n_heads)
    v_rows = rows(kv, c.n_heads + c.n_kv_heads)

    for i, layer in enumerate(big.layers):
        for weight in (layer.wqkv, layer.w_gate_up):
            noise(weight)
        for weight in (layer.attn_norm, layer.mlp_norm, layer.wo, layer.w_down):
            weight.zero_()                          # a layer of nothing but noise adds zero to the residual stream
        if i >= s.n_layers:
            continue
        old = small.layers[i]
        layer.attn_norm[:d], layer.mlp_norm[:d] = to(old.attn_norm * shrink), to(old.mlp_norm * shrink)
        q, k, v = old.wqkv.split([n * s.head_dim for n in (s.n_heads, s.n_kv_heads, s.n_kv_heads)])
        layer.wqkv[:c.n_heads * c.head_dim].view(c.n_heads, c.head_dim, -1)[heads] = 0      # whatever the key holds
        layer.wqkv[q_rows, :d] = to(q * (c.head_dim / s.head_dim) ** 0.5)           # scores are divided by sqrt(head_dim)
        layer.wqkv[k_rows, :d], layer.wqkv[v_rows, :d] = repeat(k), repeat(v)
        layer.wo[:d, q_rows] = to(old.wo)
        gate, up = old.w_gate_up.chunk(2)
        layer.w_gate_up[:s.ffn_dim, :d], layer.w_gate_up[c.ffn_dim:c.ffn_dim + s.ffn_dim, :d] = to(gate), to(up)
        layer.w_down[:d, :s.ffn_dim] = to(old.w_down)
    return big

"""Commit an accepted path: its K and V rows move to where the prefix ends, and nothing else moves.

Bytes: P rows of D elements per layer and KV head, read and written once, for K and for V. Grid: (L, B * KV).
"""
import torch
import triton
import triton.language as tl

from kernels.launch import launch_options, pdl, wait_for_inputs


def commit_ref(k, v, src, dst):
    """Copy cache slots src[b, i] to dst[b, i] for all layers and heads, as if all rows were read before any is written.

    k, v [L, B, KV, C, D] in place; src, dst [B, P] int64. Two entries may share a dst only if they share their src.
    """
    for cache in (k, v):
        L, B, KV, _, D = cache.shape
        index = lambda slots: slots[None, :, None, :, None].expand(L, B, KV, slots.shape[1], D)
        cache.scatter_(3, index(dst), cache.gather(3, index(src)))


@triton.jit
def commit_kernel(k_ptr, v_ptr, src_ptr, dst_ptr, P, stride_l, stride_b, stride_h, KV: tl.constexpr, D: tl.constexpr,
                  BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    b = (tl.program_id(1) // KV).to(tl.int64)
    base = tl.program_id(0).to(tl.int64) * stride_l + b * stride_b + (tl.program_id(1) % KV) * stride_h
    i, d = tl.arange(0, BLOCK), tl.arange(0, triton.next_power_of_2(D))[None, :]
    src = base + tl.load(src_ptr + b * P + i, mask=i < P, other=0)[:, None] * D + d
    dst = base + tl.load(dst_ptr + b * P + i, mask=i < P, other=0)[:, None] * D + d
    live = (i < P)[:, None] & (d < D)
    k, v = tl.load(k_ptr + src, mask=live), tl.load(v_ptr + src, mask=live)
    tl.debug_barrier()                                          # all reads before all writes
    tl.store(k_ptr + dst, k, mask=live)
    tl.store(v_ptr + dst, v, mask=live)


def commit(k, v, src, dst):
    """As commit_ref."""
    L, B, KV, _, D = k.shape
    assert k.stride() == v.stride() and k.stride()[3:] == (D, 1)
    commit_kernel[(L, B * KV)](k, v, src.contiguous(), dst.contiguous(), src.shape[1], *k.stride()[:3], KV, D,
                               triton.next_power_of_2(src.shape[1]), PDL=pdl(k.device), num_warps=4,
                               **launch_options(k.device))


def path_slots_ref(path, length, prefix_len):
    """Where an accepted path lies and where it goes: src, dst [B, K+1]. Entries behind its end copy the root onto itself.

    path [B, K+1]: accepted nodes, root first; length [B]: how many of them follow the root; prefix_len [B].
    """
    start, i = prefix_len[:, None], torch.arange(path.shape[1], device=path.device)
    live = i <= length[:, None]
    return torch.where(live, start + path, start), torch.where(live, start + i, start)


@triton.jit
def path_slots(path, i, length, start, src_ptr, dst_ptr, DEPTH):
    """As path_slots_ref for one sequence; path [BLOCK]: its entry i, of which there are DEPTH + 1."""
    live = i <= length
    tl.store(src_ptr + i, start + tl.where(live, path, 0), mask=i <= DEPTH)
    tl.store(dst_ptr + i, start + tl.where(live, i, 0), mask=i <= DEPTH)

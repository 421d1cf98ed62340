"""The end of a verify: what the host must know of it, which KV rows move where, and the new length of the prefix.

Bytes: a few hundred; it is a kernel because a dozen torch ops would each cost a launch. Grid: one program a sequence.
"""
import torch
import triton
import triton.language as tl

from kernels.commit import path_slots, path_slots_ref
from kernels.launch import launch_options, pdl, wait_for_inputs


def settle_ref(tokens, parent, path, length, bonus, prefix_len):
    """Settle a verdict (path [B, K+1], length [B], bonus [B]) on a tree (tokens [B, M+1], parent [M+1]).

    prefix_len [B] moves behind the accepted path, in place. Returns report [B, 2K+5]: the tokens of the path, its nodes, k,
    bonus, and 1 where a drafted token was there to be rejected; and src, dst [B, K+1] for `commit`.
    """
    src, dst = path_slots_ref(path, length, prefix_len)
    prefix_len += length + 1
    offered = ((parent == path[:, -1:]) & (tokens >= 0)).any(1)
    ends = torch.stack([length, bonus, offered], 1)
    return torch.cat([tokens.gather(1, path), path, ends], 1), src, dst


@triton.jit
def settle_kernel(token_ptr, parent_ptr, path_ptr, length_ptr, bonus_ptr, prefix_ptr, report_ptr, src_ptr, dst_ptr, size,
                  DEPTH, BLOCK: tl.constexpr, PDL: tl.constexpr):
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    parent = tl.load(parent_ptr + i, mask=i < size, other=-2)               # a constant of the tree
    wait_for_inputs(PDL)
    start, length = tl.load(prefix_ptr + b), tl.load(length_ptr + b)
    path_ptr, token_ptr, report_ptr = path_ptr + b * (DEPTH + 1), token_ptr + b * size, report_ptr + b * (2 * DEPTH + 5)
    path = tl.load(path_ptr + i, mask=i <= DEPTH, other=0)
    offered = (parent == tl.load(path_ptr + DEPTH)) & (tl.load(token_ptr + i, mask=i < size, other=-1) >= 0)
    tl.store(report_ptr + i, tl.load(token_ptr + path), mask=i <= DEPTH)
    tl.store(report_ptr + DEPTH + 1 + i, path, mask=i <= DEPTH)
    tl.store(report_ptr + 2 * DEPTH + 2, length)
    tl.store(report_ptr + 2 * DEPTH + 3, tl.load(bonus_ptr + b))
    tl.store(report_ptr + 2 * DEPTH + 4, tl.max(offered.to(tl.int64), axis=0))
    path_slots(path, i, length, start, src_ptr + b * (DEPTH + 1), dst_ptr + b * (DEPTH + 1), DEPTH)
    tl.debug_barrier()                                                      # all have read prefix_len
    tl.store(prefix_ptr + b, start + length + 1)


def settle(tokens, parent, path, length, bonus, prefix_len):
    """As settle_ref."""
    (B, size), (_, P) = tokens.shape, path.shape
    new = lambda n: torch.empty(B, n, device=tokens.device, dtype=torch.int64)
    report, src, dst = new(2 * P + 3), new(P), new(P)
    settle_kernel[(B,)](tokens.contiguous(), parent, path.contiguous(), length, bonus, prefix_len, report, src, dst, size,
                        P - 1, triton.next_power_of_2(size), PDL=pdl(tokens.device), num_warps=1,
                        **launch_options(tokens.device))
    return report, src, dst

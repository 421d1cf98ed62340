"""An op, or a few of a kind, a file: what it computes and which bytes it moves, then `x_ref` in plain torch, which defines
what correct means, then the Triton kernel and its launcher `x`, which keeps the same contract.

`TORCH` and `TRITON` hold the ops of a forward under the same names; a model carries one of them as `model.ops`.
"""
import functools
from types import SimpleNamespace

from kernels import accept, commit, embed, grow, head, linear, outcomes, settle, switch, tree_attention
from kernels.head import MAX_BEST
from kernels.launch import MAX_ROWS, Int8Weight, Share, compiling_together
from kernels.noise import gumbel, uniform
from kernels.tree_attention import Ancestors

TORCH = SimpleNamespace(
    embed=embed.embed_ref, add_linear=linear.add_linear_ref, swiglu_linear=linear.swiglu_linear_ref,
    qkv_rope=linear.qkv_rope_ref, visibility=tree_attention.visibility_ref, tree_attention=tree_attention.tree_attention_ref,
    rms_norm=linear.rms_norm_ref, head=head.head_ref, best=head.best_ref, commit=commit.commit_ref, walk=accept.walk_ref,
    settle=settle.settle_ref, grow=grow.grow_ref, outcomes=outcomes.outcomes_ref, switch=switch.switch_ref)


@functools.cache
def triton_ops(share):
    """The kernels; share: None, or the Share that linears keep to because another model works beside this one."""
    few = lambda op: functools.partial(op, share=share)
    return SimpleNamespace(
        embed=embed.embed, add_linear=few(linear.add_linear), swiglu_linear=few(linear.swiglu_linear),
        qkv_rope=few(linear.qkv_rope), visibility=tree_attention.visibility, tree_attention=tree_attention.tree_attention,
        rms_norm=head.rms_norm, head=few(head.head), best=few(head.best), commit=commit.commit, walk=accept.walk,
        settle=settle.settle, grow=grow.grow, outcomes=outcomes.outcomes, switch=switch.switch)


TRITON = triton_ops(None)


def takes(head_dim):
    """Whether the kernels take heads of that size: a tensor core product has no fewer than 16 columns."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def ops_for(tensor):
    """The ops that fit where a tensor lives."""
    return TRITON if tensor.is_cuda else TORCH


__all__ = ["Ancestors", "MAX_BEST", "MAX_ROWS", "TORCH", "TRITON", "Int8Weight", "Share", "compiling_together", "gumbel",
           "ops_for", "takes", "triton_ops", "uniform"]

"""One op a file: what it computes and which bytes it moves, then `x_ref` in plain torch, which defines what correct means.

`model.py` and the loops call `x`; the twins `x_ref` run everywhere and are what the tests compare with.
"""
from kernels.accept import walk
from kernels.commit import commit
from kernels.head import head
from kernels.linear import linear, qkv_rope, rms_norm, swiglu_linear
from kernels.noise import gumbel, uniform
from kernels.tree_attention import tree_attention, visibility

__all__ = ["commit", "gumbel", "head", "linear", "qkv_rope", "rms_norm", "swiglu_linear", "tree_attention", "uniform",
           "visibility", "walk"]

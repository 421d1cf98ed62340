"""Every Triton kernel against its plain-torch twin.

CPU tier (no GPU: Triton's interpreter, see conftest.py): tiny shapes in fp32, and whether real ones compile. GPU tier: real
shapes in bf16, where the error against fp32 may be at most twice that of the same maths in bf16 torch, and where a token's
logits must be equal to the last bit however many other tokens stand beside it.
"""
import itertools
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
import kernels
from errors import UserError
from kernels import accept, commit, embed, gate, grow, head, launch, linear, mail, outcomes, settle, switch, tree_attention, tune
from kernels.finish import FIXED
from layout import Layout
from measure.timing import random_model
from model import KVCache, Llama, LlamaConfig
from saguaro import Options, sd, ssd
from sampling import Sampler, Sampling
from shapes import SHAPES
from tree import Tree

ROOT = Path(__file__).resolve().parent
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
no_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA GPU: bit-exactness is a property of the tensor cores")
gpu_only = lambda test: pytest.mark.gpu(no_gpu(test))
SIZES = [(4096, 6144), (576, 960), (1536, 576), (14336, 4096)] if CUDA else [(64, 96), (48, 32)]      # K, N
ROWS = [1, 5, 8, 16, 33, 64, 128] if CUDA else [1, 5, 17]


def randn(*shape, dtype=DTYPE, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def check(got, reference, *args):
    """got: the kernel's result; reference(*args) is its twin, called in fp32 for the truth and in DTYPE for the bar."""
    up = [a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    truth, plain = reference(*up).float(), reference(*args).float()
    assert torch.isfinite(got).all()
    error, bar = (got.float() - truth).norm(), (plain - truth).norm()
    assert error <= 2 * bar + 1e-5 * truth.norm(), f"error {error / truth.norm():.2e}, torch's {bar / truth.norm():.2e}"


def fixed_sums(x):
    return (x.float().pow(2) * FIXED.value).to(torch.int64).sum(-1)


def stream(x, norm=None):
    """x as the stream that a kernel reads, or without a norm, as the one that a twin reads."""
    if norm is None:
        return linear.Stream(x, None, x.float().pow(2).sum(-1))
    return linear.Stream(x, (x.float() * norm.float()).to(x.dtype), fixed_sums(x))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


def test_tuning_needs_a_gpu_whose_tables_are_read(monkeypatch):
    monkeypatch.setattr(launch, "is_hopper", lambda: False)
    with pytest.raises(UserError, match="Hopper"):
        tune.main([])


@pytest.mark.parametrize("card", ["H100", "H200"])
def test_a_weight_is_split_alike_for_any_number_of_rows(card):
    """The split is what shows in the bits of a sum."""
    table = getattr(launch, card)
    assert table.narrow.keys() == table.wide.keys()
    assert all(table.narrow[shape].split == table.wide[shape].split for shape in table.narrow)


def test_candidates_of_int8_weights_keep_to_small_tensor_core_instructions():
    """A weight in int8 that wgmma reads travels in copies of 4 bytes: no candidate for a large one has 4 warps and BN >= 64."""
    for operation in tune.operations("llama-3.2-1b"):
        blocks = list(tune.candidates(*operation[:4], 1, 16))
        assert len(blocks) > 5 and not any(b.BN >= 64 and b.warps >= 4 for b in blocks), operation


# ---------------------------------------------------------------------------------------------------------------------
# Linears

@pytest.mark.parametrize("rows, size", list(itertools.product(ROWS, SIZES)))
def test_linear(rows, size):
    K, N = size
    x, w, residual = randn(1, rows, K), randn(N, K, scale=K ** -0.5), randn(1, rows, N)
    check(linear.linear(x, w), linear.linear_ref, x, w)
    norm, sums = randn(N), torch.zeros(1, rows, dtype=torch.int64, device=DEVICE)
    got = linear.add_linear(x, w, linear.Stream(residual, None, None), norm, sums)
    check(got.x, lambda x, w, residual: linear.add_linear_ref(x, w, linear.Stream(residual, None, None), None,
                                                              torch.zeros(1, rows, device=DEVICE)).x, x, w, residual)
    assert torch.equal(got.weighed, (got.x.float() * norm.float()).to(DTYPE))
    torch.testing.assert_close(got.sums.double(), fixed_sums(got.x).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("split, more", [(1, 0), (2, 0), (4, 0), (2, 1), (4, 3)])
def test_split_k_is_repeatable(split, more, monkeypatch):
    """Partials are added in a fixed order, none is left out, and the counters are left ready for the next launch."""
    K, N = (4096 if CUDA else 128, 512 if CUDA else 32) if not more else (512 * split + more, 32)
    monkeypatch.setattr(launch, "blocks_for", lambda *a: launch.Blocks(32, 32, 2, 4, split))
    x, w = randn(1, 5, K), randn(N, K, scale=K ** -0.5)
    first = linear.linear(x, w)
    check(first, linear.linear_ref, x, w)
    for _ in range(20 if CUDA else 2):
        assert torch.equal(linear.linear(x, w), first)


@pytest.mark.parametrize("rows, size", list(itertools.product(ROWS, SIZES)))
def test_swiglu(rows, size):
    K, N = size
    x, w, norm = randn(1, rows, K), randn(N, K, scale=K ** -0.5), randn(K)
    check(linear.swiglu_linear(stream(x, norm), norm, 1e-5, w),
          lambda x, w, norm: linear.swiglu_linear_ref(stream(x), norm, 1e-5, w), x, w, norm)


@pytest.mark.parametrize("B, T, H, KV, D", [(1, 1, 32, 8, 128), (3, 5, 9, 3, 64), (1, 64, 32, 8, 64)] if CUDA else
                         [(1, 1, 4, 2, 16), (3, 5, 3, 1, 32)])
def test_qkv_rope(B, T, H, KV, D):
    K, C = (576, 300) if CUDA else (48, 40)
    x, norm, w = randn(B, T, K), randn(K), randn((H + 2 * KV) * D, K, scale=K ** -0.5)
    angles = torch.rand(B, T, D // 2, device=DEVICE) * 100
    slots = torch.stack([torch.randperm(C)[:T] for _ in range(B)]).to(DEVICE)

    def run(op, stream, norm, w):
        k, v = torch.full((2, B, KV, C, D), 1e4, device=DEVICE, dtype=stream.x.dtype)
        q = op(stream, norm, 1e-5, w, angles.cos(), angles.sin(), slots, k, v)
        return torch.cat([q.flatten(), k.flatten(), v.flatten()])       # the cache too: nothing else may be written
    got = run(linear.qkv_rope, stream(x, norm), norm, w)
    check(got, lambda x, norm, w: run(linear.qkv_rope_ref, stream(x), norm, w), x, norm, w)


@pytest.mark.parametrize("rows, split, share", [(rows, split, kernels.Share(*share)) for rows, split, share in itertools.product(
    ROWS if CUDA else [5, 17], (1, 2), ((3, 48), (4, 1)))])
def test_the_share_of_a_gpu_shows_in_no_bit(rows, split, share, monkeypatch):
    """A few programs that take many blocks each, with few bytes in flight, write what a full grid writes."""
    monkeypatch.setattr(launch, "blocks_for", lambda *a: launch.Blocks(16, 32, 3, 4, split))
    K, N, KV, D = (1536, 640, 2, 64) if CUDA else (96, 144, 1, 16)
    H = N // D - 2 * KV
    x, w, norm, residual = randn(1, rows, K), randn(N, K, scale=K ** -0.5), randn(K), randn(1, rows, N)
    angles, slots = torch.rand(1, rows, D // 2, device=DEVICE), torch.arange(rows, device=DEVICE)[None]
    seeds, positions = torch.zeros(1, device=DEVICE, dtype=torch.int64), torch.arange(rows, device=DEVICE)[None]
    assert launch.Launch(x, w, share=share).grid[0] == share.ctas < launch.Launch(x, w).grid[0]

    def run(**share):
        cache, sums = torch.zeros(2, 1, KV, rows, D, device=DEVICE, dtype=DTYPE), torch.zeros(1, rows, device=DEVICE, dtype=torch.int64)
        added = linear.add_linear(x, w, linear.Stream(residual, None, None), randn(N).fill_(0.5), sums, **share)
        outs = [linear.linear(x, w, **share), *added, linear.swiglu_linear(stream(x, norm), norm, 1e-5, w, **share),
                linear.qkv_rope(stream(x, norm), norm, 1e-5, w, angles.cos(), angles.sin(), slots, *cache, **share), cache,
                *head.best(x, w, 3, 0.8, seeds, 0, positions, **share)]
        assert outs[-3].any() and H > 0
        return outs
    for full, few in zip(run(), run(share=share)):
        assert torch.equal(full, few)


def test_sequences_may_lie_far_apart():
    """A batch of long texts: between two sequences lie more elements of K than 32 bits can count."""
    B, T, H, KV, C, D, K = 3, 2, 2, 1, 8, 16, 32
    memory = torch.empty(2**31 + 2 * C * D, device=DEVICE, dtype=torch.float16)         # hardly any of it is touched
    far = [memory.as_strided((1, B, KV, C, D), (0, 2**30, C * D, D, 1), i * C * D).zero_() for i in range(2)]
    near = torch.zeros(2, 1, B, KV, C, D, device=DEVICE, dtype=torch.float16)
    x, norm, w = randn(B, T, K).half(), randn(K).half(), randn((H + 2 * KV) * D, K, scale=K ** -0.5).half()
    angles, slots = torch.rand(B, T, D // 2, device=DEVICE), torch.tensor([[4, 5], [1, 7], [2, 3]], device=DEVICE)
    for k, v in near, far:
        linear.qkv_rope(stream(x, norm), norm, 1e-5, w, angles.cos(), angles.sin(), slots, k[0], v[0])
        commit.commit(k, v, slots, slots - 1)
    assert torch.equal(torch.stack(far), near) and near.any(dim=-1).sum() == 2 * (3 + 4 + 3)


@pytest.mark.parametrize("rows, size", list(itertools.product([5, 33] if CUDA else [1, 17], SIZES)))
def test_int8_weights(rows, size):
    """Every linear with a weight in int8 against its twin with that weight in full."""
    (K, N), D = size, 64 if CUDA else 8                                 # one KV head, the others are query heads
    x, w, norm, residual = randn(1, rows, K), randn(N, K, scale=K ** -0.5), randn(K), randn(1, rows, N)
    w8 = kernels.Int8Weight.of(w)
    assert (w8.dense(torch.float32) - w.float()).abs().max() <= w.float().abs().max() / 127
    zeros = lambda: torch.zeros(1, rows, device=DEVICE, dtype=torch.int64)
    check(linear.linear(x, w8), linear.linear_ref, x, w8)
    check(head.head(x, w8), head.head_ref, x, w8)
    check(linear.add_linear(x, w8, linear.Stream(residual, None, None), norm.new_ones(N), zeros()).x,
          lambda x, w, y: linear.add_linear_ref(x, w, linear.Stream(y, None, None), None, zeros().float()).x, x, w8, residual)
    check(linear.swiglu_linear(stream(x, norm), norm, 1e-5, w8),
          lambda x, w, norm: linear.swiglu_linear_ref(stream(x), norm, 1e-5, w), x, w8, norm)
    angles, slots = torch.rand(1, rows, D // 2, device=DEVICE), torch.arange(rows, device=DEVICE)[None]

    def qkv(op, x, norm, w):
        k, v = torch.full((2, 1, 1, rows, D), 1e4, device=DEVICE, dtype=x.x.dtype)
        return torch.cat([y.flatten() for y in (op(x, norm, 1e-5, w, angles.cos(), angles.sin(), slots, k, v), k, v)])
    check(qkv(linear.qkv_rope, stream(x, norm), norm, w8),
          lambda x, norm, w: qkv(linear.qkv_rope_ref, stream(x), norm, w), x, norm, w8)


# ---------------------------------------------------------------------------------------------------------------------
# Attention

def random_tree(nodes):
    """Parents in level order, as Tree wants them."""
    parents = [-1] + [random.randrange(node) for node in range(1, nodes)]
    depth = [0]
    for parent in parents[1:]:
        depth.append(depth[parent] + 1)
    order = sorted(range(nodes), key=lambda node: depth[node])
    name = {node: i for i, node in enumerate(order)}
    renamed = sorted((name[node], name[parents[node]]) for node in order[1:])
    return [-1] + [parent for _, parent in renamed]


@pytest.mark.parametrize("B, nodes, H, KV, D, prefix", [
    (1, 1, 32, 8, 128, 1), (1, 1, 32, 8, 128, 2049), (3, 5, 9, 3, 64, 127), (1, 64, 32, 8, 128, 500), (2, 33, 9, 3, 64, 64),
    (4, 8, 32, 8, 64, 0), (1, 128, 9, 3, 64, 700), *((3, 5, 32, 8, 128, prefix) for prefix in (1, 127, 2049)),
    (3, 5, 9, 3, 64, 1), (3, 5, 9, 3, 64, 2049), (3, 5, 32, 8, 64, 2049)] if CUDA else
    [(1, 1, 4, 2, 16, 1), (2, 7, 3, 1, 32, 130), (1, 20, 4, 4, 16, 61), (1, 9, 4, 1, 16, 0)])
def test_tree_attention(B, nodes, H, KV, D, prefix):
    tree = Tree(random_tree(nodes), DEVICE)
    C = prefix + B + nodes + 7
    q, cache = randn(B, nodes, H, D), randn(2, B, KV, C, D)
    prefix_len = torch.arange(B, device=DEVICE) + prefix
    for b in range(B):
        cache[:, b, :, prefix + b + nodes:] = 1e4                      # poison behind what may be looked at
    view = tree_attention.visibility(prefix_len, tree.mask, C)
    visible = tree_attention.visibility_ref(prefix_len, tree.mask, C)
    got = tree_attention.tree_attention(q, cache[0], cache[1], view)
    check(got, lambda q, k, v: tree_attention.tree_attention_ref(q, k, v, visible), q, cache[0], cache[1])

    # Each sequence with a tree of its own: as the one that it has alone
    trees = [tree_attention.Ancestors.of(Tree(random_tree(nodes), DEVICE).mask) for _ in range(B)]
    most = max(tree.slots.shape[1] for tree in trees)
    slots = torch.stack([torch.nn.functional.pad(tree.slots, (0, most - tree.slots.shape[1])) for tree in trees])
    own = tree_attention.Ancestors(None, slots, torch.stack([tree.count for tree in trees]))
    masks = tree_attention.Ancestors(torch.stack([tree.mask for tree in trees]), None, None)
    got = tree_attention.tree_attention(q, *cache, tree_attention.visibility(prefix_len, own, C))
    visible = tree_attention.visibility_ref(prefix_len, masks, C)
    for b, tree in enumerate(trees):
        one = slice(b, b + 1)
        alone = tree_attention.tree_attention(q[one], *cache[:, one], tree_attention.visibility(prefix_len[one], tree, C))
        assert torch.equal(got[one], alone)
        assert torch.equal(visible[one], tree_attention.visibility_ref(prefix_len[one], tree, C))


@pytest.mark.parametrize("prefix", [63, 64, 65])
def test_a_token_may_see_its_prefix_alone(prefix):
    """The draft feeds the last token of its prefix again: that row's mask is empty."""
    mask = torch.tensor([[False], [True]], device=DEVICE)
    q, cache, prefix_len = randn(1, 2, 4, 16), randn(2, 1, 2, 70, 16), torch.tensor([prefix], device=DEVICE)
    cache[..., prefix + 1:, :] = 1e4
    got = tree_attention.tree_attention(q, cache[0], cache[1], tree_attention.visibility(prefix_len, mask, 70))
    visible = tree_attention.visibility_ref(prefix_len, mask, 70)
    check(got, lambda q, k, v: tree_attention.tree_attention_ref(q, k, v, visible), q, cache[0], cache[1])


@pytest.mark.parametrize("prefix, unit, splits", [(0, 64, 32), (60, 64, 32), (125, 16, 4)] +
                         [(500, 64, 32), (2040, 64, 32), (6000, 64, 32)] * CUDA)
def test_attention_does_not_depend_on_company(prefix, unit, splits, monkeypatch):
    """A token of a tree in a batch gets what it gets alone, behind a prefix that holds its ancestors, in another cache.

    The small units make more of them than there are splits.
    """
    monkeypatch.setattr(tree_attention, "BLOCK", unit)
    monkeypatch.setattr(tree_attention, "SPLITS", splits)
    B, nodes, H, KV, D = (3, 64, 32, 8, 128) if CUDA else (3, 20, 3, 1, 16)
    parents = [-1] + [max(0, node - random.choice([1, 1, 3])) for node in range(1, nodes)]              # deep
    mask = torch.eye(nodes, dtype=torch.bool, device=DEVICE)
    for node in range(1, nodes):
        mask[node] |= mask[parents[node]]
    prefix_len = prefix + torch.tensor([0, 3, 9], device=DEVICE)
    q, cache = randn(B, nodes, H, D), randn(2, B, KV, prefix + nodes + 9, D)
    attention = lambda q, cache, prefix_len, mask: tree_attention.tree_attention(
        q, cache[0], cache[1], tree_attention.visibility(prefix_len, mask, cache.shape[3]))
    together = attention(q, cache, prefix_len, mask)
    for b, node in itertools.product(range(B), [0, 1, nodes // 2, nodes - 2, nodes - 1]):
        slots = prefix_len[b] + mask[node].nonzero()[:, 0]
        alone = torch.cat([cache[:, b:b + 1, :, :prefix_len[b]], cache[:, b:b + 1, :, slots],
                           torch.full_like(cache[:, :1, :, :3 * node], 1e4)], 3)
        got = attention(q[b:b + 1, node:node + 1], alone, prefix_len[b:b + 1] + len(slots) - 1, mask[:1, :1])[0, 0]
        if CUDA:
            assert torch.equal(got, together[b, node])
        else:                                                           # the interpreter's products are numpy's
            torch.testing.assert_close(got, together[b, node], atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Embedding, norm, head, and what a round does with their tokens

def test_embed():
    V, dim, D, B, T = 50, 96, 32, 2, 5
    weight, freqs = randn(V, dim), torch.rand(D // 2, device=DEVICE)
    tokens, positions = torch.randint(-1, V, (B, T), device=DEVICE), torch.randint(0, 5000, (B, T), device=DEVICE)
    norm = randn(dim)
    got, cos, sin, zeros = embed.embed(tokens, positions, weight, freqs, norm, 7)
    want, cos_ref, sin_ref, _ = embed.embed_ref(tokens, positions, weight, freqs, norm, 7)
    assert torch.equal(got.x, want.x) and torch.equal(got.weighed, (got.x.float() * norm.float()).to(DTYPE))
    torch.testing.assert_close((cos, sin), (cos_ref, sin_ref), atol=2e-6, rtol=0)
    assert torch.equal(got.sums, fixed_sums(got.x)) and zeros.shape == (7, B, T) and not zeros.any()


@pytest.mark.parametrize("V, dim", [(49152, 576), (128256, 4096)] if CUDA else [(300, 32)])
def test_head(V, dim):
    w = (torch.randn(V, dim, device=DEVICE) * dim ** -0.5).to(DTYPE)
    for rows in ROWS[::2]:
        x = randn(1, rows, dim)
        check(head.head(x, w), head.head_ref, x, w)


def test_norm():
    x, weight = randn(2, 3, 576), randn(576)
    check(head.rms_norm(x, weight, 1e-5), lambda x, w: linear.rms_norm_ref(x, w, 1e-5), x, weight)


@pytest.mark.parametrize("n, temperature, rows", [(1, 0.0, 1), (1, 0.8, 7), (5, 0.0, 4), (8, 1.0, 17)])
def test_best(n, temperature, rows):
    V, dim = (49152, 576) if CUDA else (300, 32)
    hidden, w = randn(2, rows, dim), randn(V, dim, scale=dim ** -0.5)
    seeds, positions = torch.tensor([3, 2**45 + 1], device=DEVICE), torch.randint(0, 9999, (2, rows), device=DEVICE)
    ids = torch.randperm(4 * V, device=DEVICE)[:V]
    ids[0] = -1
    for given in (None, ids):
        got, their_scores = head.best(hidden, w, n, temperature, seeds, 0, positions, given)
        scores = head.head(hidden, w)                                   # the same products: only the choice is tested
        if temperature:
            all_ids = torch.arange(V, device=DEVICE) if given is None else given
            scores = scores / temperature + kernels.gumbel(seeds, 0, positions, all_ids)
        if given is not None:
            scores[..., 0] = -torch.inf                                 # id -1: not a token
        want = scores.topk(n).values
        torch.testing.assert_close(scores.gather(-1, got), want, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(their_scores, want, atol=1e-4, rtol=1e-5)
        assert all(len(set(row)) == n for row in got.flatten(0, 1).tolist())


def test_best_where_the_last_block_is_a_single_row():
    """What fills that block up must not be taken for its one row."""
    V, dim = (49153, 576) if CUDA else (257, 32)
    hidden, w = randn(1, 3, dim), randn(V, dim, scale=dim ** -0.5)
    assert V % launch.blocks_for(V, dim).BN == 1
    w[-1] = 4 * hidden[0, 1]                                            # likeliest of row 1
    none, positions = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    got, _ = head.best(hidden, w, 4, 0.0, none, 0, positions)
    assert torch.equal(got, head.head(hidden, w).topk(4).indices) and got[0, 1, 0] == V - 1


def test_walk():
    for _ in range(20):
        tree = Tree(random_tree(random.randint(1, 20)), DEVICE)
        tokens = torch.randint(-1, 3, (4, tree.size), device=DEVICE)
        for node in range(1, tree.size):                                # siblings differ, as drafted ones do
            tokens[:, node] = torch.where(tokens[:, node] < 0, -1, 3 * tree.ranks[node] + tokens[:, node])
        own = torch.randint(0, 6, (4, tree.size), device=DEVICE)
        got, want = (op(tokens, tree.parent, tree.depth, own) for op in (accept.walk, accept.walk_ref))
        assert all(map(torch.equal, got, want))


def ints(high, *shape, low=0):
    return torch.randint(low, high, shape, device=DEVICE)


def verdict_on(tree, B):
    """A verdict somewhere on the tree for each of B sequences: path, length, bonus."""
    paths = []
    for _ in range(B):
        path = [random.randrange(tree.size)]
        while path[0]:
            path.insert(0, tree.parents[path[0]])
        paths.append(path)
    length = torch.tensor([len(path) - 1 for path in paths], device=DEVICE)
    path = torch.tensor([path + path[-1:] * (tree.depth + 1 - len(path)) for path in paths], device=DEVICE)
    return path, length, ints(9, B)


TREES = [[-1], [-1, 0], [-1, 0, 1, 2, 3], [-1, 0, 0, 0, 1, 1, 2], [-1, 0, 0, 1, 1, 1, 1, 1, 2, 4, 4]]


@pytest.mark.parametrize("parents, B", list(itertools.product(TREES, [1, 3])))
def test_settle(parents, B):
    tree = Tree(parents, DEVICE)
    for _ in range(4):
        args = ints(9, B, tree.size, low=-1), tree.parent, *verdict_on(tree, B)
        ours = ints(50, B)
        twins = ours.clone()
        got, want = settle.settle(*args, ours), settle.settle_ref(*args, twins)
        assert all(map(torch.equal, got, want)) and torch.equal(ours, twins)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("parents, B, known", list(itertools.product(TREES[1:], [1, 3], [False, True])))
def test_grow(parents, B, known, trimmed):
    """Level by level and all nodes at once; drawn apart from the ranked (residual) and from among them."""
    tree, V = Tree(parents, DEVICE), 40
    layout = Layout(tree, [2] + [0] * (tree.size - 2) + [1], DEVICE)
    to_target = torch.cat([torch.tensor([-1]), torch.randperm(60)[:V - 1]]).to(DEVICE) if trimmed else None
    to_draft = ints(V, 60) if trimmed else None
    schedules = [(1, layout.refeed.levels), (1, layout.ahead.levels[:1]), (1, layout.glued.levels[:1]),
                 (len(layout.nodes), layout.ahead.levels[1:])]
    for (R, levels), apart in itertools.product(schedules, [False, True]):
        ours = [ints(60, B, R, tree.size, low=-1), ints(60, B, R, tree.size, layout.width)]
        odds = [torch.rand(x.shape, device=DEVICE) for x in reversed(ours)]
        twins, their_odds = ([x.clone() for x in some] for some in (ours, odds))
        for level in levels:
            rows = R * (level.nodes.stop - level.nodes.start)
            draw = lambda n: torch.rand(B, rows, V, device=DEVICE).topk(n)
            scores, ranked = draw(level.n_ranked)
            drawn = draw(level.n_choices).indices if apart else ranked
            args = ranked, drawn, ints(2, B).bool() if known else None, tree.children, level.nodes, level.below
            got, want = (op(*own, *args, to_target, to_draft, *(() if apart else (sure, scores, 1.5)))
                         for op, own, sure in ((grow.grow, ours, odds), (grow.grow_ref, twins, their_odds)))
            assert torch.equal(got, want) and all(map(torch.equal, ours, twins))
            for got, want in zip(odds, their_odds):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_guesses_are_no_children():
    """By hand: node 0 of [-1, 0, 0] with 3 guesses."""
    tree = Tree([-1, 0, 0], DEVICE)
    tensor = lambda *x: torch.tensor(x, device=DEVICE)
    for op in grow.grow, grow.grow_ref:
        tokens, guesses = tensor([[9, 7, 4]], [[9, 0, 0]]), torch.zeros(2, 1, 3, 3, dtype=torch.int64, device=DEVICE)
        ranked = tensor([[5, 4, 3, 2, 1]], [[5, 4, 3, 2, 1]])
        fed = op(tokens, guesses, ranked, ranked, tensor(True, False), tree.children, slice(0, 1), slice(1, 3), None, None)
        assert tokens.tolist() == [[[9, 7, 4]], [[9, 5, 4]]] and fed.tolist() == [[7, 4], [5, 4]]
        assert guesses[:, 0, 0].tolist() == [[5, 3, 2], [3, 2, 1]] and not guesses[:, :, 1:].any()


def test_odds_of_guesses_and_children():
    """By hand: node 0 of [-1, 0, 0], whose second child isn't among the three best."""
    tree, tensor = Tree([-1, 0, 0], DEVICE), lambda *x: torch.tensor(x, device=DEVICE)
    chances = torch.tensor([0.5, 0.3, 0.2])
    for op in grow.grow, grow.grow_ref:
        tokens, guesses = tensor([[9, 7, 4]]), torch.full((1, 1, 3, 2), -1, device=DEVICE)
        odds = torch.zeros(1, 1, 3, 2, device=DEVICE), torch.zeros(1, 1, 3, device=DEVICE)
        ranked, drawn, scores = tensor([[7, 3, 2]]), tensor([[7, 4]]), (chances.log() / 2).to(DEVICE).view(1, 1, 3)
        op(tokens, guesses, ranked, drawn, None, tree.children, slice(0, 1), slice(1, 3), None, None, odds, scores, 2.0)
        assert guesses[0, 0, 0].tolist() == [3, 2]
        torch.testing.assert_close(odds[0][0, 0, 0].exp().cpu(), chances[1:])
        torch.testing.assert_close(odds[1][0, 0, 1:].exp().cpu(), chances[[0, 2]])


@pytest.mark.parametrize("parents, B, N", list(itertools.product([*TREES[1:], list(range(-1, 20))], [1, 3], [1, 16])))
def test_outcomes(parents, B, N, monkeypatch):
    """The likeliest are chosen, and the branches see what lies above them: by both ways, mask and lists."""
    monkeypatch.setattr(outcomes, "MAX_ROWS", 16)                       # levels of more rows need masks, too
    tree, start = Tree(parents, DEVICE), 50 + 3 * torch.arange(B, device=DEVICE)
    layout = Layout(tree, [N] + [0] * (tree.size - 1), DEVICE, confident=True)
    F, branching = layout.width, layout.branching
    guesses = torch.rand(B, tree.size, 19, device=DEVICE).argsort(-1)[..., :F] - 1          # all of a node differ
    odds = torch.rand(B, tree.size, F, device=DEVICE).log(), torch.rand(B, tree.size, device=DEVICE).log()
    odds[0][:, 1, 0] = float("nan")                                     # garbage where there is no guess ...
    guesses[:, 1, 0], odds[1][:, 0] = -1, float("nan")                  # ... and behind the root's parent
    odds[0][:, 0, 0], odds[1][:, -1] = float("nan"), -float("inf")      # a broken model; an empty node
    got, want = (op(guesses, odds, start, tree, branching) for op in (outcomes.outcomes, outcomes.outcomes_ref))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for b in range(B):
        chances = {(node, guesses[b, node, f].item()): sum(odds[1][b, up].item() for up in range(1, node + 1) if tree.mask[node, up])
                   + odds[0][b, node, f].item() for node in range(tree.size) for f in range(F) if guesses[b, node, f] >= 0}
        found = list(zip(got[0][b].tolist(), got[1][b].tolist()))
        best = sorted((chance for chance in chances.values() if chance > -1e30), reverse=True)[:N]
        assert sorted((chances.get(outcome, 1) for outcome in found[:len(best)]), reverse=True) == pytest.approx(best, abs=1e-4)
    assert len(got[2]) == len(want[2]) == tree.depth
    for (level, places, lists), (other, their_places, masks) in zip(got[2], want[2]):
        assert level is other and all(map(torch.equal, places, their_places)) and all(x.is_contiguous() for x in places)
        assert torch.equal(lists.mask, masks.mask) if places[0].shape[1] > 16 else lists.mask is None
        for b, t in itertools.product(range(B), range(places[0].shape[1])):
            seen = lists.slots[b, t, :lists.count[b, t]]
            assert torch.equal(seen, masks.mask[b, t].nonzero()[:, 0]), "ascending: in the order of their positions"
            assert start[b] + len(seen) - 1 == places[0][b, t] and start[b] + seen[-1] == places[2][b, t]


def test_plain_outcomes_can_be_recorded():
    """In plain torch, too, on a GPU they are part of a CUDA graph: no op may want a number from the device."""
    seen, tree = set(), Tree([-1, 0, 0, 1, 1], DEVICE)
    layout = Layout(tree, [5] + [0] * 4, DEVICE, confident=True)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(op.name().split(".")[0])
            return op(*args, **(kwargs or {}))
    odds = tuple(torch.rand(2, *shape, device=DEVICE) for shape in ((5, layout.width), (5,)))
    with Watch():
        outcomes.outcomes_ref(ints(9, 2, 5, layout.width), odds, ints(9, 2), tree, layout.branching)
    assert "aten::sort" in seen and not seen & {"aten::_local_scalar_dense", "aten::nonzero", "aten::repeat_interleave"}


@pytest.mark.parametrize("parents, B, N", list(itertools.product(TREES[1:], [1, 3], [0, 1, 30])))
def test_switch(parents, B, N):
    tree, F, room = Tree(parents, DEVICE), 3, 80
    for hit in (True, False):
        verdict = path, _, bonus = verdict_on(tree, B)
        branches = ints(9, B, N, tree.size), ints(9, B, N, tree.size, F)
        nodes, roots = ints(tree.size, B, N), ints(9, B, N) + 9         # none is the bonus ...
        roots[:, :-1] = bonus[:, None].where(nodes[:, :-1] != path[:, -1:], 9)  # ... or the node is another ...
        if hit and N:
            nodes[0, -1], roots[0, -1] = path[0, -1], bonus[0]          # ... but here
        state = [ints(9, B, tree.size), ints(9, B, tree.size, F)], [ints(9, B, room), 20 + ints(30, B)]
        rand = lambda *like: tuple(torch.rand(x.shape, device=DEVICE) for x in like)
        for odds, their_odds in ((rand(*reversed(state[0])), rand(*reversed(branches))), (None, None)):
            outcomes = (nodes, roots, *branches, their_odds) if N else None
            results = []
            for op in switch.switch, switch.switch_ref:
                (spec, text), sure = ([x.clone() for x in some] for some in state), odds and tuple(x.clone() for x in odds)
                found = torch.full((B, 4), -1, device=DEVICE)
                results.append((op(*verdict, *spec, sure, *text, found, outcomes), spec + text + list(sure or ()) + [found]))
            (got, ours), (want, twins) = results
            assert all(map(torch.equal, ours, twins)) and all(map(torch.equal, got, want))
            here = (nodes[0] == path[0, -1]).tolist() if N else []
            expected = [int(hit), *((N - 1, sum(here) - 1) if hit else (0, 0)), sum(here)] if N else [-1] * 4
            assert found[0].tolist() == expected


def test_commit():
    k, v = randn(2, 3, 2, 2, 90, 32)
    start = torch.tensor([[3], [40]], device=DEVICE)
    src = start + torch.tensor([[0, 2, 5, 0, 9, 10, 11], [0, 1, 0, 0, 30, 31, 32]], device=DEVICE)
    dst = start + torch.tensor([[0, 1, 2, 0, 3, 4, 5], [0, 1, 0, 0, 2, 3, 4]], device=DEVICE)
    k_ref, v_ref = k.clone(), v.clone()
    commit.commit(k, v, src, dst)
    commit.commit_ref(k_ref, v_ref, src, dst)
    assert torch.equal(k, k_ref) and torch.equal(v, v_ref)


# ---------------------------------------------------------------------------------------------------------------------
# Whole forwards

CONFIGS = {"8b": dict(dim=4096, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336, n_layers=3, vocab_size=128256),
           "smollm2": dict(dim=576, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, n_layers=8, vocab_size=49152,
                           tie_embeddings=True)}


def step(model, cache, tokens, positions, slots, prefix_len, mask):
    """Logits of one forward over [B, T] tokens, as tensors on the model's device."""
    tensor = lambda x: torch.as_tensor(x, device=model.device)
    return model.logits(model(tensor(tokens), tensor(positions), tensor(slots), tensor(prefix_len), tensor(mask), cache))


@pytest.mark.skipif(CUDA, reason="the CPU tier's stand-in for the next test")
def test_forward_matches_the_twins():
    config = LlamaConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48)
    model, tree, out = Llama.random(config, 1, dtype=torch.float32), Tree.from_widths([2, 2]), []
    for model.ops in (kernels.TORCH, kernels.TRITON):
        cache = KVCache(config, 1, 100, "cpu", torch.float32)
        cache.k.normal_(generator=torch.Generator().manual_seed(0))
        cache.v.normal_(generator=torch.Generator().manual_seed(1))
        depth = tree.node_depth[None]
        out.append(step(model, cache, [list(range(tree.size))], 70 + depth, 70 + torch.arange(tree.size)[None], [70], tree.mask))
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hits, opened, left", [([1], 0, 0), ([1, 1, 1], 1, 1), ([0], 1, 0), ([1, 1, 0], 1, 0), ([0, 1], 1, 0)])
def test_gate(hits, opened, left):
    """It lets through at once who all hit, and else who finds it open, and shuts it then. Whoever should wait is not in this test."""
    found = torch.tensor([[hit, 7 - 7 * hit, 0, 1] for hit in hits], device=DEVICE)
    opened = torch.tensor([opened], dtype=torch.int32, device=DEVICE)
    gate.wait_at_gate(found, opened)
    assert opened.item() == left


@gpu_only
@pytest.mark.parametrize("hit", [0, 1])
def test_who_waits_at_the_gate(hit):
    """Behind it a copy waits until it is opened from another stream, unless all hit."""
    found, opened = torch.tensor([[1, 0, 0, 0], [hit, 0, 0, 0]], device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE).zero_()
    gate.wait_at_gate(torch.ones_like(found), opened)                       # compiles it
    mark, other, passed, way = torch.zeros(1, device=DEVICE), torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
    torch.cuda.synchronize()
    gate.wait_at_gate(found, opened)
    mark.fill_(1)
    passed.record()
    time.sleep(0.05)
    assert passed.query() == bool(hit)
    with torch.cuda.stream(other):
        opened.fill_(1)
        way.record()
    way.synchronize()
    passed.synchronize()
    assert mark.item() == 1 and opened.item() == hit


def test_mail_matches_the_twin():
    """Lines of several lengths, more of them than the box has room for."""
    boxes = [torch.full((3, 2, 9), -1, dtype=torch.int64, pin_memory=CUDA) for _ in range(2)]
    counts = [torch.full((2,), 7 << 32, dtype=torch.int64, device=device) for device in (DEVICE, "cpu")]
    for n in 5, 8, 1, 2, 8:
        x = torch.randint(1 << 40, (2, n), device=DEVICE)
        mail.send(x, boxes[0], counts[0])
        mail.send_ref(x.cpu(), boxes[1], counts[1])
        if CUDA:
            torch.cuda.synchronize()
        assert torch.equal(*boxes) and torch.equal(counts[0].cpu(), counts[1])


def test_mail_that_was_written_over_is_noticed():
    """The host would wait for ever for the number of a run whose line a later one has taken."""
    box = object.__new__(graphs.Mailbox)
    box.rows, box.words = 1, [0] * (graphs.Mailbox.DEPTH * graphs.Mailbox.WIDTH)
    at = 5 % box.DEPTH * box.WIDTH
    box.words[at:at + 3] = [5, 8, 9]
    assert box.wait_for(5, 2) == [[8, 9]]
    box.words[at] = 5 + box.DEPTH
    with pytest.raises(RuntimeError, match="run 5 was written over by that of 9"):
        box.wait_for(5, 2)


@gpu_only
def test_mailbox():
    """Several receipts at once, in order; a step that a graph replays; another box's numbers are no good here."""
    box, calls, x = graphs.Mailbox(torch.device(DEVICE), 3), graphs.Graphs(True), torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)

    class Step:
        def run(self):
            x.add_(1)
            box.send(x)
            return x
    step = Step()
    for _ in range(5):
        receipts = [box.receipt(calls(step.run)) for _ in range(2)]
        got = [receipt() for receipt in receipts]
        assert got[1] == [[value + 1 for value in line] for line in got[0]] and len(got[0]) == 3 and len(got[0][0]) == 2
    assert got[1] == [[10, 10]] * 3 and graphs.Mailbox(torch.device(DEVICE), 3).number >> 32 > box.number >> 32


@pytest.mark.skipif(CUDA, reason="the loops run on these kernels there (test_correctness.py)")
@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("options", [Options(k=3, fanout_budget=7), Options(tree="2,2", fanout_budget=9, backup="fast"),
                                     Options(tree="2,1", accept="residual", saguaro_c=0.5, fanout_budget=5)], ids=str)
def test_rounds_match_the_twins(options, trimmed, monkeypatch):
    """Whole requests on the kernels that end a level, a verify and a round, in memory that starts as garbage."""
    target, draft = tiny_pair(trimmed)
    prompts, out = [[1, 2, 3], [4], [5, 6, 5, 6, 5]], []
    for ops in (kernels.TORCH, kernels.TRITON):
        monkeypatch.setattr(kernels, "ops_for", lambda tensor: ops)
        for loop in (sd, ssd):
            out.append(texts_of(loop(target, draft, prompts, [9, 14, 12], Sampling(0.9, seed=3), options), monkeypatch))
    assert out[:2] == out[2:] and {"accepted-hit", "accepted-miss"} <= {kind for *_, kinds in out[3] for kind in kinds}


@pytest.mark.skipif(CUDA, reason="the GPU tier runs whole requests, and this test's levels, on real shapes")
@pytest.mark.parametrize("trimmed", [False, True])
def test_rounds_on_a_drafts_own_kernels(trimmed, monkeypatch):
    """Its forwards, too, behind outcomes that each round chooses, where some of its levels have more rows than the kernels take."""
    target, draft = tiny_pair(trimmed)
    out, run = [], lambda: ssd(target, draft, [[1, 2, 3]], 12, Sampling(0.9, seed=5), Options(tree="2,2", fanout_budget=5))
    for ops, most in (kernels.TORCH, 128), (kernels.TRITON, 8):         # levels of 5 and 10 rows
        monkeypatch.setattr(kernels, "ops_for", lambda tensor: ops)
        for module in kernels, outcomes:
            monkeypatch.setattr(module, "MAX_ROWS", most)
        draft.ops = ops
        out.append(texts_of(run(), monkeypatch))
    assert out[0] == out[1] and "accepted-hit" in {kind for *_, kinds in out[0] for kind in kinds}


def tiny_pair(trimmed):
    """A target and a draft that agrees with it now and then."""
    config = LlamaConfig(vocab_size=60, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48)
    target, draft = (Llama.random(config, 1, dtype=torch.float32) for _ in range(2))
    target.head.mul_(4), draft.head.mul_(4)                             # confident, like a language model
    if trimmed:                                                         # it has never heard of the last ten tokens
        draft = Llama.random(replace(config, vocab_size=51, target_vocab_size=60), 1, dtype=torch.float32)
        layers = {name: x for name, x in target.state_dict().items() if "layers" in name}
        draft.load_state_dict({**draft.state_dict(), **layers})
        draft.d2t[1:] = torch.arange(50)
        draft.embed[1:], draft.head[1:] = target.embed[:50], target.head[:50]
    draft.norm.mul_(0.5 + torch.rand(32))
    return target, draft


def texts_of(rounds, monkeypatch):
    """What a loop gives out, one side after the other (the interpreter isn't made for threads), in memory that starts as garbage."""
    def at_once(self, work):
        result = work()
        return lambda: result
    monkeypatch.setattr(graphs.Beside, "submit", at_once)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    found = [(chunk.sequence, chunk.tokens, chunk.origins) for chunks in rounds for chunk in chunks]
    torch.use_deterministic_algorithms(False)
    return found


def test_many_rows_go_in_groups(monkeypatch):
    """A step of more rows than the kernels take is the same as its sequences in smaller batches, bit for bit."""
    config = LlamaConfig(vocab_size=60, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48)
    model, tree, B = Llama.random(config, 1, DEVICE, torch.float32), Tree.chain(2, DEVICE), 5
    model.ops = kernels.TRITON
    sampler = Sampler(Sampling(0.8), list(range(B)), DEVICE)
    cache = KVCache(config, B, 40, DEVICE, torch.float32)
    cache.k.normal_()
    start = torch.arange(B, device=DEVICE)[:, None] + 9
    tokens = torch.randint(0, 60, (B, tree.size), device=DEVICE)
    out = []
    for most in (128, 7):                                               # all at once; two sequences at a time
        monkeypatch.setattr(kernels, "MAX_ROWS", most)
        hidden = model(tokens, start + tree.node_depth, start + tree.node_depth, start[:, 0], tree.ancestors, cache)
        out.append((hidden, model.logits(hidden), sampler.choose(model, hidden, start + tree.node_depth, 3)))
    if CUDA:
        assert all(map(torch.equal, *out))
    else:                                                               # the interpreter's products are numpy's
        torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)


def test_int8_model_is_its_own_rounding():
    """to_int8 computes what the dense model with the rounded weights would."""
    config = LlamaConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, tie_embeddings=True)
    tree, out = Tree.from_widths([2, 2], DEVICE), []
    for int8 in (True, False):
        model = Llama.random(config, 1, DEVICE, torch.float32)
        if int8:
            model.to_int8()
        else:
            for module, name in [(model, "head")] + [(layer, name) for layer in model.layers
                                                     for name in ("wqkv", "wo", "w_gate_up", "w_down")]:
                weight = torch.nn.Parameter(kernels.Int8Weight.of(getattr(module, name)).dense(torch.float32), False)
                setattr(module, name, weight)
        cache = KVCache(config, 1, 100, DEVICE, torch.float32)
        depth = tree.node_depth[None]
        out.append(step(model, cache, [list(range(tree.size))], 5 + depth, 5 + torch.arange(tree.size, device=DEVICE)[None],
                        [5], tree.mask))
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)


class Steps:
    """Logits [B, T, V] of forwards, launched kernel by kernel or replayed as CUDA graphs."""

    def __init__(self, model, recorded):
        self.model, self.graphs = model, graphs.Graphs(recorded)

    def forward(self, tokens, positions, slots, prefix_len, ancestors, cache):
        return self.model.logits(self.model(tokens, positions, slots, prefix_len, ancestors, cache))

    def __call__(self, tree, tokens, start, cache):
        """tokens [B, M+1] of a tree behind start [B, 1]. Thrice, as a graph is replayed from the third time on; in clones, as it
        takes the memory of its arguments for itself."""
        slots = start + torch.arange(tree.size, device=start.device)
        args = tokens.clone(), start + tree.node_depth, slots, start[:, 0].clone(), tree.ancestors, cache
        return [self.graphs(self.forward, *args) for _ in range(3 if self.graphs.on else 1)][-1].clone()


@pytest.fixture(scope="module")
def big_model():
    """A bf16 model, one at a time: random weights in the whole 8B or 1B shape, SmolLM2 itself if it's there and else in its shape."""
    models = {}

    def get(name):
        if name not in models:
            models.clear()
            folder = ROOT / "checkpoints" / "smollm2"
            if name == "smollm2" and folder.exists():
                models[name] = Llama.load(folder, "cuda", torch.bfloat16)
            else:
                shape = {"8b": "llama-3.1-8b", "1b": "llama-3.2-1b", "smollm2": "smollm2-135m"}[name]
                models[name] = random_model(SHAPES[shape], "cuda", torch.bfloat16)
        return models[name]
    yield get
    models.clear()


@gpu_only
@pytest.mark.parametrize("prefix, nodes", [(1, 64), (127, 65), (500, 64), (2049, 65)])
@pytest.mark.parametrize("name", ["8b", "1b", "smollm2"])
def test_logits_do_not_depend_on_company(name, prefix, nodes, big_model):
    """A token's logits are bit-equal alone, in a chain of 8, in a tree of 64 nodes (and one of 65, which fills other tiles), in
    a batch of 4, with and without CUDA graphs, and where the target keeps to a share of the GPU (bf16, poisoned KV)."""
    model = big_model(name)
    config, tree, chain, single = model.config, Tree(random_tree(nodes), "cuda"), Tree.chain(7, "cuda"), Tree.chain(0, "cuda")
    tokens = torch.randint(0, config.vocab_size, (1, tree.size), device="cuda")
    others = torch.randint(0, config.vocab_size, (4, 8), device="cuda")
    others[2] = tokens[0, :8]

    def cache(batch):
        c = KVCache(config, batch, prefix + 80, "cuda", torch.bfloat16)
        g = torch.Generator("cuda").manual_seed(5)
        for x in (c.k, c.v):
            x.fill_(1e4)
            x[:, :, :, :prefix] = torch.randn(x[:, :1, :, :prefix].shape, generator=g, device="cuda").to(x.dtype)
        return c
    start = torch.full((1, 1), prefix, device="cuda")
    wanted = None
    for recorded in (False, True):
        steps, alone = Steps(model, recorded), cache(1)
        in_tree, in_chain = steps(tree, tokens, start, cache(1))[0], steps(chain, tokens[:, :8], start, cache(1))[0]
        wanted = (in_tree, in_chain) if wanted is None else wanted
        assert torch.equal(in_tree, wanted[0]) and torch.equal(in_chain, wanted[1]), "a graph computes something else"
        assert torch.isfinite(in_tree).all() and torch.isfinite(in_chain).all()

        def one_by_one(path, expected):
            """Decode the tokens of tree nodes one at a time; the poison behind them stays."""
            alone.k[:, :, :, prefix:], alone.v[:, :, :, prefix:] = 1e4, 1e4
            for i, node in enumerate(path):
                logits = steps(single, tokens[:, node:node + 1], start + i, alone)[0, 0]
                assert torch.equal(logits, expected[i]), f"node {node} at depth {i}: {(logits - expected[i]).abs().max()}"
        for leaf in [n for n in range(tree.size) if not tree.n_children[n]][:6]:
            path = tree.mask[leaf].nonzero()[:, 0].tolist()
            one_by_one(path, in_tree[path])
        one_by_one(range(8), in_chain)
        assert torch.equal(steps(chain, others, start.expand(4, 1).contiguous(), cache(4))[2], in_chain)
    model.run_with(share=kernels.Share(132, 32))
    assert torch.equal(steps(chain, tokens[:, :8], start, cache(1))[0], wanted[1])
    model.run_with()


@gpu_only
@pytest.mark.parametrize("prefix", [1, 127, 2049])
@pytest.mark.parametrize("name", CONFIGS)
def test_awkward_forwards(name, prefix):
    """Three sequences of different lengths, 5 tokens each, poison behind them: logits of a whole forward against fp32's."""
    config, tree, out = LlamaConfig(**CONFIGS[name]), Tree([-1, 0, 0, 1, 3], "cuda"), {}
    start, tokens = torch.tensor([[prefix], [prefix + 1], [prefix - 1]], device="cuda"), torch.arange(15, device="cuda").view(3, 5)
    whole = random_model(config, "cuda", torch.bfloat16)
    for kind, dtype in (("triton", torch.bfloat16), ("torch", torch.bfloat16), ("truth", torch.float32)):
        model = whole
        if kind == "truth":
            model = Llama(config, "cuda", dtype)
            model.load_state_dict(whole.state_dict())
        model.run_with("triton" if kind == "triton" else "torch")
        cache = KVCache(config, 3, prefix + 9, "cuda", dtype)
        for seed, x in enumerate((cache.k, cache.v)):
            x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(torch.bfloat16))
            for row, length in enumerate(start[:, 0].tolist()):
                x[:, row, :, length:] = 1e4
        out[kind] = Steps(model, False)(tree, tokens, start, cache)
    error, bar = ((out[kind] - out["truth"]).norm(dim=-1) for kind in ("triton", "torch"))
    assert (error.norm() <= 2 * bar.norm()) and torch.isfinite(error).all(), (error, bar)


ONLY_COMPILED = """
import sys, torch, triton
from dataclasses import replace
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
triton.runtime.driver.set_active(SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0,
                                                 get_current_target=lambda: GPUTarget("cuda", 90, 32)))
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda *device: (9, 0)
import kernels
from model import KVCache, Llama
from shapes import SHAPES
from tree import Tree
for name, module in list(sys.modules.items()):
    if name.startswith("kernels.") and hasattr(module, "pdl"):
        module.pdl = lambda device: True
launch = triton.JITFunction.run
torch.cuda.get_device_name = lambda *device: card
for card, name, T, share in (("NVIDIA H100 80GB HBM3", "smollm2-135m", 16, None), ("NVIDIA H200", "llama-3.2-1b", 128, None),
                             ("NVIDIA H100 80GB HBM3", "llama-3.1-8b", 128, None), ("NVIDIA H200", "llama-3.1-8b", 7, kernels.Share(132))):
    kernels.launch.tables.cache_clear()
    model = Llama(replace(SHAPES[name], n_layers=1, max_context=512), "cpu", torch.bfloat16)
    model.ops, cache, places = kernels.triton_ops(share), KVCache(model.config, 1, 512, model.device, model.dtype), torch.arange(T)[None]
    cache.k.fill_(7.0)
    with kernels.compiling_together():
        hidden = model(places, places, places, torch.zeros(1, dtype=torch.int64), Tree.chain(T - 1, "cpu").ancestors, cache)
        model.ops.best(hidden, model.head, 4, 1.0, torch.zeros(1, dtype=torch.int64), 0, places)
    assert triton.JITFunction.run is launch and bool((cache.k == 7.0).all())
"""


def test_kernels_of_a_forward_are_compiled_together(tmp_path):
    """... at their real shapes for a Hopper GPU, by threads, and not launched: there may be no GPU at all. All fit into it."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", ONLY_COMPILED], cwd=ROOT, env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    made = [json.loads(path.read_text()) for path in tmp_path.rglob("[!_]*_kernel.json")]
    assert {one["name"] for one in made} == {
        "embed_kernel", "qkv_kernel", "tree_attention_kernel", "combine_kernel", "linear_kernel", "split_kernel", "swiglu_kernel",
        "norm_kernel", "best_kernel", "pick_kernel"}
    assert len(made) == len([*tmp_path.rglob("*.cubin")]) > 30
    assert max(one["shared"] for one in made) <= 227 << 10, "bytes of shared memory that a program may have on a Hopper GPU"

"""Grow token trees by a level: put the draft's tokens for some nodes in their places, and say what the next forward reads.

Bytes: a few hundred a row; it is a kernel so that a level of drafting ends in one launch. Grid: one program a row, that is
a node of one of the R trees that each of the B sequences has.
"""
import torch
import triton
import triton.language as tl

from kernels.launch import launch_options, pdl, wait_for_inputs


def grow_ref(tokens, guesses, ranked, drawn, known, children, nodes, below, to_target, to_draft, odds=None, scores=None, sharp=1.0):
    """Fill in the children of some nodes and the guesses behind them. Returns the children's tokens for the next forward.

    tokens [B, R, M+1] and guesses [B, R, M+1, F] in place. nodes, below: slices, the w nodes whose rows these are and the
    nodes that are their children; children [M+1, C]: the children of each node, -1 where there is none. ranked
    [B, R*w, n]: the draft's tokens for a row, best first; the guesses are the first F that no child holds, as far as they go.
    drawn [B, R*w, >= children]: the tokens of the first, second, ... child. known [B] bool or None: sequences whose
    tokens are there already and stay. to_target, to_draft: between the draft's ids (ranked, drawn, the result [B, R*|below|])
    and the target's (tokens, guesses), or None where they are the same. -1 is no token.
    odds: None, or tensors that say how sure the draft is, float32: of its guesses [B, R, M+1, F], and of each node [B, R, M+1]
    behind its parent. They get log softmax(sharp * scores), scores [B, R*w, n] being those of the ranked tokens; a child that isn't
    among them is as likely as the last, an empty one impossible.
    """
    (B, R, _), F, C = tokens.shape, guesses.shape[-1], drawn.shape[-1]
    child = children[nodes, :C]                                             # [w, C]
    exists = child >= 0
    ranked, drawn = (x.view(B, R, len(child), -1) for x in (ranked, drawn))
    if to_target is not None:
        ranked, drawn = to_target[ranked], to_target[drawn]
    drawn = drawn[..., :child.shape[1]]
    if known is not None:
        drawn = torch.where(known.view(B, 1, 1, 1), tokens[:, :, child.clamp(min=0)], drawn)
    tokens[:, :, child[exists]] = drawn[:, :, exists]
    taken = (exists[:, None] & (ranked[..., None] == drawn[..., None, :])).any(-1)
    order = taken.int().argsort(dim=-1, stable=True)[..., :F]               # the free ones first, best first
    put = lambda old, new: old.copy_(torch.where(taken.gather(-1, order), old, new.gather(-1, order)))
    put(guesses[:, :, nodes, :order.shape[-1]], ranked)
    if odds is not None:
        sure = (sharp * (scores - scores[..., :1])).log_softmax(-1).view(ranked.shape)          # [B, R, w, n]
        put(odds[0][:, :, nodes, :order.shape[-1]], sure)
        same = ranked[..., None] == drawn[..., None, :]                                         # [B, R, w, n, C]
        sure = torch.where(same, sure[..., None], sure[..., -1:, None]).amax(-2)                # [B, R, w, C]
        odds[1][:, :, child[exists]] = sure.masked_fill(drawn < 0, -torch.inf)[:, :, exists]
    fed = tokens[:, :, below].flatten(1)
    return fed if to_draft is None else to_draft[fed.clamp(min=0)]


@triton.jit(do_not_specialize=["R", "w", "size", "first", "below", "n_below", "F", "n_ranked", "n_drawn", "C"])
def grow_kernel(token_ptr, guess_ptr, ranked_ptr, drawn_ptr, known_ptr, child_ptr, target_id_ptr, draft_id_ptr, fed_ptr,
                score_ptr, guess_odds_ptr, node_odds_ptr, sharp, R, w, size, first, below, n_below, F, n_ranked, n_drawn, C,
                KNOWN: tl.constexpr, IDS: tl.constexpr, ODDS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
                PDL: tl.constexpr):
    # Not specialised: the levels differ in these numbers alone, and one compiled kernel serves them all.
    row = tl.program_id(0).to(tl.int64)
    tree, node = row // w, first + row % w
    i, c = tl.arange(0, BLOCK), tl.arange(0, MOST)
    child = tl.load(child_ptr + node * C + c, mask=c < C, other=-1)         # a constant of the tree
    exists = child >= 0
    wait_for_inputs(PDL)
    ranked = tl.load(ranked_ptr + row * n_ranked + i, mask=i < n_ranked, other=0)
    drawn = tl.load(drawn_ptr + row * n_drawn + c, mask=exists, other=0)
    if IDS:
        ranked, drawn = tl.load(target_id_ptr + ranked), tl.load(target_id_ptr + drawn)
    place = token_ptr + tree * size + child
    if KNOWN:
        drawn = tl.where(tl.load(known_ptr + tree // R), tl.load(place, mask=exists, other=0), drawn)
    tl.store(place, drawn, mask=exists)
    same = exists[None, :] & (i < n_ranked)[:, None] & (ranked[:, None] == drawn[None, :])
    taken = tl.sum(same.to(tl.int32), axis=1) > 0
    free = (i < n_ranked) & (taken == 0)
    rank = tl.cumsum(free.to(tl.int32), axis=0) - 1                         # among those that no child holds
    place_of_guess = (tree * size + node) * F + rank
    tl.store(guess_ptr + place_of_guess, ranked, mask=free & (rank < F))
    if ODDS:
        score = tl.load(score_ptr + row * n_ranked + i, mask=i < n_ranked, other=float("-inf"))
        sure = sharp * (score - tl.max(score, axis=0))
        sure -= tl.log(tl.sum(tl.exp(sure), axis=0))
        last = tl.min(tl.where(i < n_ranked, sure, float("inf")), axis=0)
        tl.store(guess_odds_ptr + place_of_guess, sure, mask=free & (rank < F))
        behind = tl.where(drawn < 0, float("-inf"), tl.max(tl.where(same, sure[:, None], last), axis=0))
        tl.store(node_odds_ptr + tree * size + child, behind, mask=exists)
    if IDS:
        drawn = tl.load(draft_id_ptr + tl.maximum(drawn, 0))
    tl.store(fed_ptr + tree * n_below + child - below, drawn, mask=exists)


def grow(tokens, guesses, ranked, drawn, known, children, nodes, below, to_target, to_draft, odds=None, scores=None, sharp=1.0):
    """As grow_ref."""
    (B, R, size), device, (w, n_below) = tokens.shape, tokens.device, (s.stop - s.start for s in (nodes, below))
    assert tokens.is_contiguous() and guesses.is_contiguous() and ranked.is_contiguous() and drawn.is_contiguous()
    assert odds is None or scores.is_contiguous() and all(x.is_contiguous() for x in odds)
    fed, n, C = torch.empty(B, R * n_below, dtype=torch.int64, device=device), ranked.shape[-1], children.shape[1]
    none = lambda x: tokens if x is None else x
    grow_kernel[(B * R * w,)](
        tokens, guesses, ranked, drawn, none(known), children, none(to_target), none(to_draft), fed, none(scores),
        *(odds or (tokens, tokens)), sharp, R, w, size, nodes.start, below.start, n_below, guesses.shape[-1], n, drawn.shape[-1],
        C, known is not None, to_target is not None, odds is not None, triton.next_power_of_2(n), triton.next_power_of_2(C),
        PDL=pdl(device), num_warps=1, **launch_options(device))
    return fed

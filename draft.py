"""
The draft side of (speculative) speculative decoding: outcome prediction, branch drafting, the speculation cache, and
the backup for misses.

A *speculation* is a token tree: node 0 is the root, the last token of the text, which no model has seen yet; the other
M nodes are guesses for what follows. A plain lookahead of K tokens is a tree that is a chain. Verification ends in an
*outcome* (node, t*): the last accepted node and the bonus token that the target put behind it. While the target works
on that, the draft guesses N outcomes and drafts a whole new speculation for each: N *branches*.

    cache slots of a sequence | committed prefix | trunk: M+1 nodes | branch 0: M+1 nodes | ... | branch N-1 |
                                                 ^ prefix_len

Shapes: B sequences, M+1 tree nodes, K tree depth, N branches, F guesses per node, V vocabulary.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch

from graphs import FIRST, Graphs, cross, on
from kernels.noise import DRAFT
from layout import Layout
from model import KVCache, prefill
from sampling import saguaro_probs


class Speculation(NamedTuple):
    """A drafted token tree for each of B sequences ([B, R, ...] while R trees are drafted side by side)."""
    tokens: torch.Tensor                    # [B, M+1]: root first; -1 is an empty node, which is never accepted
    guesses: torch.Tensor | None = None     # [B, M+1, F]: best next tokens after each node that aren't its children
    q: torch.Tensor | None = None           # [B, M+1, V]: what the children were sampled from (`residual` only)

    def map(self, f, *others):
        return Speculation(*(None if x is None else f(x, *more) for x, *more in zip(self, *others)))


class Verdict(NamedTuple):
    """How a verification ended: the outcome is (path[:, -1], bonus)."""
    path: torch.Tensor                      # [B, K+1] accepted nodes, root first, the last one repeated
    length: torch.Tensor                    # [B] k: how many of them follow the root
    bonus: torch.Tensor                     # [B] t*: the target's own next token


class SpeculationCache(NamedTuple):
    """What the draft prepared for the coming outcome: branch i of a sequence answers (nodes[i], roots[b, i])."""
    nodes: torch.Tensor                     # [N]
    roots: torch.Tensor                     # [B, N]
    branches: Speculation                   # [B, N, ...]

    def lookup(self, verdict):
        """Find each sequence's outcome. Returns hit [B] bool and branch [B] (any on a miss)."""
        same = (self.nodes == verdict.path[:, -1:]) & (self.roots == verdict.bonus[:, None])        # [B, N]
        found, branch = same.int().max(dim=1)
        return found > 0, branch

    def select(self, branch):
        """The speculation that was drafted for branch [B]."""
        batch = torch.arange(len(branch), device=branch.device)
        return self.branches.map(lambda x: x[batch, branch])


def prompt_lookup(history, length, depth, n=2):
    """Draft without a model: what followed the latest earlier occurrence of the last n tokens (Saxena 2023).

    history [B, C] int64 with length [B] tokens each. Returns [B, depth], -1 where nothing is known.
    """
    at = torch.arange(history.shape[1] - n, device=history.device)         # [W] start of a window with a successor
    match = (at + n < length[:, None])                                      # [B, W]
    for i in range(n):
        last = history.gather(1, (length - n + i).clamp(min=0)[:, None])    # [B, 1]
        match = match & (history[:, i:i + len(at)] == last)
    start = torch.where(match, at, -1).max(dim=1).values                    # [B]
    index = start[:, None] + n + torch.arange(depth, device=history.device)
    known = (start >= 0)[:, None] & (index < length[:, None])
    return torch.where(known, history.gather(1, index.clamp(0, history.shape[1] - 1)), -1)


@dataclass
class Drafting:
    """One plan of a Drafter at work."""
    layout: Layout
    graphs: Graphs
    spec: Speculation | None = None         # of this round; its place never moves


PLANS = 8               # a Drafter keeps so many of them, with their graphs


class Drafter:
    """The draft model with its KV cache for B sequences, drafting speculations over a fixed tree."""

    def __init__(self, model, batch_size, sampler, room, options):
        """room: cache slots for prompt, new tokens and speculation. Not ready before `start` and `plan`."""
        self.model, self.device, self.options = model, model.device, options
        self.sampler, self.residual = sampler.on(model.device), options.residual(sampler)
        self.cache = KVCache(model.config, batch_size, room, model.device, model.dtype)
        new = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=model.device)
        self.prefix_len, self.history = new(batch_size), new(batch_size, room)      # history: the text so far, target ids
        self.drafting = {}                                                  # (tree, fan-out) -> Drafting, oldest first
        self.target_ids = model.d2t                                         # [V_draft] or None: ids are the target's
        if model.d2t is not None:
            self.draft_ids = new(model.config.target_vocab_size)
            self.draft_ids[model.d2t[1:]] = torch.arange(1, len(model.d2t), device=model.device)

    def start(self, prompts, sampler, stats):
        """Begin a request: prompts (lists of the target's token ids), a sampler with its seeds, the stats to count in."""
        self.stats = stats
        self.sampler.seeds.copy_(sampler.seeds)
        history = torch.zeros(self.history.shape, dtype=torch.int64)
        for row, prompt in zip(history, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        self.history.copy_(history)
        if self.target_ids is not None:
            prompts = [self.draft_ids[prompt].tolist() for prompt in prompts]
        with on(self.device):
            self.prefix_len.copy_(prefill(self.model, self.cache, prompts))

    @property
    def root(self):
        """The last token of each text [B, 1], which no model has seen yet."""
        return self.history.gather(1, self.prefix_len[:, None])

    def plan(self, tree, fan_out):
        """Draft `tree` from now on. fan_out: F_node for each of its nodes, None where only speculations are wanted (SD)."""
        key = tree, tuple(fan_out or ())
        drafting = self.drafting.pop(key, None)
        if drafting is None:
            with on(self.device):
                graphs = Graphs(getattr(self.model, "graphs", False), FIRST)
                drafting = Drafting(Layout(tree, fan_out, self.device), graphs)
        self.drafting[key] = self.now = drafting                            # the newest stands last
        if len(self.drafting) > PLANS:
            self.drafting.pop(next(iter(self.drafting)))

    layout = property(lambda self: self.now.layout)
    tree = property(lambda self: self.layout.tree)          # a graph reads it: not one that is only equal to it
    width = property(lambda self: self.layout.width)        # F: guesses kept per node
    spec = property(lambda self: self.now.spec)             # the Speculation of this round

    def run(self, name, step, *args):
        """Run a step on the draft's device, where its arguments are, as a span of that name."""
        with self.stats.span(name, "draft"), on(self.device):
            return self.now.graphs(step, *args)

    # -- one forward --------------------------------------------------------------------------------------------------

    def forward(self, tokens, depth, offsets, ancestors):
        """Feed tokens [B, T] (target ids) at positions prefix_len + depth and slots prefix_len + offsets (both [T]).

        Returns hidden [B, T, dim] and the positions [B, T] of the tokens that come next.
        """
        if self.target_ids is not None:
            tokens = self.draft_ids[tokens.clamp(min=0)]
        start, depth = self.prefix_len[:, None], depth + self.prefix_len[:, None]
        return self.model(tokens, depth, start + offsets, self.prefix_len, ancestors, self.cache), depth + 1

    def choices(self, hidden, positions, n_children, fan_out):
        """What the draft would put at positions [B, T], given hidden [B, T, dim].

        Returns children [B, T, n_children], its first, second, ... choice for the tree; ranked [B, T, F + C], the most
        likely tokens for the outcome guesses; q [B, T, V] (residual only), which the children were drawn from. Greedy
        and coupled draw the best under the sampler's scores, residual draws from q_C without replacement (Gumbel top-k)
        with noise of its own. All in target ids, -1 where there is no such token.
        """
        ids, most = self.target_ids, self.width + self.tree.children.shape[1]
        if not self.residual:
            ranked = self.in_target_ids(self.sampler.choose(self.model, hidden, positions, most, ids))
            return ranked[..., :n_children], ranked, None
        logits = self.model.logits(hidden)                                  # [B, T, V_draft]
        if ids is not None:
            logits = logits.masked_fill(ids < 0, -torch.inf)
        q = saguaro_probs(self.sampler.tempered(logits), fan_out, self.options.saguaro_c, self.width)
        noise = self.sampler.noise(DRAFT, positions, torch.arange(q.shape[-1], device=q.device) if ids is None else ids)
        drawn = (q.log() + noise).topk(n_children)
        children = self.in_target_ids(drawn.indices).masked_fill(drawn.values == -torch.inf, -1)
        ranked = self.in_target_ids(logits.topk(min(most, logits.shape[-1])).indices)
        if ids is not None:
            q = q.new_zeros(*q.shape[:-1], self.model.config.target_vocab_size).index_copy(-1, ids[1:], q[..., 1:])
        return children, ranked, q

    def in_target_ids(self, tokens):
        return tokens if self.target_ids is None else self.target_ids[tokens]

    def guess(self, ranked, children):
        """The first F of ranked [B, T, F+C] that are not among children [B, T, C]: what may follow if none is accepted.

        A rejected child can't be the bonus token: greedy and coupled would have accepted it, and the residual
        max(p - q, 0) of a rejected token is zero.
        """
        taken = (ranked[..., None] == children[..., None, :]).any(-1)
        order = taken.int().argsort(dim=-1, stable=True)[..., :self.width]  # the untaken first, best first
        return ranked.gather(-1, order)

    # -- drafting -----------------------------------------------------------------------------------------------------

    def draft(self, roots, depth, levels, previous=None, known=None):
        """Draft a tree under each of R roots per sequence, one forward a depth for all of them together.

        roots [B, R]; depth [R]: their distance from the trunk's root. previous [B] (SD only, R = 1): the token before
        the root, fed again beside it, because a fully accepted speculation ends in a token the draft has never seen.
        known: (rows [B] bool, tokens [B, M+1]): rows whose tokens are given; for them this only fills the KV cache.
        Returns a Speculation with [B, R, ...] fields; the deepest nodes have no guesses yet.
        """
        tree, (B, R) = self.tree, roots.shape
        tokens = roots.new_full((B, R, tree.size), -1)
        tokens[:, :, 0] = roots
        guesses = roots.new_full((B, R, tree.size, self.width), -1)
        q = None
        for d, level in enumerate(levels):
            w = len(level.nodes)
            fed = tokens[:, :, level.nodes].flatten(1)                      # [B, R*w]
            at = (depth + d).repeat_interleave(w)                           # [R*w]
            if d == 0 and previous is not None:
                hidden, positions = self.forward(torch.stack([previous, fed[:, 0]], 1), *self.layout.refeed)
                hidden, positions = hidden[:, 1:].contiguous(), positions[:, 1:]
            else:
                hidden, positions = self.forward(fed, at, level.offsets, level.ancestors)       # [B, R*w, dim]
            children, ranked, level_q = self.choices(hidden, positions, level.n_choices, level.fan_out)
            tokens[:, :, level.children] = children.view(B, R, w, -1)[:, :, level.parents, level.ranks]
            if known is not None:
                tokens = torch.where(known[0][:, None, None], known[1][:, None], tokens)
            if self.width:
                drawn = self.children_of(tokens, level.nodes).flatten(1, 2)             # [B, R*w, C]
                guesses[:, :, level.nodes] = self.guess(ranked, drawn).view(B, R, w, -1)
            if level_q is not None:
                q = level_q.new_zeros(B, R, tree.size, level_q.shape[-1]) if q is None else q
                q[:, :, level.nodes] = level_q.view(B, R, w, -1)
        return Speculation(tokens, guesses, q)

    def children_of(self, tokens, nodes):
        """The tokens drafted under `nodes`: tokens [..., M+1] -> [..., w, C], -1 where there is none."""
        index = self.tree.children[nodes]                                   # [w, C]
        return tokens[..., index.clamp(min=0)].masked_fill(index < 0, -1)

    def speculate(self, refeed=False):
        """Draft a speculation just in time, into self.spec. refeed: see `draft`; True after a commit without a switch."""
        self.stats.draft_forwards += self.tree.depth
        self.run("draft", self._speculate, refeed, None)

    def _speculate(self, refeed, hit):
        known = None if hit is None else (hit, self.spec.tokens)
        previous = self.history.gather(1, self.prefix_len[:, None] - 1)[:, 0] if refeed else None
        new = self.draft(self.root, self.tree.node_depth[:1], self.layout.trunk, previous, known)
        self.store(new.map(lambda x: x[:, 0]), hit)

    def store(self, new, keep=None):
        """Make `new` the speculation of this round, except for the sequences `keep` [B] bool; its place never moves."""
        if self.spec is None:
            self.now.spec = new.map(torch.clone)
        elif keep is None:
            self.spec.map(lambda old, x: old.copy_(x), new)
        else:
            self.spec.map(lambda old, x: old.copy_(torch.where(keep.view(-1, *[1] * (x.dim() - 1)), old, x)), new)

    def precompute(self, glue=False):
        """While the target verifies self.spec: guess the outcomes and draft a speculation for each, K + 1 forwards.

        The first forward feeds the deepest nodes, the only ones drafting hasn't fed, so that outcomes behind them can
        be guessed too. glue: feed every node instead, because some speculation wasn't drafted by this model.
        Returns a SpeculationCache.
        """
        self.stats.draft_forwards += self.tree.depth + 1
        return self.run("draft", self._precompute, glue)

    def _precompute(self, glue):
        spec, tree, layout = self.spec, self.tree, self.layout
        nodes, ancestors = (layout.all, tree.ancestors) if glue else (layout.leaves, layout.leaf_ancestors)
        at = tree.node_depth[nodes]
        hidden, positions = self.forward(spec.tokens[:, nodes], at, nodes, ancestors)
        _, ranked, _ = self.choices(hidden, positions, 1, layout.fan_out[nodes])
        guesses = spec.guesses.clone()
        guesses[:, nodes] = self.guess(ranked, self.children_of(spec.tokens, nodes))
        roots = guesses[:, layout.nodes, layout.guess_ranks]                # [B, N]
        branches = self.draft(roots, tree.node_depth[layout.nodes] + 1, layout.branches)
        return SpeculationCache(layout.nodes, roots, branches)

    def commit(self, verdict):
        """Make the accepted path part of the prefix (SD)."""
        self.run("commit", self._commit, cross(verdict, self.device), None)

    def switch(self, verdict, cache):
        """Look the outcome up; commit the accepted path and, on a hit, the branch as the new trunk: one move of KV rows.

        The branch becomes self.spec (anything for those that missed). Returns found [B, 2]: hit (0 or 1) and branch.
        """
        return self.run("join", self._switch, cross(verdict, self.device), cache)

    def _switch(self, verdict, cache):
        hit, branch = cache.lookup(verdict)
        self._commit(verdict, (hit, branch))
        self.store(cache.select(branch))
        return torch.stack([hit, branch], 1)

    def _commit(self, verdict, found):
        size, all_nodes, start = self.tree.size, self.layout.all, self.prefix_len[:, None]
        src, dst = path_slots(self.prefix_len, verdict)
        after = start + verdict.length[:, None] + 1
        self.history.scatter_(1, dst, self.spec.tokens.gather(1, src - start))
        self.history.scatter_(1, after, verdict.bonus[:, None])
        if found is not None:
            hit, branch = (x[:, None] for x in found)
            src = torch.cat([src, torch.where(hit, start + (branch + 1) * size + all_nodes, start)], 1)
            dst = torch.cat([dst, torch.where(hit, after + all_nodes, start)], 1)
        self.cache.commit(src, dst)
        self.prefix_len += verdict.length + 1

    def fall_back(self, backup, found):
        """Give the sequences that missed a speculation; the others keep theirs. found: what `switch` returned.

        backup: "neural" drafts it with the model, K forwards that everybody waits for; "fast" looks the last tokens up
        in the text so far and proposes what followed there, or nothing.
        """
        self.stats.draft_forwards += self.tree.depth if backup == "neural" else 0
        self.run("miss", self._fall_back, backup, found)

    def _fall_back(self, backup, found):
        hit, spec, spine = found[:, 0] > 0, self.spec, self.layout.spine
        if backup == "neural":
            return self._speculate(False, hit)
        proposal = prompt_lookup(self.history, self.prefix_len + 1, len(spine) - 1)
        tokens, q = torch.full_like(spec.tokens, -1), None
        tokens[:, spine] = torch.cat([self.root, proposal], 1)
        if spec.q is not None:                                              # a proposal is drawn from a point mass
            point = torch.zeros_like(spec.q[:, spine[:-1]])
            point = point.scatter(-1, proposal.clamp(min=0)[..., None], (proposal >= 0)[..., None].to(point.dtype))
            q = torch.zeros_like(spec.q)
            q[:, spine[:-1]] = point
        self.store(Speculation(tokens, spec.guesses, q), hit)

    def keep(self, rows):
        """Go on with the sequences `rows` alone."""
        self.sampler.keep(rows)
        self.cache.keep(rows)
        self.prefix_len, self.history = self.prefix_len[rows], self.history[rows]
        self.drafting = {key: drafting for key, drafting in self.drafting.items() if drafting is self.now}
        self.now.graphs.clear()
        self.now.spec = self.spec.map(lambda x: x[rows])


def path_slots(prefix_len, verdict):
    """Where an accepted path lies and where it goes: src, dst [B, K+1]. Entries behind its end copy the root onto itself."""
    start, i = prefix_len[:, None], torch.arange(verdict.path.shape[1], device=prefix_len.device)
    live = i <= verdict.length[:, None]
    return torch.where(live, start + verdict.path, start), torch.where(live, start + i, start)

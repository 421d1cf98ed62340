"""
The draft side of (speculative) speculative decoding: outcome prediction, branch drafting, the speculation cache, and
the backup for misses.

A *speculation* is a token tree: node 0 is the root, the last token of the text, which no model has seen yet; the other
M nodes are guesses for what follows. A plain lookahead of K tokens is a tree that is a chain. Verification ends in an
*outcome* (node, t*): the last accepted node and the bonus token that the target put behind it. While the target works
on that, the draft guesses N outcomes and drafts a whole new speculation for each: N *branches*.

    cache slots of a sequence | committed prefix | trunk: M+1 nodes | branch 0: M+1 nodes | ... | branch N-1 |
                                                 ^ prefix_len

Shapes: B sequences, M+1 tree nodes, K tree depth, C most children of a node, N branches, F guesses per node, V vocabulary.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch

import kernels
from graphs import FIRST, Graphs, Mailbox, cross, fork, on
from kernels.gate import wait_at_gate
from kernels.noise import DRAFT
from layout import Layout
from model import KVCache, prefill
from sampling import saguaro_probs


class Speculation(NamedTuple):
    """A drafted token tree for each of B sequences ([B, R, ...] while R trees are drafted side by side)."""
    tokens: torch.Tensor                    # [B, M+1]: root first; -1 is an empty node, which is never accepted
    guesses: torch.Tensor | None = None     # [B, M+1, F]: best next tokens after each node that aren't its children
    q: torch.Tensor | None = None           # [B, M+1, V]: what the children were sampled from (`residual` only)
    odds: tuple | None = None               # log-chances of the guesses [B, M+1, F] and of each node behind its parent [B, M+1]

    def map(self, f):
        return Speculation(*(None if x is None else tuple(map(f, x)) if isinstance(x, tuple) else f(x) for x in self))


class Verdict(NamedTuple):
    """How a verification ended: the outcome is (path[:, -1], bonus)."""
    path: torch.Tensor                      # [B, K+1] accepted nodes, root first, the last one repeated
    length: torch.Tensor                    # [B] k: how many of them follow the root
    bonus: torch.Tensor                     # [B] t*: the target's own next token


class SpeculationCache(NamedTuple):
    """What the draft prepared for the coming outcome: branch i of a sequence answers (nodes[b, i], roots[b, i]), its root."""
    nodes: torch.Tensor                     # [B, N]
    roots: torch.Tensor                     # [B, N]
    branches: Speculation                   # [B, N, ...], of whose tokens node 0 isn't filled in


def prompt_lookup(history, length, depth, n=2):
    """Draft without a model: what followed the latest earlier occurrence of the last n tokens (Saxena 2023).

    history [B, room] int64 with length [B] tokens each. Returns [B, depth], -1 where nothing is known.
    """
    device = history.device
    windows = history.unfold(1, n, 1)[:, :-1]                               # [B, W, n], each with a successor
    at = torch.arange(windows.shape[1], device=device)                      # [W]
    last = history.gather(1, (length[:, None] + torch.arange(-n, 0, device=device)).clamp(min=0))         # [B, n]
    match = (windows == last[:, None]).all(-1) & (at + n < length[:, None])                               # [B, W]
    start = torch.where(match, at, -1).max(dim=1).values                    # [B]
    index = start[:, None] + torch.arange(n, n + depth, device=device)
    known = (start >= 0)[:, None] & (index < length[:, None])
    return torch.where(known, history.gather(1, index.clamp(0, history.shape[1] - 1)), -1)


@dataclass
class Drafting:
    """One plan of a Drafter at work."""
    layout: Layout
    graphs: Graphs
    spec: Speculation                       # of this round; its place never moves, its root is the text's last token


PLANS = 8               # a Drafter keeps so many of them, with their graphs
SHARP = 1.5             # how sure the draft is, softmax(SHARP * logits): 2 is better for a good draft, 1 for a weak one (MEASURED.md)


class Drafter:
    """The draft model with its KV cache for B sequences, drafting speculations over a fixed tree."""

    def __init__(self, model, batch_size, sampler, room, options):
        """room: cache slots for prompt, new tokens and speculation. Not ready before `start` and `plan`."""
        self.model, self.device, self.options = model, model.device, options
        self.sampler, self.residual = sampler.on(model.device), options.residual(sampler)
        self.sharp = SHARP * (sampler.temperature or 1.0)                   # of scores, which are logits / temperature
        self.cache = KVCache(model.config, batch_size, room, model.device, model.dtype)
        new = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=model.device)
        self.prefix_len, self.history = new(batch_size), new(batch_size, room)      # history: the text so far, target ids
        self.found = new(batch_size, 4)                                     # hit (0 or 1) first, the rest: kernels/switch.py
        self.mail = Mailbox(model.device, batch_size)                       # brings what `switch` found
        self.opened = torch.zeros(1, dtype=torch.int32, device=model.device)    # the gate (kernels/gate.py)
        self.drafting = {}                                                  # (tree, fan-out) -> Drafting, oldest first
        self.target_ids, self.draft_ids = model.d2t, None                   # [V_draft], [V]; None: ids are the target's
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

    def plan(self, tree, fan_out):
        """Draft `tree` from now on. fan_out: F_node for each of its nodes, None where only speculations are wanted (SD)."""
        key = tree, tuple(fan_out or ())
        drafting = self.drafting.pop(key, None)
        if drafting is None:
            with on(self.device):
                graphs = Graphs(getattr(self.model, "graphs", False), FIRST)
                layout = Layout(tree, fan_out, self.device, self.options.by_round())
                spec = self.blank(layout)
                twin = next((other.spec for other in self.drafting.values() if other.layout.tree == tree), spec)
                # The target's graphs of a tree read tokens and q where they are, so all its plans keep them there.
                drafting = Drafting(layout, graphs, spec._replace(tokens=twin.tokens, q=twin.q))
        self.drafting[key] = self.now = drafting                            # the newest stands last
        if len(self.drafting) > PLANS:
            self.drafting.pop(next(iter(self.drafting)))
        self.spec.tokens[:, :1] = self.history.gather(1, self.prefix_len[:, None])

    layout = property(lambda self: self.now.layout)
    tree = property(lambda self: self.layout.tree)          # the very object that graphs were recorded with
    width = property(lambda self: self.layout.width)        # F: guesses kept per node
    spec = property(lambda self: self.now.spec)             # the Speculation of this round
    trunk = property(lambda self: self.spec.map(lambda x: x[:, None]))      # the same as one tree of R = 1

    def run(self, name, step, *args):
        """Run a step on the draft's device, where its arguments are, as a span of that name."""
        with self.stats.span(name, "draft"), on(self.device):
            return self.now.graphs(step, *args)

    def blank(self, layout, *R):
        """Room for R trees of each sequence, which `grow` fills in; it may find fewer guesses than there is room for."""
        shape, c, q = (len(self.prefix_len), *R, layout.tree.size), self.model.config, None
        tokens = self.prefix_len.new_empty(shape)                           # int64, on this side
        if self.residual:
            q = self.prefix_len.new_zeros(*shape, c.target_vocab_size or c.vocab_size, dtype=torch.float32)
        guesses, odds = self.prefix_len.new_full((*shape, layout.width), -1), None
        if layout.branching is not None:
            odds = tuple(torch.empty(x.shape, device=self.device) for x in (guesses, tokens))
        return Speculation(tokens, guesses, q, odds)

    # -- one forward --------------------------------------------------------------------------------------------------

    def choices(self, hidden, positions, level):
        """What the draft would put at positions [B, T], given hidden [B, T, dim], in its own ids.

        Returns ranked [B, T, the level's n_ranked], the most likely tokens, for the outcome guesses, and their scores (None for
        residual); drawn [B, T, at least its n_choices], its first, second, ... choice for the tree; and q [B, T, V] in target ids,
        which these were drawn from (residual only). Greedy and coupled draw the best under the sampler's scores, residual draws
        from q_C without replacement (Gumbel top-k) with noise of its own.
        """
        ids = self.target_ids
        if not self.residual:
            ranked, scores = self.sampler.rank(self.model, hidden, positions, level.n_ranked, ids)
            return ranked, scores, ranked, None
        logits = self.model.logits(hidden)                                  # [B, T, V_draft]
        if ids is not None:
            logits = logits.masked_fill(ids < 0, -torch.inf)
        q = saguaro_probs(self.sampler.tempered(logits), level.fan_out, self.options.saguaro_c, self.width)
        noise = self.sampler.noise(DRAFT, positions, torch.arange(q.shape[-1], device=q.device) if ids is None else ids)
        best = (q.log() + noise).topk(level.n_choices)
        none = -1 if ids is None else 0                                     # a trimmed vocabulary's id 0 is no token
        drawn = best.indices.masked_fill(best.values == -torch.inf, none)
        ranked = logits.topk(min(level.n_ranked, logits.shape[-1])).indices
        if ids is not None:
            q = q.new_zeros(*q.shape[:-1], self.model.config.target_vocab_size).index_copy(-1, ids[1:], q[..., 1:])
        return ranked, None, drawn, q

    def grow(self, spec, fed, forwards, known=None):
        """Draft R trees side by side, one forward a depth for all of them together, into spec ([B, R, ...] fields).

        fed [B, T]: the tokens of the first forward, in target ids; forwards: (level, rows, ancestors) in turn. known
        [B] bool: sequences whose tokens all stand there; for them this only fills the KV cache and renews the guesses. The
        roots aren't written, and the deepest nodes, which nobody has fed yet, have no guesses. A node has as many guesses as its
        fan-out says, or fewer where the draft knows no more tokens; what is behind them, -1 at first, is no guess.

        A guess is a likely token that isn't among the node's children: a rejected child can't be the bonus token. Greedy
        and coupled would have accepted it, and the residual max(p - q, 0) of a rejected token is zero.
        """
        ops = kernels.ops_for(fed)
        if self.target_ids is not None:
            fed = self.draft_ids[fed]                   # from here on the draft's own; an empty node, -1, may read as any token
        for level, (positions, following, slots), ancestors in forwards:
            hidden = self.model(fed, positions, slots, self.prefix_len, ancestors, self.cache)
            T = len(level.fan_out)                                          # rows of the level: a refeed has one more in front
            ranked, scores, drawn, q = self.choices(hidden[:, -T:].contiguous(), following[:, -T:], level)
            fed = ops.grow(spec.tokens, spec.guesses, ranked, drawn, known, self.tree.children, level.nodes, level.below,
                           self.target_ids, self.draft_ids, spec.odds, scores, self.sharp)
            if spec.q is not None:
                old = spec.q[:, :, level.nodes]                             # [B, R, w, V]
                new = q.view(old.shape)
                old.copy_(new if known is None else torch.where(known.view(-1, 1, 1, 1), old, new))

    # -- drafting -----------------------------------------------------------------------------------------------------

    def speculate(self, refeed=False, span="draft"):
        """Draft a speculation just in time, into self.spec. refeed: True where the round before was one of SD: feed the token
        before the root again, because a fully accepted speculation ends in a token the draft has never seen."""
        self.stats.draft_forwards += self.tree.depth
        self.run(span, self._speculate, refeed, None)

    def _speculate(self, refeed, known):
        forwards, fed = self.layout.trunk, self.spec.tokens[:, :1]
        if refeed:
            forwards = self.layout.refeed
            fed = self.history.gather(1, self.prefix_len[:, None] + self.layout.last_two)      # [B, 2]
        self.grow(self.trunk, fed, forwards.behind(self.prefix_len), known)

    def precompute(self, glue=False):
        """While the target verifies self.spec: guess the outcomes and draft a speculation for each, K + 1 forwards.

        The first forward feeds the deepest nodes, the only ones drafting hasn't fed, so that outcomes behind them can
        be guessed too; then the outcomes are chosen. glue: feed every node instead, because some speculation wasn't drafted
        by this model. Returns a SpeculationCache.
        """
        self.stats.draft_forwards += self.tree.depth + 1
        return self.run("draft", self._precompute, glue)

    def _precompute(self, glue):
        layout, B = self.layout, len(self.prefix_len)
        first, *deeper = (layout.glued if glue else layout.ahead).behind(self.prefix_len)
        known = torch.ones_like(self.prefix_len, dtype=torch.bool) if glue else None
        trunk = self.trunk._replace(q=None)                                 # the target reads tokens and q just now
        self.grow(trunk, self.spec.tokens[:, first[0].nodes], [first], known)
        if layout.branching is None:
            nodes = layout.nodes.repeat(B, 1)                               # [B, N]
            roots = self.spec.guesses.flatten(1).index_select(1, layout.guesses)
        else:
            ops = getattr(self.model, "ops", kernels.TORCH)                 # whose attention reads the ancestors that come of it
            nodes, roots, deeper = ops.outcomes(self.spec.guesses, self.spec.odds, self.prefix_len, self.tree, layout.branching)
        branches = self.blank(layout, nodes.shape[1])
        self.grow(branches, roots, deeper)
        return SpeculationCache(nodes, roots, branches)

    def switch(self, verdict, cache=None):
        """Look the outcome up; commit the accepted path and, on a hit, the branch as the new trunk: one move of KV rows.

        The branch becomes self.spec (of those that missed only the root counts). Returns a receipt of self.found. cache: a
        SpeculationCache; None (SD) if nothing was prepared: then only the path is committed, and there's no receipt.
        """
        self.run("commit" if cache is None else "join", self._switch, cross(verdict, self.device), cache)
        return None if cache is None else self.mail.receipt(self.found)

    def _switch(self, verdict, cache):
        spec, branches = self.spec, cache and cache.branches
        outcomes = cache and (cache.nodes, cache.roots, branches.tokens, branches.guesses, branches.odds)
        src, dst = kernels.ops_for(spec.tokens).switch(*verdict, spec.tokens, spec.guesses, spec.odds, self.history,
                                                       self.prefix_len, self.found, outcomes)
        if cache is not None or self.tree.forks:
            self.cache.commit(src, dst)
        if cache is not None and spec.q is not None:
            spec.q.copy_(cache.branches.q[torch.arange(len(self.found), device=self.device), self.found[:, 1]])
        if cache is not None:
            self.mail.send(self.found)

    def round(self, target):
        """Launch a whole round as one graph: the gate, verify beside precompute, switch. All have run by themselves, so their
        kernels are compiled. Returns the receipts of the report and of self.found."""
        self.stats.draft_forwards += self.tree.depth + 1
        with on(self.device):
            report = self.now.graphs(self._round, target, warm=True)
        return target.mail.receipt(report), self.mail.receipt(self.found)

    def _round(self, target):
        self._wait_at_gate()
        with fork(target.graphs.stream) as join:                            # no branch begins with PDL: all wait for the gate
            verdict, report = target._verify(self.spec.tokens, self.spec.q, self.tree)
        cache = self._precompute(False)
        join()
        self._switch(verdict, cache)
        return report

    def fall_back(self, backup):
        """Give the sequences that missed, by self.found, a speculation; the others keep theirs.

        backup: "neural" drafts it with the model, K forwards that everybody waits for; "fast" looks the last tokens up
        in the text so far and proposes what followed there, or nothing.
        """
        self.stats.draft_forwards += self.tree.depth if backup == "neural" else 0
        self.run("miss", self._fall_back, backup)

    def wait_at_gate(self):
        """Let the current stream wait until all have hit, or the gate is opened."""
        with on(self.device):
            self.now.graphs(self._wait_at_gate)

    def _wait_at_gate(self):
        if self.found.is_cuda:
            wait_at_gate(self.found, self.opened)

    def can_go_on(self, backup):
        """Whether the gate, `fall_back`, `precompute`, and so the `switch` behind that, would do nothing but replay a graph."""
        steps = (self._wait_at_gate,), (self._fall_back, backup), (self._precompute, False)
        return all(self.now.graphs.ready(*step) for step in steps)

    def get_ready(self, backup):
        """Have the graphs recorded that `can_go_on` asks for, but for precompute's: fall back, needed or not, and pass an open gate."""
        self.fall_back(backup)
        self.opened.fill_(1)
        self.wait_at_gate()
        self.opened.fill_(0)

    def _fall_back(self, backup):
        hit, spec, spine = self.found[:, 0] > 0, self.spec, self.layout.spine
        if backup == "neural":
            return self._speculate(False, hit)
        proposal = prompt_lookup(self.history, self.prefix_len + 1, len(spine) - 1)
        tokens = torch.full_like(spec.tokens, -1)
        tokens[:, spine] = torch.cat([spec.tokens[:, :1], proposal], 1)
        spec.tokens.copy_(torch.where(hit[:, None], spec.tokens, tokens))
        if spec.q is not None:                                              # a proposal is drawn from a point mass
            point = torch.zeros_like(spec.q[:, spine[:-1]])
            point = point.scatter(-1, proposal.clamp(min=0)[..., None], (proposal >= 0)[..., None].to(point.dtype))
            q = torch.zeros_like(spec.q)
            q[:, spine[:-1]] = point
            spec.q.copy_(torch.where(hit[:, None, None], spec.q, q))

    def keep(self, rows):
        """Go on with the sequences `rows` alone."""
        self.mail = Mailbox(self.device, len(rows))
        self.sampler.keep(rows)
        self.cache.keep(rows)
        self.prefix_len, self.history, self.found = self.prefix_len[rows], self.history[rows], self.found[rows]
        self.drafting = {key: drafting for key, drafting in self.drafting.items() if drafting is self.now}
        self.now.graphs.clear()
        self.now.spec = self.spec.map(lambda x: x[rows])

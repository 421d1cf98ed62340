"""
Autoregressive, speculative (SD) and speculative speculative decoding (SSD), one loop after the other.

SD: a small draft guesses a token tree, the target verifies it in one forward, and both wait for each other. SSD: while
the target verifies, the draft already guesses how the verification will end and drafts the next speculation for every
likely outcome; if the real outcome is among them (a *hit*) the next round starts at once, else (a *miss*) a backup
drafts just in time. The output is the target's own in all three.

The algorithm is Saguaro: Kumar, Dao, May, "Speculative Speculative Decoding", arXiv 2603.03251 (2026). Token trees are
those of SpecInfer (Miao et al. 2024) and Sequoia (Chen et al. 2024).

Shapes: B sequences, M+1 nodes of a speculation (node 0 the root), K its depth (the lookahead of a chain), V vocabulary.
"""
from functools import partial

import torch

import kernels
from batch import Batch, Chunk, Options, Stats  # noqa: F401 (for callers)
from draft import Drafter, Verdict
from graphs import Beside, Graphs, Mailbox, cross, on
from kernels.noise import ACCEPT, TARGET
from model import KVCache, prefill
from plan import Rest, choose_backup, make_plan, time_to_replan
from sampling import Sampling, saguaro_probs  # noqa: F401 (for callers, and the rest of the maths)
from tree import Tree


# ---------------------------------------------------------------------------------------------------------------------
# Accepting: two rules

def accept_coupled(tokens, tree, own):
    """Follow the target's own token from the root for as long as the tree holds it (greedy: the same with no noise).

    tokens [B, M+1]; own [B, M+1] the target's token after each node, argmax(logits / T + g). Returns a Verdict.
    """
    return Verdict(*kernels.ops_for(own).walk(tokens, tree.parent, tree.depth, own))


def accept_residual(tokens, tree, p, q, coins, noise):
    """Rejection sampling over a tree (Leviathan et al. 2023 on a chain, SpecInfer on trees; without replacement).

    At each node test its children in the order they were drawn: accept x with probability min(1, p(x) / q(x)); after a
    rejection p becomes the residual max(p - q, 0), normalised, and q loses x. Where all are rejected, or nothing was
    drafted, the bonus token is sampled from what p has become.
    tokens [B, M+1]; p, q [B, M+1, V] target and draft distributions after each node; coins [B, K, C] uniform, one for
    each test; noise [B, K+1, V] Gumbel noise for the bonus at each depth. Returns a Verdict.
    """
    batch = torch.arange(len(tokens), device=tokens.device)
    node = torch.zeros_like(batch)
    path, length, left = [node], torch.zeros_like(node), p[:, 0]
    for d in range(tree.depth):
        alive = length == d                                                 # not yet stopped by a rejection
        here, moved, q_node = node, torch.zeros_like(alive), q[batch, node]
        for rank in range(tree.children.shape[1]):
            child = tree.children[here, rank]                               # [B], -1 where there is none
            x = tokens[batch, child.clamp(min=0)]
            tested = alive & ~moved & (child >= 0) & (x >= 0)
            x = x.clamp(min=0)
            accepted = tested & (coins[:, d, rank] * q_node[batch, x] < left[batch, x])     # never takes p(x) = 0
            rejected = (tested & ~accepted)[:, None]
            left = torch.where(rejected, normalise(left - q_node, left), left)
            q_node = torch.where(rejected, normalise(q_node.scatter(1, x[:, None], 0.0), q_node), q_node)
            node, moved = torch.where(accepted, child, node), moved | accepted
        left = torch.where(moved[:, None], p[batch, node], left)
        length = length + moved
        path.append(node)
    bonus = (left.log() + noise[batch, length]).argmax(-1)
    return Verdict(torch.stack(path, 1), length, bonus)


def normalise(weights, otherwise):
    """max(weights, 0) scaled to sum 1; `otherwise` where nothing is left (rounding only)."""
    weights = weights.clamp(min=0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=1e-30), otherwise)


# ---------------------------------------------------------------------------------------------------------------------
# The target side

class Target:
    """The target model with its KV cache for B sequences: verifies a speculation in one forward."""

    def __init__(self, model, batch_size, sampler, room, residual=False):
        """room: cache slots for prompt, new tokens and speculation. Not ready before `start`."""
        self.model, self.sampler, self.residual = model, sampler.on(model.device), residual
        with on(model.device):
            self.graphs = Graphs(getattr(model, "graphs", False))
        self.cache = KVCache(model.config, batch_size, room, model.device, model.dtype)
        self.prefix_len = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self.root = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)      # what `decode` goes on from
        self.mail = Mailbox(model.device, batch_size)                                       # brings a verify's report

    def start(self, prompts, sampler, stats):
        """Begin a request: prompts (lists of token ids), a sampler with its seeds, the stats to count in."""
        self.stats = stats
        self.sampler.seeds.copy_(sampler.seeds)
        self.root.copy_(torch.tensor([prompt[-1:] for prompt in prompts]))
        with on(self.model.device):
            self.prefix_len.copy_(prefill(self.model, self.cache, prompts))

    def verify(self, tokens, q, tree, alone=False):
        """One forward over the tree, the accept rule, and the commit of the accepted path.

        tokens [B, M+1], q [B, M+1, V] or None, here or on the draft's device. Returns the Verdict and a receipt of the report
        [B, 2K+5]: the tokens of the path, its nodes, k, bonus, and 1 where a drafted token was there to be rejected.
        alone: no draft works beside it.
        """
        device = self.model.device
        with self.stats.span("verify", "target"), on(device):
            squeezed = alone and getattr(self.model, "ops", kernels.TORCH) not in (kernels.TORCH, kernels.TRITON)
            step = self._verify_alone if squeezed else self._verify
            verdict, report = self.graphs(step, cross(tokens, device), cross(q, device), tree.on(device))
            return verdict, self.mail.receipt(report)

    def decode(self, tree):
        """Verify the root alone (`tree` is no more than it); the token behind it is the next root. Returns a receipt as `verify`."""
        with self.stats.span("verify", "target"), on(self.model.device):
            return self.mail.receipt(self.graphs(self._decode, tree))

    def can_verify(self, tokens, q, tree):
        """Whether `verify` would do nothing but replay a graph. Never where tokens come from a draft on another GPU."""
        return self.graphs.ready(self._verify, tokens, q, tree)

    def _verify(self, tokens, q, tree):
        start = self.prefix_len[:, None]
        positions, following, slots = start + tree.rows[:, None]                            # [B, M+1] each
        hidden = self.model(tokens, positions, slots, self.prefix_len, tree.ancestors, self.cache)
        if not self.residual:
            own = self.sampler.choose(self.model, hidden, following, 1)[..., 0]
            verdict = accept_coupled(tokens, tree, own)
        else:
            p = self.sampler.tempered(self.model.logits(hidden)).softmax(-1)                # [B, M+1, V]
            following = start + 1 + torch.arange(tree.depth + 1, device=start.device)       # of each depth
            vocab, ranks = (torch.arange(n, device=start.device) for n in (p.shape[-1], tree.children.shape[1]))
            coins = kernels.uniform(self.sampler.seeds, ACCEPT, following[:, :-1], ranks)
            noise = self.sampler.noise(TARGET, following, vocab)
            verdict = accept_residual(tokens, tree, p, q, coins, noise)
        report, src, dst = kernels.ops_for(tokens).settle(tokens, tree.parent, *verdict, self.prefix_len)
        if tree.forks:
            self.cache.commit(src, dst)
        self.mail.send(report)
        return verdict, report

    def _decode(self, tree):
        verdict, report = self._verify(self.root, None, tree)
        self.root.copy_(verdict.bonus[:, None])
        return report

    def _verify_alone(self, *args):
        """_verify by kernels that leave no room for a draft."""
        ops, self.model.ops = self.model.ops, kernels.TRITON
        try:
            return self._verify(*args)
        finally:
            self.model.ops = ops

    def keep(self, rows):
        """Go on with the sequences `rows` alone."""
        self.graphs.clear()
        self.mail = Mailbox(self.model.device, len(rows))
        self.sampler.keep(rows)
        self.cache.keep(rows)
        self.prefix_len, self.root = self.prefix_len[rows], self.root[rows]


# ---------------------------------------------------------------------------------------------------------------------
# The three loops. Each takes a whole batch of prompts (lists of token ids) and yields, round by round, the list of
# Chunks that the round produced. A stop id ends its sequence and is given out. seeds: one per sequence, by default
# sampling.seed for all, so that a prompt's text is the same alone and in a batch. stats: a Stats to fill in.
#
# A GPU should hardly ever wait for Python: AR and SD start a round before they read the last one's outcome; SSD starts it behind a
# gate, all of it as one CUDA graph, reads who missed, and only then hands out the text.

@torch.inference_mode()
def autoregressive(target_model, prompts, max_new_tokens, sampling, stop_ids=(), seeds=None, stats=None):
    """One token a round: verify a speculation that is nothing but its root."""
    batch = Batch(target_model, prompts, max_new_tokens, sampling, stop_ids, seeds, stats)
    tree = Tree.chain(0, target_model.device)
    target, = batch.sides((Target, target_model, batch.length + 2))
    batch.prefilled()
    while batch.live:
        batch.post(target.decode(tree))
        yield from batch.outcomes(tree)
        batch.drop_finished(target)


@torch.inference_mode()
def sd(target_model, draft_model, prompts, max_new_tokens, sampling, options, stop_ids=(), seeds=None, stats=None):
    """Speculative decoding: draft a tree, verify it, keep what the target agrees with and its bonus token."""
    options.check()
    batch = Batch(target_model, prompts, max_new_tokens, sampling, stop_ids, seeds, stats, draft_model)
    tree, fan = make_plan(options, batch.stats, draft_model)             # fan is for SSD
    room = batch.length + 3 * options.most_nodes()                      # two rounds that overshoot, and the trunk
    target, drafter = batch.sides((Target, target_model, room, options.residual(batch.sampler)),
                                  (Drafter, draft_model, room, options))
    drafter.plan(tree, None)
    batch.prefilled()
    refeed = False                  # a fully accepted speculation ends in a token that the draft has never seen
    while batch.live:
        drafter.speculate(refeed)
        verdict, report = target.verify(drafter.spec.tokens, drafter.spec.q, tree)
        drafter.switch(verdict)
        batch.post(report)
        refeed = True
        yield from batch.outcomes(tree)
        batch.drop_finished(target, drafter)
        if time_to_replan(options, batch, batch.stats.rounds):
            yield from batch.outcomes(tree, drain=True)
            batch.drop_finished(target, drafter)
            if not batch.live:                                          # its sides are another request's now
                break
            old, (tree, fan) = tree, make_plan(options, batch.stats, draft_model, (tree, fan))
            if tree is not old:
                drafter.plan(tree, None)


@torch.inference_mode()
def ssd(target_model, draft_model, prompts, max_new_tokens, sampling, options, stop_ids=(), seeds=None, stats=None):
    """Speculative speculative decoding: while the target verifies round T, the draft prepares round T+1."""
    options.check()
    batch = Batch(target_model, prompts, max_new_tokens, sampling, stop_ids, seeds, stats, draft_model)
    options = options.settled(batch.sampler)
    tree, fan = make_plan(options, batch.stats, draft_model)
    nodes = options.most_nodes()
    room = batch.length + nodes * (options.fanout_budget + 3)           # two rounds that overshoot, the trunk and the branches
    target, drafter = batch.sides((Target, target_model, batch.length + 3 * nodes, options.residual(batch.sampler)),
                                  (Drafter, draft_model, room, options))
    drafter.plan(tree, fan)
    batch.prefilled()
    drafter.speculate()                                                 # round 1: the speculation cache is empty
    # glue: some speculation isn't the draft's own; works: the draft prepares something; chunks: None until they are counted; ahead: the
    # receipts of the next round, if it was launched already; covered: nobody needs a backup any more.
    glue, works, chunks, ahead, rest = False, True, None, None, Rest(options.rests)
    with Beside(drafter) as beside:
        while True:
            speculation = drafter.spec.tokens, drafter.spec.q, tree
            if ahead is None:
                precompute = partial(drafter.precompute, glue) if works else None   # guess the outcomes, draft for each of them
                verified, drafted = beside.both(partial(target.verify, *speculation, alone=not works), precompute)
            chunks = chunks or batch.count_outcome()                    # while both work, the caller gets the last text
            if chunks:
                yield chunks
            if ahead is None:
                verdict, report = verified()
                ahead = report, drafter.switch(verdict, drafted())
            batch.post(*ahead)
            prepared = ahead[1] is not None                         # else it was a round of SD
            backup = choose_backup(options, batch.stats, len(batch.live))
            replan = time_to_replan(options, batch, batch.stats.rounds + 1)     # one isn't counted yet
            ahead, covered = None, not prepared
            if covered:                                             # a round of SD asks nobody before it drafts the next
                drafter.speculate(refeed=True)
            elif (batch.read and all(batch.left) and not replan and backup == "neural" and rest.far()
                  and target.can_verify(*speculation)):
                if drafter.can_go_on(backup):                       # where all hit the next round follows at once
                    ahead = beside.ahead(target, speculation)
                else:                                               # recorded, needed or not, while nobody waits
                    drafter.get_ready(backup)
                    covered = True
            hits = batch.read_outcome(tree, drafter)
            # What is usual goes straight on to the next round, and is counted while that runs.
            usual = prepared and all(hits) and all(batch.left) and not replan and batch.read > 1
            chunks = None if usual else batch.count_outcome()
            if batch.read == 1:                                     # at once: the next round has graphs to record first
                yield chunks
                chunks = None
            if not any(batch.left):
                break
            if ahead is None and (rows := batch.drop_finished(target, drafter)) is not None:
                hits = [hits[row] for row in rows]
            plan = make_plan(options, batch.stats, draft_model, (tree, fan)) if replan else (tree, fan)
            if replanned := plan != (tree, fan):
                tree, fan = plan
                drafter.plan(tree, fan)
                rest.new_plan()
            elif prepared:
                rest.count([hit for hit, left in zip(hits, batch.left) if left], backup)
            works = rest.over()                                         # else the coming round is one of SD
            if replanned:                                           # what was drafted is for the old plan
                drafter.speculate(refeed=not prepared, span="miss" if prepared else "draft")
            if replanned or not prepared:
                hits, backup = [False] * len(hits), "neural"
            elif not all(hits) and not covered:                         # those that missed need a speculation now
                backup = backup if works else "neural"
                with beside.backing_up(ahead is not None):
                    drafter.fall_back(backup)
            glue = not all(hits) and backup == "fast"
            batch.start_round(hits, backup, works)
    batch.close()
    if chunks:
        yield chunks

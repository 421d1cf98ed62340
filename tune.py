"""--tune: measure the parts of a round on this machine, predict ar, sd and ssd from them, keep the fastest.

A round of B sequences yields B E tokens, E the expected number of accepted tokens plus one, and takes

    ar     verify(1)                                                                                    + extra_ar
    sd     verify(M+1) + K forwards of the draft                                                        + extra_sd
    ssd    together(verify(M+1), a forward and K with N branches) + (1 - p^B) K forwards of the backup  + extra_ssd

(Theorem 7 of the paper, in seconds). verify and forwards are measured for a few widths. together(a, b): side by side the
verify takes s times as long and the draft d times, until one of them is done and the other goes on alone. s and d are measured
for every share of the GPU that the target may keep to. extra, what rounds take beyond that, comes from a short run of each mode
on the text at hand, and so does the acceptance of the draft's 1st, 2nd, ... choice, from which E and the hit rate p follow.

Shapes: M+1 nodes of a tree (a chain of K: K+1), K its depth, N outcomes guessed.
"""
import time
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

import torch

from batch import MAX_BUDGET, Options, Stats
from draft import Drafter
from graphs import Beside
from kernels import MAX_ROWS, TORCH, Share
from measure.timing import WARM_UP, seconds_of
from plan import make_plan
from saguaro import Target, autoregressive, sd, ssd
from sampling import Sampler, Sampling
from timeline import Timeline
from tree import Tree

TOKENS = 1, 7, 16, 32, 64               # widths of a verify to measure
BRANCHES = 8, 16, 32, 64, 128           # outcomes to measure a forward of the draft with
REPEATS = 5                             # of every measurement
TRIAL = 128                             # new tokens of the short runs

CHAINS = 1, 2, 3, 4, 5, 6, 8, 10, 12    # what is chosen from: K of a chain ...
TREES = 8, 15, 31, 63                   # ... drafted tokens of a tree; with its root 15 and more fill 16-row MMA tiles ...
DEPTHS = 4, 6, 8, 10                    # ... its greatest depth ...
BUDGETS = 4, 8, 16, 32                  # ... and outcomes guessed


@dataclass
class Times:
    """Seconds of the parts, at one batch size. Plain lists, as JSON keeps them."""
    batch: int
    verify: list = field(default_factory=list)      # [tokens a sequence, seconds]
    draft: list = field(default_factory=list)       # [rows a sequence, seconds of one forward]
    slowdown: list = field(default_factory=list)    # [the target's Share or None, s, d]
    extra: dict = field(default_factory=lambda: dict(ar=0.0, sd=0.0, ssd=0.0))

    def __post_init__(self):
        self.slowdown = [[share and Share(*share), s, d] for share, s, d in self.slowdown]

    def verify_seconds(self, tokens):
        return interpolate(self.verify, tokens)

    def draft_seconds(self, tree, branches=1):
        """K forwards that draft `branches` trees side by side."""
        return sum(interpolate(self.draft, branches * len(level)) for level in tree.levels[:-1])

    def together_seconds(self, tree, branches, share=None):
        """A round of SSD that hits: the forward over the leaves and K with all branches, beside the verify."""
        a = self.verify_seconds(tree.size)
        b = interpolate(self.draft, len(tree.levels[-1])) + self.draft_seconds(tree, branches)
        s, d = next((s, d) for other, s, d in self.slowdown if other == share)
        first = min(s * a, d * b)                                           # when one of them is done
        return first + max(a - first / s, b - first / d)

    def round_seconds(self, mode, tree, branches=0, hit_rate=0.0, share=None):
        """The formulas above. The tree of ar is a root alone, which takes no drafting."""
        if mode == "ssd":
            work = self.together_seconds(tree, branches, share) + (1 - hit_rate ** self.batch) * self.draft_seconds(tree)
        else:
            work = self.verify_seconds(tree.size) + self.draft_seconds(tree)
        return work + self.extra[mode]


class Plan(NamedTuple):
    """The best way to run a mode, and what is expected of it."""
    k: int
    tree: str | None
    fanout_budget: int
    share: Share | None             # what the target's linears keep to while the draft works beside them
    tokens_per_round: float         # E
    hit_rate: float                 # p
    tokens_per_second: float        # of the whole batch


def interpolate(points, x):
    """Linear between measured points (x, y), flat before the first, on the line through the last two behind the last."""
    points = sorted(map(tuple, points))
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    i = next((i for i, (px, _) in enumerate(points) if px >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1:i + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def shares(model):
    """What a target's linears may keep to: a program a multiprocessor, and for drafts that take longer fewer bytes in flight.
    Empty without our kernels."""
    if model.ops is TORCH:
        return []
    ctas = torch.cuda.get_device_properties(model.device).multi_processor_count
    return [Share(ctas), Share(ctas, 32)]


LONG = 8                                # drafts of so many levels outlast the verify unless the target keeps to the second Share


def usual_share(target_model, draft_model, options=Options()):
    """The Share of ssd's target where nothing has been tuned: None unless both models are on one GPU."""
    together = draft_model is not None and draft_model.device == target_model.device
    found = shares(target_model) if together else []
    return found[options.depth() >= LONG] if found else None


def slowdown(alone, beside, first):
    """How much slower one model ran until `first`, when one of two was done: `alone` seconds became `beside` seconds."""
    return max(1.0, first / max(alone - (beside - first), first / 10))      # after that it ran as fast as alone


@torch.inference_mode()
def measure(target_model, draft_model, sampling=Sampling(), batch=1, context=256, k=Options.k, budget=Options.fanout_budget,
            which=None, widths=True):
    """Time the parts of a round behind a text of `context` tokens. Returns Times without `extra`.

    widths: also for verifies of other widths than 1 and k + 1 tokens, and for other numbers of branches than `budget`. What
    runs side by side is a chain of k and `budget` outcomes, for every Share in `which`: by default None, all that a linear
    wants, and those of `shares`.
    """
    times, device, gpu = Times(batch), target_model.device, target_model.device.type == "cuda"
    usual = 1 if gpu else 0                 # the median, or the least: others use a CPU as well, and are no part of a round
    took = lambda run: seconds_of(run, device, draft_model.device, repeats=REPEATS)[usual]
    prompts, sampler = [[1] * context] * batch, Sampler(sampling, [0] * batch, device)
    branches = {budget, *((BRANCHES if gpu else (8, 32)) if widths else ())}
    chain, room = Tree.chain(k, draft_model.device), context + (k + 1) * (max(branches) + 2)
    drafter = Drafter(draft_model, batch, sampler, room, Options())
    drafter.start(prompts, sampler, Stats())
    drafter.plan(chain, None)
    one = took(drafter.speculate) / k
    times.draft.append([1, one])
    for n in sorted(branches, key=lambda n: (n == budget, n)):              # the budget last: it stays planned
        drafter.plan(chain, [n // (k + 1) + (i < n % (k + 1)) for i in range(k + 1)])
        drafter.speculate()
        ahead = took(drafter.precompute)
        times.draft.append([n, max(one, (ahead - one) / k)])

    chains = {n: Tree.chain(n - 1, device) for n in sorted({1, k + 1, *(TOKENS if widths else ())})}
    tokens = {n: torch.ones(batch, n, dtype=torch.int64, device=device) for n in chains}

    def side(share):
        """The target, ready to verify, and how it does that."""
        target_model.run_with(share=share)
        target = Target(target_model, batch, sampler, context + 2 * max(tokens))
        target.start(prompts, sampler, Stats())
        start = target.prefix_len.clone()

        def verify(n):
            target.prefix_len.copy_(start)
            target.verify(tokens[n], None, chains[n])
        return target, verify

    _, verify = side(None)
    times.verify = [[n, took(lambda: verify(n))] for n in tokens]
    for share in [None, *shares(target_model)] if which is None else which:
        target, verify = side(share)
        target.stats = drafter.stats = Stats()
        with Beside(drafter) as beside:
            for number in range(WARM_UP + 2 * REPEATS):
                if number == WARM_UP:
                    target.stats.timeline = Timeline(target=device, draft=draft_model.device)
                verified, drafted = beside.both(lambda: verify(k + 1), drafter.precompute)
                verified(), drafted()
        spans = target.stats.timeline.spans()
        a, b = (median(span.end - span.start for span in spans if span.name == name) for name in ("verify", "draft"))
        times.slowdown.append([share, slowdown(times.verify_seconds(k + 1), a, min(a, b)), slowdown(ahead, b, min(a, b))])
    target_model.run_with()
    return times


def try_modes(times, target_model, draft_model, prompts, new_tokens, sampling, options, stop_ids=()):
    """Run each mode a little on real text: fills in times.extra, and returns the Stats of ssd."""
    options = replace(options, k=Options.k, tree=None, fanout_budget=Options.fanout_budget)
    for mode, loop in (("ar", autoregressive), ("sd", sd), ("ssd", ssd)):
        models, more, k = ((target_model,), (), 0) if mode == "ar" else ((target_model, draft_model), (options,), options.k)
        stats, rounds, before = Stats(), [], time.perf_counter()
        for _ in loop(*models, prompts, new_tokens, sampling, *more, stop_ids, stats=stats):
            now = time.perf_counter()
            rounds.append(now - before)
            before = now
        rounds = sorted(rounds[3:] or rounds)                               # the first ones compile and record
        hit_rate = float(stats.all_hit_rate > 0.5)                          # did the round in the middle hit?
        expected = times.round_seconds(mode, Tree.chain(k), options.fanout_budget, hit_rate)
        times.extra[mode] = max(0.0, rounds[len(rounds) // 2] - expected)
    return stats


def find(target_model, draft_model, prompts, sampling, options, stop_ids=()):
    """Measure all there is to know about a pair, on a batch of prompts (lists of ids): (Times, Stats), for `choose`."""
    models, length = (target_model, draft_model), max(map(len, prompts))
    new = min(TRIAL, min(model.config.max_context for model in models) - length)
    times = measure(*models, sampling, len(prompts), length + new // 2)
    return times, try_modes(times, *models, prompts, new, sampling, options, stop_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing

def expected(tree, fan, accept):
    """(tokens a round, hit rate) of a tree and its fan-out, if the target takes the draft's r-th choice with chance
    accept[r]: guesses go on where a node's children end, so the rates of their ranks add up.

    (On the embedded pair that is within .04 of measured hit rates, where F^-r, which a fan-out of 1 never satisfies, is not.)
    """
    reach = tree.reach(accept)
    hit = sum((chance * sum(accept[n:n + f]) for chance, n, f in zip(reach, tree.n_children, fan)), 0.0)
    return sum(reach), min(1.0, hit)


def candidates(options, asked, vocab_size):
    """The Options to choose from: fields of `options` named in `asked` as they are, the others free."""
    trees = [options.tree] if "tree" in asked else [None]
    if not {"tree", "k"} & {*asked}:
        trees += [str(nodes) for nodes in TREES if nodes < vocab_size - 1]
    budgets = [options.fanout_budget] if "fanout_budget" in asked else BUDGETS
    for tree in trees:
        given = "k" in asked or "," in (tree or "")                         # children per depth say how deep, too
        for k in [options.k] if given else DEPTHS if tree else CHAINS:
            yield from (replace(options, k=k, tree=tree, fanout_budget=budget) for budget in budgets)


def choose(times, stats, draft_model, options=Options(), asked=()):
    """The fastest plan of each mode: {"ar": Plan, "sd": Plan, "ssd": Plan}.

    stats: acceptance by rank and miss exponent of a run of ssd. options: `settled` for how it samples. asked: names of those of its
    fields that the user has set ("k", "tree", "fanout_budget"): they stay as they are, the others are free.
    """
    accept, plans = stats.rank_acceptance(), {}

    def offer(mode, shape, tree, branches=0, fan=(), share=None):
        tokens, hit_rate = expected(tree, fan, accept)
        speed = times.batch * tokens / times.round_seconds(mode, tree, branches, hit_rate, share)
        if mode not in plans or speed > plans[mode].tokens_per_second:
            plans[mode] = Plan(shape.k, shape.tree, shape.fanout_budget, share, tokens, hit_rate, speed)

    offer("ar", options, Tree.chain(0))
    for shape in candidates(options, asked, draft_model.config.vocab_size):
        tree, fan = make_plan(shape, stats, draft_model)
        offer("sd", shape, tree)
        branches, wide = sum(fan), sum(fan) * max(map(len, tree.levels[:-1])) > MAX_ROWS
        if shape.by_round():
            # They find what twice as many find that are spread by Theorem 12: 4- and 5-bit drafts, the embedded pair (MEASURED.md).
            fan = make_plan(replace(shape, fanout_budget=min(MAX_BUDGET, 2 * shape.fanout_budget)), stats, draft_model)[1]
        for share, _, _ in times.slowdown if not wide or "ssd" not in plans else ():
            offer("ssd", shape, tree, branches, fan, share)
    return plans


def best_mode(plans):
    return max(plans, key=lambda mode: plans[mode].tokens_per_second)


def describe(times, plans):
    """What was measured and what follows, a few lines for the user."""
    ms = lambda table: ", ".join(f"{n}: {1e3 * s:.2f}" for n, s in table)
    lines = [f"verify, ms by tokens: {ms(times.verify)}", f"a draft forward, ms by branches: {ms(sorted(times.draft))}"]
    lines += [f"side by side, the target with {share or 'all that it wants'}: the verify takes {s:.2f} times as long, the draft "
              f"{d:.2f} times" for share, s, d in times.slowdown]
    for mode, plan in plans.items():
        line = f"{mode}: {plan.tokens_per_second:.1f} tok/s expected"
        if mode != "ar":
            line += f" with --tree {plan.tree} --k {plan.k}" if plan.tree else f" with --k {plan.k}"
        if mode == "ssd":
            line += f" --fanout-budget {plan.fanout_budget}" + (f", the target with {plan.share}" if plan.share else "")
        lines.append(line)
    return [f"tune: {line}" for line in (*lines, f"fastest: {best_mode(plans)}")]

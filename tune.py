"""--tune: measure the parts of a round on this machine, predict ar, sd and ssd from them, keep the fastest.

A round of B sequences yields B E tokens, E the expected number of accepted tokens plus one, and takes

    ar     verify(1)                                                                                + extra_ar
    sd     verify(M+1) + D forwards of the draft                                                    + extra_sd
    ssd    together(verify(M+1), D+1 forwards with N branches) + (1 - p^B) D forwards of the backup  + extra_ssd

(Theorem 7 of the paper, in seconds). verify and forwards are measured for a few widths. together(a, b) is
max(a, b) + (1 - e) min(a, b), where e, how much of the shorter one disappears beside the longer one, is measured once for each
CTA budget of the target. extra, what rounds take beyond that, comes from a short run of each mode on the text at hand,
and so does the acceptance of the draft's 1st, 2nd, ... choice, from which E and the hit rate p follow.
"""
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from batch import Options, Stats
from draft import Drafter
from graphs import Beside
from kernels import MAX_ROWS, TORCH, Int8Weight
from saguaro import Target, autoregressive, make_plan, sd, ssd
from sampling import Sampler, Sampling
from tree import Tree

TOKENS = 1, 7, 16, 32, 64               # widths of a verify to measure
BRANCHES = 8, 16, 32, 64, 128           # outcomes to measure a forward of the draft with
K, BUDGET = Options.k, Options.fanout_budget        # what runs together when the overlap is measured
CHAINS = 1, 2, 3, 4, 5, 6, 8, 10, 12
TREES = 8, 15, 31, 63                   # drafted tokens: with its root a tree fills the 16 rows of an MMA tile
DEPTHS = 4, 6, 8, 10
BUDGETS = 4, 8, 16, 32
TRIAL = 128                             # new tokens of the short runs
ROOM = 8, 16, 32                        # streaming multiprocessors that a CTA budget leaves to the draft


@dataclass
class Times:
    """Seconds of the parts, at one batch size. Plain lists, as JSON keeps them."""
    batch: int
    verify: list = field(default_factory=list)      # [CTA budget or None, tokens a sequence, seconds]
    draft: list = field(default_factory=list)       # [rows a sequence, seconds of one forward]
    overlap: list = field(default_factory=list)     # [CTA budget or None, e]
    extra: dict = field(default_factory=lambda: dict(ar=0.0, sd=0.0, ssd=0.0))

    def verify_seconds(self, tokens, ctas=None):
        return interpolate([(n, seconds) for budget, n, seconds in self.verify if budget == ctas], tokens)

    def draft_seconds(self, tree, branches=1):
        """D forwards that draft `branches` trees side by side."""
        return sum(interpolate(self.draft, branches * len(level)) for level in tree.levels[:-1])

    def together_seconds(self, tree, branches, ctas):
        """A round of SSD that hits: the forward over the leaves and D with all branches, beside the verify."""
        a = self.verify_seconds(tree.size, ctas)
        b = interpolate(self.draft, len(tree.levels[-1])) + self.draft_seconds(tree, branches)
        return max(a, b) + (1 - dict(self.overlap)[ctas]) * min(a, b)


class Plan(NamedTuple):
    """The best way to run a mode, and what is expected of it."""
    k: int
    tree: str | None
    fanout_budget: int
    ctas: int | None                # CTA budget of the target's linears while the draft works beside it
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

def seconds(run, devices):
    """Seconds of run(), until its last kernel is done: the median, or on a CPU, which others use too, the least.

    The first calls compile kernels and record graphs.
    """
    cuda, times = [device for device in devices if device.type == "cuda"], []
    for _ in range(18 if cuda else 6):
        began = time.perf_counter()
        run()
        for device in cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[3:])[7] if cuda else min(times)


@torch.inference_mode()
def measure(target_model, draft_model, sampling=Sampling(), batch=1, context=256):
    """Time the parts of a round behind a text of `context` tokens. Returns Times without `extra`."""
    device, devices, times = target_model.device, {target_model.device, draft_model.device}, Times(batch)
    prompts, sampler = [[1] * context] * batch, Sampler(sampling, [0] * batch, device)
    branches = BRANCHES if draft_model.device.type == "cuda" else (8, 32)
    chain = Tree.chain(K, draft_model.device)
    drafter = Drafter(draft_model, batch, sampler, context + (K + 1) * (max(branches) + 2), Options())
    drafter.start(prompts, sampler, Stats())
    drafter.plan(chain, None)
    one = seconds(drafter.speculate, devices) / K
    times.draft.append([1, one])
    for n in sorted({*branches, BUDGET}, key=lambda n: (n == BUDGET, n)):           # the budget last: it stays planned
        drafter.plan(chain, [n // (K + 1) + (i < n % (K + 1)) for i in range(K + 1)])
        drafter.speculate()
        beside = seconds(drafter.precompute, devices)
        times.draft.append([n, max(one, (beside - one) / K)])
    budgets = [None]
    if target_model.ops is not TORCH:
        count = torch.cuda.get_device_properties(device).multi_processor_count
        budgets += [2 * (count - room) for room in ROOM if room < count // 2]
    specs = {n: (torch.ones(batch, n, dtype=torch.int64, device=device), None, Tree.chain(n - 1, device)) for n in TOKENS}
    for ctas in budgets:
        target_model.run_with(ctas=ctas)
        target = Target(target_model, batch, sampler, context + 2 * max(TOKENS))
        target.start(prompts, sampler, Stats())
        start = target.prefix_len.clone()

        def verify(n):
            target.prefix_len.copy_(start)
            target.verify(*specs[n])

        def both():
            drafted, verified = side.draft(drafter.precompute), side.target(verify, K + 1)
            verified(), drafted()
        for n in TOKENS:
            times.verify.append([ctas, n, seconds(lambda: verify(n), devices)])
        alone = times.verify_seconds(K + 1, ctas)
        with Beside(draft_model.device) as side:
            times.overlap.append([ctas, min(1.0, (alone + beside - seconds(both, devices)) / min(alone, beside))])
    target_model.run_with()
    return times


def try_modes(times, target_model, draft_model, prompts, new_tokens, sampling, options, stop_ids=()):
    """Run each mode a little on real text: fills in times.extra, and returns the Stats of ssd."""
    options, tree = replace(options, k=K, tree=None, fanout_budget=BUDGET), Tree.chain(K)
    for mode, loop in (("ar", autoregressive), ("sd", sd), ("ssd", ssd)):
        stats, rounds, before = Stats(), [], time.perf_counter()
        models, more = ((target_model,), ()) if mode == "ar" else ((target_model, draft_model), (options,))
        for _ in loop(*models, prompts, new_tokens, sampling, *more, stop_ids, stats=stats):
            now = time.perf_counter()
            rounds.append(now - before)
            before = now
        rounds = sorted(rounds[3:] or rounds)                               # the first ones compile and record
        backup = 0 if stats.all_hit_rate > 0.5 else times.draft_seconds(tree)
        parts = {"ar": times.verify_seconds(1), "sd": times.verify_seconds(tree.size) + times.draft_seconds(tree),
                 "ssd": times.together_seconds(tree, BUDGET, None) + backup}[mode]
        times.extra[mode] = max(0.0, rounds[len(rounds) // 2] - parts)
    return stats


def find(target_model, draft_model, prompts, sampling, options, stop_ids=()):
    """Measure all there is to know about a pair, on a batch of prompts (lists of ids), and keep it in the cache.

    Returns (Times, Stats), for `choose`.
    """
    models, length = (target_model, draft_model), max(map(len, prompts))
    new = min(TRIAL, min(model.config.max_context for model in models) - length)
    times = measure(*models, sampling, len(prompts), length + new // 2)
    stats = try_modes(times, *models, prompts, new, sampling, options, stop_ids)
    save(cache_key(*models, len(prompts)), times, stats, choose(times, stats, draft_model))
    return times, stats


# ---------------------------------------------------------------------------------------------------------------------
# Choosing

def expected(tree, fan, accept):
    """(tokens a round, hit rate) of a tree and its fan-out, if the target takes the draft's r-th choice with chance
    accept[r]: guesses go on where a node's children end, so the rates of their ranks add up.

    (On the embedded pair that is within .04 of measured hit rates, where F^-r, which a fan-out of 1 never satisfies, is not.)
    """
    reach = [1.0] * tree.size
    for node in range(1, tree.size):
        reach[node] = reach[tree.parents[node]] * accept[tree.ranks[node]]
    hit = sum(chance * sum(accept[n:n + f]) for chance, n, f in zip(reach, tree.n_children, fan))
    return sum(reach), min(1.0, hit)


def choose(times, stats, draft_model, options=Options(), asked=()):
    """The fastest plan of each mode: {"ar": Plan, "sd": Plan, "ssd": Plan}.

    stats: acceptance by rank and miss exponent of a run of ssd. asked: names of the fields of `options` that the user has
    set ("k", "tree", "fanout_budget"): they stay as they are, the others are free.
    """
    B, accept = times.batch, stats.rank_acceptance()
    plans = {"ar": Plan(options.k, options.tree, options.fanout_budget, None,
                        B / (times.verify_seconds(1) + times.extra["ar"]))}

    def offer(mode, seconds, *plan):
        if mode not in plans or B * yields / seconds > plans[mode].tokens_per_second:
            plans[mode] = Plan(*plan, B * yields / seconds)

    fixed, vocab_size = "k" in asked, draft_model.config.vocab_size
    sizes = [options.tree] if "tree" in asked else [None] if fixed else [None, *(str(n) for n in TREES if n < vocab_size - 1)]
    depths = lambda size: (options.k,) if fixed or "," in (size or "") else DEPTHS if size else CHAINS
    for size, k in ((size, k) for size in sizes for k in depths(size)):
        shape = replace(options, k=k, tree=size)
        for budget in (options.fanout_budget,) if "fanout_budget" in asked else BUDGETS:
            tree, fan = make_plan(replace(shape, fanout_budget=budget), stats, draft_model)
            yields, hit = expected(tree, fan, accept)
            backup = times.draft_seconds(tree)
            offer("sd", times.verify_seconds(tree.size) + backup + times.extra["sd"], k, size, budget, None)
            wide = sum(fan) * max(map(len, tree.levels[:-1])) > MAX_ROWS
            for ctas, _ in times.overlap if not wide or "ssd" not in plans else ():
                round_time = times.together_seconds(tree, sum(fan), ctas) + (1 - hit ** B) * backup + times.extra["ssd"]
                offer("ssd", round_time, k, size, budget, ctas)
    return plans


def best_mode(plans):
    return max(plans, key=lambda mode: plans[mode].tokens_per_second)


def describe(times, plans):
    """What was measured and what follows, a few lines for the user."""
    ms = lambda table: ", ".join(f"{n}: {1e3 * s:.2f}" for n, s in table)
    overlap = ", ".join(f"{ctas or 'all'}: {e:.0%}" for ctas, e in times.overlap)
    lines = [f"verify, ms by tokens: {ms([(n, s) for ctas, n, s in times.verify if ctas is None])}",
             f"a draft forward, ms by branches: {ms(sorted(times.draft))}",
             f"of the shorter side overlap hides, by CTA budget of the target: {overlap}"]
    for mode, plan in plans.items():
        shape = f"--tree {plan.tree} --k {plan.k}" if plan.tree else f"--k {plan.k}"
        how = {"ar": "", "sd": f" with {shape}"}.get(mode, f" with {shape} --fanout-budget {plan.fanout_budget}" + (
            f" and {plan.ctas} CTAs for the target" if plan.ctas else ""))
        lines.append(f"{mode}: {plan.tokens_per_second:.1f} tok/s expected{how}")
    return [f"tune: {line}" for line in (*lines, f"fastest: {best_mode(plans)}")]


# ---------------------------------------------------------------------------------------------------------------------
# The cache: what was measured, for each pair and machine, and the plans that followed

def cache_key(target_model, draft_model, batch):
    def name(model):
        c, device = model.config, model.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        weights = "int8" if isinstance(model.layers[0].wqkv, Int8Weight) else str(model.dtype).removeprefix("torch.")
        how = ("torch" if model.ops is TORCH else "triton") + (", graphs" if model.graphs else "")
        return (f"{gpu}, {weights}, {how}, {c.n_layers} layers x {c.dim}, {c.n_heads}/{c.n_kv_heads} heads x {c.head_dim}, "
                f"ffn {c.ffn_dim}, vocabulary {c.vocab_size}")
    own_gpu = ", on its own device" if draft_model.device != target_model.device else ""
    return f"torch {torch.__version__} | {name(target_model)} | {name(draft_model)}{own_gpu} | batch {batch}"


def cache_path():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saguaro" / "tune.json"


def load(target_model, draft_model, batch):
    """What `find` has found for a pair, or None. A cache that can't be read is told of and ignored."""
    try:
        entry = json.loads(cache_path().read_text(encoding="utf-8")).get(cache_key(target_model, draft_model, batch))
        if entry is None:
            return None
        times, stats = Times(**entry["times"]), Stats(choices=entry["choices"])
        stats.misses = {int(f): counts for f, counts in entry["misses"].items()}
        times.verify_seconds(1), stats.rank_acceptance(), stats.miss_exponent(), dict(times.overlap)[None]
        return times, stats
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        print(f"{cache_path()} is of no use ({error!r}) and ignored; --tune writes it anew", file=sys.stderr)


def save(key, times, stats, plans):
    """Store what was measured under key. A cache that can't be written is told of and done without."""
    try:
        path = cache_path()
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        entries = entries if isinstance(entries, dict) else {}
        entries[key] = dict(fastest=best_mode(plans), plans={mode: plan._asdict() for mode, plan in plans.items()},
                            times=asdict(times), choices=stats.choices, misses=stats.misses)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        new.replace(path)                                                   # whole, whoever else writes
    except (OSError, RuntimeError) as error:
        print(f"the choice can't be kept for later runs: {error}", file=sys.stderr)

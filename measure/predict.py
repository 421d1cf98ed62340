"""The speedup model of tune.py, asked in two ways: what does it make of a pair that bench.py has run, and what would SSD buy
with another pair, whose parts are measured and whose acceptance is made up?"""
from dataclasses import replace

from batch import Stats
from plan import make_plan
from tune import choose, interpolate, measure

RATES = 0.5, 0.6, 0.7, 0.8, 0.9         # acceptance per token
RANK_EXPONENT = 0.8                     # see rank_law
LOOKS = 1e9                             # as if acceptance had been measured on so many tokens


def rank_law(rate, n=64):
    """Chance that the target takes the draft's 1st, 2nd, ... n-th choice, if the first is right with chance `rate`.

    The chance that none of the best m is right falls as (1 - rate) m^-r; r was 0.7 to 1.1 for the drafts we measured.
    """
    return [rate] + [(1 - rate) * (m ** -RANK_EXPONENT - (m + 1) ** -RANK_EXPONENT) for m in range(1, n)]


def over_ar(plans, *modes):
    """What to report of plans (of `choose`): speed over ar of the modes, and the shape of the last of them."""
    plan, ar = plans[modes[-1]], plans["ar"].tokens_per_second
    return dict(k=plan.k, budget=plan.fanout_budget, tokens=plan.tokens_per_round, hit_rate=plan.hit_rate,
                **{mode: plans[mode].tokens_per_second / ar for mode in modes})


def parts(pair, stats, sampling, options, context, share):
    """(seconds of a round's parts, what the model makes of them) for chains, batch 1, ssd's target with `share`.

    Each part alone: "ar" a target step, "verify" of K+1 tokens, "draft" a step, "branches" a step with the whole budget; and
    "together", a verify beside the next round's drafting. stats: of a run, from which acceptance is known.
    """
    k, budget = options.k, options.fanout_budget
    times = measure(pair.target, pair.draft, sampling, 1, context, k, budget, [share], widths=False)
    tree, fan = make_plan(options, stats, pair.draft)
    found = dict(k=k, budget=budget, ar=times.verify_seconds(1), verify=times.verify_seconds(k + 1),
                 draft=interpolate(times.draft, 1), branches=interpolate(times.draft, budget),
                 together=times.together_seconds(tree, sum(fan), share))
    return found, over_ar(choose(times, stats, pair.draft, options, ("k", "tree", "fanout_budget")), "sd", "ssd")


def predictions(target, draft, name, context):
    """The best chains and fan-outs of two models (random ones will do) for every acceptance rate. Returns a list of dicts."""
    times = measure(target, draft, context=context)
    apart = replace(times, slowdown=[[None, 1.0, 1.0]])     # on two GPUs the shorter side disappears beside the longer one
    step = dict(draft=name, ar_ms=1e3 * times.verify_seconds(1), draft_ms=1e3 * interpolate(times.draft, 1),
                branch_ms=1e3 * interpolate(times.draft, 16))
    rows = []
    for rate in RATES:
        stats = Stats(choices=[[LOOKS, LOOKS * p] for p in rank_law(rate)])
        here, two = (choose(t, stats, draft, asked=("tree",)) for t in (times, apart))
        rows.append(dict(step, rate=rate, sd=over_ar(here, "sd"), one=over_ar(here, "ssd"), two=over_ar(two, "ssd")))
    return rows

"""The speedup model: what K, fan-out and draft would give, from the measured times of single steps.

A chain of K drafted tokens, each accepted with chance a, yields E = 1 + a + ... + a^K tokens a round. With v the time of a
verify of K+1 tokens and d that of a draft step:

    ar   1 token in the time of one target step
    sd   E tokens in K d + v
    ssd  E tokens in max(v, the K+1 branch steps beside it), and K d more in the rounds that miss   (Theorem 7)

On one GPU "beside" is measured, two streams sharing one memory; with the draft on a second GPU it is the longer of the two.
Not in it: accept rule, read-back and lookup (some 20-50 us a round), and the tokens' way between two GPUs.
"""
from measure.timing import Step, cta_budgets, overlapped, random_cache
from saguaro import expected_speedup, fan_out
from tree import Tree

KS = 2, 3, 4, 6, 8, 10                  # lookaheads that are tried
BUDGETS = 8, 16, 32                     # outcomes guessed in a round
RATES = 0.5, 0.6, 0.7, 0.8, 0.9         # acceptance per token
RANK_EXPONENT = 0.8                     # see rank_law


def rank_law(rate, n=64, r=RANK_EXPONENT):
    """Chance that the target takes the draft's 1st, 2nd, ... n-th choice, if the first is right with chance `rate`.

    The chance that none of the best m is right falls as (1 - rate) m^-r; r was 0.7 to 1.1 for the drafts we measured.
    """
    return [rate] + [(1 - rate) * (m ** -r - (m + 1) ** -r) for m in range(1, n)]


def hit_rate(tree, accept, fan):
    """Chance that the outcome of a chain is among those guessed: fan[k] of them after k accepted tokens."""
    stop, hit = tree.stop_probability(accept), 0.0
    for node, (p, f) in enumerate(zip(stop, fan)):
        first = tree.n_children[node]                               # what was drafted there isn't guessed
        hit += p * sum(accept[first:first + f]) / max(1e-9, 1 - sum(accept[:first]))
    return hit


def predicted(times, accept, k, budget):
    """Speed over ar of sd and ssd. times: seconds of "ar", "verify", "draft" (one row) and "together"; accept: per rank."""
    tree = Tree.chain(k)
    fan = fan_out(tree.stop_probability(accept), RANK_EXPONENT, budget, 64)
    tokens, hit = 1 + sum(accept[0] ** i for i in range(1, k + 1)), hit_rate(tree, accept, fan)
    verify, slower = times["verify"], times["ar"] / times["verify"]
    beside, backup = times["together"] / verify, k * times["draft"] / verify
    return dict(k=k, budget=budget, tokens=tokens, hit_rate=hit, sd=tokens / (1 + backup) * slower,
                ssd=expected_speedup(hit, tokens, tokens, beside, beside - 1 + backup) * slower)


def target_steps(target, context):
    """(seconds of an ar step, {K: (Steps of a verify, seconds of the first)}): what every draft is put beside.

    The first verify has the whole GPU, the second leaves a few multiprocessors to the draft.
    """
    cache = random_cache(target, context, max(KS) + 1)
    budgets = [None, *cta_budgets(target.device)[1:2]]
    ar = Step(target, 1, context, cache).seconds()[1]
    verifies = {k: [Step(target.run_with(ctas=ctas), k + 1, context, cache) for ctas in budgets] for k in KS}
    return ar, {k: (steps, steps[0].seconds()[1]) for k, steps in verifies.items()}


def predictions(ar, verifies, draft, name, context):
    """The best K and fan-out for every acceptance rate. ar, verifies: `target_steps`. Returns a list of dicts."""
    cache = random_cache(draft, context, max(BUDGETS))
    one = Step(draft, 1, context, cache).seconds()[1]
    branches = {n: Step(draft, n, context, cache) for n in BUDGETS}
    alone, plans = {n: step.seconds()[1] for n, step in branches.items()}, []
    for k, (steps, seconds) in verifies.items():
        for n, step in branches.items():
            times = dict(ar=ar, verify=seconds, draft=one, together=min(overlapped(verify, step, k + 1) for verify in steps))
            plans.append((k, n, times, dict(times, together=max(seconds, (k + 1) * alone[n]))))
    rows, best = [], lambda plans, mode: max(plans, key=lambda plan: plan[mode])
    for rate in RATES:
        accept = rank_law(rate)
        here, apart = ([predicted(plan[i], accept, *plan[:2]) for plan in plans] for i in (2, 3))
        rows.append(dict(draft=name, rate=rate, ar_ms=1e3 * ar, draft_ms=1e3 * one, branch_ms=1e3 * alone[16],
                         sd=best(here, "sd"), one=best(here, "ssd"), two=best(apart, "ssd")))
    return rows

"""
How much to speculate: the maths of the paper behind fan-out, speedup and backup, and the choices that follow from it and
from what has been measured so far.

Saguaro: Kumar, Dao, May, "Speculative Speculative Decoding", arXiv 2603.03251 (2026).
"""
import math

from batch import power_of_two_above
from errors import UserError
from tree import Tree


# ---------------------------------------------------------------------------------------------------------------------
# The maths

def fan_out(stop, r, budget, limit):
    """How many bonus tokens to guess for each outcome node: F_node ~ P(node)^{1/(1+r)}, sum F = budget.

    Minimises the expected miss rate sum P(node) F^-r (Def. 11) under the budget; for P of a chain with acceptance rate
    a this is Theorem 12's capped geometric fan-out F_k = F_0 a^{k/(1+r)}, F_K = F_0 a^{K/(1+r)} (1-a)^{-1/(1+r)}.
    stop: P(node), M+1 floats; limit: most guesses a node can have. Returns M+1 ints (largest remainders rounded up).
    """
    budget = min(budget, limit * len(stop))
    share = [max(p, 1e-9) ** (1 / (1 + r)) for p in stop]
    exact, left, free = [0.0] * len(stop), float(budget), set(range(len(stop)))
    while free:                                                     # hand what exceeds the limit to the others
        total = sum(share[i] for i in free)
        full = {i for i in free if share[i] / total * left >= limit}
        for i in full or free:
            exact[i] = limit if full else share[i] / total * left
        left -= limit * len(full)
        free = free - full if full else set()
    floor = [int(x + 1e-9) for x in exact]
    by_rest = sorted(range(len(stop)), key=lambda i: floor[i] - exact[i])
    for i in by_rest[:budget - sum(floor)]:
        floor[i] += 1
    return floor


def expected_speedup(p, e_hit, e_miss, t_primary, t_backup):
    """Theorem 7: SSD over AR = [p E_hit + (1-p) E_miss] / [p max(1, T_p) + (1-p)(1 + T_b)].

    p: hit rate; E: tokens per round incl. bonus; T: drafting time in units of one verify. For reading and testing: --tune
    works with the same in seconds (tune.Times.round_seconds).
    """
    return (p * e_hit + (1 - p) * e_miss) / (p * max(1.0, t_primary) + (1 - p) * (1 + t_backup))


def critical_batch(p, e_hit, e_slow, e_fast, t_slow, t_fast):
    """Theorem 17: the batch size b* = ln(1-w) / ln p above which the fast backup beats the slow one.

    A round waits for the backup unless all b sequences hit, p^b. With N_x = p E_hit + (1-p) E_x, break-even is at
    1 - p^b = w = (N_slow - N_fast) / (N_fast T_slow - N_slow T_fast). Returns a float, inf if slow always wins.
    """
    n_slow, n_fast = (p * e_hit + (1 - p) * e for e in (e_slow, e_fast))
    gain, cost = n_slow - n_fast, n_fast * t_slow - n_slow * t_fast
    if gain <= 0:
        return 0.0 if cost > 0 else math.inf
    if cost <= gain or p >= 1:
        return math.inf
    return math.log(1 - gain / cost) / math.log(p) if p > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The choices

WORTHWHILE = 0.02       # more tokens a round, relatively, or more hits, for which a plan is changed: that costs a backup
TRIED, HOPELESS = 16, 0.4       # where fewer of so many rounds found what had been prepared, SSD's draft rests ...
REST = 64                       # ... for so many rounds, the next time for twice as many


def make_plan(options, stats, draft_model, old=None):
    """The token tree and the fan-out of its nodes, by what has been measured so far: (Tree, list of M+1 ints).

    old: the plan in use, which is given back unless a new one promises worthwhile gains. UserError if the draft's
    vocabulary is too small for the tree.
    """
    widths, accept = options.widths(), stats.rank_acceptance()
    device, vocab_size = draft_model.device, draft_model.config.vocab_size
    if widths is None:
        tree = Tree.chain(options.k, device)
    elif isinstance(widths, int):
        tree = Tree.best(widths, accept, options.k, device)
    else:
        tree = Tree.from_widths(widths, device)
    accepted = lambda tree: sum(tree.reach(accept)[1:])
    if old is not None and accepted(tree) < (1 + WORTHWHILE) * accepted(old[0]):
        tree = old[0]
    if max(tree.n_children) >= vocab_size - 1:
        raise UserError(f"a node of the tree has {max(tree.n_children)} children, the draft only {vocab_size} tokens to "
                        f"choose from; use a narrower tree")
    if options.fanout == "uniform":
        stop, r = [1.0] * tree.size, 0.0
    else:
        stop = stats.stop_probability(tree) if options.fanout == "auto" else tree.stop_probability(accept)
        r = stats.miss_exponent()
    # Of what is to be chosen by each round only the sum counts (layout.Layout).
    fan = fan_out(stop, r, options.fanout_budget, vocab_size - 1 - max(tree.n_children))
    misses = lambda fan: sum(p * max(F, 0.5) ** -r for p, F in zip(stop, fan))
    if old is not None and tree is old[0] and (options.by_round() or misses(old[1]) - misses(fan) < WORTHWHILE):
        fan = old[1]
    return tree, fan


def time_to_replan(options, batch, rounds):
    """Measured trees and fan-outs are renewed at rounds 16, 32, 64, ...: often while little is known."""
    if rounds < batch.replan_at:
        return False
    batch.replan_at = power_of_two_above(rounds)
    return not (options.fanout == "uniform" or options.by_round()) or isinstance(options.widths(), int)


def choose_backup(options, stats, batch_size):
    """"neural" or "fast": options.backup, or for "auto" the better one at this batch size (Theorem 17), as measured."""
    if options.backup != "auto":
        return options.backup
    if "hit" not in stats.waits or "neural" not in stats.waits:
        return "neural"
    mean = lambda table, kind, default: table[kind][1] / table[kind][0] if kind in table else default
    round_time = mean(stats.waits, "hit", 0)
    t_slow, t_fast = (max(0, mean(stats.waits, kind, round_time) / round_time - 1) for kind in ("neural", "fast"))
    e_hit, e_slow, e_fast = (mean(stats.sources, kind, 1.0) for kind in ("hit", "neural", "fast"))
    best = critical_batch(stats.hit_rate, e_hit, e_slow, e_fast, t_slow, t_fast)
    return "neural" if batch_size < best else "fast"


class Rest:
    """Whether SSD's draft should prepare anything. Where outcomes can't be guessed that only disturbs the target: a round is one
    of SD then. (An 8B target and a 135M draft on an H100 break even at half of the rounds.) It goes by counts, not by clocks, so
    that runs can be repeated."""

    def __init__(self, allowed):
        self.allowed, self.left, self.next = allowed, 0, REST
        self.found, self.rounds, self.guess = 0, 0, True

    def new_plan(self):
        """What the old one found says nothing any more."""
        self.found, self.rounds, self.guess = 0, 0, False

    def count(self, hits, backup):
        """A round has ended that the draft had prepared for: hits, one a sequence. For the neural backup everybody waits."""
        self.found += all(hits) if backup == "neural" else sum(hits) / len(hits)
        self.rounds += 1
        if self.hopeless():
            self.left, self.next = self.next, 2 * self.next
        elif self.rounds == TRIED:
            self.next = REST
        else:
            return
        self.new_plan()

    def hopeless(self, coming=0):
        """Whether too few rounds found what had been prepared, if so many `coming` ones won't either."""
        # The first plan is a guess, with a fan-out at the wrong places perhaps: it gets all of its rounds, as the next plan may
        # then start anew. Later on it is enough that the rounds to come can't make good for those that were.
        rounds = self.rounds + coming                               # below: even if all that are left of TRIED hit
        return self.allowed and (rounds == TRIED or not self.guess) and self.found + TRIED - rounds < HOPELESS * TRIED

    def far(self):
        """Whether the next round is none of SD, however the one that is running ends."""
        return not self.left and not self.hopeless(coming=1)

    def over(self):
        """Ask once for each round, beforehand."""
        if self.left:
            self.left -= 1
            return False
        return True

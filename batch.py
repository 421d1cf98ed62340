"""Options, measurements and the bookkeeping of a batch: what the loops of saguaro.py need and the algorithm doesn't."""
import contextlib
import gc
import itertools
import operator
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from errors import UserError
from kernels import MAX_ROWS
from sampling import Sampler
from timeline import Timeline
from tree import Tree

MAX_NODES = MAX_ROWS - 1        # drafted tokens in a tree: with its root as many rows as the kernels take
NOTHING = contextlib.nullcontext()
SLOTS = 512                     # cache slots come in multiples of it, so that requests of like length are of one kind
IDLE = 4                        # requests whose sides a target model keeps for later ones
FANOUTS = "uniform", "geometric", "auto", "confident"       # the last: where this round's draft is unsure (kernels/outcomes.py)
CHEAP_ROWS = 32                 # of a draft's forward: those of two sequences with 16 branches each were hardly felt on an H100
MAX_BUDGET = 1024               # outcomes guessed per sequence and round; each is a tree of its own in all forwards but one


@dataclass(frozen=True)
class Options:
    k: int = 6                      # lookahead of a chain, greatest depth of a tree of N nodes
    tree: str | None = None         # None: a chain; "4,2,1,1": children per depth; "32": the best tree of 32 nodes
    fanout: str = "confident"       # one of FANOUTS; with rejection sampling confident means geometric
    fanout_budget: int = 16         # outcomes guessed per sequence and round
    saguaro_c: float = 1.0
    accept: str = "coupled"         # "coupled" | "residual"
    backup: str = "neural"          # "neural" | "fast" | "auto"
    rests: bool = True              # whether SSD takes rounds of SD where outcomes can't be guessed (plan.Rest)

    def check(self):
        """Raise UserError if a value is out of range."""
        nodes = self.most_nodes() - 1
        for bad, message in (
            (self.k < 1, f"--k (the lookahead K) must be at least 1, got {self.k}"),
            (nodes > MAX_NODES, f"the speculation (--k or --tree) has {nodes} tokens; at most {MAX_NODES} are supported"),
            (not 1 <= self.fanout_budget <= MAX_BUDGET,
             f"--fanout-budget must lie in 1..{MAX_BUDGET}, got {self.fanout_budget}"),
            (not 0 <= self.saguaro_c <= 1, f"--saguaro-c (C) must lie in [0, 1], got {self.saguaro_c}"),
            (self.fanout not in FANOUTS, f"unknown fan-out '{self.fanout}'"),
            (self.accept not in ("coupled", "residual"), f"unknown accept rule '{self.accept}'"),
            (self.backup not in ("neural", "fast", "auto"), f"unknown backup '{self.backup}'"),
        ):
            if bad:
                raise UserError(message)

    def residual(self, sampler):
        """Whether rejection sampling is at work: greedy decoding has nothing to sample."""
        return self.accept == "residual" and not sampler.greedy

    def by_round(self):
        """Whether each round chooses its outcomes by itself."""
        return self.fanout == "confident"

    def settled(self, sampler):
        """These options for what a sampler does: the noise of rejection sampling is its own, and q_C must know F beforehand."""
        return replace(self, fanout="geometric") if self.by_round() and self.residual(sampler) else self

    def most_nodes(self):
        """Most nodes of a tree, its root included."""
        widths = self.widths()
        if isinstance(widths, list):
            return 1 + sum(itertools.accumulate(widths, operator.mul))
        return 1 + (widths or self.k)

    def guessing(self, outcomes, batch=1):
        """The same with so many outcomes guessed for each sequence of a batch; None, where the user leaves it open: 16 after a
        chain, fewer in larger batches, whose branches share a forward that stops being cheap at some 32 rows. A tree is drafted
        behind each of them, level by level; so many that a forward still has some 16 rows were the best on an H100 (README). Never
        fewer than 4."""
        if outcomes is None:
            usual = min(Options.fanout_budget, CHEAP_ROWS // batch)
            outcomes = max(4, min(usual, round(usual * self.depth() / max(1, self.most_nodes() - 1))))     # K = 0 is for check() to say
        return replace(self, fanout_budget=outcomes)

    def depth(self):
        """K: the greatest depth of a tree."""
        widths = self.widths()
        return len(widths) if isinstance(widths, list) else self.k

    def widths(self):
        """The --tree option: None (chain), an int (nodes of the best tree) or a list (children per depth)."""
        if self.tree is None:
            return None
        try:
            widths = [int(part) for part in self.tree.split(",")]
        except ValueError:
            widths = [0]
        if min(widths) < 1:
            raise UserError(f"--tree is '{self.tree}'; expected children per depth such as 4,2,1,1 or a size such as 32")
        return widths if len(widths) > 1 else widths[0]


@dataclass
class Stats:
    """What a loop did, filled in while it runs. A sequence-round is one sequence in one round."""
    prefill_seconds: float = 0.0
    seconds: float = 0.0            # decoding: from the end of the prefill on
    tokens: int = 0                 # given out, i.e. cut at stop ids and budgets
    rounds: int = 0                 # read by the host
    started: int = 0                # on a GPU, ar and sd start one more than they read
    sequence_rounds: int = 0
    accepted: int = 0               # drafted tokens that the target agreed with
    tested: int = 0                 # ... of those it looked at: the accepted ones, and one rejected if there was one
    lookups: int = 0                # outcomes looked up in the speculation cache, of sequences that went on
    hits: int = 0
    batch_lookups: int = 0          # the same for whole rounds: a batch hit means that every sequence hit
    batch_hits: int = 0
    draft_forwards: int = 0
    choices: list = field(default_factory=lambda: [[0, 0] for _ in range(32)])  # draft's r-th choice: [seen, taken]
    tree: Tree | None = None                        # what was verified in the round that was counted last
    stops: dict = field(default_factory=dict)       # its node -> sequence-rounds that ended there
    misses: dict = field(default_factory=dict)      # F -> [lookups, misses] of outcomes at nodes with F guesses
    sources: dict = field(default_factory=dict)     # "hit" | "neural" | "fast" -> [speculations, tokens they yielded]
    waits: dict = field(default_factory=dict)       # "hit" | "neural" | "fast" -> [rounds, seconds], by what they waited for
    trace: list | None = None       # set to [] to get a dict per sequence-round
    timeline: Timeline | None = None        # collects when the parts of each round ran

    tokens_per_round = property(lambda s: s.tokens / max(1, s.sequence_rounds))
    acceptance_rate = property(lambda s: s.accepted / max(1, s.tested))
    hit_rate = property(lambda s: s.hits / max(1, s.lookups))
    all_hit_rate = property(lambda s: s.batch_hits / max(1, s.batch_lookups))
    forwards_per_round = property(lambda s: s.draft_forwards / max(1, s.started))

    def span(self, name, lane, round=None):
        """A context that marks what runs in it on the timeline, if there is one; round: default the one being started."""
        return NOTHING if self.timeline is None else self.timeline.span(name, lane, self.started if round is None else round)

    def summary(self):
        names = ("tokens", "rounds", "seconds", "prefill_seconds", "tokens_per_round", "acceptance_rate", "hit_rate",
                 "all_hit_rate", "forwards_per_round")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def add(table, key, amount):
        """Count one more `key`, and its amount."""
        count, total = table.get(key, (0, 0))
        table[key] = [count + 1, total + amount]

    def count_choices(self, tree, path, counts, guesses, choice):
        """Which choice of the draft the target took after each node of an accepted path.

        A node shows its children and, in SSD, counts[node] more tokens that were or could have been guessed; where the bonus token
        was none of them it is only known not to be among the `guesses` behind the last node; choice: which of these it was.
        """
        for node, child in zip(path, path[1:] + [None]):
            missed = child is None and choice is None
            shown = self.choices[:tree.n_children[node] + (guesses if missed else counts[node])]
            for seen in shown:
                seen[0] += 1
            taken = len(shown) if missed else tree.n_children[node] + choice if child is None else tree.ranks[child]
            if taken < len(shown):
                shown[taken][1] += 1

    def use(self, tree):
        """A round is counted that verified this tree."""
        if tree != self.tree:
            self.tree, self.stops = tree, {}

    def rank_acceptance(self):
        """Chance that the target takes the draft's 1st, 2nd, ... choice; a prior worth 16 looks stands in at first.

        Never increasing: a later choice that did better by chance counts as its predecessor.
        """
        prior = [0.7] + [0.1 / r ** 1.5 for r in range(1, len(self.choices))]
        rates = ((taken + 16 * p) / (seen + 16) for (seen, taken), p in zip(self.choices, prior))
        return list(itertools.accumulate(rates, min))

    def stop_probability(self, tree):
        """P(node) as measured; the rank model, worth 16 rounds, stands in for what hasn't been seen."""
        stops, model = self.stops if self.tree in (None, tree) else {}, tree.stop_probability(self.rank_acceptance())
        seen = sum(stops.values())
        return [(stops.get(node, 0) + 16 * p) / (seen + 16) for node, p in enumerate(model)]

    def miss_exponent(self):
        """r of miss(F) = F^-r (Def. 11) that makes the expected number of misses the observed one."""
        prior = (4, 16, 16 * 4 ** -0.8)
        seen = [prior] + [(f, n, missed) for f, (n, missed) in self.misses.items() if f > 1]
        low, high = 0.05, 5.0
        for _ in range(30):
            r = (low + high) / 2
            low, high = (r, high) if sum(n * f ** -r - missed for f, n, missed in seen) > 0 else (low, r)
        return r


class Chunk(NamedTuple):
    """New tokens of one sequence in one round; origins: "accepted-hit" | "accepted-miss" | "bonus", one a token."""
    sequence: int
    tokens: list
    origins: list


class Batch:
    """The sequences of a loop: their budgets and stop ids, who still lives, and what comes out."""

    def __init__(self, target, prompts, max_new_tokens, sampling, stop_ids, seeds, stats, draft=None):
        """Raises UserError for a request that the models can't serve."""
        self.left = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        for prompt, new in zip(prompts, self.left):
            if not prompt or new < 1:
                raise UserError("a prompt is empty" if not prompt else f"max-new-tokens must be at least 1, got {new}")
            for name, model in (("target", target), ("draft", draft)):
                if model is not None and len(prompt) + new > model.config.max_context:
                    raise UserError(f"{len(prompt)} prompt tokens and {new} new ones exceed the {name}'s context of "
                                    f"{model.config.max_context}; shorten the prompt or lower --max-new-tokens")
        if draft is not None:
            check_vocabularies(target.config, draft.config)
        self.stats = Stats() if stats is None else stats
        self.prompts = prompts
        self.live, self.stop_ids, self.started = list(range(len(prompts))), set(stop_ids), time.perf_counter()
        self.length = max(len(prompt) + new for prompt, new in zip(prompts, self.left))
        self.sampler = Sampler(sampling, [sampling.seed] * len(prompts) if seeds is None else seeds, target.device)
        self.sources = ["neural"] * len(prompts)    # where each sequence's speculation came from
        self.kind = None                            # SSD: "hit", or the backup that this round waited for
        self.posted, self.read = [], 0
        self.uncounted = None                       # an outcome that has been read: what it gives out, and where from
        self.replan_at = max(16, power_of_two_above(self.stats.rounds))     # see plan.time_to_replan
        self.ahead = 1 if target.device.type == "cuda" else 0       # rounds that may run before their predecessor is read

    def sides(self, *wanted):
        """Target and Drafter of a request, started: (kind, model, room, *more) each -> kind(model, B, sampler, room, *more).

        If an earlier request of the same kind has left its sides they are taken, because they have CUDA graphs, and those
        of a pair read each other's results: so they stay together.
        """
        s, B = self.sampler, len(self.live)
        wanted = [(kind, model, whole(room), *more) for kind, model, room, *more in wanted]
        parts = ((kind, *way(model), *more) for kind, model, *more in wanted)
        self.key = B, type(s), s.temperature, s.top_k, s.top_p, *parts
        self.idle = wanted[0][1].__dict__.setdefault("idle", {})            # kept by the target model
        make = lambda: [kind(model, B, s, *more) for kind, model, *more in wanted]
        try:
            self.pair = self.idle.pop(self.key, None) or make()
        except torch.cuda.OutOfMemoryError:
            self.idle.clear()
            gc.collect()
            self.pair = make()
        for side in self.pair:
            side.start(self.prompts, s, self.stats)
        return self.pair

    def close(self):
        """Leave the sides to the next request, unless sequences have been dropped from them."""
        self.posted.clear()                                         # a round that ran ahead of the end
        if all(len(side.prefix_len) == len(self.prompts) for side in self.pair):
            for side in self.pair:
                side.cache.clear()
            self.idle[self.key] = self.pair
        while len(self.idle) > IDLE:
            self.idle.pop(next(iter(self.idle)))

    def prefilled(self):
        for side in self.pair:
            if side.model.device.type == "cuda":
                torch.cuda.synchronize(side.model.device)           # what follows is decoding time
        self.last = time.perf_counter()
        self.stats.prefill_seconds += self.last - self.started

    def post(self, report, found=None):
        """A round is on its way: the receipts (graphs.Mailbox) of its report and, if its outcome was looked up, of `found`."""
        self.stats.started += 1
        self.posted.append((report, found))

    def outcomes(self, tree, drain=False):
        """Yield the chunks of the rounds that are due: all but those that may run ahead, or with `drain` all.

        The first round is always due: the second takes long to start, as its graphs are recorded then.
        """
        while len(self.posted) > (self.ahead if self.read and all(self.left) and not drain else 0):
            chunks = self.finish_round(tree)
            if not any(self.left):
                self.close()
            if chunks:
                yield chunks

    def finish_round(self, tree):
        """Wait for the oldest outcome posted and count it. Returns its chunks."""
        self.read_outcome(tree)
        return self.count_outcome()

    def read_outcome(self, tree, drafter=None):
        """Wait for the oldest outcome posted (the one host sync of a round), and cut its text to what is wanted.

        Returns whether each sequence hit; `left` says who goes on. Nothing else has to be known for the next round to start:
        the rest is left to `count_outcome`. drafter: SSD's, whose guesses are counted.
        """
        K = tree.depth
        with self.stats.span("read-back", "host", self.stats.started - len(self.posted)):
            report, found = (receipt and receipt() for receipt in self.posted.pop(0))
        self.read += 1
        hits, lines = [], []
        for row, line in enumerate(report):
            hit, _, choice, guesses = found[row] if found else (0, 0, 0, 0)
            hits.append(bool(hit))
            if not self.left[row]:                  # ended in the round before, when this one ran already
                continue
            drafted, path, (k, bonus, rejected_one) = line[1:K + 1], line[K + 1:2 * K + 2], line[2 * K + 2:]
            new = drafted[:k] + [bonus]
            cut = next((j + 1 for j, token in enumerate(new) if token in self.stop_ids), len(new))
            cut = min(cut, self.left[row])
            self.left[row] = 0 if new[cut - 1] in self.stop_ids else self.left[row] - cut
            lines.append((self.live[row], self.sources[row], new[:cut], path[:k + 1], rejected_one, hit, choice,
                          guesses, self.left[row] > 0))
        self.uncounted = lines, tree, self.kind, drafter if found else None     # a round of SD: nothing was looked up
        return hits

    def count_outcome(self):
        """Count what `read_outcome` has read. Returns the chunks: nothing if that was done before."""
        if self.uncounted is None:
            return []
        (lines, tree, kind, drafter), self.uncounted, stats = self.uncounted, None, self.stats
        chunks, lookups = [], []
        stats.use(tree)
        for sequence, source, tokens, path, rejected_one, hit, choice, guesses, goes_on in lines:
            k, node = len(path) - 1, path[-1]
            origin = "accepted-hit" if source == "hit" else "accepted-miss"
            chunks.append(Chunk(sequence, tokens, ([origin] * k + ["bonus"])[:len(tokens)]))
            stats.tokens += len(tokens)
            stats.accepted += k
            stats.tested += k + rejected_one
            stats.add(stats.sources, source, k + 1)
            if source != "fast":                    # only then are the tree's tokens the draft's choices
                stats.stops[node] = stats.stops.get(node, 0) + 1
                counts = [0] * tree.size if drafter is None else drafter.layout.counts
                stats.count_choices(tree, path, counts, guesses, choice if hit else None)
            if drafter is not None and goes_on:
                stats.add(stats.misses, guesses, not hit)
                lookups.append(bool(hit))
            if stats.trace is not None:             # `accepted` is what was verified, `tokens` what was given out of it
                stats.trace.append(dict(round=stats.rounds, sequence=sequence, source=source, accepted=k, node=node,
                                        tested=k + rejected_one, tokens=tokens,
                                        lookup=bool(hit) if goes_on and drafter else None))
        if drafter is not None:
            stats.lookups += len(lookups)
            stats.hits += sum(lookups)
            stats.batch_lookups += bool(lookups)
            stats.batch_hits += bool(lookups) and all(lookups)
        if chunks:
            now = time.perf_counter()
            stats.rounds += 1
            stats.sequence_rounds += len(chunks)
            stats.seconds += now - self.last
            if kind is not None:
                stats.add(stats.waits, kind, now - self.last)
            self.last = now
        return chunks

    def start_round(self, hits, backup, prepared):
        """Note where the speculations of the coming round come from, and what that round waits for. prepared: whether the draft
        works ahead in it; a round of SD isn't timed."""
        self.sources = ["hit" if hit else backup for hit in hits]
        self.kind = None if not prepared else "hit" if all(hits) else backup

    def drop_finished(self, *parts):
        """Go on, in all parts, with the sequences that haven't ended: the others cost nothing any more.

        Returns their rows in the old layout, None if nothing changed.
        """
        rows = [row for row, left in enumerate(self.left) if left]
        if len(rows) == len(self.left):
            return None
        for name in ("left", "live", "sources"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        if rows:
            for part in parts:
                part.keep(rows)
        return rows


def whole(slots):
    """Slots of a KV cache with room for so many."""
    return -(-slots // SLOTS) * SLOTS


def power_of_two_above(n):
    return 1 << n.bit_length()


def way(model):
    """What a recorded graph of a model depends on: the model, its ops, whether there are graphs, the kind of its weights."""
    get = lambda name: getattr(model, name, None)
    return id(model), id(get("ops")), get("graphs"), get("dtype"), type(get("head"))


def check_vocabularies(target, draft):
    """UserError unless the draft's token ids mean something to the target (configs of both)."""
    if draft.target_vocab_size is None and draft.vocab_size != target.vocab_size:
        raise UserError(f"the draft's vocabulary has {draft.vocab_size} tokens and the target's {target.vocab_size}; "
                        f"a draft must share its target's tokenizer (distill.py makes one)")
    if draft.target_vocab_size not in (None, target.vocab_size):
        raise UserError(f"the draft was made for a target vocabulary of {draft.target_vocab_size} tokens, the target's "
                        f"has {target.vocab_size}; distill a draft for this target")

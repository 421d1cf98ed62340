"""What a round takes beside the models' work: memory, syncs, Python; and what a draft costs that is never right.

The three checks are of measure/accept.py: each takes the embedded pair and yields (holds or not, or None; a line; figures).
"""
import time
from collections import Counter
from itertools import islice
from statistics import median, quantiles
from unittest.mock import patch

import torch

from batch import Options, Stats
from bench import Contestant, compare
from errors import UserError
from generate import MODES, WEIGHTS
from graphs import Graphs, Mailbox
from measure.timing import random_model
from model import Llama
from pad import pad, trim
from sampling import Sampling
from shapes import SHAPES
from timeline import Timeline, host_wait
from tune import usual_share

SETTLED = 60                        # rounds after which a request has recorded its graphs
MOST_HOST, MOST_STORM = 100e-6, 1.05
REPEATS = 3
FIXED = dict(rests=False)           # options of rounds that are all of a kind


def allocations(loop, n=40):
    """Allocations in n rounds of a loop on a GPU that has recorded its graphs. RuntimeError for a sync that torch knows of."""
    for _ in islice(loop, SETTLED):
        pass
    count = lambda: torch.cuda.memory_stats()["allocation.all.allocated"]
    before, slow = count(), Graphs.slow
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = sum(1 for _ in islice(loop, n))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == n and Graphs.slow == slow, f"{seen} rounds, in which {Graphs.slow - slow} steps were recorded: measured too early"
    return count() - before


def steady(pair, args):
    """Once its graphs are recorded a round allocates nothing, and the host waits for nothing but the outcome."""
    if args.device.type != "cuda":
        yield None, "skipped: needs a CUDA GPU", {}
        return
    for mode, tree, size in ("ar", None, 1), ("sd", None, 1), ("ssd", None, 1), ("ssd", "4,2,1,1", 3):
        models, more = ([pair.target], ()) if mode == "ar" else ([pair.target, pair.draft], (Options(tree=tree, **FIXED),))
        loop = MODES[mode](*models, pair.prompts[:1] * size, 900, Sampling(1.0, seed=3), *more, seeds=list(range(size)))
        try:
            found, sync = allocations(loop), None
        except (RuntimeError, AssertionError) as error:
            found, sync = None, str(error).splitlines()[0]
        loop.close()
        yield found == 0, f"{mode}, {'tree ' + tree if tree else 'chain'}, batch {size}: {found} allocations, syncs: {sync}", dict(
            allocations=found, sync=sync)


def at_8b_cost(pair, args, right):
    """Make the pair, in place, one at the cost of an 8B target and a 135M draft (on a CPU it stays as it is). Unless `right` the draft
    has random weights. Returns the Share of its target."""
    cuda, config = args.device.type == "cuda", pair.draft.config
    torch.manual_seed(99)
    if cuda:
        wide = lambda name, shape: pad(Llama.load(WEIGHTS / name, "cpu", torch.float32), SHAPES[shape], 0, args.device, args.dtype)
        pair.target, config = wide("target", "llama-3.1-8b"), SHAPES["smollm2-135m"]
        pair.draft = wide("draft", "smollm2-135m") if right else random_model(config, args.device, args.dtype)
        trim(pair.draft, pair.target.config.vocab_size)
    elif not right:
        pair.draft = random_model(config, args.device, args.dtype)
    return usual_share(pair.target, pair.draft)


def storm(pair, args):
    """A draft that is never right: ssd takes at most 1.05 times as long as sd."""
    share = at_8b_cost(pair, args, right=False)
    make = lambda mode, share, **options: Contestant(pair, mode, Options(**options), Sampling(), args.new, share)
    contestants = {"sd": make("sd", None), "ssd": make("ssd", share), "ssd without rests": make("ssd", share, rests=False)}
    counted, *_ = compare(contestants, [pair.prompts[:1]], REPEATS, args.device)
    seconds = {label: [run["seconds"] / run["tokens"] for run in runs] for label, runs in counted.items()}
    ratio = {label: median(a / b for a, b in zip(seconds[label], seconds["sd"])) for label in seconds}
    total = sum(counted["ssd"], Counter())
    tokens = total["tokens"] / total["rounds"]
    yield (ratio["ssd"] <= MOST_STORM if args.device.type == "cuda" else None,
           f"ssd takes {ratio['ssd']:.3f} times as long a token as sd, {ratio['ssd without rests']:.3f} times if its draft never "
           f"rests; {1e3 * median(seconds['sd']):.2f} ms a round of sd, {tokens:.2f} tokens a round",
           dict(ratio=ratio, seconds=seconds, tokens=tokens, rounds=total["rounds"], left_out=total["left_out"]))


WAITED = [0.0]                      # seconds that the host has waited for outcomes: the rest of a round's time is its own


def timed(wait_for):
    """Mailbox.wait_for that says how long it took."""
    def wrapper(*args):
        began = time.perf_counter()
        lists = wait_for(*args)
        WAITED[0] += time.perf_counter() - began
        return lists
    return wrapper


def host(pair, args):
    """Python takes less than 100 us a round, and is done with it before the verify is.

    The first is measured as rounds usually run, as one graph each; the second on a timeline, for which their parts run apart.
    """
    share = at_8b_cost(pair, args, right=True)
    stats, sampling, own, before = Stats(), Sampling(), [], None
    request = [pair.target.run_with(share=share), pair.draft], pair.prompts[:1], args.new, sampling, Options()
    with patch.object(Mailbox, "wait_for", timed(Mailbox.wait_for)):
        for models, *rest in [request] * 3:                             # the later ones on the first one's graphs
            for number, _ in enumerate(MODES["ssd"](*models, *rest, stats=stats)):
                now = time.perf_counter(), WAITED[0], Graphs.slow
                if number > 3 and now[2] == before[2]:
                    own.append(now[0] - before[0] - (now[1] - before[1]))
                before = now
    if len(own) < 2:
        raise UserError("host: the texts are too short to time a round; raise --new")
    stats.timeline = Timeline(target=args.device, draft=args.device)
    for _ in MODES["ssd"](*request[0], *request[1:], stats=stats):
        pass
    spans = stats.timeline.spans()
    pair.target.run_with()
    verify = {span.round: span for span in spans if span.name == "verify"}
    slack = [verify[span.round].end - span.start for span in spans if span.name == "read-back"]
    typical, rare, early = median(own), quantiles(own, n=10)[-1], sum(x > 0 for x in slack) / len(slack)
    gap, took = host_wait(spans), median(span.end - span.start for span in verify.values())
    us = lambda seconds: f"{1e6 * seconds:.0f} us"
    yield (typical < MOST_HOST and early > 0.9 if args.device.type == "cuda" else None,
           f"{us(typical)} of Python a round ({us(rare)} in one of ten); {early:.0%} of rounds it waits before the verify of "
           f"{1e3 * took:.2f} ms ends, {1e3 * median(slack):.2f} ms before; from a join to the next verify {us(gap)}",
           dict(own=typical, own_p90=rare, early=early, slack=median(slack), gap=gap, verify=took, rounds=len(own)))

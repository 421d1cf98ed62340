"""How fast is this here, how far from the limit, and what does speculation buy? The ceiling first, then tables, then JSON.

    python bench.py                                             the embedded pair; on a GPU also at the cost of an 8B one
    python bench.py --target DIR --draft DIR --prompts FILE     your pair on your prompts
    python bench.py --target DIR --round-draft 5 --pad llama-3.1-8b     a small model's text at the cost of a large one
    python bench.py --target DIR --round-draft 5,4 --draft DIR          several drafts, one run of ar; tables and files grow as it goes
    python bench.py --pad llama-3.1-8b --pad-draft smollm2-135m         the same for both models of the embedded pair
    python bench.py --target-shape llama-3.1-8b --draft-shape llama-3.2-1b --accept-rate 0.8     random weights: SYNTHETIC
    python bench.py --sweep k,fanout,tree,cta                   which lookahead, fan-out, tree, share of the GPU? tree=32: that one
    python bench.py --tune                                      sd and ssd also as --tune finds them fastest
    python bench.py --vs-transformers                           the same model and prompts in transformers
    python bench.py --steps llama-3.1-8b --context 128,2048,8192     ms a step and share of the ceiling, random weights
    python bench.py --kernels llama-3.1-8b                      TB/s of every linear, beside torch's F.linear (GPU)
    python bench.py --predict                                   the speedup model: which draft size, K and fan-out?
    python bench.py --speculation                               tokens per round and hit rates: no clock involved
    python bench.py --report                                    tables and plots of README.md and MEASURED.md from results/*.json

A token is one that was given out: accepted drafted tokens and the target's own, not the prompt. tok/s is decoding alone, all
sequences of a batch together; the first rounds of a run and those around a step that wasn't the replay of a CUDA graph are left out
of it (how many is in the JSON). "First token" is what a user waits for: prompt processing of both models and a first round. The ceiling
is the time in which a plain copy moves the bytes that one target step must read; "of ceiling" is that over ms per round.
Figures are medians of repeats with [least..most]; within a repeat the modes take turns at every prompt, and a ratio is that of one
repeat. A repeat in which a mode decodes for less than half a second goes over the prompts several times. "x sd" is against the sd with
the same speculation, if the table has it. "ms of a round" is from another run, of two prompts, watched by events: what part of a round
was a verify, drafting that no verify hid, a backup after a miss, the look-up, or waiting for the host.
"""
import gc
import json
import math
import operator
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import batch as batching
from batch import Stats
from errors import UserError, exit_on_user_error
from generate import MODES, WEIGHTS, compiling, peak_memory
from graphs import Graphs
from kernels import Share
from kernels import tune as linears
from measure import report
from measure.flags import parse_flags
from measure.pairs import check_memory, lengthened, shape, shape_pair, synthetic, text_pairs
from measure.plot import plot
from measure.predict import parts, predictions
from measure.rounds import split
from measure.speculation import speculation
from measure.timing import Step, card, model_bytes, random_cache, random_model, seconds_of, step_bytes
from model import LlamaConfig
from shapes import SHAPES
from timeline import Timeline, host_wait
from tune import choose, describe, find, shares, usual_share

COUNTED = "tokens", "seconds", "rounds", "sequence_rounds", "accepted", "tested", "hits", "lookups", "batch_hits", "batch_lookups"
COUNTS = operator.attrgetter(*COUNTED)
SETTLE = 3              # rounds at the start of a run that aren't timed
WARM_UP = 2             # groups of prompts that all contestants run before anything is timed
LEAST_SECONDS = 0.5     # of decoding in a repeat: small models go over the prompts several times
MOST_PASSES = 100
CLOSER = 6              # rows of a table of which it is looked up where a round goes; of longer ones only sd and ssd
TREE_DEPTH = 10         # greatest depth of the trees that --sweep tree tries


# ---------------------------------------------------------------------------------------------------------------------
# Speed: contestants take turns on the same prompts

class Contestant:
    """A mode with its options. Its Stats go on from run to run, so that plans made of them settle in the warm-up."""

    def __init__(self, pair, mode, options, sampling, new_tokens, share=None):
        self.pair, self.mode, self.options, self.sampling, self.new_tokens = pair, mode, options, sampling, new_tokens
        self.share, self.stats = share, Stats()

    def run(self, group, seeds):
        """Decode a group of prompts until the first of them ends. Returns (what was counted, the tokens of each)."""
        models, options = [self.pair.target.run_with(share=self.share)], ()
        if self.mode != "ar":
            models, options = [*models, self.pair.draft], (self.options,)
        kept, texts, ended, began = Counter(), [[] for _ in group], False, time.perf_counter()
        slow, earlier, first = Graphs.slow, True, None          # first, last: counts around the timed rounds in a row, if any
        loop = MODES[self.mode](*models, group, self.new_tokens, self.sampling, *options, stop_ids=self.pair.stop_ids,
                                seeds=seeds, stats=self.stats)
        last, prefill = COUNTS(self.stats), self.stats.prefill_seconds
        for number, chunks in enumerate(loop):                  # a round may be as short as the work that is done here
            if number == 0:
                kept["first"] = time.perf_counter() - began
                kept["prefill_seconds"] = self.stats.prefill_seconds - prefill
            after, now, slow = COUNTS(self.stats), Graphs.slow > slow, Graphs.slow
            if number < SETTLE or now or earlier:               # a loop runs a round ahead: the next one pays for a slow step
                kept += spent(first, last)
                first = None
                kept["left_out"] += 1
            elif first is None:
                first = last
            last, earlier = after, now
            for chunk in chunks:
                texts[chunk.sequence] += chunk.tokens
                ended |= len(texts[chunk.sequence]) >= self.new_tokens or not self.pair.stop_ids.isdisjoint(chunk.tokens)
            if ended:
                break
        kept += spent(first, last)
        loop.close()
        return kept, texts


def spent(first, last):
    """What was counted between two COUNTS; nothing if first is None."""
    return Counter() if first is None else Counter({name: b - a for name, a, b in zip(COUNTED, first, last)})


def compare(contestants, groups, repeats, *devices):
    """Let {label: contestant} take turns on every group of prompts.

    Returns {label: [what was counted in each repeat]}, {label: texts} and {label: how often a repeat goes over the groups}:
    more than once where a single time is too short to tell anything.
    """
    texts = {}
    lengths = [max(map(len, group)) for group in groups]
    kinds = (max(lengths) - min(lengths)) // batching.SLOTS + 2             # of requests, by what their KV caches hold, at most
    batching.IDLE = max(batching.IDLE, kinds * len(contestants))            # each keeps its graphs from turn to turn

    def turn(label, first, into):
        for device in {*devices}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
        size = len(groups[first])
        kept, text = contestants[label].run(groups[first], list(range(first * size, (first + 1) * size)))
        peak = into.get(label, kept)["peak"]
        into[label] = into.get(label, Counter()) + kept
        into[label]["peak"] = max(peak, peak_memory(*devices))
        texts.setdefault(label, {})[first] = text

    warm, passes = {}, {}                                       # compiles, measures acceptance for the plans
    for label in contestants:
        with compiling(devices[0]):
            for first in spread_over(range(len(groups)), WARM_UP):
                turn(label, first, warm)
        kept = warm[label]
        once = kept["seconds"] * (1 + kept["left_out"] / max(1, kept["rounds"])) * len(groups) / min(WARM_UP, len(groups))
        passes[label] = min(MOST_PASSES, max(1, math.ceil(LEAST_SECONDS / once))) if once else 1
    counted, most = {label: [] for label in contestants}, max(passes.values())
    for repeat in range(repeats):
        gc.collect()                                            # or Python would, somewhere on the way
        total, order = {}, [*contestants][repeat % len(contestants):] + [*contestants][:repeat % len(contestants)]
        for number in range(most):
            for first in range(len(groups)):
                for label in order:
                    if number * passes[label] % most < passes[label]:       # as often as it wants to, spread over the repeat
                        turn(label, first, total)
        for label, kept in total.items():
            if not kept["tokens"]:
                raise UserError("there was nothing to time: all texts ended within the first rounds; raise --max-new-tokens")
            counted[label].append(kept)
    return counted, {label: sum((text for _, text in sorted(found.items())), []) for label, found in texts.items()}, passes


def spread_over(things, n):
    """n of them, evenly spread, or all if there are fewer."""
    n = min(n, len(things))
    return [things[i * len(things) // n] for i in range(n)]


def watched(contestant, groups):
    """Run sd or ssd once more with the time of each step taken: (where a round goes, for ssd what the target waits for the host
    after a hit)."""
    contestant.stats.timeline = Timeline(target=contestant.pair.target.device, draft=contestant.pair.draft.device)
    for first in spread_over(range(len(groups)), WARM_UP):
        contestant.stats.timeline.next_text()
        contestant.run(groups[first], list(range(first * len(groups[first]), (first + 1) * len(groups[first]))))
    spans, contestant.stats.timeline = contestant.stats.timeline.spans(), None
    return split(spans, SETTLE), host_wait(spans)


def spread(values):
    """[median, least, most]."""
    values = list(values)
    return [median(values), min(values), max(values)]


def rows_of(contestants, counted, texts, floor, begun):
    """A dict of results for each contestant; floor: seconds that a target step takes at least; begun: runs in a repeat."""
    speeds = {label: [r["tokens"] / r["seconds"] for r in runs] for label, runs in counted.items()}
    rows = []
    for label, contestant in contestants.items():
        runs, total = counted[label], sum(counted[label], Counter())
        rate = lambda a, b: total[a] / total[b] if total[b] else None
        against = lambda other: spread(a / b for a, b in zip(speeds[label], speeds[other])) if other in speeds else None
        twin = label.replace("ssd", "sd", 1) + ","              # the same speculation, if it was run
        same_sd = max((sd for sd, c in contestants.items() if c.mode == "sd" and twin.startswith(sd + ",")), key=len, default="sd")
        same = all(a[:len(b)] == b[:len(a)] for a, b in zip(texts[label], texts[next(iter(contestants))]))
        round_ms = spread(1e3 * r["seconds"] / r["rounds"] for r in runs)
        rows.append(dict(
            label=label, mode=contestant.mode, share=contestant.share,
            options=asdict(contestant.options) if contestant.options else None,
            tok_s=spread(speeds[label]), round_ms=round_ms, tokens_per_round=rate("tokens", "sequence_rounds"),
            acceptance_rate=rate("accepted", "tested"), hit_rate=rate("hits", "lookups"),
            batch_hit_rate=rate("batch_hits", "batch_lookups"), of_ceiling=1e3 * floor / round_ms[0],
            first_ms=spread(1e3 * r["first"] / begun[label] for r in runs),
            prefill_ms=spread(1e3 * r["prefill_seconds"] / begun[label] for r in runs), peak_bytes=max(r["peak"] for r in runs),
            vs_ar=against("ar"), vs_sd=against(same_sd if contestant.mode == "ssd" else "sd"),
            same_text=same, rounds=total["rounds"], left_out=total["left_out"]))
    return rows


def contestants_for(args, plain, pair, group, share_of, more=True):
    """{label: contestant}: ar, sd and ssd, and if `more` what --tune (on a group of prompts), --sweep or --vs-transformers add.

    plain: the Options of the rows sd and ssd. share_of: Options -> the Share of ssd's target.
    """
    share = share_of(plain)
    make = lambda mode, options=None, share=None: Contestant(pair, mode, options, args.sampling, args.max_new_tokens, share)
    found = {"ar": make("ar")}
    if pair.draft is not None:
        found |= {"sd": make("sd", plain), "ssd": make("ssd", plain, share)}
        for what, modes, field, values in (
                ("k", ("sd", "ssd"), "k", (2, 4, 6, 8, 10)), ("fanout", ("ssd",), "fanout_budget", (4, 8, 16, 32)),
                ("tree", ("sd", "ssd"), "tree", (16, 32, 64))):
            given = args.sweep.get(what)
            for mode in modes if more and given is not None else ():
                for value in given or values:
                    options = replace(plain, **{field: value})
                    if what == "tree":
                        options = replace(options, tree=str(value), k=plain.k if given else TREE_DEPTH)
                    if what != "fanout":
                        options = options.guessing(args.fanout_budget, len(group))
                    options.check()
                    title = {"k": f"{mode}, K = {value}", "fanout": f"{mode}, {value} outcomes",
                             "tree": f"{mode}, tree of {value}, depth {options.k}"}[what]
                    own = None
                    if mode == "ssd":                                       # say what else is other than in the plain row
                        own, guessed = share_of(options), options.fanout_budget
                        title += f", {guessed} guessed" * (what != "fanout" and guessed != plain.fanout_budget)
                        title += f", {own.in_flight} KB in flight" if own != share else ""
                    if options != plain:                                    # else it is plain sd or ssd
                        found[title] = make(mode, options, own)
        if args.tune and more:
            times, stats = find(pair.target, pair.draft, group, args.sampling, plain, pair.stop_ids)
            plans = choose(times, stats, pair.draft, plain)
            print(*describe(times, plans), sep="\n", flush=True)
            for mode in "sd", "ssd":
                plan = plans[mode]
                options = replace(plain, k=plan.k, tree=plan.tree, fanout_budget=plan.fanout_budget)
                found[f"{mode}, tuned"] = make(mode, options, plan.share)
        for other in (None, *shares(pair.target)) if more and "cta" in args.sweep else ():
            if other != share:
                found[f"ssd, {other or 'full grid'}"] = make("ssd", plain, other)
    if args.vs_transformers and more:
        from measure.peers import transformers_contestants
        found |= transformers_contestants(pair, args.sampling, args.max_new_tokens, plain.k)
    return found


def pairs_for(args):
    """The pairs to time: as asked for, or by default the embedded one and, on a GPU, the same at the cost of an 8B target."""
    if args.target_shape:
        yield shape_pair(args)
    elif args.target or args.pad or args.device.type == "cpu":
        yield from text_pairs(args, args.pad, args.pad_draft)
    else:
        yield from text_pairs(args, None, None)
        try:
            yield from text_pairs(args, "llama-3.1-8b", "smollm2-135m")
        except UserError as error:
            print(f"\nnot run: the embedded pair at the cost of an 8B target: {error}")


def speed(args):
    """Time the modes on every pair, batch size and context asked for."""
    machine, results, known, first = card(args.device), [], {}, None
    print("\n".join(report.card_lines(machine)), flush=True)
    for pair in pairs_for(args):
        more = first is not pair.target                         # of several drafts of a target the first is looked at closely
        first = pair.target
        share_of = lambda options: Share(*args.ctas) if args.ctas else usual_share(pair.target, pair.draft, options)
        share = share_of(args.options)                          # no matter how many outcomes
        for context in args.context or [None]:
            prompts = pair.prompts if context is None else lengthened(pair.prompts, context)
            for size in args.batch:
                options = args.options.guessing(args.fanout_budget, size)
                count = max(1, args.sequences // size) * size
                texts = [prompts[i * max(count, len(prompts)) // count % len(prompts)] for i in range(count)]
                groups = [texts[i:i + size] for i in range(0, count, size)]
                lengths = list(map(len, texts))
                middle = sum(lengths) / count + args.max_new_tokens / 2
                weights, cached = step_bytes(pair.target.config, args.dtype, int(middle))
                floor = (weights + size * cached) / machine["copy_bandwidth"]
                models = [model for model in (pair.target, pair.draft) if model is not None]
                apart = ", the draft on another GPU" * (args.draft_device != args.device)
                head = dict(pair=pair.name + apart, synthetic=pair.accept is not None, batch=size, prompts=count,
                            prompt_tokens=[min(lengths), max(lengths)], new_tokens=args.max_new_tokens,
                            dtype=str(args.dtype)[6:], temperature=args.sampling.temperature, share=share,
                            options=asdict(options), weight_bytes=weights, kv_bytes=size * cached,
                            floor_ms=1e3 * floor, repeats=args.repeats, ar_as_above=not more,
                            parameters=[model_bytes(model.config, args.dtype) // args.dtype.itemsize for model in models])
                print("\n" + "\n".join(report.run_lines(head, machine)), flush=True)
                with synthetic(pair):
                    contestants = contestants_for(args, options, pair, groups[0], share_of, more)
                    others = {label: c for label, c in contestants.items() if more or label != "ar"}
                    found = compare(others, groups, args.repeats, args.device, args.draft_device)
                    if not more:                                # ar knows of no draft: it was run before the first one
                        found = tuple({"ar": ar, **rest} for ar, rest in zip(known[context, size], found))
                    known[context, size] = [part["ar"] for part in found]
                    closer = [label for label, c in others.items() if size == 1 and c.mode in ("sd", "ssd")]
                    seen = {label: watched(others[label], groups) for label in (closer if len(closer) <= CLOSER else closer[:2])}
                counted, outputs, passes = found
                head["passes"] = passes
                head["modes"] = rows_of(contestants, counted, outputs, floor,
                                        {label: n * len(groups) for label, n in passes.items()})
                if pair.draft is not None and size == 1 and options.tree is None:
                    stats = contestants["ssd"].stats
                    head["parts"], head["model"] = parts(pair, stats, args.sampling, options, int(middle), share)
                    head["parts"]["host"] = seen["ssd"][1]
                head["split"] = {label: where for label, (where, _) in seen.items() if where}
                print("\n".join(report.mode_lines(head)), flush=True)
                results.append(head)
                result = dict(command=args.command, kind="speed", card=machine, runs=results)
                write_files(args, result)                       # what is there stays there, whatever happens to the next
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Single steps, single kernels, the speedup model

def steps(args):
    """Time single steps of the shapes in --steps at every --context."""
    machine, rows = card(args.device), []
    for name, config in {name: shape(name) for name in args.steps}.items():
        contexts = args.context or [512]
        check_memory(args, config, [], max(contexts))
        model = random_model(config, args.device, args.dtype)
        for context in contexts:
            weights, cached = step_bytes(config, args.dtype, context)
            cache = random_cache(model, context, max(args.rows))
            for n in args.rows:
                least, middle, most = seconds_of(Step(model, n, context, cache), args.device)
                rows.append(dict(shape=name, context=context, rows=n, ms=[1e3 * middle, 1e3 * least, 1e3 * most],
                                 weight_bytes=weights, kv_bytes=cached, bandwidth=(weights + cached) / middle))
                print(f"{name}, context {context}, {n} tokens: {1e3 * middle:.3f} ms", flush=True)
        del model, cache
    return dict(kind="steps", card=machine, dtype=str(args.dtype)[6:], rows=rows)


def kernel_speeds(args):
    """Time every linear of a layer, and the head, against F.linear, over weights that rotate past the L2 cache."""
    if args.device.type != "cuda":
        raise UserError("--kernels times Triton kernels and needs a CUDA GPU")
    machine, rows = card(args.device), []
    for name in {name: shape(name) for name in args.kernels}:
        for op, N, K, head_dim, kv in linears.operations(name):
            size = 2 * N * K
            copies = max(2, min(64, int(linears.L2_BYTES / size)))
            weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            for n in (1, 8, 32):
                x = torch.randn(n, K, device="cuda", dtype=torch.bfloat16)
                ours = linears.microseconds(linears.workload(op, N, K, head_dim, kv, n, False, copies))
                plain = linears.microseconds(lambda i: F.linear(x, weights[i % copies]))
                rows.append(dict(shape=name, op=op, N=N, K=K, rows=n, us=ours, torch_us=plain, bytes=size))
                print(f"{name} {op} {N} x {K}, {n} rows: {ours:.1f} us, F.linear {plain:.1f} us", flush=True)
    return dict(kind="kernels", card=machine, rows=rows)


def predict(args):
    """Measure the steps of a target shape and of several draft shapes, and put them into the speedup model."""
    machine, cuda = card(args.device), args.device.type == "cuda"
    name = args.target_shape or ("llama-3.1-8b" if cuda else "smollm2-135m")
    drafts = [args.draft_shape] if args.draft_shape else [d for d in SHAPES if SHAPES[d].dim < shape(name).dim and cuda]
    configs = {draft: shape(draft) for draft in drafts} or {"embedded draft": LlamaConfig.from_folder(WEIGHTS / "draft")}
    context, rows = (args.context or [512])[0], []
    check_memory(args, shape(name), [max(configs.values(), key=lambda c: model_bytes(c, args.dtype))], context)
    target = random_model(shape(name), args.device, args.dtype)
    for draft, config in configs.items():
        rows += predictions(target, random_model(config, args.device, args.dtype), draft, context)
        print(f"timed {name} with {draft}", flush=True)
    return dict(kind="predict", card=machine, target=name, context=context, dtype=str(args.dtype)[6:], rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def command_line(argv, *program):
    """The command that made a result, without where it was written. program: default bench.py."""
    argv, kept = list(argv), []
    while argv:
        flag = argv.pop(0)
        if flag in ("--json", "--plot"):
            argv.pop(0)
        elif not flag.startswith(("--json=", "--plot=")):
            kept.append(flag)
    return shlex.join(["python", *(program or ["bench.py"]), *kept])


def write_files(args, result):
    """What --json and --plot ask for. Raises UserError."""
    for path, text in ((args.json, lambda: json.dumps(result, indent=1) + "\n"), (args.plot, lambda: plot(result))):
        if path:
            try:
                Path(path).write_text(text(), encoding="utf-8")
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_flags(argv, __doc__)
    args.command = command_line(argv)
    if args.report:
        return report.write()
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    work = (steps if args.steps else kernel_speeds if args.kernels else predict if args.predict else
            speculation if args.speculation else speed)
    try:
        result = dict(command=args.command) | work(args)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{str(error).splitlines()[0]} Choose a smaller shape, or lower --batch, --context or "
                        f"--fanout-budget.") from None
    if work is not speed:
        print("\n" + report.tables(result), end="")
        write_files(args, result)
    print(json.dumps(result))


if __name__ == "__main__":
    with exit_on_user_error():
        main()

"""Does it all hold on this machine? The long checks that the tests leave out: a line each, and JSON.

    python -m measure.accept                                    all of them: about seven minutes on an H100
    python -m measure.accept --only exact --pairs smollm2       some: exact, delays, steady, storm, host
    python -m measure.accept --prompts 2 --new 24 --runs 2      smaller, as a CPU wants it

exact   40 prompts x 256 tokens, the embedded pair and SmolLM2 with its draft, greedy and at temperature 1 (coupled): sd and
        ssd, chain and tree, in batches and some alone, ssd's target with its share of the GPU: not one token is other than ar's.
delays  ssd 20 times, every step of either stream late by chance: the same tokens.
steady, storm, host     what measure/steady.py watches in a round, with bars.

Exit code 1 if a check fails. On a CPU steady is skipped, storm and host judge nothing; models are fp32, where two tokens may tie.
"""
import contextlib
import itertools
import json
import random
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

import templates
from batch import Options, Stats
from bench import command_line, spread_over
from draft import Drafter
from errors import UserError, exit_on_user_error
from generate import MODES, WEIGHTS, find_device
from measure import steady
from measure.pairs import Pair, worse
from model import Llama
from request import FlagParser, has_place
from saguaro import Target
from sampling import Sampling
from tokenizer import Tokenizer
from tune import usual_share

ROOT = WEIGHTS.parent
FOLDERS = {"embedded": ("weights/target", "weights/draft"), "smollm2": ("checkpoints/smollm2", "weights/smollm2-draft")}
PROMPTS = "humaneval20_gsm8k20_mtbench20.jsonl", "humaneval7_gsm8k7_mtbench6.jsonl"     # the first that is there
CHAIN, TREE = Options(), Options(tree="16")
ALONE = 5               # prompts that also run by themselves
STEPS = (*((Target, step) for step in ("verify", "_verify")),                   # what is late while a graph is recorded stays so in it
         *((Drafter, step) for step in ("precompute", "_precompute", "switch", "fall_back", "wait_at_gate", "round")))


def load(name, args):
    """A Pair of FOLDERS with args.prompts prompts; UserError if it isn't there. The embedded draft is made worse: misses are what there
    is to check."""
    folders = [ROOT / folder for folder in FOLDERS[name]]
    models, tokenizer = [Llama.load(folder, args.device, args.dtype) for folder in folders], Tokenizer.from_folder(folders[0])
    if name == "embedded":
        worse(models[1])
        prompts = [tokenizer.prompt(templates.opening(random.Random(i))) for i in range(args.prompts)]
    else:
        path = next(path for path in (ROOT / "prompts" / file for file in PROMPTS) if path.exists())
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) < args.prompts:
            print(f"exact: {len(lines)} prompts instead of {args.prompts}: all of {path.name}; {PROMPTS[0]} has more", flush=True)
        rows = map(json.loads, spread_over(lines, args.prompts))
        prompts = [tokenizer.chat([dict(role="user", content=row["prompt"])]) for row in rows]
    return Pair(name, *models, prompts, set())


def texts(pair, mode, prompts, new, sampling, options=None, size=1, share=None, stats=None):
    """The first `new` tokens behind each prompt, `size` prompts at a time; share: what the target keeps to."""
    models, found = [pair.target.run_with(share=share), pair.draft], [[] for _ in prompts]
    models, more = (models[:1], ()) if mode == "ar" else (models, (options,))
    for first in range(0, len(prompts), size):
        group = prompts[first:first + size]
        # Who ends makes the others' graphs be recorded anew: in a batch nobody does before all have enough.
        room = min(model.config.max_context for model in models) - max(map(len, group))
        loop = MODES[mode](*models, group, new if size == 1 else min(4 * new, room), sampling, *more, stats=stats)
        for chunk in (chunk for chunks in loop for chunk in chunks):
            found[first + chunk.sequence] += chunk.tokens
            if size > 1 and min(map(len, found[first:first + size])) >= new:
                break
        loop.close()
    return [text[:new] for text in found]


def exact(embedded, args):
    for name in args.pairs:
        if not (ROOT / FOLDERS[name][0]).exists():
            yield None, f"{name}: skipped, {FOLDERS[name][0]} isn't there", {}
            continue
        pair = embedded if name == "embedded" else load(name, args)
        share = usual_share(pair.target, pair.draft)
        for sampling in Sampling(), Sampling(1.0, seed=7):
            began, wrong, ssd = time.perf_counter(), [], Stats()
            wanted = texts(pair, "ar", pair.prompts, args.new, sampling, size=args.batch)
            ways = [("ar", None, 1), *itertools.product(("sd", "ssd"), (CHAIN, TREE), (1, args.batch))]
            for mode, options, size in ways:
                prompts, more = pair.prompts[:ALONE if size == 1 else None], (share, ssd) if mode == "ssd" else ()
                found = texts(pair, mode, prompts, args.new, sampling, options, size, *more)
                wrong += [(mode, options and options.tree, size, i) for i, text in enumerate(found) if text != wanted[i]]
            yield not wrong and 0 < ssd.hits < ssd.lookups, f"{name}, T = {sampling.temperature:g}: {len(wanted)} prompts x " \
                f"{args.new} tokens in {len(ways)} ways, {ssd.hits} hits of {ssd.lookups}, {time.perf_counter() - began:.0f} s", dict(
                wrong=wrong, hits=ssd.hits, lookups=ssd.lookups)


@contextlib.contextmanager
def late(device, rng):
    """Each step of either side starts up to about a millisecond late, by chance, on the stream, branch of a graph or thread that it
    runs on."""
    def delayed(work):
        def wrapper(*args, **more):
            milliseconds = rng.choice((0.0, 0.0, 0.05, 1.0))
            torch.cuda._sleep(int(2e6 * milliseconds)) if device.type == "cuda" else time.sleep(1e-3 * milliseconds)
            return work(*args, **more)
        return wrapper
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(patch.object(side, step, delayed(getattr(side, step)))) for side, step in STEPS]


def delays(pair, args):
    rng, stats, wrong = random.Random(0), Stats(), []
    request, share = (pair.prompts[:2], args.new, Sampling(0.8, seed=1)), usual_share(pair.target, pair.draft)
    wanted = texts(pair, "ar", *request)
    for options in (CHAIN, TREE):
        for number in range(args.runs):
            vars(pair.target).pop("idle", None)                         # the sides with their graphs: others are recorded, late elsewhere
            with late(args.device, rng):
                wrong += [(options.tree, number)] * (texts(pair, "ssd", *request, options, 1, share, stats) != wanted)
    yield not wrong and 0 < stats.hits < stats.lookups, f"{args.runs} runs each of chain and tree, {stats.hits} hits of " \
        f"{stats.lookups}", dict(wrong=wrong, hits=stats.hits, lookups=stats.lookups)


CHECKS = dict(exact=exact, delays=delays, steady=steady.steady, storm=steady.storm, host=steady.host)     # (embedded pair, args)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = FlagParser("measure.accept")
    flags = dict(only=",".join(CHECKS), pairs=",".join(FOLDERS), prompts=40, new=256, batch=8, runs=20, device="auto", json="")
    for flag, default in flags.items():
        parser.add_argument(f"--{flag}", default=default, type=type(default))
    args, results = parser.parse_args(argv), []
    args.only, args.pairs, args.device = args.only.split(","), args.pairs.split(","), find_device(args.device)
    if unknown := {*args.only} - {*CHECKS} | {*args.pairs} - {*FOLDERS}:
        raise UserError(f"--only takes {','.join(CHECKS)} and --pairs {','.join(FOLDERS)}, not {','.join(unknown)}")
    if min(args.prompts, args.batch, args.runs, args.new) < 1:
        raise UserError("--prompts, --batch, --runs and --new must be at least 1")
    if args.json and not has_place(args.json):
        raise UserError(f"--json {args.json}: expected a file in a folder that is there")
    cuda, args.dtype = args.device.type == "cuda", torch.bfloat16 if args.device.type == "cuda" else torch.float32
    for check in args.only:
        for ok, line, figures in CHECKS[check](load("embedded", args), args):
            results.append(dict(check=check, ok=ok, line=line, **figures))
            wrong = f"; other than ar: {figures['wrong'][:9]}" if figures.get("wrong") else ""
            print(f"{check}: {'-' if ok is None else 'ok' if ok else 'FAILED'}: {line}{wrong}", flush=True)
    if args.json:
        found = dict(command=command_line(argv, "-m", "measure.accept"), kind="accept",
                     device=torch.cuda.get_device_name() if cuda else "CPU", torch=torch.__version__, checks=results)
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(result["ok"] is False for result in results))


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())

"""The flags of bench.py."""
import argparse
import math

from batch import FANOUTS, Options
from errors import UserError
from generate import find_device, find_draft_device
from model import DTYPES
from request import FlagParser, has_place
from sampling import Sampling
from shapes import SHAPES


SWEPT = "k", "fanout", "tree", "cta"


def names(text):
    return text.split(",")


def numbers(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,2,8, got '{text}'") from None


def sweeps(text):
    """k,tree=16,tree=32 -> {"k": [], "tree": [16, 32]}: no values mean the usual ones."""
    found = {}
    for part in text.split(","):
        what, given, value = part.partition("=")
        if what not in SWEPT or given and (what == "cta" or not value.isdigit() or int(value) < 1):
            raise argparse.ArgumentTypeError(f"expected {', '.join(SWEPT)}, the first three with a number as in tree=32 or "
                                             f"without, got '{part}'")
        found.setdefault(what, []).extend([int(value)] if given else [])
    return found


def parse_flags(argv, description=None):
    """The flags of bench.py with what follows from them: device, dtype, repeats, sampling, options. Raises UserError."""
    parser = FlagParser("bench.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for flag, metavar, help in (
            ("--target", "DIR", "default: the embedded target"), ("--draft", "DIR", "default: the embedded draft"),
            ("--target-shape", "SHAPE", f"random weights: {', '.join(SHAPES)}"),
            ("--draft-shape", "SHAPE", "the same for the draft"),
            ("--pad", "SHAPE", "embed the target in that shape, where it computes the same at the cost of the shape"),
            ("--pad-draft", "SHAPE", "the same for the draft"),
            ("--prompts", "FILE.jsonl", "default: 20 story openings"), ("--device", "D", "auto, cpu, cuda or cuda:N"),
            ("--draft-device", "D", "where the draft works (default: beside the target)"),
            ("--json", "FILE", "write the JSON there too"), ("--plot", "FILE.svg", "draw the results")):
        add(flag, metavar=metavar, help=help)
    for flag, kind, metavar, default, help in (
            ("--round-draft", numbers, "BITS,BITS", [], "draft: the target with its linears rounded to so many bits"),
            ("--accept-rate", float, "X", None, "SYNTHETIC acceptance for --target-shape and --draft-shape"),
            ("--temperature", float, "T", 0.0, "0 is greedy"), ("--max-new-tokens", int, "N", 128, "in every sequence"),
            ("--batch", numbers, "N,N", [1], "sequences at once"),
            ("--sequences", int, "N", 4, "prompts in a repeat, spread over the file; at least the batch"),
            ("--repeats", int, "N", None, "default: 5, on a CPU 3"),
            ("--context", numbers, "N,N", None, "prompt tokens (default: prompts as they are, 128 random ones; 512 in steps)"),
            ("--rows", numbers, "N,N", [1, 8, 16, 32, 64], "tokens in a step, for --steps"),
            ("--k", int, "N", Options.k, "lookahead"), ("--tree", str, "TREE", None, "as in generate.py"),
            ("--ctas", numbers, "N,KB", None, "CTAs of a linear of ssd's target, KB in flight in each (GPU; default: its SMs,48, from K = 8 on its SMs,32)"),
            ("--fanout-budget", int, "N", None, f"outcomes guessed in a round (default: {Options.fanout_budget}, behind trees and in batches fewer)"),
            ("--sweep", sweeps, "k,fanout,tree,cta", {}, "also time other values of these; tree=32: that one, as deep as --k"),
            ("--steps", names, "SHAPES", None, "time single steps with random weights"),
            ("--kernels", names, "SHAPES", None, "time single kernels (GPU)")):
        help += "" if default in (None, [], {}) else f" (default {default})"
        add(flag, type=kind, metavar=metavar, default=default, help=help)
    add("--fanout", default=Options.fanout, choices=FANOUTS, help="how guesses spread over the places to stop")
    add("--draft-dtype", choices=("int8",), help="round the draft's weights to int8")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    for flag, help in (("--tune", "add sd and ssd as --tune of generate.py finds them best"),
                       ("--chat", "put the prompts under the chat template"),
                       ("--vs-transformers", "add transformers' generate"),
                       ("--predict", "the speedup model with measured steps"), ("--speculation", "tables without a clock"),
                       ("--small", "fewer fan-out budgets in --speculation"),
                       ("--report", "write README.md and MEASURED.md from results/")):
        add(flag, action="store_true", help=help)
    args = parser.parse_args(argv)
    shapes, work = args.target_shape and not args.predict, (args.steps, args.kernels, args.predict, args.speculation)
    optional = args.repeats, *args.round_draft, *(args.ctas or [])
    own = args.target or args.draft or args.round_draft or args.pad or args.pad_draft or args.prompts
    drafts = args.draft or args.round_draft or args.draft_shape or not (args.target or args.target_shape)
    for wrong, message in (
        (min(*args.batch, *(args.context or []), *args.rows, args.sequences, *(n for n in optional if n is not None)) < 1,
         "--batch, --sequences, --context, --rows, --repeats, --round-draft and --ctas must be at least 1"),
        (len(args.ctas or [1]) > 2, "--ctas takes CTAs and KB in flight in each, such as 132,48"),
        (max(args.rows) > 128, "--rows: a step takes at most 128 tokens"),
        (args.max_new_tokens < 32, f"--max-new-tokens must be at least 32 to be timed, got {args.max_new_tokens}"),
        (not 0 <= args.temperature < math.inf, f"--temperature must be at least 0, got {args.temperature}"),
        (shapes and own,
         "--target-shape means random weights: leave out --target, --draft, --round-draft, --pad, --pad-draft and --prompts"),
        (args.pad_draft and not (args.pad and drafts),
         "--pad-draft needs a draft, and goes with --pad: the target's vocabulary must be the larger one"),
        (shapes and bool(args.draft_shape) != (args.accept_rate is not None),
         "random models never agree: --draft-shape and --accept-rate go together"),
        (not args.target_shape and (args.accept_rate is not None or args.draft_shape and not args.predict),
         "--draft-shape and --accept-rate are for --target-shape; a real pair has an acceptance of its own"),
        ((args.tune or args.sweep) and not drafts,
         "--tune and --sweep need a draft: give --draft DIR, --round-draft BITS or --draft-shape SHAPE"),
        (args.accept_rate is not None and not 0 <= args.accept_rate < 1, "--accept-rate must lie in [0, 1)"),
        (any(work) and sum(map(bool, (*work, args.tune or args.vs_transformers or args.sweep))) > 1,
         "--steps, --kernels, --predict and --speculation are measured alone, without --tune, --sweep and --vs-transformers"),
        (args.draft_device and (any(work) or args.vs_transformers or not drafts),
         "--draft-device is for the speed of a pair: it needs a draft, and goes without --steps, --kernels, --predict, "
         "--speculation and --vs-transformers"),
        ((args.steps or args.kernels) and (own or args.target_shape),
         "--steps and --kernels have shapes of their own: leave out --target, --draft, --round-draft, --pad, --target-shape and --prompts"),
        (args.predict and own,
         "--predict goes by shapes: leave out --target, --draft, --round-draft, --pad and --prompts"),
        (args.speculation and (args.target_shape or len(args.batch) > 1 or args.tree or args.k != Options.k),
         "--speculation needs a real pair and takes one --batch; it tries several --k and --tree by itself"),
        (args.plot and args.small, "--plot draws what fan-out budgets bring, of which --small leaves only one"),
        (args.vs_transformers and (args.batch != [1] or args.target_shape or args.draft_dtype),
         "--vs-transformers takes --batch 1 and a real pair, its draft not in int8"),
        (args.batch != [1] and any(work[:3]), "--steps, --kernels and --predict are of batch 1"),
        (args.plot and (args.steps or args.kernels),
         "--plot draws speeds, --predict and --speculation, not single steps or kernels"),
        (any(path and not has_place(path) for path in (args.json, args.plot)),
         "--json and --plot need a file in a folder that is there"),
    ):
        if wrong:
            raise UserError(message)
    args.prompt, args.device = None, find_device(args.device or "auto")
    args.draft_device = find_draft_device(args.draft_device, args.device)
    args.dtype = DTYPES[args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")]
    args.repeats = args.repeats or (5 if args.device.type == "cuda" else 3)
    args.sampling = Sampling(args.temperature)
    args.options = Options(k=args.k, tree=args.tree, fanout=args.fanout).guessing(args.fanout_budget)
    args.options.check()
    return args

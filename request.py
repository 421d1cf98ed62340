"""What the user asks for: the flags of generate.py, and the prompts they point to."""
import argparse
import json
import math
import sys
from pathlib import Path

from batch import FANOUTS, Options
from errors import UserError
from model import DTYPES
from sampling import Sampling

MODES = "ar", "sd", "ssd"


class FlagParser(argparse.ArgumentParser):
    def __init__(self, *args, **more):
        super().__init__(*args, allow_abbrev=False, **more)

    def error(self, message):
        raise UserError(message)                        # one line, as for every other mistake, and no usage dump


def has_place(path):
    """Whether a file of that name can stand there: in a folder that is there."""
    return Path(path).parent.is_dir() and not Path(path).is_dir()


def number_or_auto(text):
    """An argparse type: a whole number, or None for "auto"."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or auto, got '{text}'") from None


def parse_flags(argv, description=None):
    parser = FlagParser("generate.py", description=description,
                        formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag, default=None, help="", **how):
        how = {"type": type(default), "metavar": "N", **how} if isinstance(default, (int, float)) else how
        help += "" if default is None else f" (default {default})"
        parser.add_argument(flag, default=default, help=help, **how)

    def switch(flag, help):
        parser.add_argument(flag, action="store_true", help=help)

    add("--prompt", help="the text to continue; - reads it from stdin", metavar="TEXT")
    add("--prompts", help='a {"prompt": ...} a line; its other keys are carried into --json', metavar="FILE.jsonl")
    add("--batch", 1, "how many of --prompts run together")
    switch("--chat", "use the chat template; with no prompt: a conversation, a line a turn")
    add("--model", help="checkpoint folder of the target (default: the embedded pair)", metavar="DIR")
    add("--draft", help="checkpoint folder of the draft, which must share the target's vocabulary", metavar="DIR")
    add("--mode", help="default: what --tune found fastest, else ssd; ar if there is no draft", choices=MODES)
    add("--max-new-tokens", 256, "in every answer, at most")
    add("--temperature", Sampling.temperature, "0 is greedy")
    add("--top-k", Sampling.top_k, "0 is off")
    add("--top-p", Sampling.top_p, "sample from the likeliest tokens that make up this mass; 1 is off")
    add("--seed", Sampling.seed, "the text for a seed is the same in all modes")
    add("--device", "auto", "auto, cpu, cuda or cuda:N")
    add("--dtype", "auto", "auto is bfloat16 on a GPU and float32 on a CPU", choices=("auto", *DTYPES))
    add("--draft-device", help="where the draft works (default: beside the target)", metavar="DEVICE")
    add("--draft-dtype", help="int8 halves the bytes of the draft's weights", choices=("int8",))
    add("--kernels", help="default: triton on a GPU, torch on a CPU", choices=("torch", "triton"))
    switch("--no-graph", "on a GPU: launch every kernel by itself instead of CUDA graphs")
    switch("--tune", "measure, choose the fastest mode, --k or --tree, --fanout-budget; kept for later runs of this pair")
    add("--k", "auto", f"tokens to draft in a round; auto is what --tune found, else {Options.k}", type=number_or_auto,
        metavar="N")
    add("--tree", Options.tree, "draft a tree: children per depth (4,2,1,1) or the best one of so many nodes (32)")
    add("--fanout", Options.fanout, "how ssd spreads its guesses", choices=FANOUTS)
    add("--fanout-budget", "auto", f"outcomes that ssd guesses in a round; auto is what --tune found, else "
        f"{Options.fanout_budget}, with --tree or --batch 4 to {Options.fanout_budget}", type=number_or_auto, metavar="N")
    add("--saguaro-c", Options.saguaro_c, "C of Saguaro sampling, for --accept residual")
    add("--accept", Options.accept, "accept rule", choices=("coupled", "residual"))
    add("--backup", Options.backup, "who drafts after a miss", choices=("neural", "fast", "auto"))
    switch("--compare", "run ar, sd and ssd on the same prompts and print a table")
    add("--trace", help="write when everything ran, for ui.perfetto.dev", metavar="FILE.json")
    switch("--timeline", "draw the last rounds: what target and draft did side by side")
    switch("--color", "tint each token by where it came from")
    switch("--json", "print a JSON line a prompt instead of text")
    args = parser.parse_args(argv)

    no_prompt = args.prompt is None and args.prompts is None
    for wrong, message in (
        (no_prompt and not args.chat, "nothing to do: give --prompt, --prompts or --chat"),
        (no_prompt and args.compare, "--compare needs --prompt or --prompts"),
        (None not in (args.prompt, args.prompts), "give --prompt or --prompts, not both"),
        (args.compare and (args.mode or args.json), "--compare is a table of all modes: leave out --mode and --json"),
        (args.compare and (args.trace is not None or args.timeline),
         "--trace and --timeline are of one mode: leave out --compare"),
        (args.trace is not None and not has_place(args.trace),
         f"--trace {args.trace}: can't be written; expected a file in a folder that is there"),
        (args.color and (args.compare or args.json), "--color tints text: leave out --compare and --json"),
        (args.batch < 1, f"--batch must be at least 1, got {args.batch}"),
        (args.max_new_tokens < 1, f"--max-new-tokens must be at least 1, got {args.max_new_tokens}"),
        (not 0 <= args.temperature < math.inf, f"--temperature must be at least 0, got {args.temperature}"),
        (args.top_k < 0, f"--top-k must be at least 0, got {args.top_k}"),
        (not 0 < args.top_p <= 1, f"--top-p must lie in (0, 1], got {args.top_p}"),
        (not 0 <= args.seed < 2**63, f"--seed must lie in [0, 2^63), got {args.seed}"),
    ):
        if wrong:
            raise UserError(message)
    return args


def read_rows(args):
    """{where it was read: {"prompt": text, whatever else is in its line}}; empty for a conversation.

    Bytes that are not UTF-8 become lone surrogates, which Engine.encode refuses.
    """
    if args.prompt == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        return {"--prompt -": {"prompt": text.removesuffix("\n")}}          # the newline is echo's
    if args.prompts is None:
        return {} if args.prompt is None else {"--prompt": {"prompt": args.prompt}}
    try:
        lines = Path(args.prompts).read_text("utf-8-sig", "surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"--prompts {args.prompts}: {error.strerror}") from None
    rows = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{args.prompts} line {number}"
            try:
                row = rows[where] = json.loads(line)
            except ValueError as error:
                raise UserError(f'{where}: not JSON ({error}); expected {{"prompt": "..."}}') from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise UserError(f'{where}: has no "prompt" text; expected {{"prompt": "..."}}')
    if not rows:
        raise UserError(f"--prompts {args.prompts}: there is no prompt in it")
    return rows

"""Generate text: with the target model alone (ar), with a draft before it (sd), or with a draft beside it (ssd).

    python generate.py --prompt "Once upon a time"                  the embedded pair in weights/
    python generate.py --model DIR --draft DIR --chat               talk to a Llama checkpoint
    python generate.py --prompts questions.jsonl --batch 8 --json   a JSON line a prompt on stdout
    python generate.py --prompt "def fib(n):" --compare             the same prompt in ar, sd and ssd
    python generate.py --prompt "def fib(n):" --tune                find the fastest way for this pair on this machine

Text (or JSON) goes to stdout, all else to stderr. Exit code 0; 2 for a mistake in the request, which one line explains;
130 after Ctrl-C, with the text so far; 141 if the reader of stdout went away.
"""
import contextlib
import itertools
import json
import os
import resource
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import tune
import tune_cache
from batch import Options, Stats, check_vocabularies
from errors import UserError, exit_on_user_error
from model import DTYPES, Llama, LlamaConfig
from request import parse_flags, read_rows
from saguaro import autoregressive, sd, ssd
from sampling import Sampling
from timeline import Timeline, report
from tokenizer import Tokenizer

WEIGHTS = Path(__file__).resolve().parent / "weights"               # the embedded pair: target/ and draft/
MODES = {"ar": autoregressive, "sd": sd, "ssd": ssd}
TINTS = {"accepted-hit": "\033[32m", "accepted-miss": "\033[33m", "bonus": "\033[36m"}     # green, yellow, cyan
PATIENCE = 3.0                  # seconds without a word
WARM_UP_TOKENS = 16             # --compare runs each mode this far beforehand, so that none is timed while it compiles
TUNE_TEXT = "Tell me a long story about the sea."           # what --tune runs on where no prompt is given
TUNED = "k", "tree", "fanout_budget"                        # what a plan sets unless the user does


# ---------------------------------------------------------------------------------------------------------------------
# The request

def find_folders(args):
    """(mode, {"target": folder, "draft": folder unless the mode is ar})."""
    target, draft, mode = args.model, args.draft, args.mode or "ssd"
    if target is None:
        target, draft = WEIGHTS / "target", draft or WEIGHTS / "draft"
        if not target.is_dir():
            raise UserError(f"no --model, and no embedded pair in {WEIGHTS}: give --model DIR (and --draft DIR)")
    if draft is None and args.mode is None and not args.compare:
        mode = "ar"
    if draft is None and mode != "ar":
        raise UserError(f"{'--compare' if args.compare else '--mode ' + mode} needs a draft: give --draft DIR")
    return mode, {"target": target} if mode == "ar" else {"target": target, "draft": draft}


def find_device(name, flag="--device"):
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not supported")
        torch.empty(1, device=device)                                       # is it really there?
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"{flag} {name}: {str(error).splitlines()[0]}; expected auto, cpu, cuda or cuda:N") from None
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def find_draft_device(name, device):
    """Where the draft works: beside the target on `device`, or on another one of its kind. Raises UserError."""
    found = find_device(name, "--draft-device") if name else device
    if found.type != device.type:
        raise UserError(f"--draft-device {name}: the target is on {device}; expected a device of the same kind")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The engine

@dataclass
class Reply:
    """One prompt and its answer while it grows."""
    prompt_ids: list
    row: dict = field(default_factory=dict)         # the prompt's row
    title: str = ""                                 # goes above the text where there are several
    ids: list = field(default_factory=list)         # new tokens, a stop id at the end included
    pieces: list = field(default_factory=list)      # (text, origin) of each
    seconds: float = 0.0                            # from the request to the newest token, prefill included
    first_token: float | None = None                # seconds
    finish_reason: str = "interrupted"              # until it is "stop" (a stop id) or "length"

    @property
    def text(self):
        return "".join(text for text, _ in self.pieces)


class Engine:
    """What all answers of a run share. Making one checks whatever is cheap to check; then `load` reads the weights."""

    def __init__(self, args):
        self.args = args
        self.mode, self.folders = find_folders(args)
        self.device = find_device(args.device)
        if args.kernels == "triton" and self.device.type != "cuda":
            raise UserError(f"--kernels triton needs a CUDA GPU, the device is {self.device}; leave it out or choose torch")
        for flag in "draft_dtype", "draft_device", "tune":
            if getattr(args, flag) and "draft" not in self.folders:
                raise UserError(f"--{flag.replace('_', '-')}: there is no draft in mode ar")
        self.draft_device = find_draft_device(args.draft_device, self.device)
        auto = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = DTYPES[auto if args.dtype == "auto" else args.dtype]
        self.sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        self.asked = {name: getattr(args, name) for name in TUNED if getattr(args, name) is not None}
        self.options = Options(fanout=args.fanout, saguaro_c=args.saguaro_c, accept=args.accept, backup=args.backup,
                               **self.asked).guessing(args.fanout_budget, args.batch)
        self.options.check()
        self.plans = {}                         # mode -> tune.Plan, once `plan` has found some
        self.timeline = Timeline(target=self.device, draft=self.draft_device) if args.trace or args.timeline else None
        self.configs = {name: LlamaConfig.from_folder(folder) for name, folder in self.folders.items()}
        if self.mode != "ar":
            check_vocabularies(*self.configs.values())
        self.tokenizer = Tokenizer.from_folder(self.folders["target"])
        size, config = self.tokenizer.vocab_size, self.configs["target"]
        if size > config.vocab_size:            # the other way round is padding; such ids decode to nothing
            raise UserError(f"{self.folders['target']}: the tokenizer has {size} tokens and the model only "
                            f"{config.vocab_size}; expected files that belong together")
        self.stop_ids = {*self.tokenizer.eos_ids, *(self.tokenizer.chat_stop_ids if args.chat else ())}

    def encode(self, messages):
        """Chat messages, or without --chat one message that is raw text -> token ids."""
        if any("\ud800" <= char <= "\udfff" for message in messages for char in message["content"]):
            raise UserError("the prompt is not valid UTF-8 text")
        ids = self.tokenizer.chat(messages) if self.args.chat else self.tokenizer.prompt(messages[0]["content"])
        if not ids or not messages[-1]["content"]:
            raise UserError("the prompt is empty")
        return ids

    def too_long(self, ids):
        """What to say if prompt and answer don't fit; None if they do."""
        length = len(ids) + self.args.max_new_tokens
        for name, config in self.configs.items():
            if length > config.max_context:
                return (f"{len(ids)} prompt tokens and {self.args.max_new_tokens} new ones are {length}, over the "
                        f"{name}'s context of {config.max_context}; shorten the prompt or lower --max-new-tokens")

    def load(self):
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        graphs = False if self.args.no_graph else None
        devices = {"target": self.device, "draft": self.draft_device}
        self.models = [Llama.load(folder, devices[name], self.dtype, loading(name)).run_with(self.args.kernels, graphs)
                       for name, folder in self.folders.items()]
        if self.args.draft_dtype == "int8" and len(self.models) > 1:
            self.models[1].to_int8()

    def plan(self, prompts):
        """Choose how to run by what --tune measures now, on these prompts (lists of ids), or has measured before.

        What the user has asked for stays, the mode included.
        """
        if len(self.models) == 1:
            return
        if self.args.tune:
            print("tune: measuring", file=sys.stderr)
            known = tune.find(*self.models, prompts, self.sampling, self.options, self.stop_ids)
            tune_cache.save(*self.models, *known, self.sampling, self.options.accept)
        else:
            known = tune_cache.load(*self.models, len(prompts), self.sampling, self.options.accept)
        if known is None:
            return
        self.plans = tune.choose(*known, self.models[1], self.options.settled(self.sampling), self.asked)
        if self.args.tune:
            print(*tune.describe(known[0], self.plans), sep="\n", file=sys.stderr)
        if self.args.mode is None and not self.args.compare and (best := tune.best_mode(self.plans)) != self.mode:
            speed = {mode: f"{plan.tokens_per_second:.1f}" for mode, plan in self.plans.items()}
            print(f"--mode {best}: --tune found it faster for this pair and machine than {self.mode} ({speed[best]} against "
                  f"{speed[self.mode]} tok/s expected)", file=sys.stderr)
            self.mode = best

    def stats(self):
        """A fresh Stats, for the next loop."""
        if self.timeline is not None:
            self.timeline.next_text()
        return Stats(timeline=self.timeline)

    def stream(self, mode, replies, stats, max_new_tokens):
        """Answer a batch of replies; yields (reply, text, origin) token by token, the text in whole characters."""
        options, share = self.options, tune.usual_share(*self.models, self.options) if mode == "ssd" else None
        if plan := self.plans.get(mode):
            options, share = replace(options, k=plan.k, tree=plan.tree, fanout_budget=plan.fanout_budget), plan.share
        self.models[0].run_with(share=share)
        models, options = (self.models[:1], ()) if mode == "ar" else (self.models, (options,))
        decoders = [self.tokenizer.stream() for _ in replies]
        prompts, start = [reply.prompt_ids for reply in replies], time.perf_counter()
        loop = MODES[mode](*models, prompts, max_new_tokens, self.sampling, *options, self.stop_ids, stats=stats)
        with compiling(self.device):
            first = next(loop, [])
        for chunks in itertools.chain([first], loop):
            now = time.perf_counter() - start
            for chunk in chunks:
                reply, decoder = replies[chunk.sequence], decoders[chunk.sequence]
                reply.seconds, reply.first_token = now, reply.first_token or now
                for id, origin in zip(chunk.tokens, chunk.origins):
                    reply.ids.append(id)
                    stop = id in self.stop_ids
                    text = "" if stop else decoder.push(id)
                    if stop or len(reply.ids) == max_new_tokens:
                        reply.finish_reason = "stop" if stop else "length"
                        text += decoder.flush()
                    reply.pieces.append((text, origin))
                    yield reply, text, origin


def loading(name):
    """progress(done, total) for Llama.load: goes along on a terminal, elsewhere speaks up if a load takes long."""
    tty, told = sys.stderr.isatty(), time.monotonic()

    def progress(done, total):
        nonlocal told
        if time.monotonic() - told > (0.1 if tty else 5.0) or tty and done == total:
            told, end = time.monotonic(), "\r" if tty and done < total else "\n"
            print(f"loading the {name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", end=end, file=sys.stderr, flush=True)

    return progress


@contextlib.contextmanager
def compiling(device):
    """Around what compiles kernels where they are new: says so on a terminal if it takes long."""
    notice = threading.Timer(PATIENCE, print, ("compiling kernels for this GPU; later runs find them again",),
                             dict(file=sys.stderr, flush=True))
    notice.daemon = True
    if device.type == "cuda" and sys.stderr.isatty():
        notice.start()
    try:
        yield
    finally:
        notice.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees

def write(text, origin=None):
    """Text to stdout, at once; tinted if an origin is given."""
    print(f"{TINTS[origin]}{text}\033[0m" if origin and text else text, end="", flush=True)


def write_whole(reply, color):
    write(reply.title)
    for text, origin in reply.pieces:
        write(text, color and origin)
    write("\n")


def answer(engine, replies):
    """Answer a batch: a text alone is streamed, of several each is written when it ends. Ctrl-C ends it early.

    Returns its Stats, and whether it was interrupted.
    """
    args, stats, interrupted = engine.args, engine.stats(), False
    live = len(replies) == 1 and not args.json
    try:
        for reply, text, origin in engine.stream(engine.mode, replies, stats, args.max_new_tokens):
            if live:
                write(reply.title if len(reply.ids) == 1 else "")
                write(text, args.color and origin)
            elif reply.finish_reason != "interrupted" and not args.json:
                write_whole(reply, args.color)
    except KeyboardInterrupt:
        interrupted = True
    if live:
        write("\n")
    for reply in replies:
        if args.json:
            print(json.dumps(record(engine, reply, stats)), flush=True)
        elif reply.finish_reason == "interrupted" and not live:
            write_whole(reply, args.color)
    return stats, interrupted


def total(parts):
    """One Stats for several runs: the sums of what they counted."""
    names = [name for name, value in vars(Stats()).items() if isinstance(value, (int, float))]
    return Stats(**{name: sum(getattr(stats, name) for stats in parts) for name in names})


def measures(stats):
    """How speculation went; None for what there was none of: ar tests no token, sd has no cache to look into."""
    return {"rounds": stats.rounds, "tokens_per_round": stats.tokens_per_round,
            "acceptance_rate": stats.acceptance_rate if stats.tested else None,
            "hit_rate": stats.hit_rate if stats.lookups else None,
            "all_hit_rate": stats.all_hit_rate if stats.lookups else None}


def record(engine, reply, stats):
    """The --json line of a reply. How speculation went is told of its whole batch."""
    row = {key: value for key, value in reply.row.items() if key != "prompt"}
    decoding = reply.seconds - stats.prefill_seconds
    return {**row, "text": reply.text, "token_ids": reply.ids, "prompt_tokens": len(reply.prompt_ids),
            "mode": engine.mode, "finish_reason": reply.finish_reason, "seconds": reply.seconds,
            "tokens_per_second": len(reply.ids) / decoding if reply.ids else 0.0,
            "time_to_first_token": reply.first_token, "peak_memory_bytes": peak_memory(engine.device, engine.draft_device),
            **measures(stats)}


def peak_memory(*devices):
    """High-water mark in bytes: of PyTorch's allocations on the GPUs, or of this process' resident set."""
    if devices[0].type == "cuda":
        return sum(torch.cuda.max_memory_allocated(device) for device in {*devices})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def closing_line(engine, replies, stats):
    """tok/s is that of decoding, prefill left out, the sequences of a batch side by side."""
    first = [reply.first_token for reply in replies if reply.first_token]
    tokens = sum(len(reply.ids) for reply in replies)       # after Ctrl-C stats may know of some that never came out
    parts = [f"{tokens} tokens", f"{tokens / max(stats.seconds, 1e-9):.1f} tok/s",
             f"first token {1000 * sum(first) / max(1, len(first)):.0f} ms",
             f"peak memory {peak_memory(engine.device, engine.draft_device) / 1e9:.2f} GB"]
    if engine.mode != "ar":
        parts += [f"{stats.tokens_per_round:.2f} tokens/round", f"accepted {stats.acceptance_rate:.0%}"]
    if engine.mode == "ssd":
        parts += [f"hits {stats.hit_rate:.0%}, of whole batches {stats.all_hit_rate:.0%}"]
    print(" | ".join(parts), file=sys.stderr)


def answer_all(engine, batches):
    """Answer one batch after the other. Returns the exit code."""
    parts, interrupted = [], False
    for replies in batches:
        stats, interrupted = answer(engine, replies)
        parts.append(stats)
        if interrupted:
            break
    closing_line(engine, [reply for replies in batches for reply in replies], total(parts))
    return 130 if interrupted else 0


def chat(engine):
    """A conversation, a line of stdin a turn, until its end (exit code 0) or Ctrl-C (130)."""
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    if tty:
        import readline     # noqa: F401 (gives input() line editing)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    messages, interrupted = [], False
    while not interrupted:
        try:
            line = input("> " if tty else "")
        except EOFError:
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        while (problem := engine.too_long(engine.encode(messages))) and len(messages) > 1:
            print("the conversation outgrew the context: its oldest turn is forgotten", file=sys.stderr)
            del messages[:2]
        if problem:
            print(problem, file=sys.stderr)
            messages.clear()
            continue
        reply = Reply(engine.encode(messages))
        stats, interrupted = answer(engine, [reply])
        closing_line(engine, [reply], stats)
        messages.append({"role": "assistant", "content": reply.text})
    return 130


def compare(engine, batches):
    """The same prompts in all three modes: a table."""
    columns, expected = ("tok/s", "tokens/round", "accepted", "hits", "batch hits", "same tokens"), None
    for mode in MODES:
        for limit in min(WARM_UP_TOKENS, engine.args.max_new_tokens), engine.args.max_new_tokens:
            parts, ids = [], []
            for replies in batches:
                parts.append(Stats())
                fresh = [Reply(reply.prompt_ids) for reply in replies]
                for _ in engine.stream(mode, fresh, parts[-1], limit):
                    pass
                ids += [reply.ids for reply in fresh]
        if expected is None:
            print("mode", *(f"{column:>12}" for column in columns))
            expected = ids
        stats = total(parts)
        rates = [measures(stats)[name] for name in ("acceptance_rate", "hit_rate", "all_hit_rate")]
        cells = (f"{stats.tokens / stats.seconds:.1f}", f"{stats.tokens_per_round:.2f}",
                 *("-" if rate is None else f"{rate:.0%}" for rate in rates), "yes" if ids == expected else "no")
        print(f"{mode:<4}", *(f"{cell:>12}" for cell in cells), flush=True)
    return 0


# ---------------------------------------------------------------------------------------------------------------------

def run(args):
    """Check what is cheap to check, load, answer. Returns the exit code."""
    rows, replies = read_rows(args), []
    args.batch = min(args.batch, max(1, len(rows)))             # no more run together than there are
    engine = Engine(args)
    for number, (where, row) in enumerate(rows.items(), 1):
        try:
            replies.append(Reply(engine.encode([{"role": "user", "content": row["prompt"]}]), row))
            if problem := engine.too_long(replies[-1].prompt_ids):
                raise UserError(problem)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if len(rows) > 1:
            replies[-1].title = f"=== {row.get('id', number)} ===\n"
    if not rows:
        tune_ids = engine.encode([{"role": "user", "content": TUNE_TEXT}])          # a UserError if there is no template
    engine.load()
    if args.mode is None and engine.mode == "ar":
        print("no --draft, so nothing can speculate: --mode ar", file=sys.stderr)
    if args.color:
        print("tokens are", *(f"{tint}{origin}\033[0m" for origin, tint in TINTS.items()), file=sys.stderr)
    batches = [replies[i:i + args.batch] for i in range(0, len(replies), args.batch)]
    engine.plan([reply.prompt_ids for reply in batches[0]] if rows else [tune_ids])
    code = compare(engine, batches) if args.compare else answer_all(engine, batches) if rows else chat(engine)
    if engine.timeline is not None:
        report(engine.timeline, args.trace, args.timeline)
    return code


def main(argv=None):
    """The command line, by default the process' own. Returns the exit code, or raises SystemExit(2) for a UserError."""
    sys.stdout.reconfigure(errors="replace")    # a terminal without Unicode shows ? for what it lacks
    try:
        with exit_on_user_error():
            try:
                return run(parse_flags(argv, __doc__))
            except torch.OutOfMemoryError as error:
                raise UserError(f"{str(error).splitlines()[0]} Lower --batch or --max-new-tokens.") from None
    except KeyboardInterrupt:                   # while it loads, compares or waits for a line; `answer` catches its own
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:                     # e.g. `| head`; what is still buffered must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())

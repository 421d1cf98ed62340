"""Measure what speculation buys, and write the tables of README.md from the measurements.

    python bench.py --json results/speculation_embedded.json                 the embedded pair
    python bench.py --target DIR --round-draft 5 --prompts FILE.jsonl --chat   a target with itself, rounded, as its draft
    python bench.py --steps llama-3.1-8b,smollm2-135m --context 512          ms of single steps, random weights
    python bench.py --report                                                 README.md's tables from results/*.json

What is counted: tokens per round (accepted ones and the bonus token, as given out), acceptance (per token looked at), hit
rate (outcomes found in the speculation cache, per sequence), draft forwards per round. These don't depend on the machine.
"""
import argparse
import json
import platform
import time
from pathlib import Path

import torch

from batch import Options, Stats
from errors import UserError, exit_on_user_error
from generate import WEIGHTS, FlagParser
from graphs import Graphs
from model import KVCache, Llama
from saguaro import sd, ssd
from sampling import Sampler, Sampling
from shapes import SHAPES
from tokenizer import Tokenizer
from tree import Tree

RESULTS = Path(__file__).resolve().parent / "results"
STARTS = "Once upon a time, there was", "One day,", "Long ago, near the sea, lived", "In a small town,"
HEROES = "a little fox named Tim", "a shy girl who loved to paint", "an old bear", "two brothers", "a brave duck"
OPENINGS = [f"{start} {hero}" for start in STARTS for hero in HEROES]


def rounded(model, bits, group=64):
    """The model's linear weights rounded to `bits` bits in groups of `group` inputs, in place; embeddings are kept.

    A draft that needs no training and agrees with its target about as well as an off-the-shelf pair does.
    """
    for layer in model.layers:
        for w in (layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down):
            groups = w.view(w.shape[0], -1, group)
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            step = ((high - low) / (2 ** bits - 1)).clamp(min=1e-12)
            groups.copy_(((groups - low) / step).round() * step + low)
    return model


def configurations(small):
    """(table, row, Sampling, Options, loop) of every run."""
    for temperature in (0.0, 0.7, 1.0):
        for accept, c in (("coupled", 1.0), ("residual", 1.0), ("residual", 0.5)):
            if temperature or accept == "coupled":
                name = accept if accept == "coupled" else f"residual, C = {c}"
                yield ("accept", f"T = {temperature}, {name}", Sampling(temperature),
                       Options(accept=accept, saguaro_c=c), ssd)
    for temperature in (0.0, 1.0):
        for budget in (8, 16, 32):
            for fanout in ("uniform", "geometric", "auto"):
                if not small or budget == 16:
                    yield ("fan-out", f"T = {temperature}, budget {budget}, {fanout}", Sampling(temperature),
                           Options(fanout=fanout, fanout_budget=budget), ssd)
    for k in (2, 4, 6, 8):
        yield "speculation", f"chain, K = {k}", Sampling(), Options(k=k), sd
    for nodes in (8, 16, 32, 64):
        yield "speculation", f"best tree of {nodes}", Sampling(), Options(k=10, tree=str(nodes)), sd


def measure(target, draft, prompts, new_tokens, batch, small):
    rows = []
    for table, row, sampling, options, loop in configurations(small):
        totals, began = Stats(), time.time()
        for first in range(0, len(prompts), batch):
            group = prompts[first:first + batch]
            for _ in loop(target, draft, group, new_tokens, sampling, options, stats=totals,
                          seeds=list(range(first, first + len(group)))):
                pass
        rows.append(dict(table=table, row=row, **{k: v for k, v in totals.summary().items() if "seconds" not in k}))
        print(f"{table}: {row}: {totals.tokens_per_round:.2f} tokens a round, acceptance {totals.acceptance_rate:.3f}, "
              f"hit rate {totals.hit_rate:.3f}  ({time.time() - began:.0f} s)", flush=True)
    return rows


def copy_bandwidth(device, size=1 << 30):
    """Bytes a second of a large copy, read and written: what memory gives here."""
    a, b = (torch.empty(size if device.type == "cuda" else size >> 4, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * a.numel() / median_seconds(lambda: b.copy_(a), device)[1]


def median_seconds(run, device, repeats=50):
    """(10th percentile, median, 90th percentile) of run() in seconds, by events on a GPU."""
    times = []
    for _ in range(repeats if device.type == "cuda" else 7):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    times.sort()
    return times[len(times) // 10], times[len(times) // 2], times[-1 - len(times) // 10]


@torch.inference_mode()
def step_times(name, context, device, rows=(1, 8, 16, 32, 64)):
    """Time decoding steps of one sequence over `rows` tokens: forward, head, choice. Returns a list of dicts.

    One token is an AR step, more of them a verify step or, as branches, a draft step. The bytes are those of the weights,
    without the embedding where it isn't the head, and of the K and V in context.
    """
    config, out = SHAPES[name], []
    model = Llama(config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for p in model.parameters():
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0, p.shape[1] ** -0.5)
    weights = sum(p.numel() for p in model.parameters()) - (0 if config.tie_embeddings else model.embed.numel())
    cached = 2 * config.n_layers * config.n_kv_heads * config.head_dim * context
    moved = (weights + cached) * model.embed.element_size()
    cache = KVCache(config, 1, context + max(rows) + 1, device, model.dtype)
    cache.k.normal_()
    cache.v.normal_()
    sampler, start = Sampler(Sampling(), [0], device), torch.full((1,), context, device=device)
    for n in rows:
        tree = Tree([-1] + [0] * (n - 1), device)               # a root and its children: every row counts the same
        graphs, tokens = Graphs(model.graphs), torch.randint(0, config.vocab_size, (1, n), device=device)
        positions, slots = start[:, None] + tree.node_depth, start[:, None] + torch.arange(n, device=device)

        class Step:                                             # a method, as Graphs wants it
            def run(self, tokens):
                hidden = model(tokens, positions, slots, start, tree.ancestors, cache)
                return sampler.choose(model, hidden, positions + 1, 1)
        step = Step()
        for _ in range(3):                                      # compile, record, replay
            graphs(step.run, tokens)
        low, mid, high = median_seconds(lambda: graphs(step.run, tokens), device)
        out.append(dict(shape=name, rows=n, context=context, ms=mid * 1e3, ms_10=low * 1e3, ms_90=high * 1e3,
                        bandwidth=moved / mid))
    return out


def steps(args):
    """Print and return the step times of the shapes in --steps, beside the copy bandwidth."""
    device = torch.device(args.device)
    for name in args.steps.split(","):
        if name not in SHAPES:
            raise UserError(f"--steps {name}: unknown shape; expected some of {', '.join(SHAPES)}")
    ceiling, rows = copy_bandwidth(device), []
    print(f"copy: {ceiling / 1e12:.3f} TB/s (read and written)")
    for name in args.steps.split(","):
        for row in step_times(name, args.context, device):
            rows.append(row)
            print(f"{name}, context {args.context}, {row['rows']} tokens: {row['ms']:.3f} ms [{row['ms_10']:.3f}, "
                  f"{row['ms_90']:.3f}], {row['bandwidth'] / 1e12:.3f} TB/s, {row['bandwidth'] / ceiling:.0%} of the copy",
                  flush=True)
    return dict(what=f"Steps with random weights on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}",
                copy_bandwidth=ceiling, rows=rows, torch=torch.__version__)


def report():
    """Write the table of each results file between its markers in README.md."""
    readme = Path(__file__).resolve().parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("speculation_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        begin, end = f"<!-- {path.name} -->\n", f"<!-- end of {path.name} -->"
        if begin not in text or end not in text:
            raise UserError(f"README.md has no place for {path.name}; expected the lines {begin.strip()} and {end}")
        head, rest = text.split(begin)
        text = head + begin + tables(result) + end + rest.split(end, 1)[1]
    readme.write_text(text, encoding="utf-8")


def tables(result):
    lines = [f"{result['what']}. Command: `{result['command']}`.", ""]
    lines += ["| | tokens per round | acceptance | hit rate | draft forwards per round |", "|-|-|-|-|-|"]
    for r in result["rows"]:
        hit = "" if r["table"] == "speculation" else f"{r['hit_rate']:.3f}"
        lines.append(f"| {r['table']}: {r['row']} | {r['tokens_per_round']:.2f} | {r['acceptance_rate']:.3f} | {hit} | "
                     f"{r['forwards_per_round']:.1f} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = FlagParser("bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", metavar="DIR", help="default: the embedded target")
    add("--draft", metavar="DIR", help="default: the embedded draft")
    add("--round-draft", type=int, metavar="BITS", help="draft: the target with its linears rounded to so many bits")
    add("--prompts", metavar="FILE.jsonl", help="default: 20 story openings")
    add("--chat", action="store_true", help="put the prompts under the chat template")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--batch", type=int, default=10, metavar="N")
    add("--small", action="store_true", help="fewer fan-out budgets")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE", help="write the measurements there")
    add("--steps", metavar="SHAPES", help=f"time single steps of {', '.join(SHAPES)} with random weights, and stop")
    add("--context", type=int, default=512, metavar="N", help="tokens in the cache, for --steps (default 512)")
    add("--report", action="store_true", help="write README.md's tables from results/ and stop")
    args = parser.parse_args(argv)
    if args.report:
        return report()
    if args.steps:
        result = steps(args)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    if args.target is not None and args.draft is None and args.round_draft is None:
        raise UserError("--target needs a draft: give --draft DIR or --round-draft BITS")
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    folder = args.target or WEIGHTS / "target"
    target, tokenizer = Llama.load(folder, args.device, dtype), Tokenizer.from_folder(folder)
    if args.round_draft:
        draft = rounded(Llama.load(folder, args.device, torch.float32), args.round_draft).to(dtype)
    else:
        draft = Llama.load(args.draft or WEIGHTS / "draft", args.device, dtype)
    texts = OPENINGS
    if args.prompts:
        texts = [json.loads(line)["prompt"] for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()]
    encode = (lambda text: tokenizer.chat([{"role": "user", "content": text}])) if args.chat else tokenizer.prompt
    rows = measure(target, draft, [encode(text) for text in texts], args.max_new_tokens, args.batch, args.small)
    who = "The embedded pair" if args.target is None else Path(folder).resolve().name + \
        (f", its draft itself rounded to {args.round_draft} bits" if args.round_draft else "")
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {Path(str(value)).name}")
             for name, value in vars(args).items() if value not in (None, False) and name not in ("json", "device", "context")]
    result = dict(what=f"{who}, {len(texts)} prompts, {args.max_new_tokens} new tokens, {str(dtype)[6:]}; K = 6 and "
                       f"budget 16 where not said otherwise", command="python bench.py " + " ".join(flags), rows=rows,
                  torch=torch.__version__, python=platform.python_version(), device=args.device)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with exit_on_user_error():
        main()

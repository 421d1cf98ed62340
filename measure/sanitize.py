"""A round of everything, small enough for NVIDIA's compute-sanitizer to watch: ar, sd and ssd without CUDA graphs.

    python -m measure.sanitize                              first without it: compiles the kernels
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1                 else what lies behind a tensor is memory that torch has, too
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m measure.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m measure.sanitize
    ... python -m measure.sanitize smollm2-135m             the same with the sizes, and so the tiles, of a real shape
    ... python -m measure.sanitize 1/4                      every fourth run: racecheck takes more than a minute for each

Two layers, head_dim 64; chains and trees, greedy and sampled, a draft with a vocabulary of its own and one in int8, either backup, both
accept rules, a target that keeps to its share. Every kernel of a round but the gate is launched (test_accept.py counts them), and the
texts must be ar's.
"""
import sys
from dataclasses import replace

import torch

from batch import Options, Stats
from errors import UserError, exit_on_user_error
from generate import MODES
from kernels import Share
from measure.pairs import shape
from measure.timing import random_model
from model import LlamaConfig
from pad import trim
from sampling import Sampling

# Hidden sizes that make both kinds of tensor core instruction (16384 rows: wgmma) and split-K (8192 columns) appear. Weights
# of 128 columns are taken at once, those of 96 in steps.
TINY = LlamaConfig(vocab_size=16384, dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=8192)
SHARE = Share(4, 16)
PROMPT = list(range(1, 70))                     # longer than a unit of the attention
RUNS = (                                        # mode, draft, temperature, options
    ("sd", "own ids", 0.0, Options(k=3)), ("sd", "int8", 0.9, Options(tree="3,2,1")),
    ("ssd", "own ids", 0.9, Options(k=3, fanout_budget=6)), ("ssd", "int8", 0.0, Options(tree="2,2", fanout_budget=8)),
    ("ssd", "int8", 0.9, Options(k=2, fanout_budget=5, backup="fast")),
    ("ssd", "own ids", 0.9, Options(tree="2,1", fanout_budget=5, accept="residual", saguaro_c=0.5)))


def models(config, device, dtype):
    """A target and a draft of it for either kind in RUNS, which agree now and then."""
    def make():
        torch.manual_seed(0)
        model = random_model(config, device, dtype)
        if not config.tie_embeddings:
            model.head.mul_(4)                  # confident, like a language model
        return model
    target, drafts = make(), {"own ids": trim(make(), config.vocab_size), "int8": make()}
    for draft in drafts.values():
        draft.norm.mul_(0.5 + torch.rand(config.dim, device=device))
    drafts["int8"].to_int8()
    return target, drafts


def rounds(config, device, dtype, prompt=PROMPT, new=7, runs=RUNS):
    """Run them all; the texts of `coupled` must be those of ar. Returns a line for each run."""
    target, drafts = models(config, device, dtype)
    for model in (target, *drafts.values()):
        model.run_with(graphs=False)

    def text(mode, temperature, *more):
        out, stats = [[], []], Stats()
        for chunks in MODES[mode](target, *more[:1], [prompt, prompt[:2]], new, Sampling(temperature, seed=3), *more[1:], stats=stats):
            for chunk in chunks:
                out[chunk.sequence] += chunk.tokens
        return out, f"{stats.rounds} rounds, {stats.accepted} tokens accepted, {stats.hits} hits of {stats.lookups}"
    wanted = {temperature: text("ar", temperature)[0] for temperature in {run[2] for run in runs}}
    for mode, kind, temperature, options in runs:
        shared = mode == "ssd" and device.type == "cuda"
        target.run_with(share=SHARE if shared else None)
        found, line = text(mode, temperature, drafts[kind], options)
        if options.accept == "coupled" and found != wanted[temperature]:
            raise UserError(f"{mode} with {options} wrote {found}, ar {wanted[temperature]}")
        yield f"{mode}, {options.tree or options.k}, {kind}, T = {temperature:g}, {options.accept}: {line}"


def main(argv):
    """argv: names of shapes, and I/N for every N-th run from the I-th on."""
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU whose kernels could be watched")
    part = next((word for word in argv if "/" in word), "1/1")
    first, step = (int(n) if n.isdigit() else 0 for n in part.split("/", 1))
    if not 1 <= first <= step <= len(RUNS):
        raise UserError(f"{part}: expected I/N with 1 <= I <= N <= {len(RUNS)}, for every N-th run from the I-th on")
    for config in [replace(shape(name), n_layers=2) for name in argv if name != part] or (TINY, replace(TINY, dim=96)):
        for line in rounds(config, torch.device("cuda"), torch.bfloat16, runs=RUNS[first - 1::step]):
            print(line, flush=True)
    torch.cuda.synchronize()
    print("ok", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])

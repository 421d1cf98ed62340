"""
The engine against itself and the paper's maths: ar == sd == ssd token for token, the stats, bad and odd requests.

That `residual` is lossless in distribution is tested in test_tables.py.
"""
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import time
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import draft as draft_side
import kernels
import plan
import saguaro
import templates
import tune
from batch import MAX_BUDGET, MAX_NODES, Batch
from draft import Drafter, prompt_lookup
from errors import UserError
from generate import WEIGHTS
from graphs import MOST, Beside, Graphs
from measure.pairs import rounded, worse
from measure.steady import allocations
from model import KVCache, Llama, LlamaConfig, prefill
from plan import critical_batch, expected_speedup, fan_out
from sampling import Sampler, Sampling, saguaro_probs
from saguaro import Options, Stats, Target
from timeline import Timeline, outcomes
from tokenizer import Tokenizer
from tree import Tree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).resolve().parent
CONTEXT = 72
CONFIG = LlamaConfig(vocab_size=67, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96,
                     max_context=CONTEXT, dtype=torch.float32)
TIE = 1e-4                  # two logits this close may swap places when the width of a matmul changes the rounding


# ---------------------------------------------------------------------------------------------------------------------
# Models

@functools.cache
def tiny(seed, config=CONFIG):
    """Random weights with a sharp head: confident like a language model, with near ties now and then."""
    model = Llama.random(config, seed, DEVICE)
    model.head.mul_(4)
    return model


@functools.cache
def perturbed(eps=0.07):
    """tiny(0) with a little of tiny(1) mixed into its weights: agrees with it about seven times in ten."""
    model = Llama(CONFIG, DEVICE)
    for weight, ours, noise in zip(model.parameters(), tiny(0).parameters(), tiny(1).parameters()):
        weight.copy_(ours if ours.dim() == 1 else (1 - eps ** 2) ** 0.5 * ours + eps * noise)
    return model


@functools.cache
def trimmed():
    """perturbed() with 44 of the 67 tokens, in another order; its id 0 stands for all the others."""
    kept = torch.randperm(CONFIG.vocab_size, generator=torch.Generator().manual_seed(2))[:44].to(DEVICE)
    model = Llama(dataclasses.replace(CONFIG, vocab_size=45, target_vocab_size=CONFIG.vocab_size), DEVICE)
    rows = torch.cat([kept[:1], kept])
    for (name, weight), (_, whole) in zip(model.named_parameters(), perturbed().named_parameters()):
        weight.copy_(whole[rows] if name in ("embed", "head") else whole)
    model.d2t[1:] = kept
    return model


@functools.cache
def load(folder):
    if not (ROOT / folder / "model.safetensors").exists():
        pytest.skip(f"{folder} isn't there")
    return Llama.load(ROOT / folder, DEVICE, torch.float32)


@functools.cache
def rounded_smollm2():
    return rounded(load.__wrapped__("checkpoints/smollm2"), 5)


PAIRS = {
    "perturbed": lambda: (tiny(0), perturbed()),
    "same": lambda: (tiny(0), tiny(0)),
    "random": lambda: (tiny(0), tiny(3)),
    "trimmed": lambda: (tiny(0), trimmed()),
    "embedded": lambda: (load("weights/target"), load("weights/draft")),
    "smollm2": lambda: (load("checkpoints/smollm2"), rounded_smollm2()),    # a real draft that needs no training
    "smollm2-draft": lambda: (load("checkpoints/smollm2"), load("weights/smollm2-draft")),
}


def run(loop, models, prompts, new, sampling=Sampling(), options=None, **more):
    """Run a loop to its end. Returns (texts, Stats with a trace, chunks round by round)."""
    stats, texts, rounds = Stats(trace=[]), [[] for _ in prompts], []
    models = models[:1] if options is None else models
    for chunks in loop(*models, prompts, new, sampling, *([] if options is None else [options]), stats=stats, **more):
        rounds.append(chunks)
        for chunk in chunks:
            assert len(chunk.tokens) == len(chunk.origins) > 0
            texts[chunk.sequence] += chunk.tokens
    return texts, stats, rounds


def scores_by_plain_decoding(model, tokens, sampling, seed):
    """What the target's next token behind `tokens` is the argmax of [V]: prefill, one step, temperature and noise."""
    with torch.inference_mode():
        cache = KVCache(model.config, 1, len(tokens), model.device, model.dtype)
        at = prefill(model, cache, [tokens])[:, None]
        mask = torch.ones(1, 1, dtype=torch.bool, device=model.device)
        logits = model.logits(model(torch.tensor([tokens[-1:]], device=model.device), at, at, at[:, 0], mask, cache))
        return Sampler(sampling, [seed], model.device).scores(logits, at + 1)[0, 0]


def assert_same(expected, found, model, prompts, sampling, seeds, what):
    """Equal texts; where one differs its two best tokens must tie, and the rest of it isn't looked at. Counts ties."""
    ties = 0
    for prompt, a, b, seed in zip(prompts, expected, found, seeds):
        if a != b:
            i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
            assert i is not None, f"{what}: one text goes on after the other's end: {a} and {b}"
            best = scores_by_plain_decoding(model, prompt + a[:i], sampling, seed).topk(2)
            gap = (best.values[0] - best.values[1]).item()
            assert {a[i], b[i]} == set(best.indices.tolist()) and gap < TIE, (
                f"{what}: {a[i]} became {b[i]} at {i}, but the best two are {best.indices.tolist()}, {gap:.1e} apart")
            ties += 1
    return ties


# ---------------------------------------------------------------------------------------------------------------------
# ar == sd == ssd

FACTORS = {
    "temperature": (0.0, 0.7, 1.0),
    "filters": ((0, 1.0), (0, 1.0), (5, 1.0), (0, 0.8), (9, 0.9)),          # top_k, top_p
    "greedy_rule": ("coupled", "residual"),                                 # at temperature 0 they are the same
    "k": range(1, 9),
    "tree": (None, None, None, "4,2,1,1", "3,2,2", "16", "32"),
    "fanout": ("uniform", "geometric", "auto", "confident"),
    "fanout_budget": (1, 2, 3, 5, 8, 12, 16, 24, 32),
    "backup": ("neural", "fast", "auto"),
    "batch": (1, 3, 8),
    "seeds": ("own", "shared"),
    "stop": (False, True),
    "new": ("few", "mixed", "context"),
}


def configurations(name, n):
    """n dicts of options, seeded by name: each factor takes its values equally often, in an order of its own."""
    rng, columns = random.Random(name), {}
    for factor, values in FACTORS.items():
        columns[factor] = list(values) * (n // len(values)) + rng.sample(values, n % len(values))
        rng.shuffle(columns[factor])
    return [{factor: column[i] for factor, column in columns.items()} for i in range(n)]


def request(config, rng):
    """Prompts of mixed lengths, one a single token, half of them repetitive; and how long to go on."""
    lengths = rng.sample([1, 2, 3, 9, 14, 22, 31, 40], config["batch"])
    if config["batch"] > 1:
        lengths[rng.randrange(config["batch"])] = 1
    prompts = []
    for i, length in enumerate(lengths):
        motif = [rng.randrange(CONFIG.vocab_size) for _ in range(4 if i % 2 else length)]
        prompts.append((motif * length)[:length])
    new = {"few": lambda length: rng.randint(1, 9), "mixed": lambda length: rng.randint(1, 28),
           "context": lambda length: CONTEXT - length}[config["new"]]
    return prompts, [new(length) for length in lengths]


def compare_modes(pair, config, prompts, new, rng):
    """Run a configuration in all three modes; tokens must agree. Returns what happened, as counts."""
    models = PAIRS[pair]()
    top_k, top_p = config["filters"]
    sampling = Sampling(config["temperature"], top_k, top_p, seed=rng.randrange(2 ** 40))
    seeds = [sampling.seed] * len(prompts)
    if config["seeds"] == "own":
        seeds = [rng.randrange(2 ** 62) for _ in prompts]
    options = Options(**{name: config[name] for name in ("k", "tree", "fanout", "fanout_budget", "backup")},
                      accept="coupled" if config["temperature"] else config["greedy_rule"])
    more = dict(seeds=None if config["seeds"] == "shared" else seeds)
    expected = run(saguaro.autoregressive, models, prompts, new, sampling, **more)[0]
    if config["stop"]:
        longest = max(expected, key=len)
        more["stop_ids"] = {longest[2 * len(longest) // 3]}
        expected = run(saguaro.autoregressive, models, prompts, new, sampling, **more)[0]
    events = dict.fromkeys(("texts", "ties", "hits", "misses", "stopped inside", "cut inside", "replans"), 0)
    for loop in saguaro.sd, saguaro.ssd:
        what = f"{loop.__name__}, {pair} pair, {config}"
        found, stats, _ = run(loop, models, prompts, new, sampling, options, **more)
        events["ties"] += assert_same(expected, found, models[0], prompts, sampling, seeds, what)
        assert stats.tokens == sum(map(len, found)), what
        events["texts"] += len(found)
        events["hits"] += stats.hits
        events["misses"] += stats.lookups - stats.hits
        events["replans"] += stats.rounds > 16 and not (options.tree is None and (options.fanout == "uniform" or options.by_round()))
        for entry in stats.trace:
            stopped = entry["tokens"][-1] in more.get("stop_ids", ())
            if len(entry["tokens"]) <= entry["accepted"]:       # cut within what had been drafted
                events["stopped inside" if stopped else "cut inside"] += 1
    return events


def sweep(pair, n, make_request=None):
    rng, total = random.Random(pair), {}
    for i, config in enumerate(configurations(pair, n)):
        prompts, new = make_request(i, config, rng) if make_request else request(config, rng)
        for event, count in compare_modes(pair, config, prompts, new, rng).items():
            total[event] = total.get(event, 0) + count
    print(pair, total)
    assert total["ties"] <= 0.02 * total["texts"] + 1, total    # ties are rare; many would hide a defect
    return total


@pytest.mark.parametrize("pair", ("perturbed", "same", "random", "trimmed"))
def test_modes_agree(pair):
    total = sweep(pair, 16 if pair in ("perturbed", "trimmed") else 11)
    wanted = {"random": ("misses", "replans"), "same": ("hits", "stopped inside", "cut inside")}.get(
        pair, ("hits", "misses", "stopped inside", "cut inside", "replans"))        # what the sweep was to come across
    assert all(total[event] for event in wanted), total


@pytest.mark.slow
@pytest.mark.parametrize("pair", ("perturbed", "same", "random", "trimmed"))
def test_modes_agree_everywhere(pair):
    sweep(pair, 120)


OPENINGS = [f"{who} {what}" for who in ("Lily", "Tom and his dog", "The old king", "Once upon a time, a girl", "My cat")
            for what in ("went to the park and", "was sad because", "found a big red", "said: \"I want", "did not",
                         "liked to play with", "saw a bird. The bird", "had a")]            # 40


def sweep_real(pair, n, batches, longest, branches):
    """A sweep over real weights, on text: `branches` bounds batch * budget, which is what takes the time."""
    PAIRS[pair]()                                                               # skips if they aren't there
    tokenizer = Tokenizer.from_folder(ROOT / ("weights/target" if pair == "embedded" else "checkpoints/smollm2"))
    prompts = [tokenizer.prompt(text) for text in random.Random(0).sample(OPENINGS, len(OPENINGS))]

    def make_request(i, config, rng):
        size = batches[i % len(batches)]
        config["fanout_budget"] = min(config["fanout_budget"], branches // size)
        some = [prompts[(8 * i + j) % len(prompts)] for j in range(size)]
        return some, [rng.randint(longest // 2, longest) for _ in some]
    total = sweep(pair, n, make_request)
    assert total["hits"] and total["misses"], total


def test_modes_agree_on_the_embedded_pair():
    sweep_real("embedded", 5, (1, 3, 8), longest=32, branches=24)


@pytest.mark.slow
def test_modes_agree_on_the_embedded_pair_everywhere():
    sweep_real("embedded", 40, (1, 3, 8), longest=64, branches=128)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ("smollm2", "smollm2-draft"))
def test_modes_agree_on_smollm2(pair):
    sweep_real(pair, 9, (1, 1, 3), longest=20, branches=16)


def test_batch_does_not_change_a_text():
    models, rng = PAIRS["perturbed"](), random.Random(0)
    prompts, new = request(dict(batch=8, new="mixed"), rng)
    for sampling in Sampling(), Sampling(0.7, seed=5):
        for loop, options in ((saguaro.autoregressive, None), (saguaro.ssd, Options(k=4))):
            together = run(loop, models, prompts, new, sampling, options)[0]
            alone = [run(loop, models, [prompt], n, sampling, options)[0][0] for prompt, n in zip(prompts, new)]
            assert_same(alone, together, models[0], prompts, sampling, [sampling.seed] * 8, loop.__name__)


# ---------------------------------------------------------------------------------------------------------------------
# What the draft proposes: a defect here would cost speed and no test of the texts would see it

@pytest.mark.parametrize("sampling, options", (
    (Sampling(), Options(k=3, fanout_budget=8)),
    (Sampling(1.0, seed=1), Options(tree="3,2,1", fanout_budget=12)),
    (Sampling(0.7, seed=1), Options(k=4, tree="7", fanout_budget=8, backup="fast")),
))
@pytest.mark.parametrize("loop, rests", ((saguaro.sd, False), (saguaro.ssd, False), (saguaro.ssd, True)))
def test_speculations_are_the_drafts_own(loop, rests, sampling, options, monkeypatch):
    """Every drafted token and every guessed outcome is the draft's best behind its whole text, decoded plainly.

    So the draft's KV cache holds the right rows after hits, misses of either backup, rests and new plans.
    """
    target, draft = PAIRS["perturbed"]()
    specs, caches = [], {}                                                  # caches: round -> what was guessed
    if rests:                                                               # every other round or so
        for name, value in (("TRIED", 3), ("HOPELESS", 0.7), ("REST", 1)):
            monkeypatch.setattr(plan, name, value)
    verify, precompute = Target.verify, Drafter.precompute

    def watch_verify(self, tokens, q, tree, alone=False):
        specs.append((tokens.tolist(), tree))
        return verify(self, tokens, q, tree)

    def watch_precompute(self, *args):
        cache = precompute(self, *args)
        caches[self.stats.started] = cache.nodes.tolist(), cache.roots.tolist()
        return cache
    monkeypatch.setattr(Target, "verify", watch_verify)
    monkeypatch.setattr(Drafter, "precompute", watch_precompute)
    prompts, new = [[1, 2, 3, 4, 5, 6], [7]], [36, 14]
    stats = run(loop, (target, draft), prompts, new, sampling, options)[1]
    texts = [list(prompt) for prompt in prompts]
    for i, (tokens, tree) in enumerate(specs):
        for row, entry in enumerate(entry for entry in stats.trace if entry["round"] == i):
            text, drafted = texts[entry["sequence"]], tokens[row]
            assert drafted[0] == text[-1]
            for node in range(tree.size):
                children = [drafted[child] for child in tree.children[node].tolist() if child >= 0]
                path = tree.mask[node].nonzero().flatten().tolist()
                behind = text + [drafted[n] for n in path[1:]]
                guessed = []
                if i in caches:
                    guessed = [root for n, root in zip(caches[i][0][row], caches[i][1][row]) if n == node]
                if -1 in behind or not children + guessed:
                    continue
                scores = scores_by_plain_decoding(draft, behind, sampling, sampling.seed).clone()
                if entry["source"] == "fast":               # its guesses come from the model, its tokens from the text
                    proposal = lookup_by_hand(text, tree.depth)[len(path) - 1:len(path)]
                    assert children in (proposal + [-1] * (len(children) - 1), [-1] * len(children))
                    scores[[child for child in children if child >= 0]] = -math.inf
                    children = []
                best = scores.topk(len(children) + len(guessed)).values
                assert scores[children + guessed].tolist() == pytest.approx(best.tolist(), abs=TIE)
            text += entry["tokens"]
    if loop is saguaro.ssd:
        assert {entry["source"] for entry in stats.trace} >= {"hit", options.backup} and (len(caches) < len(specs)) == rests


# ---------------------------------------------------------------------------------------------------------------------
# Degenerate requests

BOTH = pytest.mark.parametrize("loop", (saguaro.sd, saguaro.ssd))


@BOTH
@pytest.mark.parametrize("accept, temperature", (("coupled", 0.0), ("coupled", 1.0), ("residual", 1.0)))
def test_draft_is_target(loop, accept, temperature):
    """Everything that is drafted is accepted; with shared noise the bonus is always guessed too."""
    options = Options(k=5, accept=accept)
    texts, stats, _ = run(loop, PAIRS["same"](), [[1, 2, 3], [4]], 36, Sampling(temperature, seed=1), options)
    assert [len(text) for text in texts] == [36, 36]
    assert stats.acceptance_rate > 0.98 and stats.tokens_per_round >= 0.9 * 6       # 1 and 6, but for rounding
    if loop is saguaro.ssd and accept == "coupled":
        assert stats.hit_rate > 0.9


def hopeless_pair():
    """A target that only takes even tokens, a draft that only proposes odd ones."""
    from test_tables import TableModel
    even = (torch.arange(20, device=DEVICE) % 2 == 0).float() * 200
    ramp = torch.arange(20, device=DEVICE) * 0.1
    return [TableModel((x + ramp).expand(2, 20, 20)) for x in (even, -even)]


@BOTH
@pytest.mark.parametrize("accept, temperature", (("coupled", 0.0), ("coupled", 1.0), ("residual", 1.0)))
@pytest.mark.parametrize("tree", (None, "3,2"))
def test_hopeless_draft(loop, accept, temperature, tree):
    """The draft only proposes tokens that the target never takes: a round yields its bonus token and no more."""
    stats = run(loop, hopeless_pair(), [[1, 2, 3], [4]], 9, Sampling(temperature, seed=1),
                Options(k=3, tree=tree, accept=accept))[1]
    assert stats.tokens_per_round == 1 and stats.accepted == 0 and stats.acceptance_rate == 0
    assert stats.tokens == stats.tested == 18


def test_when_to_rest():
    """Where everybody waits for the neural backup a round counts as found if all sequences hit; else their share counts."""
    def rounds_of_sd(rest, hits, backup, n):
        for _ in range(n):
            rest.count(hits, backup)
        return next(i for i in itertools.count() if rest.over())
    rest = plan.Rest(True)
    assert rounds_of_sd(rest, [True, False], "neural", 15) == 0 and rounds_of_sd(rest, [True, False], "neural", 1) == 64
    # From now on 10 misses of 16 are enough to know
    assert [rounds_of_sd(rest, [True, False], "neural", 10) for _ in range(2)] == [128, 256]
    assert rounds_of_sd(rest, [True, False], "fast", 16) == 0 and rounds_of_sd(rest, [True, False], "neural", 10) == 64
    assert rounds_of_sd(rest, [False], "neural", 9) == 0 and rounds_of_sd(rest, [True], "neural", 1) == 0
    assert rounds_of_sd(rest, [False], "neural", 1) == 128                  # one hit and five to come are less than 40 %
    assert rounds_of_sd(plan.Rest(False), [False], "neural", 100) == 0
    rest = plan.Rest(True)
    for hit in random.Random(1).choices((True, False, False), k=400):
        far = rest.far()
        rest.count([hit], "neural")
        assert rest.over() or not far, "known to go on, and then it rests"
    rest = plan.Rest(True)
    assert rounds_of_sd(rest, [False], "neural", 15) == 0                   # the first plan is a guess
    rest.new_plan()
    assert rounds_of_sd(rest, [False], "neural", 9) == 0 and rounds_of_sd(rest, [False], "neural", 1) == 64


def test_the_first_plan_is_not_judged():
    """The embedded pair's first fan-out of three outcomes is a poor guess: 2 hits of 16. The next plan hits, and may."""
    models = [Llama.load(WEIGHTS / name, "cpu", torch.float32) for name in ("target", "draft")]
    prompt = Tokenizer.from_folder(WEIGHTS / "target").prompt("Once upon a time")
    options = Options(fanout="geometric", fanout_budget=3)
    stats = run(saguaro.ssd, models, [prompt], 250, Sampling(), options)[1]
    assert sum(bool(row["lookup"]) for row in stats.trace[:16]) < 0.4 * 16
    assert stats.lookups == stats.rounds - 1 and stats.hit_rate > 0.5


@pytest.mark.parametrize("accept, temperature", (("coupled", 0.0), ("residual", 1.0)))
def test_a_hopeless_draft_rests(accept, temperature, monkeypatch):
    """SSD becomes SD where no outcome is guessed: for 64 rounds, then for 128, ...; where all are, the draft never rests."""
    ahead, precompute = [], Drafter.precompute
    options = Options(k=3, accept=accept, fanout="uniform", fanout_budget=4)

    def watch(self, glue=False):
        ahead.append(self.stats.started)
        return precompute(self, glue)
    monkeypatch.setattr(Drafter, "precompute", watch)
    target, draft = hopeless_pair()
    stats = run(saguaro.ssd, (target, draft), [[1, 2, 3]], 300, Sampling(temperature, seed=1), options)[1]
    assert stats.rounds == 300 and ahead == [*range(16), *range(80, 90), *range(218, 228)]
    assert stats.draft_forwards == 3 * 301 + 4 * 36                         # K for each speculation, K + 1 ahead
    stats = Stats(timeline=Timeline())
    for _ in saguaro.ssd(target, draft, [[1, 2, 3]], 100, Sampling(temperature, seed=1), options, stats=stats):
        pass
    assert [hit for _, hit in outcomes(stats.timeline.spans())] == [False] * 26     # a round of SD looks nothing up
    ahead.clear()
    if accept == "coupled":
        stats = run(saguaro.ssd, (target, target), [[1, 2, 3]], 300, Sampling(temperature, seed=1), options)[1]
        assert ahead == [*range(stats.rounds)]


@BOTH
def test_lookahead_past_the_budget(loop):
    models, prompts, new = PAIRS["same"](), [[1, 2], [3], [4, 5, 6]], [1, 2, 3]
    texts, stats, rounds = run(loop, models, prompts, new, options=Options(k=8))
    assert texts == run(saguaro.autoregressive, models, prompts, new)[0]
    assert [len(text) for text in texts] == new and len(rounds) == stats.rounds == 1 and stats.tokens == 6


@BOTH
def test_stop_id_is_the_first_token(loop):
    models, prompts = PAIRS["same"](), [[1, 2], [3]]
    first = [text[0] for text in run(saguaro.autoregressive, models, prompts, 1)[0]]
    texts, stats, rounds = run(loop, models, prompts, 30, options=Options(k=4), stop_ids=first)
    assert texts == [[token] for token in first] and len(rounds) == 1 and stats.tokens == 2


@BOTH
def test_one_sequence_finishes_in_round_one(loop):
    for new in ([1, 20], [20, 1]):
        models, prompts = PAIRS["perturbed"](), [[7, 8, 9], [5]]
        texts, stats, rounds = run(loop, models, prompts, new, options=Options(k=3))
        assert texts == run(saguaro.autoregressive, models, prompts, new)[0]
        assert [len(chunks) for chunks in rounds] == [2] + [1] * (stats.rounds - 1)     # it costs nothing afterwards


# ---------------------------------------------------------------------------------------------------------------------
# Bad requests

def refuses(message, models, prompts=((1, 2),), new=4, loops=(saguaro.sd, saguaro.ssd), **options):
    for loop in loops:
        with pytest.raises(UserError, match=message):
            run(loop, models, [list(prompt) for prompt in prompts], new,
                options=None if loop is saguaro.autoregressive else Options(**options))


@pytest.mark.parametrize("message, options", (
    ("K.* at least 1, got 0", dict(k=0)),
    ("K.* at least 1, got -3", dict(k=-3, tree="4")),
    ("budget .*got 0", dict(fanout_budget=0)),
    (f"budget .*got {MAX_BUDGET + 1}", dict(fanout_budget=MAX_BUDGET + 1)),
    (r"C.* in \[0, 1\], got -0.1", dict(saguaro_c=-0.1)),
    (r"C.* in \[0, 1\], got 1.5", dict(saguaro_c=1.5)),
    (r"C.* in \[0, 1\], got nan", dict(saguaro_c=math.nan)),
    (f"tree.* has 1110 .* at most {MAX_NODES}", dict(tree="10,10,10")),
    (f"tree.* has {MAX_NODES + 1} .* at most {MAX_NODES}", dict(tree=str(MAX_NODES + 1))),
    (f"--k.* has {MAX_NODES + 1} .* at most {MAX_NODES}", dict(k=MAX_NODES + 1)),
    *((f"--tree is '{tree}'; expected", dict(tree=tree)) for tree in ("", "0", "-4", "4,0", "4,,2", "wide", "2.5")),
    ("unknown fan-out 'fair'", dict(fanout="fair")),
    ("unknown accept rule 'all'", dict(accept="all")),
    ("unknown backup 'none'", dict(backup="none")),
))
def test_bad_options(message, options):
    refuses(message, PAIRS["same"](), **options)


def test_bad_models_and_prompts():
    target, config = tiny(0), dataclasses.replace
    refuses("draft's vocabulary has 50 tokens and the target's 67", (target, tiny(0, config(CONFIG, vocab_size=50))))
    other = config(CONFIG, vocab_size=50, target_vocab_size=99)
    refuses("made for a target vocabulary of 99 tokens, the target's has 67", (target, Llama(other, DEVICE)))
    short = tiny(0, config(CONFIG, max_context=16))
    refuses("a node of the tree has 60 children, the draft only 45 tokens", PAIRS["trimmed"](), tree="60,1")
    refuses("10 prompt tokens and 7 new ones exceed the draft's context of 16", (target, short), [[1] * 10], 7)
    for loop, models, request in itertools.product(
            (saguaro.autoregressive, saguaro.sd, saguaro.ssd), [PAIRS["same"]()],
            (("a prompt is empty", [[1], []], 4), ("at least 1, got 0", [[1]], 0), ("got -2", [[1], [2]], [3, -2]),
             (f"exceed the target's context of {CONTEXT}", [[1] * 40], CONTEXT - 39))):
        refuses(request[0], models, *request[1:], loops=[loop])


# ---------------------------------------------------------------------------------------------------------------------
# Stats

@pytest.mark.parametrize("sampling, options", (
    (Sampling(), Options(k=4, fanout="uniform", fanout_budget=8)),
    (Sampling(), Options(k=3, backup="fast")),
    (Sampling(1.0, seed=3), Options(k=4, fanout="auto", tree="12")),
    (Sampling(1.0, seed=3), Options(tree="3,2,1", accept="residual", saguaro_c=0.5, backup="fast")),
    (Sampling(1.0, seed=3), Options(k=2, accept="residual")),
))
def test_stats_are_what_the_trace_says(sampling, options, monkeypatch):
    """Watch the verifies, the lookups and the draft's forwards of a run and count everything again."""
    models, options = PAIRS["perturbed"](), dataclasses.replace(options, rests=False)
    verified, found, forwards, planned = [], [], [0], set()
    verify, switch, fill, plan = Target.verify, Drafter.switch, draft_side.prefill, Drafter.plan

    def watch_plan(self, *args):
        planned.add(len(found))                                             # after how many rounds
        return plan(self, *args)

    def watch_verify(self, tokens, q, tree, alone=False):
        verdict, report = verify(self, tokens, q, tree)
        verified.append((tokens.clone(), tree, verdict))
        return verdict, report

    def watch_switch(self, *args):
        result = switch(self, *args)
        found.append([bool(hit) for hit, *_ in self.found.tolist()])
        return result

    def watch_prefill(*args):
        result = fill(*args)
        forwards[0] = 0                                                     # count from here on
        return result
    monkeypatch.setattr(Target, "verify", watch_verify)
    monkeypatch.setattr(Drafter, "switch", watch_switch)
    monkeypatch.setattr(draft_side, "prefill", watch_prefill)
    monkeypatch.setattr(Drafter, "plan", watch_plan)
    hook = models[1].register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    prompts, new = request(dict(batch=8, new="context"), random.Random(4))
    stop = {run(saguaro.autoregressive, models, prompts, new, sampling)[0][2][9]}
    verified.clear()
    texts, stats, rounds = run(saguaro.ssd, models, prompts, new, sampling, options, stop_ids=stop)
    hook.remove()

    trace = [[entry for entry in stats.trace if entry["round"] == r] for r in range(stats.rounds)]
    live, sources, counted, lookups, drafting = list(range(8)), ["neural"] * 8, [0, 0], [], 0
    for entries, chunks, (tokens, tree, verdict), hits in zip(trace, rounds, verified, found, strict=True):
        assert [entry["sequence"] for entry in entries] == [chunk.sequence for chunk in chunks] == live
        assert [entry["source"] for entry in entries] == sources
        drafting += 1 + tree.depth                                          # one forward for the leaves, D for branches
        for row, (entry, chunk, k) in enumerate(zip(entries, chunks, verdict.length.tolist())):
            node = verdict.path[row, -1].item()
            children = [c for c in tree.children[node].tolist() if c >= 0 and tokens[row, c] >= 0]
            assert (entry["accepted"], entry["node"], entry["tested"]) == (k, node, k + bool(children))
            counted = [counted[0] + k, counted[1] + k + bool(children)]
            drafted = tokens[row, verdict.path[row, 1:k + 1]].tolist() + [verdict.bonus[row].item()]
            assert entry["tokens"] == chunk.tokens == drafted[:len(chunk.tokens)]
            kind = "accepted-hit" if entry["source"] == "hit" else "accepted-miss"
            assert chunk.origins == ([kind] * k + ["bonus"])[:len(chunk.tokens)]
            goes_on = len(chunk.tokens) == k + 1 and chunk.tokens[-1] not in stop and any(
                later["sequence"] == entry["sequence"] for later in stats.trace if later["round"] > entry["round"])
            assert entry["lookup"] == (hits[row] if goes_on else None)
        lookups.append([entry["lookup"] for entry in entries if entry["lookup"] is not None])
        live = [entry["sequence"] for entry in entries if entry["lookup"] is not None]
        replan = len(lookups) in planned                                    # then what was drafted is void
        sources = ["hit" if hit and not replan else "neural" if replan else options.backup for hit in lookups[-1]]
        drafting += tree.depth * ("neural" in sources)
    first_tree = verified[0][1]
    lookups = [hits for hits in lookups if hits]
    flat = sum(lookups, [])
    assert live == [] and True in flat and False in flat
    assert planned <= {0, 16, 32, 64} and (options.fanout != "uniform" or planned == {0})
    assert stats.tokens == sum(map(len, texts)) == sum(len(entry["tokens"]) for entry in stats.trace)
    assert stats.sequence_rounds == len(stats.trace) and stats.rounds == len(rounds)
    assert stats.tokens_per_round == stats.tokens / len(stats.trace)
    assert [stats.accepted, stats.tested] == counted and stats.acceptance_rate == counted[0] / counted[1]
    assert stats.hit_rate == sum(flat) / len(flat) and (stats.hits, stats.lookups) == (sum(flat), len(flat))
    assert stats.all_hit_rate == sum(map(all, lookups)) / len(lookups)
    assert stats.draft_forwards == forwards[0] == first_tree.depth + drafting
    assert stats.forwards_per_round == forwards[0] / stats.rounds
    by_source = {s: [e["accepted"] + 1 for e in stats.trace if e["source"] == s] for s in stats.sources}
    assert stats.sources == {source: [len(ks), sum(ks)] for source, ks in by_source.items()}
    assert all(value == getattr(stats, name) for name, value in stats.summary().items())


def test_coupled_noise_keeps_the_hit_rate():
    """At temperature 1 shared noise guesses the bonus token far more often than rejection sampling, C = 1, does."""
    prompts, seeds, rate = [[i, i + 3, 5] for i in range(16)], list(range(16)), {}
    for accept, temperature in (("coupled", 0.0), ("coupled", 1.0), ("residual", 1.0)):
        options = Options(k=4, fanout="uniform", fanout_budget=10, accept=accept)
        rate[accept, temperature] = run(saguaro.ssd, (tiny(0), perturbed(0.1)), prompts, 48, Sampling(temperature),
                                        options, seeds=seeds)[1].hit_rate
    assert rate["coupled", 1.0] > rate["residual", 1.0] + 0.1, rate
    assert rate["coupled", 1.0] > rate["coupled", 0.0] - 0.15, rate


@pytest.mark.parametrize("more", (dict(k=5), dict(tree="3,2,1")), ids=("chain", "tree"))
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_confident_guesses_find_more(temperature, more, monkeypatch):
    """Where the draft was unsure more outcomes are guessed, and more of what comes is among them; not so by another's odds."""
    prompts, seeds, rate = [[i, i + 3, 5] for i in range(16)], list(range(16)), {}
    choose = kernels.TORCH.outcomes
    shuffled = lambda guesses, odds, *rest: choose(guesses, tuple(x.flip(0) for x in odds), *rest)
    for name, fanout, op in (("geometric", "geometric", choose), ("confident", "confident", choose), ("shuffled", "confident", shuffled)):
        monkeypatch.setattr(kernels.TORCH, "outcomes", op)
        options = Options(**more, fanout=fanout, fanout_budget=6, rests=False)
        models = [model.run_with(ops="torch") for model in (tiny(0), perturbed(0.1))]
        rate[name] = run(saguaro.ssd, models, prompts, 48, Sampling(temperature), options, seeds=seeds)[1].hit_rate
    assert rate["confident"] > rate["geometric"] + 0.04 and rate["confident"] > rate["shuffled"] + 0.04, rate


@pytest.mark.parametrize("options", (None, Options(k=4), Options(tree="3,2,1", backup="fast")), ids=("ar", "chain", "tree"))
def test_what_a_cache_holds_elsewhere_does_not_matter(options, monkeypatch):
    """Both KV caches are poisoned before the first token: on a CPU in fp32, on a GPU in bf16, with graphs and without."""
    models = embedded_pair() if DEVICE.type == "cuda" else PAIRS["perturbed"]()
    request = models, [[1, 2, 3], [4], [5, 6, 5, 6, 5]], [24, 9, 40], Sampling(0.8, seed=3)
    loops = [saguaro.autoregressive] if options is None else [saguaro.sd, saguaro.ssd]
    expected = [run(loop, *request, options) for loop in loops]
    made, poisoned = [], KVCache.__init__

    def poison(self, *args):
        poisoned(self, *args)
        self.k.fill_(1e4), self.v.fill_(-1e4)
        made.append(self)
    monkeypatch.setattr(KVCache, "__init__", poison)
    for graphs in (False, True) if DEVICE.type == "cuda" else (False,):
        for loop, (texts, stats, _) in zip(loops, expected):
            for model in models:
                model.__dict__.pop("idle", None)                            # else they take over the caches of before
                model.graphs = graphs
            found, seen, _ = run(loop, *request, options)
            assert found == texts and (DEVICE.type == "cuda" or counts(seen) == counts(stats))
    assert len(made) == (1 if options is None else 4) * (2 if DEVICE.type == "cuda" else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Overlap: the draft side runs in a thread beside the verify

def counts(stats):
    """All of a Stats but the clock."""
    timed = ("seconds", "prefill_seconds", "waits")
    return {name: value for name, value in vars(stats).items() if name not in timed}


@pytest.mark.parametrize("sampling, options", (
    (Sampling(0.7, seed=2), Options(k=3, tree="3,2,1", fanout="auto")),
    (Sampling(1.0, seed=2), Options(k=4, accept="residual", saguaro_c=0.5, backup="fast")),
))
def test_same_result_however_the_threads_run(sampling, options, monkeypatch):
    rng, request = random.Random(0), ([[1, 2, 3], [4], [5, 6, 5, 6, 5]], [12, 24, 18], sampling, options)
    expected, expected_stats, _ = run(saguaro.ssd, PAIRS["perturbed"](), *request)

    def slowed(work):
        def wrapper(*args, **more):
            time.sleep(rng.choice((0, 0, 0.002, 0.004)))
            result = work(*args, **more)
            time.sleep(rng.choice((0, 0, 0.002, 0.004)))
            return result
        return wrapper
    monkeypatch.setattr(Target, "verify", slowed(Target.verify))
    monkeypatch.setattr(Drafter, "precompute", slowed(Drafter.precompute))
    for _ in range(20):
        texts, stats, _ = run(saguaro.ssd, PAIRS["perturbed"](), *request)
        assert texts == expected and counts(stats) == counts(expected_stats)


@pytest.mark.parametrize("sampling, options", (
    (Sampling(), Options(k=3, fanout_budget=16)),
    (Sampling(0.7, seed=2), Options(k=3, tree="3,2,1", fanout="auto", backup="fast")),
    (Sampling(1.0, seed=2), Options(k=2, accept="residual", saguaro_c=0.5)),
))
@BOTH
def test_results_may_live_at_fixed_addresses(loop, sampling, options, monkeypatch):
    """What CUDA graphs do, played on the CPU: a step reads copies of its arguments and overwrites its last results."""
    request = PAIRS["perturbed"](), [[1, 2, 3], [4], [5, 6, 5, 6, 5]], [14, 40, 25], sampling, options
    expected, expected_stats, _ = run(loop, *request)

    def replay(self, f, *args):
        leaves, structure = pytree.tree_flatten(args)
        fixed = [x.clone() if torch.is_tensor(x) else x for x in leaves]
        key = (f.__func__, *(tuple(x.shape) if torch.is_tensor(x) else x for x in leaves))
        results = pytree.tree_map_only(torch.Tensor, torch.clone, f(*pytree.tree_unflatten(fixed, structure)))
        for old, new in zip(pytree.tree_leaves(self.recorded.setdefault(key, results)), pytree.tree_leaves(results)):
            if torch.is_tensor(old) and old is not new:
                old.copy_(new)
        return self.recorded[key]
    monkeypatch.setattr(Graphs, "__call__", replay)
    texts, stats, _ = run(loop, *request)
    assert texts == expected and counts(stats) == counts(expected_stats)


@pytest.fixture
def played_graphs(monkeypatch):
    """CUDA graphs played on the CPU by their own rules, ar and sd a round ahead, ssd a verify ahead behind a gate. Returns a Counter
    of what happened.

    The first call runs as it is, the second is recorded: from then on the function reads its owner's tensors and its
    arguments where they lay at that time, and its results stand where they stood then.
    """
    events = Counter()

    def call(self, f, *args, warm=False):
        leaves, structure = pytree.tree_flatten(args)
        key = (f.__func__, *(tuple(x.shape) if torch.is_tensor(x) else x for x in leaves))
        # What is warm is recorded as it is launched, before anybody stands at its gate.
        assert self.recorded.get(key) or warm or not events["closed"], "kernels may be loaded here, which may wait for the GPU"
        events[f.__name__] += 1
        if key not in self.recorded and not warm:
            self.recorded[key] = None
            return f(*args)
        if self.recorded.get(key) is None:
            owner = copy.copy(f.__self__)
            owner.cache, owner.sampler = copy.copy(owner.cache), copy.copy(owner.sampler)
            results = pytree.tree_map_only(torch.Tensor, torch.clone, f(*args))
            self.recorded[key] = owner, f.__func__, leaves, results
            events["recorded"] += 1
            return results
        owner, function, fixed, results = self.recorded[key]
        for old, x in zip(fixed, leaves):
            if torch.is_tensor(x) and (x.data_ptr() != old.data_ptr() or x.stride() != old.stride()):
                events["copied"] += 1
                old.copy_(x)
        events["replayed"] += 1
        for old, new in zip(*map(pytree.tree_leaves, (results, function(owner, *pytree.tree_unflatten(fixed, structure))))):
            if torch.is_tensor(old):
                old.copy_(new)
        return results

    def ahead(begin):
        def wrapper(self, *args):
            begin(self, *args)
            self.ahead = 1
        return wrapper

    def ready(self, f, *args):
        leaves = pytree.tree_leaves(args)
        graph = self.recorded.get((f.__func__, *(tuple(x.shape) if torch.is_tensor(x) else x for x in leaves)))
        return bool(graph) and all(not torch.is_tensor(x) or x.data_ptr() == old.data_ptr() for old, x in zip(graph[2], leaves))

    class Gate(Beside):
        def ahead(self, target, speculation):
            events["ahead"] += 1
            events["closed"] = 1                                            # for all that the host knows
            receipts = []
            self.begin = lambda launch=super().ahead: receipts.extend(launch(target, speculation))
            if self.drafter.found[:, 0].all():
                self.begin()
            read = lambda side: receipts[side]() if receipts else pytest.fail("nobody has opened the gate")
            return functools.partial(read, 0), functools.partial(read, 1)

        @contextlib.contextmanager
        def backing_up(self, waiting):
            yield
            if waiting:
                events["opened"], events["closed"] = events["opened"] + 1, 0
                self.begin()

        def __exit__(self, *args):
            events["closed"] = 0
            super().__exit__(*args)

    def known(self, *args, read_outcome=Batch.read_outcome):
        hits = read_outcome(self, *args)
        events["closed"] *= not all(hits)                                   # nobody stands at the gate
        return hits

    def watched(*args, ssd=saguaro.ssd, **more):
        with contextlib.closing(ssd(*args, **more)) as rounds:
            for chunks in rounds:
                assert not events["closed"], "the caller may wait for the GPU"
                yield chunks

    def own_tree(plan):
        def wrapper(self, *args):
            plan(self, *args)
            assert self.tree is self.layout.tree, "a graph would read a tree that nobody keeps"
        return wrapper
    monkeypatch.setattr(Graphs, "__call__", call)
    monkeypatch.setattr(Graphs, "ready", ready)
    monkeypatch.setattr(saguaro, "Beside", Gate)
    monkeypatch.setattr(saguaro, "ssd", watched)
    monkeypatch.setattr(Batch, "__init__", ahead(Batch.__init__))
    monkeypatch.setattr(Batch, "read_outcome", known)
    monkeypatch.setattr(Drafter, "plan", own_tree(Drafter.plan))
    return events


def test_requests_that_share_graphs(played_graphs, monkeypatch):
    """Requests one after the other, some left early, some with rests, take over each other's graphs; the texts are those of
    plain decoding."""
    models, rng = PAIRS["perturbed"](), random.Random(1)
    monkeypatch.setattr(plan, "TRIED", 3), monkeypatch.setattr(plan, "REST", 2)
    ways = [Options(k=3, fanout="uniform"), Options(k=3), Options(k=3, tree="6"), Options(k=3, backup="fast"),
            Options(k=3, tree="2,1,1", fanout="auto", backup="fast")]
    for _ in range(60):
        size, sampling = rng.choice([1, 1, 1, 2, 3]), Sampling(rng.choice([0, 0.8]), seed=rng.randrange(99))
        prompts = [[rng.randrange(1, 60) for _ in range(rng.choice([1, 3, 6]))] for _ in range(size)]
        request = prompts, [rng.choice([1, 2, 5, 20, 45]) for _ in range(size)], sampling
        models[0].__dict__.pop("idle", None) if rng.random() < 0.1 else None
        monkeypatch.setattr(plan, "HOPELESS", rng.choice((0, 2)))           # never, or always
        often = rng.choice((5, 99))
        monkeypatch.setattr(saguaro, "time_to_replan", lambda options, batch, rounds: rounds % often == 0)
        monkeypatch.setattr(plan, "WORTHWHILE", rng.choice((-1.0, 0.02)))
        loop = rng.choice([saguaro.autoregressive, saguaro.sd, saguaro.ssd, saguaro.ssd])
        options, last = (None if loop is saguaro.autoregressive else rng.choice(ways)), rng.choice([None, None, None, 3])
        text = plain_texts(*request)
        found = [[] for _ in prompts]
        rounds = loop(*models[:1], *request) if options is None else loop(*models, *request, options)
        for chunk in itertools.chain.from_iterable(itertools.islice(rounds, last)):
            found[chunk.sequence] += chunk.tokens
        rounds.close()
        assert found == (text if last is None else [whole[:len(part)] for whole, part in zip(text, found)]), (loop, options)
    assert played_graphs["replayed"] > 3 * played_graphs["recorded"] > 0
    assert played_graphs["ahead"] > 2 * played_graphs["opened"] > 0


def test_a_new_fan_out_leaves_the_verify_graph_alone(played_graphs, monkeypatch):
    """Plans that share a tree share what the target reads: each verify is still launched ahead, and nothing is copied for it."""
    models, stats, fans = PAIRS["perturbed"](), Stats(), itertools.cycle(([4, 2, 1, 1], [1, 1, 2, 4]))
    monkeypatch.setattr(saguaro, "make_plan", lambda options, stats, draft, old=(Tree.chain(3),): (old[0], next(fans)))
    monkeypatch.setattr(saguaro, "time_to_replan", lambda options, batch, rounds: rounds % 12 == 0)
    for first in range(5):
        request = [[first, 6, 7]], [50], Sampling(0.8, seed=3)
        rounds = saguaro.ssd(*models, *request, Options(k=3, rests=False), stats=stats)
        assert [[token for chunks in rounds for chunk in chunks for token in chunk.tokens]] == plain_texts(*request)
    assert played_graphs["ahead"] > 0.7 * stats.rounds > 40


@pytest.mark.parametrize("tree", (None, "2,2"))
def test_a_draft_that_has_but_one_idea(tree, monkeypatch):
    """Its best tokens are all the same one, so there is nothing left to guess: what no one has written isn't read."""
    models, choose = PAIRS["perturbed"](), Sampler.choose

    def one_idea(self, model, *args):
        ranked = choose(self, model, *args)
        return ranked if model is models[0] else ranked[..., :1].expand_as(ranked).contiguous()
    monkeypatch.setattr(Sampler, "choose", one_idea)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        found, stats = run(saguaro.ssd, models, [[5, 6, 7]], 40, Sampling(), Options(k=3, tree=tree, rests=False))[:2]
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == plain_texts([[5, 6, 7]], [40], Sampling()) and stats.hits < stats.lookups


def plain_texts(prompts, new, sampling):
    """What the target gives by itself, a prompt and a token at a time: no loop, no graphs."""
    texts, target = [], PAIRS["perturbed"]()[0]
    for prompt, n in zip(prompts, new):
        text = list(prompt)
        for _ in range(n):
            text.append(scores_by_plain_decoding(target, text, sampling, sampling.seed).argmax().item())
        texts.append(text[len(prompt):])
    return texts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_that_take_turns(played_graphs, temperature):
    """Two unfinished requests on the same models don't touch each other's buffers, whatever a third has left behind."""
    models, (a, b) = PAIRS["perturbed"](), (Options(k=3, fanout="uniform"), Options(k=3, fanout="auto"))
    for options in a, b, a:
        run(saguaro.ssd, models, [[9, 8]], 40, Sampling(temperature, seed=3), options)
    requests = [([[1, 2, 3]], [40], Sampling(temperature, seed=5)), ([[4, 5, 6]], [40], Sampling(temperature, seed=6))]
    found = [[], []]
    both = [saguaro.ssd(*models, *request, options) for request, options in zip(requests, (b, a))]
    for pair in itertools.zip_longest(*both):
        for text, chunks in zip(found, pair):
            text += [token for chunk in chunks or [] for token in chunk.tokens]
    assert found == [plain_texts(*request)[0] for request in requests]


def test_a_finished_request_leaves_its_sides_alone(monkeypatch):
    """The next request may have taken them over before the first one is asked whether there is more."""
    models, options, first, second = PAIRS["perturbed"](), Options(k=3, tree="6"), Stats(), Stats(trace=[])
    monkeypatch.setattr(saguaro, "time_to_replan", lambda options, batch, rounds: batch.stats is first)
    monkeypatch.setattr(plan, "WORTHWHILE", -1.0)                           # a new plan each time
    request = [[4, 5, 6]], 40, Sampling()
    text, expected, _ = run(saguaro.sd, models, *request, options)
    early = saguaro.sd(*models, [[1, 2, 3]], 20, Sampling(), options, stats=first)
    while first.tokens < 20:
        next(early)
    late = saguaro.sd(*models, *request, options, stats=second)
    chunks = next(late)
    first.choices[0] = [999, 1]                                             # it would plan a very wide tree now
    assert not list(early)
    chunks += itertools.chain(*late)
    assert [[token for chunk in chunks for token in chunk.tokens]] == text and counts(second) == counts(expected)


def test_a_steady_round_copies_nothing(played_graphs):
    """From the third request of a kind on, every graph finds its arguments where they lay."""
    for options in (Options(k=3, fanout="uniform"), Options(k=3, tree="3,1", fanout="uniform")):
        for request in range(4):
            before = played_graphs["copied"], played_graphs["recorded"]
            run(saguaro.ssd, PAIRS["perturbed"](), [[1, 2, 3 + request]], 40, Sampling(), options)
    assert (played_graphs["copied"], played_graphs["recorded"]) == before


@pytest.mark.parametrize("tree", (None, "2,2"))
def test_a_usual_round_is_one_launch(played_graphs, tree):
    """Once all is recorded, a round is one graph, and a miss adds the backup's; for a timeline the parts are launched apart."""
    parts = ["_precompute", "_switch", "_verify", "_wait_at_gate"]
    request, options = ([[1, 2, 3]], [60], Sampling(0.8, seed=5)), Options(k=3, tree=tree, fanout_budget=4, rests=False)
    expected = run(saguaro.ssd, PAIRS["perturbed"](), *request, options)[0]             # records, and so once more
    for timeline, usual in (None, ["_round"]), (Timeline(), parts), (None, ["_round"]):
        launched, text, stats, before = [], [], Stats(timeline=timeline), Counter(played_graphs)
        for chunks in saguaro.ssd(*PAIRS["perturbed"](), *request, options, stats=stats):
            names = Counter(played_graphs) - before
            launched.append(sorted(name for name in names.elements() if name.startswith("_")))
            before, text = Counter(played_graphs), text + chunks[0].tokens
        assert [text] == expected == plain_texts(*request)
        after_a_miss = sorted([*usual, "_fall_back"])
        assert usual in launched and after_a_miss in launched
        assert all(names in (usual, after_a_miss) for names in launched[4:])


def test_a_round_graph_forks_and_joins(monkeypatch):
    """The verify is a branch, on the stream that knows its kernels. It is recorded at once, and only launched from then on."""
    log, now = [], ["main"]

    class Stream(str):
        wait_stream = lambda self, other: log.append(f"{self} waits for {other}")

    class Recording:
        capture_begin, capture_end, replay = (lambda *_, w=w, **mode: log.append(w) for w in ("record", "end", "launch"))

    @contextlib.contextmanager
    def entered(name):
        now.append(name)
        yield
        now.pop()
    for name, value in (("CUDAGraph", Recording), ("Stream", lambda priority=0: Stream("draft's" if priority else "target's")),
                        ("current_stream", lambda: Stream(now[-1])), ("stream", entered)):
        monkeypatch.setattr(torch.cuda, name, value)
    models, sampling = [copy.copy(model) for model in PAIRS["perturbed"]()], Sampling()
    for model in models:
        model.graphs = True
    options, tree = Options(k=2), Tree.chain(2)
    batch = Batch(models[0], [[1, 2, 3]], 20, sampling, (), None, Stats(), models[1])
    target, drafter = batch.sides((Target, models[0], 40, False), (Drafter, models[1], 200, options))
    drafter.plan(tree, [2, 1, 1])
    for side, step in (drafter, "_wait_at_gate"), (target, "_verify"), (drafter, "_precompute"), (drafter, "_switch"):
        def noted(*args, step=step, f=getattr(side, step)):
            log.append(f"{step} on {now[-1]}")
            return f(*args)
        monkeypatch.setattr(side, step, noted)
    with torch.inference_mode():
        drafter.speculate()
        log.clear()
        drafter.round(target)
        assert log == ["draft's waits for main", "record", "_wait_at_gate on draft's", "target's waits for draft's",
                       "_verify on target's", "_precompute on draft's", "draft's waits for target's", "_switch on draft's",
                       "end", "launch"]
        log.clear()
        drafter.round(target)
    assert log == ["launch"] and drafter.stats.draft_forwards == 2 + 2 * 3


@pytest.fixture
def empty_graphs(monkeypatch):
    """Graphs that record and replay nothing; `replayed` counts."""
    class Recording:
        capture_begin = capture_end = lambda self, **_: None

        def replay(self):
            graphs.replayed += 1
    stand = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (("CUDAGraph", Recording), ("current_stream", lambda: stand), ("stream", contextlib.nullcontext)):
        monkeypatch.setattr(torch.cuda, name, value)
    graphs = Graphs(False)
    graphs.on, graphs.stream, graphs.replayed = True, stand, 0
    return graphs


def test_many_graphs_make_room(empty_graphs):
    """A side keeps so many graphs; the one just recorded is never the one that goes, however early it was first asked for."""
    double = types.MethodType(lambda self, n: 2 * n, empty_graphs)
    asked = [*range(MOST + 1), 0, *range(2 * MOST), *range(2 * MOST), *range(2 * MOST)]
    assert [empty_graphs(double, n) for n in asked] == [2 * n for n in asked]
    assert sum(graph is not None for graph in empty_graphs.recorded.values()) <= MOST
    assert len(empty_graphs.known) <= MOST + 1


def test_a_graph_knows_its_arguments(empty_graphs):
    """The same objects are replayed at sight; other tensors are copied to where the first ones lay, each time."""
    double, (a, b, c) = types.MethodType(lambda self, x, flag: 2 * x, empty_graphs), torch.arange(3.0).split(1)
    for x in a, a, a, a:
        result = empty_graphs(double, x, True)
    assert empty_graphs.replayed == 3 and [args for args, *_ in empty_graphs.known.values()] == [(a, True)]
    for x in b, c, b:
        assert empty_graphs(double, x, True) is result and a == x
    assert empty_graphs(double, a[:], True) is result and a == b            # another view of the same place
    assert empty_graphs.replayed == 7 and len(empty_graphs.known) == 2
    before = Graphs.slow
    empty_graphs.clear()
    assert empty_graphs(double, b, True) == 2 * b and empty_graphs.replayed == 7 and Graphs.slow == before + 1


def test_leaving_early_and_failing(monkeypatch):
    """An abandoned loop gives the cores back, and an error on the draft's side reaches the caller."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads = torch.get_num_threads()
    loop = saguaro.ssd(*PAIRS["perturbed"](), [[1, 2]], 30, Sampling(), Options(k=2))
    next(loop)
    loop.close()
    assert torch.get_num_threads() == threads

    def fail(*args):
        raise ZeroDivisionError
    monkeypatch.setattr(Drafter, "precompute", fail)
    with pytest.raises(ZeroDivisionError):
        run(saguaro.ssd, PAIRS["perturbed"](), [[1, 2]], 30, options=Options(k=2))
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Maths

def chain_stop(a, k):
    return [(1 - a) * a ** i for i in range(k)] + [a ** k]


def test_fan_out_is_theorem_12():
    for a, r, k in ((0.8, 0.8, 6), (0.5, 2.0, 3), (0.95, 0.3, 8)):
        f0 = [a ** (i / (1 + r)) for i in range(k)] + [a ** (k / (1 + r)) * (1 - a) ** (-1 / (1 + r))]
        found = fan_out(chain_stop(a, k), r, 10 ** 6, 10 ** 6)
        assert all(abs(n - 10 ** 6 * share / sum(f0)) <= 1 for n, share in zip(found, f0))


def test_fan_out_spends_its_budget_well():
    rng = random.Random(1)
    for _ in range(60):
        n, budget, limit, r = rng.randint(1, 9), rng.randint(1, 60), rng.randint(1, 12), rng.uniform(0.05, 4)
        stop = [rng.random() ** 3 for _ in range(n)]
        found = fan_out(stop, r, budget, limit)
        assert len(found) == n and sum(found) == min(budget, limit * n) and all(0 <= f <= limit for f in found)
        assert all(f >= g for (p, f), (s, g) in itertools.product(zip(stop, found), repeat=2) if p > s and f < limit)
    miss = lambda stop, fans, r: sum(p * (f ** -r if f else 1) for p, f in zip(stop, fans))
    for a, r, k in itertools.product((0.6, 0.75, 0.9), (0.4, 0.8, 1.5), (3, 6)):
        stop, uniform = chain_stop(a, k), [4] * (k + 1)
        assert miss(stop, fan_out(stop, r, 4 * (k + 1), 100), r) < miss(stop, uniform, r)
    assert fan_out([1.0] * 4, 0.0, 16, 100) == [4] * 4
    assert fan_out([0.9, 0.1, 0.0], 1.0, 7, 3) == [3, 3, 1]                 # what is over the limit goes to the others


def check_tree(tree):
    parents = tree.parents
    for node in range(tree.size):
        path = [node]
        while path[-1]:
            path.append(parents[path[-1]])
        assert tree.mask[node].nonzero().flatten().tolist() == sorted(path)
        assert tree.depths[node] == tree.node_depth[node] == len(path) - 1 and node in tree.levels[len(path) - 1]
        own = [child for child in range(1, tree.size) if parents[child] == node]
        assert [c for c in tree.children[node].tolist() if c >= 0] == own and tree.n_children[node] == len(own)
        assert [tree.ranks[child] for child in own] == list(range(len(own)))
        assert tree.first_child[node] == (own[0] if own else -1) and tree.parent[node] == parents[node]
    assert [node for level in tree.levels for node in level] == list(range(tree.size))
    assert tree.depth == max(tree.depths)


def test_tree_shapes():
    check_tree(Tree.chain(0))
    assert Tree.chain(4).parents == [-1, 0, 1, 2, 3] and Tree.chain(4).mask.equal(torch.ones(5, 5).tril().bool())
    tree = Tree.from_widths([3, 2])
    assert tree.parents == [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3] and tree.levels == [[0], [1, 2, 3], [4, 5, 6, 7, 8, 9]]
    rng = random.Random(0)
    for _ in range(30):
        accept = sorted((rng.random() for _ in range(6)), reverse=True)
        best = Tree.best(rng.randint(1, 40), [x / sum(accept) for x in accept], rng.randint(1, 8))
        for tree in Tree.from_widths([rng.randint(1, 3) for _ in range(rng.randint(1, 4))]), best:
            check_tree(tree)
    assert [Tree.best(n, [0.7, 0.1], 6).size for n in (1, 5, 20)] == [2, 6, 21]


def all_trees(n):
    """Every ordered tree of n drafted nodes, as the path of ranks to each of its nodes."""
    def grow(paths):
        if len(paths) == n + 1:
            yield frozenset(paths)
            return
        for path in paths:
            child = path + (sum(other[:-1] == path for other in paths if other),)
            yield from grow(paths | {child})
    return set(grow(frozenset([()])))


def test_best_tree_is_best():
    """Against every tree of up to 5 nodes: 1, 2, 5, 14, 42 of them."""
    rng = random.Random(2)
    trees = {n: all_trees(n) for n in range(1, 6)}
    assert [len(trees[n]) for n in trees] == [1, 2, 5, 14, 42]
    for _ in range(40):
        accept = sorted((rng.random() for _ in range(5)), reverse=True)
        accept = [x / sum(accept) * 0.95 for x in accept]
        for n, depth in itertools.product(trees, (1, 2, 5)):
            most = max(sum(math.prod(accept[r] for r in path) for path in tree if path)
                       for tree in trees[n] if max(map(len, tree)) <= depth)
            tree = Tree.best(n, accept, depth)
            stop = tree.stop_probability(accept)
            expected_accepted = sum(p * d for p, d in zip(stop, tree.depths))
            assert tree.depth <= depth and expected_accepted == pytest.approx(most)


def test_stop_probability():
    assert Tree.chain(3).stop_probability([0.6]) == pytest.approx(chain_stop(0.6, 3))
    assert Tree.from_widths([2]).stop_probability([0.5, 0.2]) == pytest.approx([0.3, 0.5, 0.2])
    assert Tree.from_widths([2]).stop_probability([0.5]) == pytest.approx([0.5, 0.5, 0.0])          # of the second nothing is known
    for tree in Tree.from_widths([4, 2, 1, 1]), Tree.best(32, Stats().rank_acceptance(), 6):
        assert sum(tree.stop_probability(Stats().rank_acceptance())) == pytest.approx(1)
        stats = Stats(stops={0: 30, tree.size - 1: 10})
        assert sum(stats.stop_probability(tree)) == pytest.approx(1)
        assert stats.stop_probability(tree)[0] > tree.stop_probability(stats.rank_acceptance())[0]


def test_counts_of_stops_are_of_one_tree():
    stats, one, other = Stats(), Tree.chain(3), Tree.from_widths([2, 1])
    stats.use(one)
    stats.stops[0] = 30
    stats.use(Tree.chain(3))
    assert stats.stops == {0: 30} and stats.stop_probability(other) == pytest.approx(other.stop_probability(stats.rank_acceptance()))
    stats.use(other)
    assert not stats.stops


def test_speedup_and_critical_batch():
    assert expected_speedup(0.8, 4.0, 3.0, 0.5, 0.5) == pytest.approx(3.8 / (0.8 + 0.2 * 1.5))
    assert expected_speedup(0.8, 4.0, 3.0, 1.5, 0.5) == pytest.approx(3.8 / (0.8 * 1.5 + 0.2 * 1.5))
    # by hand: N_slow = 3.8, N_fast = 3.5, w = 0.3 / (3.5 * 0.2), b* = ln(4/7) / ln(0.8)
    assert critical_batch(0.8, 4.0, 3.0, 1.5, 0.2, 0.0) == pytest.approx(2.5079, abs=1e-3)

    def speedup(b, p, e_hit, e, t):             # Corollary 16, T_p <= 1
        return (p * e_hit + (1 - p) * e) / (p ** b + (1 - p ** b) * (1 + t))
    rng, inside = random.Random(3), 0
    for _ in range(500):
        p, e_hit = rng.uniform(0.3, 0.99), rng.uniform(2, 6)
        e_fast, e_slow = sorted(rng.uniform(1, e_hit) for _ in range(2))
        t_fast, t_slow = sorted(rng.uniform(0, 0.6) for _ in range(2))
        best = critical_batch(p, e_hit, e_slow, e_fast, t_slow, t_fast)
        inside += 0 < best < math.inf
        for b in (0.5 * best, 0.99 * best) if best < math.inf else (1, 10, 1000):
            assert speedup(b, p, e_hit, e_slow, t_slow) >= speedup(b, p, e_hit, e_fast, t_fast) - 1e-9
        for b in (1.01 * best, 3 * best) if best < math.inf else ():
            assert speedup(b, p, e_hit, e_slow, t_slow) <= speedup(b, p, e_hit, e_fast, t_fast) + 1e-9
    assert inside > 100


def test_saguaro_probs_is_definition_14():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator)
    fans = torch.tensor([0, 1, 4, 10, 11]).expand(2, 5)
    for c in (0.0, 0.3, 1.0):
        found = saguaro_probs(logits, fans, c)
        for row, f, q in zip(logits.flatten(0, 1), fans.flatten().tolist(), found.flatten(0, 1)):
            top = row.argsort(descending=True)[:f].tolist()
            weights = [math.exp(z) * (c if t in top else 1.0) for t, z in enumerate(row.tolist())]
            weights = weights if sum(weights) else row.exp().tolist()       # C = 0 and all of V cached: plain softmax
            assert q.tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-6)
    assert torch.equal(saguaro_probs(logits, 3, 0.5), saguaro_probs(logits, 3, 0.5, 7))


def test_miss_exponent_finds_what_was_planted():
    for r in (0.3, 0.8, 1.7):
        stats = Stats(misses={0: [10 ** 6] * 2} | {f: [10 ** 6, 10 ** 6 * f ** -r] for f in (1, 2, 5, 9)})
        assert stats.miss_exponent() == pytest.approx(r, abs=0.01)
    assert Stats().miss_exponent() == pytest.approx(0.8, abs=0.01)


def lookup_by_hand(text, depth, n=2):
    for start in reversed(range(len(text) - n)):
        if text[start:start + n] == text[-n:]:
            found = text[start + n:start + n + depth]
            return found + [-1] * (depth - len(found))
    return [-1] * depth


def test_prompt_lookup():
    rng, matches = random.Random(5), 0
    for _ in range(40):
        room, depth = rng.randint(12, 30), rng.randint(1, 6)
        texts = [[rng.randrange(4) for _ in range(rng.randint(1, room - 1))] for _ in range(16)]
        texts[:3] = [1], [2, 2, 2], [0, 1, 2, 3, 0, 1]                      # too short; overlaps its end; a plain match
        history = torch.full((16, room), 3)                                 # what lies behind a text must not matter
        for row, text in zip(history, texts):
            row[:len(text)] = torch.tensor(text)
        expected = [lookup_by_hand(text, depth) for text in texts]
        assert prompt_lookup(history, torch.tensor(list(map(len, texts))), depth).tolist() == expected
        matches += sum(row[0] >= 0 for row in expected)
    assert matches > 100


# ---------------------------------------------------------------------------------------------------------------------
# bf16 on a GPU, where no difference is excused

no_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA GPU: streams, graphs and bf16 exactness are its own")
gpu_only = lambda test: pytest.mark.gpu(no_gpu(test))


def embedded_pair():
    """... whose draft is made worse, so that misses are common."""
    target, draft = (Llama.load(ROOT / "weights" / name, DEVICE, torch.bfloat16) for name in ("target", "draft"))
    return [target, worse(draft)]


@gpu_only
@pytest.mark.parametrize("batch, tree, temperature", list(itertools.product([1, 4], [None, "16"], [0.0, 1.0])))
def test_bf16_texts_are_equal_on_the_gpu(batch, tree, temperature):
    models = embedded_pair()
    prompts = [random.Random(i).choices(range(100, 4000), k=5 + 3 * i) for i in range(batch)]
    sampling, options = Sampling(temperature, seed=batch), Options(tree=tree)
    wanted = run(saguaro.autoregressive, models, prompts, 160, sampling)[0]
    for loop in (saguaro.sd, saguaro.ssd):
        for graphs in (True, False):
            for model in models:
                model.run_with(graphs=graphs)
            assert run(loop, models, prompts, 160, sampling, options)[0] == wanted, (loop.__name__, graphs)
    models[0].run_with(graphs=True, share=tune.usual_share(*models))        # beside a draft, here one in int8
    models[1].run_with(graphs=True).to_int8()
    stats = run(saguaro.ssd, models, prompts, 160, sampling, options)
    assert stats[0] == wanted and stats[1].hits and stats[1].hits < stats[1].lookups


@gpu_only
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("target, draft", [("weights/target", "weights/draft"),
                                           ("checkpoints/smollm2", "weights/smollm2-draft")])
def test_forty_prompts_on_the_gpu(target, draft, temperature):
    """40 prompts x 256 tokens in bf16: not one token differs. SD and SSD draft chains alone, trees in batches of 4; SSD's target
    keeps to its share of the GPU."""
    if not (ROOT / target).exists():
        pytest.skip(f"{target} isn't there")
    models = [Llama.load(ROOT / name, DEVICE, torch.bfloat16) for name in (target, draft)]
    tokenizer, sampling = Tokenizer.from_folder(ROOT / target), Sampling(temperature, seed=7)
    if target == "weights/target":
        prompts = [tokenizer.prompt(templates.opening(random.Random(i))) for i in range(40)]
    else:
        files = (ROOT / "prompts" / name for name in ("humaneval20_gsm8k20_mtbench20.jsonl", "humaneval7_gsm8k7_mtbench6.jsonl"))
        lines = next(path for path in files if path.exists()).read_text().splitlines()
        texts = [json.loads(line)["prompt"] for line in lines]
        prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
        prompts += [tokenizer.prompt(text[:len(text) // 2]) for text in texts]
        prompts = prompts[::len(prompts) // 40]
    assert len(prompts) == len({*map(tuple, prompts)}) == 40
    wanted = [run(saguaro.autoregressive, models, [prompt], 256, sampling)[0][0] for prompt in prompts]
    for loop in (saguaro.sd, saguaro.ssd):
        models[0].run_with(share=tune.usual_share(*models) if loop is saguaro.ssd else None)
        for size, tree in ((1, None), (4, "16")):
            parts = (run(loop, models, prompts[i:i + size], 256, sampling, Options(tree=tree))[0]
                     for i in range(0, 40, size))
            assert list(itertools.chain.from_iterable(parts)) == wanted, (loop.__name__, size, tree)


@gpu_only
@pytest.mark.parametrize("tree", [None, "16"])
def test_streams_may_be_late(tree, monkeypatch):
    """Either side of a round, or branch of its graph, starts late by chance, twenty times: the tokens stay the same."""
    models, rng = embedded_pair(), random.Random(0)
    prompts, options = [random.Random(i).choices(range(100, 4000), k=5 + 3 * i) for i in range(3)], Options(tree=tree)
    wanted = run(saguaro.autoregressive, models, prompts, 64, Sampling(0.8, seed=1))[0]

    def late(work):
        def wrapper(*args, **more):
            torch.cuda._sleep(rng.choice((0, 0, 100_000, 2_000_000)))
            return work(*args, **more)
        return wrapper
    for side, step in (*((Target, step) for step in ("verify", "_verify")),
                       *((Drafter, step) for step in ("precompute", "_precompute", "switch", "fall_back", "round"))):
        monkeypatch.setattr(side, step, late(getattr(side, step)))
    for _ in range(20):
        vars(models[0]).pop("idle")                                         # graphs are recorded anew, late elsewhere
        assert run(saguaro.ssd, models, prompts, 64, Sampling(0.8, seed=1), options)[0] == wanted


@gpu_only
@pytest.mark.parametrize("size", (1, 3))
@pytest.mark.parametrize("widths", (None, "4,2,1,1"))
def test_a_usual_round_is_one_replay(widths, size, monkeypatch):
    """... or two after a miss; after new plans and the ends of sequences it's parts for a while. The text is ar's all along."""
    models, replay, replays, seen = embedded_pair(), torch.cuda.CUDAGraph.replay, [0], Counter()

    def counted(graph):
        replays[0] += 1
        replay(graph)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    options = Options(k=4, tree=widths, rests=False)
    tree = Tree.chain(4, DEVICE) if widths is None else Tree.from_widths(options.widths(), DEVICE)
    few = min(tree.size, options.fanout_budget - 3)
    fans = itertools.cycle([[4] + [1] * (few - 1) + [0] * (tree.size - few), [1] * (few - 1) + [0] * (tree.size - few) + [4]])
    monkeypatch.setattr(saguaro, "make_plan", lambda *args: (tree, next(fans)))
    monkeypatch.setattr(saguaro, "time_to_replan", lambda options, batch, rounds: rounds % 40 == 0)
    prompts = [random.Random(i).choices(range(100, 4000), k=5 + 3 * i) for i in range(size)]
    request = prompts, [300, 90, 200][:size], Sampling(0.8, seed=1)
    wanted, found = run(saguaro.autoregressive, models, *request)[0], [[] for _ in range(size)]
    for chunks in saguaro.ssd(*models, *request, options):
        seen[replays[0]] += 1
        replays[0] = 0
        for chunk in chunks:
            found[chunk.sequence] += chunk.tokens
    assert found == wanted
    assert min(seen[1], seen[2]) > 3 and seen[1] + seen[2] > 0.5 * seen.total()


@gpu_only
@pytest.mark.parametrize("batch, tree", ((1, None), (3, None), (1, "4,2,1,1"), (3, "4,2,1,1")))
@pytest.mark.parametrize("loop", (saguaro.autoregressive, saguaro.sd, saguaro.ssd))
def test_a_round_allocates_nothing_and_waits_for_nothing_but_its_outcome(loop, batch, tree, monkeypatch):
    """Once all graphs are recorded: no memory from the allocator, and none of the syncs that torch knows of."""
    if loop is saguaro.autoregressive and tree:
        pytest.skip("nothing is drafted")
    models, stats = embedded_pair(), Stats()
    options = () if loop is saguaro.autoregressive else (Options(tree=tree, fanout_budget=8, rests=False),)
    prompts, seeds = [[0, 300, 200, 100]] * batch, [3 + row for row in range(batch)]
    rounds = loop(*models[:1 + len(options)], prompts, 900, Sampling(1.0), *options, seeds=seeds, stats=stats)
    launched, ahead = [], Beside.ahead
    monkeypatch.setattr(Beside, "ahead", lambda *args: (launched.append(1), ahead(*args))[1])
    assert allocations(rounds) == 0
    if loop is saguaro.ssd:                         # once all graphs are there, each verify is launched ahead of its outcome
        assert stats.sources["neural"][0] > 3 and stats.sources["hit"][0] > 3 and len(launched) > 40

"""tune.py: the speedup model is Theorem 7's, the fastest plan wins, what the user asked for stays, the cache can't hurt."""
import dataclasses
import itertools
import json
import os
from types import SimpleNamespace

import pytest
import torch

import tune
import tune_cache
from batch import Options, Stats
from kernels import Share
from model import Llama, LlamaConfig
from plan import expected_speedup, make_plan
from saguaro import autoregressive, sd, ssd
from sampling import Sampling
from tree import Tree
from tune import Times

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DRAFT = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(vocab_size=1000))


def machine(verify=5e-3, draft=0.5e-3, slowdown=((None, 1.0, 1.0),), widening=0.0, **extra):
    """Times of a machine where only a verify's width costs something, `widening` seconds a token."""
    return Times(1, [[n, verify + widening * n] for n in tune.TOKENS], [[n, draft] for n in (1, *tune.BRANCHES)], slowdown,
                 dict(dict(ar=0.0, sd=0.0, ssd=0.0), **extra))


def ran(*rates, looks=10_000):
    """Stats of a run in which the target took the draft's r-th choice with chance rates[r]."""
    stats = Stats()
    for row, rate in zip(stats.choices, [*rates, *[0.0] * len(stats.choices)]):
        row[:] = looks, rate * looks
    return stats


GREEDY = Sampling(), "coupled"
GOOD = ran(.75, .1, .05, .03, .02, .01)


def test_interpolate():
    points = [[7, 2.0], [1, 1.0], [16, 5.0]]
    assert [tune.interpolate(points, x) for x in (0, 1, 4, 7, 16)] == [1, 1, 1.5, 2, 5]
    assert tune.interpolate(points, 19) == pytest.approx(6) and tune.interpolate(points[:1], 50) == 2


def test_expected_on_a_chain():
    """E = (1 - a^{K+1}) / (1 - a), and with all tokens guessed every outcome is a hit."""
    a, k = 0.7, 5
    accept = [a, 0.2, 0.1]
    tokens, hit = tune.expected(Tree.chain(k), [2] * k + [3], accept)
    assert tokens == pytest.approx((1 - a ** (k + 1)) / (1 - a)) and hit == pytest.approx(1)
    _, hit = tune.expected(Tree.chain(k), [1] * k + [0], accept)
    assert hit == pytest.approx(0.2 / 0.3 * (1 - a ** k))


@pytest.mark.parametrize("fanout, worth", (("geometric", 16), ("confident", 32)))
def test_prediction_is_theorem_7(fanout, worth):
    """Outcomes that each round chooses hit like twice as many that don't."""
    times, options = machine(), Options(k=6, fanout=fanout)
    plans = tune.choose(times, GOOD, DRAFT, options, asked=("k", "fanout_budget"))
    tree, fan = make_plan(Options(k=6, fanout="geometric", fanout_budget=worth), GOOD, DRAFT)
    tokens, hit = tune.expected(tree, fan, GOOD.rank_acceptance())
    forward = 0.5 / 5
    ar = plans["ar"].tokens_per_second
    assert ar == pytest.approx(200)
    assert plans["ssd"].tokens_per_second / ar == pytest.approx(expected_speedup(hit, tokens, tokens, 7 * forward, 6 * forward))
    assert plans["sd"].tokens_per_second / ar == pytest.approx(tokens / (1 + 6 * forward))
    assert (plans["ssd"].k, plans["ssd"].tree, plans["ssd"].fanout_budget) == (6, None, 16)


@pytest.mark.parametrize("fastest, times, stats", [
    ("ssd", machine(), GOOD),
    ("sd", machine(slowdown=[[None, 2.0, 2.0]]), GOOD),                                     # nothing runs beside anything
    ("sd", machine(ssd=5e-3), GOOD),
    ("ar", machine(draft=20e-3), GOOD),                                     # a draft slower than its target
    ("ar", machine(), ran(.02)),                                            # a draft that knows nothing
    ("ar", machine(widening=5e-3), ran(.5, .1)),                            # a CPU: tokens cost what they weigh
])
def test_the_fastest_mode(fastest, times, stats):
    assert tune.best_mode(tune.choose(times, stats, DRAFT)) == fastest


def test_plans_fit_the_machine():
    free_width = tune.choose(machine(), GOOD, DRAFT)
    assert free_width["sd"].tree == "63" and free_width["ar"].share is None
    assert tune.choose(machine(draft=5e-3), GOOD, DRAFT)["sd"].k <= 2       # a forward of the draft costs a verify
    assert tune.choose(machine(widening=2e-3), GOOD, DRAFT)["sd"].tree is None
    roomy = machine(slowdown=[[None, 1.1, 3.0], [[232, 16], 1.2, 1.1]])
    plans = tune.choose(roomy, GOOD, DRAFT)
    assert (plans["ssd"].share, plans["sd"].share) == (Share(232, 16), None)
    batch = dataclasses.replace(machine(), batch=8)
    assert tune.choose(batch, GOOD, DRAFT)["ar"].tokens_per_second == pytest.approx(1600)
    assert tune.choose(batch, GOOD, DRAFT)["ssd"].tokens_per_second < 8 * free_width["ssd"].tokens_per_second
    hits = [tune.choose(machine(), GOOD, DRAFT, Options(accept="residual").settled(Sampling(T)), ("k", "tree", "fanout_budget"))
            ["ssd"].hit_rate for T in (0.0, 1.0)]
    assert hits[0] > hits[1]                                                # rejection sampling can't go by each round's confidence


@pytest.mark.parametrize("asked", [dict(k=4), dict(tree="15"), dict(tree="3,2,1", k=6), dict(tree="15", k=5),
                                   dict(fanout_budget=5), dict(k=3, fanout_budget=7)])
def test_what_was_asked_for_stays(asked):
    plans = tune.choose(machine(), GOOD, DRAFT, Options(**asked), tuple(asked))
    for mode, (name, value) in itertools.product(("sd", "ssd"), asked.items()):
        assert getattr(plans[mode], name) == value
    assert plans["ssd"].tree == asked.get("tree") or "k" not in asked


def test_small_vocabulary():
    draft = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(vocab_size=12))
    assert set(tune.choose(machine(), GOOD, draft)) == {"ar", "sd", "ssd"}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

CONFIG = LlamaConfig(vocab_size=67, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, max_context=200,
                     dtype=torch.float32)


@pytest.fixture(scope="module")
def measured():
    pair = Llama.random(CONFIG, 0, DEVICE), Llama.random(dataclasses.replace(CONFIG, n_layers=1), 1, DEVICE)
    times = tune.measure(*pair, batch=2, context=40)
    stats = tune.try_modes(times, *pair, [[1, 2, 3], [4, 5]], 24, Sampling(), Options())
    return pair, times, stats


def test_measure(measured):
    (target, _), times, stats = measured
    assert [n for n, _ in times.verify] == list(tune.TOKENS)
    assert all(s > 0 for *_, s in times.verify + times.draft) and {1, 8, 16, 32} <= {n for n, _ in times.draft}
    assert [share for share, *_ in times.slowdown] == [None, *tune.shares(target)]
    assert all(s >= 1 and d >= 1 for _, s, d in times.slowdown) and all(s >= 0 for s in times.extra.values())
    assert stats.rounds > 5 and stats.lookups and stats.choices[1][0]
    assert len(times.slowdown) == (3 if DEVICE.type == "cuda" else 1)


@pytest.mark.parametrize("a, b, beside_a, beside_b", [(6.0, 4.0, 6.7, 6.0), (6.0, 4.0, 6.4, 7.2), (5.0, 5.0, 10.0, 10.0),
                                                      (3.0, 1.0, 3.0, 1.0)])
def test_slowdowns_give_back_what_was_measured(a, b, beside_a, beside_b):
    """A verify of a ms and a draft of b ms, which took longer side by side. The one that is done last runs on as it does alone."""
    first, n = min(beside_a, beside_b), 6
    s, d = tune.slowdown(a, beside_a, first), tune.slowdown(b, beside_b, first)
    times = Times(1, [[1, a]], [[1, b / (n + 1)]], [[None, s, d]])
    assert times.together_seconds(Tree.chain(n), 1) == pytest.approx(max(beside_a, beside_b))
    alone = dataclasses.replace(times, slowdown=[[None, 1.0, 1.0]])
    assert alone.together_seconds(Tree.chain(n), 1) == pytest.approx(max(a, b))


def test_noise_is_no_speedup():
    assert tune.slowdown(5.0, 4.9, 4.9) == 1 and 1 < tune.slowdown(1.0, 9.0, 2.0) <= 10


def test_tuned_plans_run_and_keep_the_text(measured):
    (target, draft), times, stats = measured
    plans = tune.choose(times, stats, draft)
    prompts, found = [[1, 2, 3], [4, 5]], []
    for mode, loop in (("ar", autoregressive), ("sd", sd), ("ssd", ssd)):
        plan, texts = plans[mode], [[], []]
        options = [Options(k=plan.k, tree=plan.tree, fanout_budget=plan.fanout_budget)] if mode != "ar" else []
        for chunks in loop(*(target, draft)[:1 + len(options)], prompts, 20, Sampling(), *options):
            for chunk in chunks:
                texts[chunk.sequence] += chunk.tokens
        found.append(texts)
    assert found[0] == found[1] == found[2]
    assert len(tune.describe(times, plans)) == 7


# ---------------------------------------------------------------------------------------------------------------------
# The cache

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_cache, "key", lambda target, *_: target)
    return tmp_path / "cache" / "saguaro" / "tune.json"


def test_cache_keeps_what_was_measured(cache, capsys):
    plans = tune.choose(machine(), GOOD, DRAFT)
    assert tune_cache.load("pair", DRAFT, 1, *GREEDY) is None
    GOOD.misses[3] = [10, 4]
    tune_cache.save("pair", DRAFT, machine(), GOOD, *GREEDY)
    tune_cache.save("other", DRAFT, machine(verify=1.0), GOOD, *GREEDY)
    times, stats = tune_cache.load("pair", DRAFT, 1, *GREEDY)
    assert times == machine() and stats.choices == GOOD.choices and stats.misses == {3: [10, 4]}
    assert tune.choose(times, stats, DRAFT) == plans and tune_cache.load("other", DRAFT, 1, *GREEDY)[0].verify_seconds(1) == 1.0
    entry = json.loads(cache.read_text())["pair"]
    assert entry["fastest"] == "ssd" and entry["plans"]["sd"]["tree"] == "63"
    assert os.listdir(cache.parent) == ["tune.json"] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("content", ["{", "[]", '{"pair": 3}', '{"pair": {}}', "\udce9", '{"pair": {"times": {"batch": 1}, '
                                     '"choices": [], "misses": {}}}'])
def test_broken_cache_is_ignored(cache, capsys, content):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert tune_cache.load("pair", DRAFT, 1, *GREEDY) is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(cache) in err and "--tune" in err
    tune_cache.save("pair", DRAFT, machine(), GOOD, *GREEDY)
    assert tune_cache.load("pair", DRAFT, 1, *GREEDY)[0] == machine()


def test_unwritable_cache_is_told_of(cache, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tune_cache.save("pair", DRAFT, machine(), GOOD, *GREEDY)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path) in err


def test_cache_key_tells_pairs_apart(measured):
    """Models, batch sizes, ways to sample, and drafts that differ in nothing but one weight, as a fine-tuned one may; not: one loaded again."""
    target, draft = measured[0]
    again, other = (Llama.random(draft.config, 1, DEVICE) for _ in range(2))
    other.layers[0].wo[3, 5] += 0.5
    int8 = Llama.random(draft.config, 1, DEVICE).to_int8()
    int8_other = Llama.random(draft.config, 2, DEVICE).to_int8()
    pairs = (target, draft, 1), (target, draft, 2), (draft, target, 1), (target, other, 1), (target, int8, 1), (target, int8_other, 1)
    keys = {tune_cache.key(*pair, *GREEDY) for pair in pairs}
    ways = (Sampling(0.7), "coupled"), (Sampling(0.7), "residual"), (Sampling(0.7, top_k=40), "coupled"), (Sampling(0.8), "coupled")
    keys |= {tune_cache.key(target, draft, 1, *way) for way in ways}
    assert len(keys) == len(pairs) + len(ways) and all(torch.__version__ in key for key in keys)
    assert tune_cache.key(target, again, 1, Sampling(seed=3), "residual") == tune_cache.key(target, draft, 1, *GREEDY)
    assert tune_cache.fingerprint(draft) == tune_cache.fingerprint(Llama.random(draft.config, 1, "cpu").to(DEVICE))


@pytest.mark.parametrize("options, in_flight", [(dict(k=7), 48), (dict(k=8), 32), (dict(tree="32", k=8), 32),
                                                (dict(tree="4,2,1,1", k=8), 48), (dict(tree="2" + 9 * ",1"), 32)])
def test_a_target_beside_a_draft_of_many_levels_keeps_less_in_flight(monkeypatch, options, in_flight):
    monkeypatch.setattr(tune, "shares", lambda model: [Share(132), Share(132, 32)])
    model = SimpleNamespace(device=torch.device("cpu"))
    assert tune.usual_share(model, model, Options(**options)).in_flight == in_flight

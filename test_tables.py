"""
Losslessness in distribution: the real sd and ssd loops on models so small that every probability is known.

A `TableModel` reads its next-token logits from a table, by the last token and the parity of its position. With V = 8
tokens the joint law of consecutive tokens can be written down, and a batch of thousands of sequences, each with a seed
of its own, is a sample of it that a G-test can judge. Tests named *red* put a defect into the engine and ask that the
same judgement rejects it.
"""
import collections
import math

import pytest
import torch

import kernels
import plan
import saguaro
from draft import Drafter
from model import LlamaConfig
from sampling import Sampler, Sampling, filter_logits, saguaro_probs
from saguaro import Options, Stats
from tree import Tree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V = 8
PROMPT = [3, 1, 4, 1, 5, 2, 6, 5, 3, 1, 4, 0, 7, 5, 2, 6, 3, 1]     # its pairs recur: prompt lookup has what to propose
GREEN, RED = 1e-3, 1e-9         # p-values: a correct engine stays above the one, a defect must fall below the other


# ---------------------------------------------------------------------------------------------------------------------
# Models

class TableModel:
    """Logits table[position % 2, token]: all that the loops ask of a model, without layers and without a cache."""

    def __init__(self, table, d2t=None):
        self.table, self.device, self.dtype, self.d2t = table, table.device, torch.float32, d2t
        self.config = LlamaConfig(vocab_size=table.shape[-1], dim=1, n_layers=0, n_heads=1, n_kv_heads=1, head_dim=2,
                                  ffn_dim=1, target_vocab_size=None if d2t is None else V)

    def __call__(self, tokens, positions, slots, prefix_len, mask, cache, end=None):
        return self.table[positions % 2, tokens.clamp(min=0)]

    def logits(self, hidden):
        return hidden


def random_table(seed, scale):
    return (torch.randn(2, V, V, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


TARGET = TableModel(random_table(0, 1.2))
DRAFT = TableModel(0.75 * TARGET.table + random_table(1, 0.7))      # the target accepts about two tokens in three
POOR = TableModel(random_table(2, 1.5))                             # has nothing to do with the target
KNOWN = torch.tensor([-1, 0, 2, 3, 5, 6, 7], device=DEVICE)         # a trimmed draft: it has never heard of 1 and 4
TRIMMED = TableModel(DRAFT.table[:, KNOWN.clamp(min=0)][:, :, KNOWN.clamp(min=0)], KNOWN)


def generate(loop, options, sampling=Sampling(1.0), draft=DRAFT, size=4000, new=6):
    """Let `size` sequences of a seed each generate `new` tokens. Returns the Stats, with a trace."""
    stats = Stats(trace=[])
    for _ in loop(TARGET, draft, [PROMPT] * size, new, sampling, options, seeds=list(range(size)), stats=stats):
        pass
    return stats


# ---------------------------------------------------------------------------------------------------------------------
# The judgement

def g_test(counts, law):
    """p-value of the G-test (likelihood-ratio chi-square) that each row of counts [R, n] is a sample of law [R, n].

    In a row, the cells with the least expected count are pooled until no cell expects less than 5. A count where the
    law is zero is impossible: p = 0.
    """
    if (counts * (law == 0)).sum() > 0:
        return 0.0
    total, freedom = 0.0, 0
    for seen, p in zip(counts.double(), law.double()):
        expected, order = (seen.sum() * p).sort()
        n = max(int((expected < 5).sum()), int((expected.cumsum(0) < 5).sum()) + 1)
        if n < len(p):
            seen, expected = (torch.cat([x[:n].sum()[None], x[n:]]) for x in (seen[order], expected))
            total += 2 * torch.special.xlogy(seen, seen / expected).sum().item()
            freedom += len(seen) - 1
    assert freedom > 0, "too few samples"
    return torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(total / 2).double()).item()


def judge(stats, sampling=Sampling(1.0)):
    """p-values of a run, by what they test: is every part of its text a sample of the target's own distribution?

    Besides the first three tokens, this looks at the rounds whose speculation came from a hit apart from those after a
    miss: the next token given the last one must follow the target's law in either. Conditioning on the source is sound
    because it is settled by the past. Whether round T's speculation is a hit is decided by round T-1's outcome, so by
    the text up to the root, the draft's logits on it, and the noise at its positions; an exact sampler draws what comes
    next independently of all these. For the same reason one may ask for the i-th token of a round: that the round
    gets so far depends on the tokens before it. (One may not ask for the round's *last* token, or for rounds that
    accepted k tokens: those look at the future, and bonus tokens alone are distributed as the residual.) Rows are
    (parity, last token), which is past as well; what is left is a sum of martingale differences, so the usual
    chi-square limit holds although a sequence gives several samples.
    """
    law = filter_logits(TARGET.table / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1).double().cpu()
    pair_law = law[..., None] * law.flip(0)[:, None]                        # [2, V, V, V]: P(x, y | parity, last)
    texts, starts = collections.defaultdict(list), collections.defaultdict(list)    # by sequence
    singles, pairs = collections.Counter(), collections.Counter()
    for entry in stats.trace:
        text = texts[entry["sequence"]]
        source = entry["source"] if text else "first"
        starts[entry["sequence"]].append((source, len(text)))
        for i, token in enumerate(entry["tokens"]):
            last, parity = (text or PROMPT)[-1], (len(PROMPT) + len(text) - 1) % 2
            singles[source, min(i, 2), parity, last, token] += 1
            text.append(token)
    for sequence, rounds in starts.items():
        text = texts[sequence]
        for source, i in rounds:
            if 0 < i < len(text) - 1:       # a round's first token with the one behind it, whichever round gave that
                pairs[source, (len(PROMPT) + i - 1) % 2, text[i - 1], text[i], text[i + 1]] += 1

    def count(items, *shape):
        index, number = zip(*items)
        return torch.zeros(shape).index_put(tuple(torch.tensor(index).T), torch.tensor(number).float())

    joint = lambda i: count(collections.Counter(tuple(t[i:i + 2]) for t in texts.values()).items(), V, V).view(1, -1)
    first = (len(PROMPT) - 1) % 2
    after_one = torch.einsum("x,xyz->yz", law[first, PROMPT[-1]], pair_law[1 - first])
    result = {"tokens 1, 2": g_test(joint(0), pair_law[first, PROMPT[-1]].view(1, -1)),
              "tokens 2, 3": g_test(joint(1), after_one.reshape(1, -1))}
    for source, i in sorted({key[:2] for key in singles}):
        items = [(key[2:], n) for key, n in singles.items() if key[:2] == (source, i)]
        if sum(n for _, n in items) >= 500:
            result[f"{source}: token {i}"] = g_test(count(items, 2, V, V).view(2 * V, V), law.view(2 * V, V))
    for source in sorted({key[0] for key in pairs}):
        items = [(key[1:], n) for key, n in pairs.items() if key[0] == source]
        result[f"{source}: pairs"] = g_test(count(items, 2, V, V, V).view(2 * V, -1), pair_law.view(2 * V, -1))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Lossless

CHAIN = dict(accept="residual", k=3, fanout="uniform", fanout_budget=6)
TREE = dict(accept="residual", tree="3,2,1", fanout="uniform", fanout_budget=12)
FILTERED = Sampling(0.7, top_k=6, top_p=0.95)
LONG = dict(size=500, new=64)           # beyond rounds 16 and 32, where fan-out and best tree are planned again

CASES = {                               # name: (loop, options, what else `generate` is to know)
    "sd chain": (saguaro.sd, CHAIN, {}),
    "sd tree": (saguaro.sd, TREE, {}),
    "sd tree poor draft": (saguaro.sd, TREE, dict(draft=POOR)),
    "sd best tree": (saguaro.sd, CHAIN | dict(tree="7"), LONG),
    "sd filtered": (saguaro.sd, TREE, dict(sampling=FILTERED)),
    "sd trimmed": (saguaro.sd, TREE, dict(draft=TRIMMED)),
    **{f"ssd {name} C={c}": (saguaro.ssd, options | dict(saguaro_c=c), {})
       for name, options in (("chain", CHAIN), ("tree", TREE)) for c in (0, 0.1, 0.5, 1)},
    "ssd chain fast": (saguaro.ssd, CHAIN | dict(backup="fast", saguaro_c=0.5), {}),
    "ssd tree fast": (saguaro.ssd, TREE | dict(backup="fast", saguaro_c=0.5), {}),
    "ssd filtered": (saguaro.ssd, CHAIN | dict(saguaro_c=0.5), dict(sampling=FILTERED)),
    "ssd filtered fast": (saguaro.ssd, TREE | dict(backup="fast"), dict(sampling=FILTERED)),
    "ssd tree poor draft": (saguaro.ssd, TREE | dict(saguaro_c=0.5), dict(draft=POOR)),
    "ssd trimmed": (saguaro.ssd, CHAIN | dict(saguaro_c=0.5), dict(draft=TRIMMED)),
    "ssd geometric": (saguaro.ssd, TREE | dict(fanout="geometric", saguaro_c=0.5), LONG),
    "ssd auto": (saguaro.ssd, CHAIN | dict(fanout="auto", saguaro_c=0.5, tree="7"), LONG),
    "ssd coupled chain": (saguaro.ssd, CHAIN | dict(accept="coupled"), {}),
    "ssd coupled tree": (saguaro.ssd, TREE | dict(accept="coupled"), dict(sampling=FILTERED)),
    "ssd coupled fast": (saguaro.ssd, CHAIN | dict(accept="coupled", backup="fast"), {}),
}


def judge_case(name, **changed):
    loop, options, more = CASES[name]
    more = more | changed
    return judge(generate(loop, Options(**options), **more), more.get("sampling", Sampling(1.0)))


def check_lossless(name, result):
    miss = "fast" if "fast" in name else "neural"
    groups = [miss] if name.startswith("sd") else ["hit", miss]             # in sd every speculation is a "miss"
    assert all(f"{group}: pairs" in result and f"{group}: token 0" in result for group in groups), result
    assert min(result.values()) > GREEN, result


@pytest.mark.parametrize("name", CASES)
def test_lossless(name):
    check_lossless(name, judge_case(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_lossless_in_200_000_samples(name):
    check_lossless(name, judge_case(name, size=4000, new=52))


@pytest.mark.parametrize("name", ("sd tree", "ssd tree C=0.5", "ssd geometric", "ssd tree fast"))
def test_stored_q_is_what_was_sampled_from(name, monkeypatch):
    """Every node's q is q_C with the node's own F, whichever branch it was drafted in; a point mass where looked up."""
    seen, plans, verify, make_plan = collections.Counter(), [], saguaro.Target.verify, Drafter.plan

    def watch_plan(self, tree, fan_out):
        make_plan(self, tree, fan_out)
        plans.append(self.layout.counts)

    def watch_verify(self, tokens, stored, tree, alone=False):
        at = self.prefix_len[:, None] + tree.node_depth
        logits = DRAFT.table[at % 2, tokens.clamp(min=0)]
        q = saguaro_probs(logits, torch.tensor(plans[-1], device=DEVICE), CASES[name][1].get("saguaro_c", 1))
        for node in (n for n in range(tree.size) if tree.n_children[n]):
            looked_up = (stored[:, node].amax(-1) == 1) | (tokens[:, tree.first_child[node]] < 0)
            assert looked_up.any() <= ("fast" in name)
            torch.testing.assert_close(stored[~looked_up, node], q[~looked_up, node])
            seen["drafted"] += (~looked_up).sum().item()
            seen["looked up"] += looked_up.sum().item()
        return verify(self, tokens, stored, tree)
    monkeypatch.setattr(Drafter, "plan", watch_plan)
    monkeypatch.setattr(saguaro.Target, "verify", watch_verify)
    loop, options, _ = CASES[name]
    generate(loop, Options(**options), size=50, new=64)
    assert seen["drafted"] > 1000 and (seen["looked up"] > 100) == ("fast" in name)
    assert len({f for plan in plans for f in plan}) > 1 or "geometric" not in name


def accept_by_hand(tokens, tree, p, q, coins, noise, wrong=None):
    """accept_residual written a second time, a sequence at a time in plain Python, with a defect on demand."""
    verdicts = []
    for s, p_s, q_s, u_s, g_s in zip(*(x.tolist() for x in (tokens, p, q, coins, noise))):
        path, stopped = [0], False
        while not stopped:
            node, d = path[-1], len(path) - 1
            left, draft, stopped = p_s[node], q_s[node], True
            for rank, child in enumerate(tree.children[node].tolist()):
                x = s[child]
                if child < 0 or x < 0:
                    continue
                u = u_s[d][rank] * draft[x]
                if u < left[x] or wrong == "takes p = 0" and u <= left[x]:
                    path.append(child)
                    stopped = False
                    break
                rest = [max(a - b, 0.0) for a, b in zip(left, draft)]
                left = [a / sum(rest) for a in rest]
                others = [b * (v != x or wrong == "x stays in q") for v, b in enumerate(draft)]
                draft = [b / sum(others) if sum(others) else 0.0 for b in others]
        if wrong == "bonus from p":
            left = p_s[path[-1]]
        bonus = max((math.log(a) + g, v) for v, (a, g) in enumerate(zip(left, g_s[len(path) - 1])) if a > 0)[1]
        verdicts.append((path + [path[-1]] * (tree.depth + 1 - len(path)), len(path) - 1, bonus))
    return saguaro.Verdict(*(torch.tensor(x, device=tokens.device) for x in zip(*verdicts)))


@pytest.mark.parametrize("widths", ([1, 1, 1, 1], [3, 2, 1], [4, 1, 2]))
def test_accept_residual_by_hand(widths):
    """Row by row the same verdict as the plain-Python twin, on drafts with zeros, empty nodes and unlikely tokens."""
    tree, B, gen = Tree.from_widths(widths), 2000, torch.Generator().manual_seed(1)
    uniform = lambda *shape: torch.rand(shape, generator=gen, dtype=torch.float64)
    dists = lambda: (uniform(B, tree.size, V) ** 3 * (uniform(B, tree.size, V) < 0.8) + 1e-9)
    p, q = (x / x.sum(-1, keepdim=True) for x in (dists(), dists()))
    tokens = torch.zeros(B, tree.size, dtype=torch.int64)
    for node in range(tree.size):
        own = (q[:, node].log() + -(-uniform(B, V).log()).log()).argsort(descending=True)       # without replacement
        for rank, child in enumerate(c for c in tree.children[node].tolist() if c > 0):
            tokens[:, child] = own[:, rank]
    tokens[:, 1:][uniform(B, tree.size - 1) < 0.1] = -1
    args = tokens, tree, p, q, uniform(B, tree.depth, max(widths)), -(-uniform(B, tree.depth + 1, V).log()).log()
    ours, twin = saguaro.accept_residual(*args), accept_by_hand(*args)
    assert all(torch.equal(a, b) for a, b in zip(ours, twin))
    assert len(set(twin.length.tolist())) == tree.depth + 1


# ---------------------------------------------------------------------------------------------------------------------
# Red: the same judgement finds the defects that an engine like this may have

def plain_q(monkeypatch):
    """Verification uses plain q although q_C was sampled from."""
    choices = Drafter.choices

    def wrong(self, hidden, *args):
        return *choices(self, hidden, *args)[:3], self.sampler.tempered(self.model.logits(hidden)).softmax(-1)
    monkeypatch.setattr(Drafter, "choices", wrong)


def accept_with(defect):
    def patch(monkeypatch):
        monkeypatch.setattr(saguaro, "accept_residual", lambda *args: accept_by_hand(*args, wrong=defect))
    return patch


def fast_as_if_drafted(monkeypatch):
    """The fast backup's proposals pass for samples of a uniform q (the reference accepts them too often as well)."""
    fall_back = Drafter.fall_back

    def wrong(self, backup):
        fall_back(self, backup)
        self.spec.q.copy_(torch.where(self.spec.q == 1, 1 / V, self.spec.q))
    monkeypatch.setattr(Drafter, "fall_back", wrong)


def choosy_lookup(monkeypatch):
    """A branch is dropped for what was sampled into it, so those that are left aren't samples of q."""
    switch = Drafter.switch

    def wrong(self, verdict, cache):
        dropped = cache.branches.tokens[:, :, 1] >= V // 2
        return switch(self, verdict, cache._replace(roots=cache.roots.masked_fill(dropped, -1)))
    monkeypatch.setattr(Drafter, "switch", wrong)
    monkeypatch.setattr(plan, "HOPELESS", 0)                                # few are left to hit


def frozen_noise(monkeypatch):
    """Coupled sampling with the same noise at every position."""
    noise = Sampler.noise
    monkeypatch.setattr(Sampler, "noise", lambda self, stream, positions, ids: noise(self, stream, positions * 0, ids))


@pytest.mark.parametrize("defect, name, where", (
    (plain_q, "ssd chain C=0.5", "tokens 1, 2"),
    (plain_q, "ssd chain C=0.5", "hit: token 0"),
    (plain_q, "ssd tree C=0.1", "neural: token 0"),
    (accept_with("bonus from p"), "sd chain", "tokens 1, 2"),
    (accept_with("bonus from p"), "ssd chain C=1", "tokens 2, 3"),
    (accept_with("bonus from p"), "ssd chain C=1", "hit: pairs"),
    (accept_with("bonus from p"), "ssd chain C=1", "neural: pairs"),
    (accept_with("x stays in q"), "sd tree poor draft", "tokens 1, 2"),
    (accept_with("x stays in q"), "ssd tree poor draft", "neural: token 0"),
    (fast_as_if_drafted, "ssd chain fast", "fast: token 0"),
    (choosy_lookup, "ssd chain C=1", "hit: token 0"),
    (frozen_noise, "ssd coupled chain", "tokens 1, 2"),
))
def test_red(defect, name, where, monkeypatch):
    defect(monkeypatch)
    assert judge_case(name)[where] < RED


def test_unmodified_twin_is_green(monkeypatch):
    """What turns the judgement red above is the defect, not the twin."""
    accept_with(None)(monkeypatch)
    assert min(judge_case("ssd tree C=0.5").values()) > GREEN


def test_impossible_tokens(monkeypatch):
    """A coin of exactly 0 must not accept a token that top-k has ruled out; the reference's `coin <= p / q` does."""
    uniform = kernels.uniform
    monkeypatch.setattr(kernels, "uniform", lambda *args: uniform(*args).where(uniform(*args) > 0.2, 0.0))
    options, sampling, law = Options(**CHAIN), Sampling(1.0, top_k=3), filter_logits(TARGET.table, 3, 1.0).softmax(-1)

    def impossible(stats):
        texts = collections.defaultdict(lambda: list(PROMPT))
        for entry in stats.trace:
            texts[entry["sequence"]] += entry["tokens"]
        return sum(law[(i - 1) % 2, text[i - 1], text[i]] == 0
                   for text in texts.values() for i in range(len(PROMPT), len(text)))

    run = lambda: impossible(generate(saguaro.sd, options, sampling, size=300, draft=DRAFT))
    assert run() == 0
    accept_with("takes p = 0")(monkeypatch)
    assert run() > 0


# ---------------------------------------------------------------------------------------------------------------------
# What C is for

def test_lower_c_means_more_hits_and_fewer_acceptances():
    hits, accepted = [], []
    for c in (0, 0.1, 0.3, 0.6, 1):
        runs = [generate(saguaro.ssd, Options(**CHAIN, saguaro_c=c), size=1000, new=12, draft=TableModel(
            0.75 * TARGET.table + random_table(seed, 0.7))) for seed in (1, 2, 3)]
        hits.append(sum(stats.hit_rate for stats in runs) / len(runs))
        accepted.append(sum(stats.acceptance_rate for stats in runs) / len(runs))
    assert hits == sorted(hits, reverse=True) and hits[0] > hits[-1] + 0.1, hits
    assert accepted == sorted(accepted) and accepted[0] < accepted[-1] - 0.1, accepted


# ---------------------------------------------------------------------------------------------------------------------
# What is measured while it runs

@pytest.mark.parametrize("options", (dict(k=2, fanout_budget=9), dict(tree="2,1", fanout_budget=10)))
def test_rank_acceptance_is_unbiased(options):
    """`Stats.choices` is how often the target's token is the draft's 1st, 2nd, 3rd choice, over all positions."""
    new, size = 12, 1000
    stats = generate(saguaro.ssd, Options(**options, fanout="uniform"), size=size, new=new)
    texts = [list(PROMPT) for _ in range(size)]
    for entry in stats.trace:
        texts[entry["sequence"]] += entry["tokens"]
    texts = torch.tensor(texts, device=DEVICE)                                                      # [size, C]
    at = torch.arange(len(PROMPT), texts.shape[1], device=DEVICE).expand(size, new)                 # positions chosen
    logits = DRAFT.table[(at - 1) % 2, texts[:, len(PROMPT) - 1:-1]]
    best = Sampler(Sampling(1.0), list(range(size)), DEVICE).scores(logits, at).argsort(-1, descending=True)
    ranks = (best == texts[:, len(PROMPT):, None]).float().mean((0, 1)).tolist()
    for r in range(3):
        seen, taken = stats.choices[r]
        assert taken / seen == pytest.approx(ranks[r], abs=0.015), (r, taken / seen, ranks)
    tree = Tree.from_widths([2, 2])
    assert min(tree.stop_probability(stats.rank_acceptance())) > 0

"""
The engine against an outside reference (transformers, or what was recorded from it) and against itself: the one forward
over token trees against decoding one token at a time, sampling against its distribution, the loader against broken
folders, the autoregressive loop against a model that is plain arithmetic.

`python test_engine.py` records goldens/engine.json anew (needs transformers and checkpoints/smollm2).
"""
import hashlib
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
from errors import UserError
from kernels.noise import ACCEPT, DRAFT, TARGET
from model import KVCache, Llama, LlamaConfig, prefill
from sampling import Sampler, Sampling, filter_logits
from saguaro import Stats, autoregressive
from tokenizer import Tokenizer

ROOT = Path(__file__).parent
GOLDENS = ROOT / "goldens" / "engine.json"
SMOLLM2 = ROOT / "checkpoints" / "smollm2"
PROMPTS = next((p for p in (ROOT / "prompts", ROOT.parent / "shared" / "prompts") if p.is_dir()), ROOT / "prompts")

TOLERANCE = 1e-5        # of fp32 logits: norm of the difference over norm of the logits, position by position
POISON = 1e4            # fills unused cache slots: a leak of any of them is far above the tolerance

TINY = LlamaConfig(vocab_size=96, dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=80,
                   max_context=1024, tie_embeddings=True, eos_ids=(2,), dtype=torch.float32)
TINY_LLAMA3 = replace(TINY, tie_embeddings=False, rope_theta=500000.0, eos_ids=(2, 3), rope_scaling=dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (README, Tests)")


@pytest.fixture(scope="module")
def smollm2():
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("checkpoints/smollm2 is not there (README, Tests)")
    return Llama.load(SMOLLM2, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers

def tiny(config=TINY, seed=0, device="cpu"):
    """A random model whose norm weights differ from 1, which Llama.random's don't."""
    model = Llama.random(config, seed, device, torch.float32)
    for i, p in enumerate(p for p in model.parameters() if p.dim() == 1):
        p.copy_(1 + 0.5 * torch.sin(torch.arange(len(p)) + i))
    return model


def error(ours, reference):
    """Largest relative error of the logits at any position."""
    ours, reference = ours.double().cpu(), reference.double().cpu()
    assert ours.shape == reference.shape
    return ((ours - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()


def new_cache(model, batch, capacity, poison=True):
    cache = KVCache(model.config, batch, capacity, model.device, torch.float32)
    if poison:
        cache.k.fill_(POISON)
        cache.v.fill_(POISON)
    return cache


def chain(model, cache, tokens, prefix_len):
    """Feed tokens [B, T] as a chain behind the prefix -> logits [B, T, V]."""
    tokens = torch.as_tensor(tokens, device=model.device)
    T = tokens.shape[1]
    at = prefix_len[:, None] + torch.arange(T, device=model.device)
    mask = torch.ones(T, T, dtype=torch.bool, device=model.device).tril()
    return model.logits(model(tokens, at, at, prefix_len, mask, cache))


def plain(model, tokens, cache=None, start=0):
    """Plain decoding, the reference for everything else: one sequence, one token at a time -> logits [T, V]."""
    cache = new_cache(model, 1, start + len(tokens), poison=False) if cache is None else cache
    return torch.cat([chain(model, cache, [[token]], torch.tensor([start + i], device=model.device))[0]
                      for i, token in enumerate(tokens)])


def decode_last(model, ids, **how):
    """Prefill all but the last token, decode that -> logits [1, V]."""
    cache = new_cache(model, 1, len(ids))
    return chain(model, cache, [ids[-1:]], prefill(model, cache, [ids], **how))[0]


def random_ids(n, seed=0, vocab=TINY.vocab_size):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(n)]


def texts(model, prompts, max_new_tokens, sampling=Sampling(), **options):
    """The whole texts of the autoregressive loop, a list of token ids per prompt."""
    out = [[] for _ in prompts]
    for chunks in autoregressive(model, prompts, max_new_tokens, sampling, **options):
        for chunk in chunks:
            out[chunk.sequence] += chunk.tokens
    return out


def hf_texts(hf, prompts, max_new_tokens):
    """Greedy text of transformers, one prompt at a time."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                           pad_token_id=0)
        out.append(text[0, len(prompt):].tolist())
    return out


def chi_square(counts, probs):
    """p-value of observed counts [n] under probabilities [n]; cells that expect fewer than 5 count as one."""
    counts, expected = counts.double(), probs.double() * counts.sum()
    assert (counts[expected == 0] == 0).all(), "a token of probability 0 was sampled"
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected >= 1], expected[expected >= 1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers

LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
HF_CASES = {    # name: (config.json without the spelled part, llama3 scaling, spelling, shards)
    "gqa-v5": (dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=2),
               None, 5, False),
    "wide-heads-tied-v4-shards": (dict(num_attention_heads=4, num_key_value_heads=1, head_dim=32,
                                       tie_word_embeddings=True, eos_token_id=[2, 5]), None, 4, True),
    "mha-llama3-v4-shards": (dict(num_attention_heads=2, tie_word_embeddings=False, eos_token_id=[2, 5, 7]),
                             LLAMA3_ROPE, 4, True),
    "llama3-v5-tied": (dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
                            eos_token_id=[2]), LLAMA3_ROPE, 5, False)}


def hf_case(transformers, folder, fields, scaling, spelling, shards):
    """A random transformers model, and the same in `folder` with config.json in the spelling of transformers 4 or 5."""
    fields = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=120, hidden_size=64,
                  intermediate_size=96, num_hidden_layers=3, rms_norm_eps=1e-5, max_position_embeddings=256,
                  bos_token_id=1, hidden_act="silu", **fields)
    theta, rope = 50000.0, None if scaling is None else {"rope_type": "llama3", **scaling}
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, rope_theta=theta, rope_scaling=rope))
    hf = hf.float().eval()
    g = torch.Generator().manual_seed(len(folder.name))
    for p in hf.parameters():       # transformers starts from std 0.02, where attention hardly looks at anything
        noise = torch.randn(p.shape, generator=g)
        p.copy_(1 + 0.3 * noise if p.dim() == 1 else noise * p.shape[1] ** -0.5)
    hf.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    spelled = (dict(rope_theta=theta, rope_scaling=rope, torch_dtype="float32") if spelling == 4 else
               dict(rope_parameters={"rope_theta": theta, "rope_type": "default", **(rope or {})}, dtype="float32"))
    (folder / "config.json").write_text(json.dumps({**fields, **spelled}))
    assert (folder / "model.safetensors.index.json").exists() == shards
    return hf


@pytest.mark.parametrize("case", HF_CASES)
def test_logits_equal_transformers(transformers, tmp_path, case):
    fields, scaling, spelling, shards = HF_CASES[case]
    with torch.inference_mode(False), torch.no_grad():
        hf = hf_case(transformers, tmp_path, fields, scaling, spelling, shards)
    model = Llama.load(tmp_path)
    eos = fields["eos_token_id"]
    assert model.dtype == torch.float32 and model.config.eos_ids == tuple(eos if isinstance(eos, list) else [eos])
    assert torch.allclose(model.freqs, hf.model.rotary_emb.inv_freq, rtol=1e-6)
    ids = random_ids(90, vocab=120)
    reference = hf(torch.tensor([ids])).logits[0]
    zero = torch.zeros(1, dtype=torch.int64)
    assert error(chain(model, new_cache(model, 1, 90), [ids], zero)[0], reference) < TOLERANCE      # one prefill
    assert error(plain(model, ids), reference) < TOLERANCE                                          # token by token
    cache = new_cache(model, 1, 90)
    prefix_len = prefill(model, cache, [ids[:41]], chunk=16)                                        # as the loops do it
    assert error(plain(model, ids[40:], cache, prefix_len.item()), reference[40:]) < TOLERANCE
    prompts = [ids[:n] for n in (1, 7, 60)]
    assert texts(model, prompts, 30, stop_ids=model.config.eos_ids) == hf_texts(hf, prompts, 30)


def test_transformers_reads_what_we_save(transformers, tmp_path):
    for i, config in enumerate((TINY, TINY_LLAMA3)):
        model = tiny(config)
        model.save(tmp_path / str(i))
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        assert hf.dtype == torch.float32
        eos = hf.generation_config.eos_token_id
        assert tuple(eos if isinstance(eos, list) else [eos]) == config.eos_ids
        ids = random_ids(100)
        assert error(hf(torch.tensor([ids])).logits[0], plain(model, ids)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("template", [False, True], ids=["raw", "chat"])
def test_smollm2_equals_transformers(transformers, smollm2, template):
    if not PROMPTS.is_dir():
        pytest.skip("prompts/ is not there (README, Tests)")
    hf = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    tokenizer = Tokenizer.from_folder(SMOLLM2)
    prompts = []
    for path in sorted(PROMPTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:4]:
            text = json.loads(line)["prompt"]
            prompts.append(tokenizer.chat([dict(role="user", content=text)]) if template else tokenizer.prompt(text))
    assert len(prompts) >= 12
    expected = hf_texts(hf, prompts, 64)
    ours = texts(smollm2, prompts[:1], 64, stop_ids=smollm2.config.eos_ids)     # one alone, the others in batches
    for i in range(1, len(prompts), 6):
        ours += texts(smollm2, prompts[i:i + 6], 64, stop_ids=smollm2.config.eos_ids)
    assert ours == expected
    for ids in (a + b for a, b in zip(prompts[::4], expected[::4])):    # rounding adds up: over the whole text
        reference, zero = hf(torch.tensor([ids])).logits[0], torch.zeros(1, dtype=torch.int64)
        for ours in (chain(smollm2, new_cache(smollm2, 1, len(ids)), [ids], zero)[0], plain(smollm2, ids)):
            assert error(ours.reshape(1, -1), reference.reshape(1, -1)) < TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# Goldens: what transformers said, for machines without it

TINY_GOLDENS = {"tied": (TINY, 1), "llama3": (TINY_LLAMA3, 2)}


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_goldens():
    """Write goldens/engine.json from transformers: greedy ids, and logits at a few places, in fp32 on the CPU.

    Tiny checkpoints are built by `tiny` from a seed. SmolLM2 is the one in checkpoints/smollm2 (its sha256 is noted),
    with the first row of each prompt file: code as it is, the others with the chat template.
    """
    import tempfile

    import transformers

    def look(hf, prompt, new_tokens, positions, ids):
        text = hf_texts(hf, [prompt], new_tokens)[0]
        logits = hf(torch.tensor([prompt + text])).logits[0]
        return dict(prompt=prompt, text=text, positions=positions, ids=ids,
                    logits=[[float(f"{x:.9g}") for x in logits[p, ids].tolist()] for p in positions])

    goldens = dict(transformers=transformers.__version__, torch=torch.__version__, tiny={}, smollm2={})
    with torch.no_grad():
        for name, (config, seed) in TINY_GOLDENS.items():
            with tempfile.TemporaryDirectory() as folder:
                tiny(config, seed).save(folder)
                hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                goldens["tiny"][name] = look(hf, random_ids(80, seed), 24, [0, 1, 17, 79, 90], list(range(0, 96, 7)))
        hf = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
        tokenizer = Tokenizer.from_folder(SMOLLM2)
        for path in sorted(PROMPTS.glob("*.jsonl")):
            row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
            prompt = (tokenizer.prompt(row["prompt"]) if path.stem == "humaneval" else
                      tokenizer.chat([dict(role="user", content=row["prompt"])]))
            n = len(prompt)
            goldens["smollm2"][row["id"]] = look(hf, prompt, 24, [0, 9, n - 1, n + 11], list(range(0, 49152, 4099)))
        goldens["smollm2_sha256"] = digest(SMOLLM2 / "model.safetensors")
    GOLDENS.parent.mkdir(exist_ok=True)
    text = json.dumps(goldens, indent=1)
    GOLDENS.write_text(re.sub(r"\[[^][{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n")   # a list a line


def check_golden(model, golden):
    prompt, text = golden["prompt"], golden["text"]
    assert texts(model, [prompt], len(text), stop_ids=model.config.eos_ids) == [text]
    cache = new_cache(model, 1, len(prompt) + len(text))
    logits = chain(model, cache, [prompt + text], torch.zeros(1, dtype=torch.int64, device=model.device))[0]
    ours, expected = logits[golden["positions"]][:, golden["ids"]], torch.tensor(golden["logits"])
    assert error(ours, expected) < TOLERANCE


@pytest.mark.parametrize("name", TINY_GOLDENS)
def test_tiny_goldens(name, device):
    golden = json.loads(GOLDENS.read_text())["tiny"][name]
    config, seed = TINY_GOLDENS[name]
    assert golden["prompt"] == random_ids(80, seed) and len(golden["text"]) > 0
    check_golden(tiny(config, seed, device), golden)


def test_smollm2_goldens(smollm2):
    goldens = json.loads(GOLDENS.read_text())
    if digest(SMOLLM2 / "model.safetensors") != goldens["smollm2_sha256"]:
        pytest.skip("checkpoints/smollm2 is not the checkpoint of goldens/engine.json (tools/convert_smollm2.py)")
    assert len(goldens["smollm2"]) == 3
    for golden in goldens["smollm2"].values():
        check_golden(smollm2, golden)


# ---------------------------------------------------------------------------------------------------------------------
# One forward, many uses: all of them equal plain decoding

@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
def test_any_chunking_of_the_prefill(chunk, device):
    model, ids = tiny(device=device), random_ids(600)
    for n in (1, 2, 3, 4, 7, 8, 9, 30, 600):
        reference = new_cache(model, 1, n, poison=False)
        logits = plain(model, ids[:n], reference)
        cache = new_cache(model, 1, n + 5)
        prefix_len = prefill(model, cache, [ids[:n]], chunk)
        assert prefix_len.tolist() == [n - 1]
        assert error(chain(model, cache, [[ids[n - 1]]], prefix_len)[0], logits[-1:]) < TOLERANCE
        for ours, theirs in ((cache.k, reference.k), (cache.v, reference.v)):
            assert error(ours[:, :, :, :n].flatten(3), theirs.flatten(3)) < TOLERANCE
            assert (ours[:, :, :, n:] == POISON).all(), "the prefill wrote behind the prompt"


@pytest.mark.parametrize("lengths", [[5, 1, 40, 17], [1, 1], [30, 30, 2]])
def test_batch_of_different_lengths_equals_each_alone(lengths, device):
    model = tiny(device=device)
    sequences = [random_ids(n + 12, seed=i) for i, n in enumerate(lengths)]
    alone = [plain(model, ids) for ids in sequences]
    cache = new_cache(model, len(lengths), max(lengths) + 12)
    prefix_len = prefill(model, cache, [ids[:n] for ids, n in zip(sequences, lengths)], chunk=7)
    rows = list(range(len(lengths)))
    for t in range(12):                                 # on the way the batch loses sequences, as the loops do it
        tokens = [[sequences[row][lengths[row] - 1 + t]] for row in rows]
        logits = chain(model, cache, tokens, prefix_len)
        for i, row in enumerate(rows):
            assert error(logits[i], alone[row][lengths[row] - 1 + t][None]) < TOLERANCE
        prefix_len = prefix_len + 1
        if t in (3, 7) and len(rows) > 1:
            keep = [i for i in range(len(rows)) if i != t % len(rows)]
            old = cache.k.clone(), cache.v.clone()
            cache.keep(keep)
            assert torch.equal(cache.k, old[0][:, keep]) and torch.equal(cache.v, old[1][:, keep])
            prefix_len, rows = prefix_len[keep], [rows[i] for i in keep]


class RandomTree:
    """A random forest of token trees behind random prefixes of B sequences, fed at once; some slots stay unused."""

    def __init__(self, model, seed):
        rng = random.Random(seed)
        n = {0: 1, 1: 40}.get(seed) or rng.randint(2, 40)
        B = rng.randint(1, 3)
        self.parents = [-1] + [rng.randrange(-1 if rng.random() < 0.1 else 0, i) for i in range(1, n)]
        self.paths = []                                 # nodes from a root to each node
        for node, parent in enumerate(self.parents):
            self.paths.append((self.paths[parent] if parent >= 0 else []) + [node])
        self.leaves = sorted(set(range(n)) - set(self.parents))
        self.prefixes = [random_ids(0 if (seed + b) % 4 == 0 else rng.randint(1, 25), seed=b) for b in range(B)]
        self.tokens = [[rng.randrange(TINY.vocab_size) for _ in range(n)] for _ in range(B)]
        S = n + rng.randint(0, 3)
        self.slot = sorted(rng.sample(range(S), n))     # in any order in which parents stand before their children
        self.cache = new_cache(model, B, 25 + S + 10)
        self.prefix_len = prefill(model, self.cache, [prefix + [0] for prefix in self.prefixes], chunk=8)
        for b, prefix in enumerate(self.prefixes):      # the prefill of a longer sequence wrote there
            self.cache.k[:, b, :, len(prefix):] = POISON
            self.cache.v[:, b, :, len(prefix):] = POISON
        mask = torch.zeros(n, S, dtype=torch.bool)
        for node, path in enumerate(self.paths):
            mask[node, [self.slot[x] for x in path]] = True
        depth = torch.tensor([len(path) - 1 for path in self.paths], device=model.device)
        start = self.prefix_len[:, None]
        hidden = model(torch.tensor(self.tokens, device=model.device), start + depth,
                       start + torch.tensor(self.slot, device=model.device), self.prefix_len, mask.to(model.device),
                       self.cache)
        self.logits = model.logits(hidden)              # [B, n, V]


@pytest.mark.parametrize("seed", range(12))
def test_any_token_tree_equals_plain_decoding_along_each_path(seed, device):
    model = tiny(device=device)
    tree = RandomTree(model, seed)
    for b, prefix in enumerate(tree.prefixes):
        cache = new_cache(model, 1, 80, poison=False)
        plain(model, prefix or [0], cache)
        for leaf in tree.leaves:                        # the next path overwrites the last one
            path = tree.paths[leaf]
            reference = plain(model, [tree.tokens[b][node] for node in path], cache, len(prefix))
            assert error(tree.logits[b, path], reference) < TOLERANCE


@pytest.mark.parametrize("seed", range(8))
def test_commit_of_an_accepted_path_then_plain_decoding(seed, device):
    model = tiny(device=device)
    tree, rng = RandomTree(model, seed), random.Random(seed)
    paths = [tree.paths[rng.choice(tree.leaves)] for _ in tree.prefixes]
    paths = [path[:rng.randint(1, len(path))] for path in paths]
    src, dst = [], []
    for path in paths:                                  # padded by copies of the first node's slot onto itself
        pad = max(map(len, paths)) - len(path)
        src.append([tree.slot[node] for node in path] + [tree.slot[path[0]]] * pad)
        dst.append(list(range(len(path))) + [0] * pad)
    src, dst = (torch.tensor(x, device=device) + tree.prefix_len[:, None] for x in (src, dst))
    expected = []
    for cache in (tree.cache.k, tree.cache.v):
        new = cache.clone()
        for b in range(len(paths)):
            new[:, b, :, dst[b]] = cache[:, b, :, src[b]]
        expected.append(new)
    tree.cache.commit(src, dst)
    assert torch.equal(tree.cache.k, expected[0]) and torch.equal(tree.cache.v, expected[1])
    more = [random_ids(6, seed=100 + b) for b in range(len(paths))]
    prefix_len = tree.prefix_len + torch.tensor([len(path) for path in paths], device=device)
    logits = torch.cat([chain(model, tree.cache, [[ids[t]] for ids in more], prefix_len + t) for t in range(6)], 1)
    for b, path in enumerate(paths):
        text = tree.prefixes[b] + [tree.tokens[b][node] for node in path] + more[b]
        assert error(logits[b], plain(model, text)[-6:]) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_commit_with_overlapping_sources_and_destinations(seed, device):
    g = torch.Generator().manual_seed(seed)
    cache = new_cache(SimpleNamespace(config=TINY, device=device), 3, 20)
    cache.k.copy_(torch.randn(cache.k.shape, generator=g))
    cache.v.copy_(torch.randn(cache.v.shape, generator=g))
    src, dst = (torch.stack([torch.randperm(20, generator=g)[:12] for _ in range(3)]).to(device) for _ in range(2))
    old_k, old_v = cache.k.clone(), cache.v.clone()
    cache.commit(src, dst)
    for new, old in ((cache.k, old_k), (cache.v, old_v)):
        for b in range(3):
            moved = dict(zip(dst[b].tolist(), src[b].tolist()))
            assert torch.equal(new[:, b], old[:, b][:, :, [moved.get(slot, slot) for slot in range(20)]])


def test_interpreted_kernels_compute_the_same(monkeypatch):
    """The forward that a GPU runs, with Triton's interpreter in place of the GPU: slow, so one of each is enough."""
    if torch.cuda.is_available():
        pytest.skip("CUDA is there: the kernels run compiled, in the tests above")
    model = tiny()
    batch = [random_ids(n, seed=n) for n in (9, 1, 14)]

    def decode_batch():
        cache = new_cache(model, 3, 20)
        return chain(model, cache, [ids[-1:] for ids in batch], prefill(model, cache, batch, chunk=8))[:, 0]

    cases = [lambda: RandomTree(model, seed=2).logits, decode_batch,
             lambda: decode_last(model, random_ids(35))]        # a prefill of 34 rows, few enough for the kernels
    expected = [case() for case in cases]
    monkeypatch.setattr(model, "ops", kernels.TRITON)
    for case, reference in zip(cases, expected):
        assert error(case(), reference) < TOLERANCE


@pytest.mark.gpu
def test_greedy_text_on_the_gpu_equals_the_cpus():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    prompts = [random_ids(n, seed=n) for n in (1, 12, 33, 200)]
    for config in (TINY, TINY_LLAMA3):
        assert texts(tiny(config, device="cuda"), prompts, 64) == texts(tiny(config), prompts, 64)


@pytest.mark.gpu
def test_smollm2_greedy_text_on_the_gpu_equals_the_cpus(smollm2):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    prompts = [golden["prompt"] for golden in json.loads(GOLDENS.read_text())["smollm2"].values()]
    prompts.append(prompts[0] + prompts[1])
    assert texts(Llama.load(SMOLLM2, "cuda", torch.float32), prompts, 64) == texts(smollm2, prompts, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling. All statistics are of fixed seeds: a p-value below 1e-4 is a defect, not bad luck.

def uniform(seeds, stream, positions, ids, device="cpu"):
    """kernels.uniform for ranges: seeds [B], the same positions [T] for all, ids [n] -> [B, T, n]."""
    seeds, positions, ids = (torch.as_tensor(list(x), device=device) for x in (seeds, positions, ids))
    return kernels.uniform(seeds, stream, positions.expand(len(seeds), -1), ids)


def test_noise_is_uniform_and_gumbel(device):
    u = uniform([0, 1, 2**40 + 7, -5], TARGET, range(500), range(500), device).flatten().cpu().double()
    assert 0 < u.min() and u.max() < 1
    n, grid = len(u), torch.arange(1, len(u) + 1).double() / len(u)
    distance = torch.maximum((u.sort().values - grid).abs().max(), (u.sort().values - grid + 1 / n).abs().max())
    assert distance < 2.23 / n ** 0.5, "Kolmogorov-Smirnov: P(distance > 2.23 / sqrt(n)) = 1e-4"
    assert chi_square(torch.bincount((u * 4096).long(), minlength=4096), torch.full((4096,), 1 / 4096)) > 1e-4
    small = u[u < 2**-10]
    assert len(small.unique()) > 0.98 * len(small), "too coarse near zero, where a race of exponentials is decided"
    seeds, positions, ids = torch.tensor([3], device=device), torch.arange(1000, device=device)[None], torch.arange(
        1000, device=device)
    g = kernels.gumbel(seeds, TARGET, positions, ids).flatten().cpu().double()
    u = kernels.uniform(seeds, TARGET, positions, ids).flatten().cpu().double()
    assert torch.allclose(g, -(-(-u).log1p()).log(), rtol=1e-4, atol=1e-4)
    assert abs(g.mean() - 0.57722) < 0.006 and abs(g.var() - torch.pi**2 / 6) < 0.02        # 4 standard errors


NEIGHBOURS = {      # what differs between two draws: (seed, stream, positions, ids)
    "position": ((0, TARGET, range(500), range(400)), (0, TARGET, range(1, 501), range(400))),
    "position-256": ((0, TARGET, range(500), range(400)), (0, TARGET, range(256, 756), range(400))),
    "id": ((0, TARGET, range(500), range(400)), (0, TARGET, range(500), range(1, 401))),
    "id-position": ((0, TARGET, range(500), range(400)), (0, TARGET, range(1, 501), range(1, 401))),
    "position-for-id": ((0, TARGET, range(500), range(1000, 1500)), (0, TARGET, range(1000, 1500), range(500))),
    "seed": ((0, TARGET, range(500), range(400)), (1, TARGET, range(500), range(400))),
    "high-seed": ((5, TARGET, range(500), range(400)), (5 + 2**32, TARGET, range(500), range(400))),
    "negative-seed": ((1, TARGET, range(500), range(400)), (-1, TARGET, range(500), range(400))),
    "seed-for-position": ((0, TARGET, range(500), range(400)), (1, TARGET, range(1, 501), range(400))),
    "draft-stream": ((0, TARGET, range(500), range(400)), (0, DRAFT, range(500), range(400))),
    "accept-stream": ((0, TARGET, range(500), range(400)), (0, ACCEPT, range(500), range(400)))}


@pytest.mark.parametrize("what", NEIGHBOURS)
def test_noise_is_independent(what):
    (a, b) = (uniform([seed], *rest)[0] for seed, *rest in NEIGHBOURS[what])
    a, b = (x if what != "position-for-id" else y for x, y in ((a, a), (b, b.T)))   # pairs (p, v) and (v, p)
    x, y = a.flatten().double(), b.flatten().double()
    correlation = torch.corrcoef(torch.stack([x, y]))[0, 1].abs()
    assert correlation < 4 / len(x) ** 0.5
    pairs = (x * 16).long() * 16 + (y * 16).long()      # together they fill the unit square evenly
    assert chi_square(torch.bincount(pairs, minlength=256), torch.full((256,), 1 / 256)) > 1e-4


def test_no_two_seeds_and_positions_share_their_noise():
    seeds = [*range(50), *(2**32 * i for i in range(1, 26)), *(-i for i in range(1, 26))]
    u = uniform(seeds, TARGET, range(100), [0, 1, 2])           # [100, 100, 3]
    assert len(torch.unique(u.flatten(0, 1), dim=0)) == 100 * 100
    u = uniform([0], TARGET, range(10_000), [0, 1, 2])
    assert len(torch.unique(u[0], dim=0)) == 10_000


EIGHT = torch.tensor([2.0, 0.5, -1.0, 1.5, 0.0, 1.0, -0.5, -3.0])
FILTERS = {"softmax": dict(temperature=1.0), "cool": dict(temperature=0.6), "hot": dict(temperature=2.5),
           "top-k": dict(temperature=1.0, top_k=4), "top-p": dict(temperature=1.0, top_p=0.8),
           "both": dict(temperature=2.0, top_k=6, top_p=0.7)}


@pytest.mark.parametrize("name", FILTERS)
def test_sampled_tokens_follow_the_distribution(name, device):
    sampling, logits = Sampling(seed=11, **FILTERS[name]), EIGHT.to(device)
    probs = (logits / sampling.temperature).softmax(-1).cpu()
    order = probs.argsort(descending=True)
    kept = order[:sampling.top_k or 8]
    mass = probs[kept] / probs[kept].sum()
    kept = kept[:next(n for n in range(1, 9) if n == len(kept) or mass[:n].sum() >= sampling.top_p)]
    expected = torch.zeros(8).index_copy(0, kept, probs[kept] / probs[kept].sum())
    n = 200_000
    many_positions = Sampler(sampling, [11], device)
    tokens = many_positions.scores(logits.expand(1, n, 8), torch.arange(n, device=device)[None]).argmax(-1)[0].cpu()
    assert chi_square(torch.bincount(tokens, minlength=8), expected) > 1e-4
    joint = torch.bincount(tokens[:-1:2] * 8 + tokens[1::2], minlength=64)      # neighbours, two by two
    assert chi_square(joint, torch.outer(expected, expected).flatten()) > 1e-4
    many_seeds = Sampler(sampling, list(range(n)), device)
    tokens = many_seeds.scores(logits.expand(n, 1, 8), torch.full((n, 1), 40, device=device)).argmax(-1)[:, 0].cpu()
    assert chi_square(torch.bincount(tokens, minlength=8), expected) > 1e-4


def brute_force_filter(row, top_k, top_p):
    """What filter_logits promises, for a list of floats: the values kept, sorted, ties with the last one included."""
    kept = sorted(row, reverse=True)
    if 0 < top_k < len(kept):
        kept = [x for x in kept if x >= kept[top_k - 1]]
    if top_p < 1:
        weights = torch.tensor(kept).double().softmax(-1)
        last = kept[next((n for n in range(1, len(kept)) if weights[:n].sum() >= top_p), len(kept)) - 1]
        kept = [x for x in kept if x >= last]
    return kept


def test_filters_equal_brute_force():
    rng = random.Random(0)
    for case in range(300):
        V = rng.choice([2, 5, 17, 64])
        ties = case % 3 == 0
        row = [float(rng.randint(-2, 3)) if ties else rng.gauss(0, 2) for _ in range(V)]
        top_k, top_p = rng.choice([0, 0, 1, 3, V, V + 5]), rng.choice([1.0, 1.0, 0.95, 0.5, 0.123, 1e-3, 1e-9])
        logits = torch.tensor(row).expand(2, 3, V).contiguous()
        before = logits.clone()
        out = filter_logits(logits, top_k, top_p)
        assert torch.equal(logits, before), "the logits were changed in place"
        assert out.shape == logits.shape and torch.equal(out[0, 0], out[1, 2])
        finite = out.isfinite()
        assert torch.equal(out[finite], logits[finite]) and (out[~finite] == -torch.inf).all()
        expected = brute_force_filter(row, top_k, top_p)
        assert sorted(out[0, 0][finite[0, 0]].tolist(), reverse=True) == pytest.approx(expected), (row, top_k, top_p)
        assert torch.equal(out[:1, :1], filter_logits(logits[:1, :1], top_k, top_p)), "a row depends on its batch"


def test_seeds_and_batches():
    model, prompts = tiny(), [random_ids(n, seed=n) for n in (3, 20, 1, 9)]
    hot = Sampling(temperature=1.0, seed=5)
    together = texts(model, prompts, 40, hot)
    assert together == texts(model, prompts, 40, hot)                                   # reproducible
    assert together == [texts(model, [prompt], 40, hot)[0] for prompt in prompts]       # whatever the batch
    assert together == texts(model, prompts[::-1], 40, hot)[::-1]
    assert together == texts(model, prompts, 40, replace(hot, seed=9), seeds=[5] * 4)
    budgets, seeds = [40, 3, 17, 25], [7, 2**35, -1, 0]                                 # a batch that shrinks
    assert texts(model, prompts, budgets, hot, seeds=seeds) == [
        texts(model, [prompt], n, replace(hot, seed=seed))[0] for prompt, n, seed in zip(prompts, budgets, seeds)]
    same_prompt = texts(model, [prompts[1]] * 30, 12, hot, seeds=list(range(30)))
    assert len({tuple(text) for text in same_prompt}) == 30                             # another seed, another text
    assert same_prompt[5] == together[1][:12]
    assert len({tuple(texts(model, [prompts[0]], 12, replace(hot, seed=2**32 * i))[0]) for i in range(4)}) == 4
    filtered = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)
    assert texts(model, prompts, 40, filtered) == [texts(model, [prompt], 40, filtered)[0] for prompt in prompts]
    greedy = texts(model, prompts, 40)
    assert greedy != together
    assert greedy == texts(model, prompts, 40, Sampling(seed=5)) == texts(model, prompts, 40, seeds=[1, 2, 3, 4])
    assert greedy == texts(model, prompts, 40, Sampling(temperature=1.0, top_k=1, seed=8))
    assert greedy == texts(model, prompts, 40, Sampling(temperature=1.0, top_p=1e-6, seed=8))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

@pytest.mark.parametrize("config", [
    replace(TINY, dtype=torch.bfloat16), replace(TINY_LLAMA3, dtype=torch.float16), TINY_LLAMA3,
    replace(TINY, eos_ids=()), replace(TINY, eos_ids=(0,), bos_id=0), replace(TINY, target_vocab_size=200, bos_id=4)],
    ids=["bf16", "fp16-llama3", "fp32", "no-eos", "eos-0", "trimmed"])
def test_save_then_load_is_bit_equal(config, tmp_path):
    model = Llama.random(config, seed=3)
    if model.d2t is not None:
        model.d2t[1:] = torch.randperm(200)[:95]
    model.save(tmp_path / "a" / "b")
    again = Llama.load(tmp_path / "a" / "b")
    assert again.config == config and again.dtype == config.dtype
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(state[name], loaded[name]) for name in state)
    assert (again.head is again.embed) == config.tie_embeddings
    assert torch.equal(model.freqs, again.freqs) and not any(p.requires_grad for p in again.parameters())
    assert Llama.load(tmp_path / "a" / "b", dtype=torch.float32).dtype == torch.float32


def test_random_weights_are_seeded():
    a, b, c = (Llama.random(TINY, seed) for seed in (0, 0, 1))
    assert torch.equal(a.embed, b.embed) and not torch.equal(a.embed, c.embed)


def test_spellings_of_the_config(tmp_path):
    llama31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    base = dict(model_type="llama", vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=80)

    def read(generation=None, **fields):
        (tmp_path / "config.json").write_text(json.dumps({**base, **fields}))
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return LlamaConfig.from_folder(tmp_path)

    c = read()                                          # transformers' own defaults
    assert (c.n_kv_heads, c.head_dim, c.norm_eps, c.rope_theta, c.max_context) == (4, 12, 1e-6, 10000.0, 2048)
    assert (c.tie_embeddings, c.eos_ids, c.bos_id, c.rope_scaling) == (False, (), None, None)
    assert read(head_dim=None, num_key_value_heads=None).head_dim == 12
    assert read(num_key_value_heads=2, head_dim=20).head_dim == 20
    for fields in (dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **llama31)),
                   dict(rope_theta=5e5, rope_scaling=dict(type="llama3", **llama31)),
                   dict(rope_parameters=dict(rope_theta=5e5, rope_type="llama3", **llama31))):
        c = read(**fields)
        assert c.rope_theta == 5e5 and c.rope_scaling == llama31
    for fields in (dict(rope_theta=1e5, rope_scaling=None), dict(rope_parameters=dict(rope_theta=1e5)),
                   dict(rope_theta=1e5, rope_scaling=dict(rope_type="default")),
                   dict(rope_parameters=dict(rope_theta=1e5, rope_type="default"))):
        c = read(**fields)
        assert c.rope_theta == 1e5 and c.rope_scaling is None
    assert read(torch_dtype="float16").dtype == read(dtype="float16").dtype == torch.float16
    assert read(eos_token_id=7).eos_ids == (7,) and read(eos_token_id=[7, 0]).eos_ids == (7, 0)
    assert read(eos_token_id=0).eos_ids == (0,)
    assert read(dict(eos_token_id=[8, 9]), eos_token_id=7).eos_ids == (8, 9)        # the generation config knows better
    assert read({}, eos_token_id=7).eos_ids == (7,)


@pytest.fixture
def folder(tmp_path):
    tiny().save(tmp_path)
    return tmp_path


def edit_config(folder, **fields):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, **fields}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Split model.safetensors in two shards with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {tensor: names[i % 2] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({tensor: x for tensor, x in tensors.items() if where[tensor] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    (folder / "model.safetensors").unlink()
    return [folder / name for name in names]


def write_index(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {      # name: (what is done to a good folder, what the message has to say)
    "no-folder": (lambda f: f.rename(f.with_name("moved")), "no such checkpoint folder"),
    "no-config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "empty-config": (lambda f: (f / "config.json").write_text(""), "config.json can't be read as JSON"),
    "broken-config": (lambda f: truncate(f / "config.json", 50), "config.json can't be read as JSON"),
    "binary-config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json can't be read as JSON"),
    "list-config": (lambda f: (f / "config.json").write_text("[1]"), "config.json holds a list"),
    "other-architecture": (lambda f: edit_config(f, architectures=["MistralForCausalLM"], model_type="mistral"),
                           "MistralForCausalLM"),
    "other-model-type": (lambda f: edit_config(f, architectures=None, model_type="gpt2"), "gpt2"),
    "bias": (lambda f: edit_config(f, attention_bias=True), "bias"),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act"),
    "rope-kind": (lambda f: edit_config(f, rope_parameters=dict(rope_type="yarn", factor=4.0)), "yarn"),
    "rope-incomplete": (lambda f: edit_config(f, rope_parameters=dict(rope_type="llama3", factor=4.0)),
                        "low_freq_factor"),
    "broken-generation-config": (lambda f: (f / "generation_config.json").write_text("{"),
                                 "generation_config.json can't be read as JSON"),
    "no-hidden-size": (lambda f: edit_config(f, hidden_size=None), "config.json"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "git-lfs-pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
                        "model.safetensors is truncated or broken"),
    "truncated-weights": (lambda f: truncate(f / "model.safetensors", 9000), "model.safetensors is truncated"),
    "empty-weights": (lambda f: truncate(f / "model.safetensors", 0), "model.safetensors is truncated"),
    "short-weights": (lambda f: truncate(f / "model.safetensors", -4), "model.safetensors is truncated"),
    "missing-shard": (lambda f: shard(f)[1].unlink(), "model-00002-of-00002.safetensors is missing"),
    "truncated-shard": (lambda f: truncate(shard(f)[1], -1), "model-00002-of-00002.safetensors is truncated"),
    "broken-index": (lambda f: write_index(f, "{"), "model.safetensors.index.json can't be read as JSON"),
    "no-weight-map": (lambda f: write_index(f, "{}"), "no weight_map"),
    "junk-weight-map": (lambda f: write_index(f, '{"weight_map": {"a": 5}}'), "no weight_map"),
    "missing-tensor": (lambda f: edit_tensors(f, lambda t: t.pop(UP)), f"{UP} is missing"),
    "untied-without-head": (lambda f: edit_config(f, tie_word_embeddings=False), "lm_head.weight is missing"),
    "wrong-shape": (lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP][:-1].clone()})),
                    f"{UP} has shape [79, 48]"),
    "transposed": (lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP].T.contiguous()})),
                   f"{UP} has shape [48, 80]"),
    "fp8": (lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
            f"{UP} is float8_e4m3fn"),
    "wrong-config": (lambda f: edit_config(f, vocab_size=97), "model.embed_tokens.weight has shape [96, 48]"),
    "more-layers": (lambda f: edit_config(f, num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing")}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_told_in_one_line(name, folder):
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        Llama.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("junk", [None, "x", -1, 0, 2.5, [], ["x"], {"a": 1}, True, 10**30], ids=repr)
def test_junk_in_the_config_is_a_user_error_or_harmless(folder, junk):
    good = json.loads((folder / "config.json").read_text())
    for key in good:
        edit_config(folder, **{**good, key: junk})
        try:
            texts(Llama.load(folder), [[1, 2]], 2)
        except UserError as error:
            assert "\n" not in str(error) 
        except Exception as error:
            pytest.fail(f"{key}: {junk!r} in config.json gave {error!r} instead of a UserError")


def test_shards_and_foreign_tensors_load(folder):
    expected = tiny().state_dict()
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    shard(folder)
    loaded = Llama.load(folder).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in expected.items())


def test_loading_reports_its_progress(folder):
    seen = []
    model = Llama.load(folder, progress=lambda done, total: seen.append((done, total)))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert seen[-1] == (size, size) and {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) > 10


MEMORY_PROBE = """
import json, sys, threading, time
import torch
from model import Llama

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def sample():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)

Llama.load(sys.argv[1] + "/small")      # what the first load allocates for good is no copy of the weights
before, peak, done = anonymous(), [0], False
thread = threading.Thread(target=sample)
thread.start()
model = Llama.load(sys.argv[1] + "/big", dtype=getattr(torch, sys.argv[2]),
                   progress=lambda *_: peak.append(anonymous()))
done = True
thread.join()
print(json.dumps([max(peak) - before, sum(p.numel() * p.element_size() for p in model.parameters())]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc/self/status is not there (Linux only)")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_never_holds_two_copies(tmp_path, dtype):
    """Peak growth of RssAnon, memory that is the process's own: unlike ru_maxrss it leaves out the pages of the mapped
    file, which the kernel shares with its cache and drops at will. Sampled every 0.5 ms and after every tensor."""
    small = replace(TINY, dtype=torch.bfloat16)
    Llama.random(small).save(tmp_path / "small")
    model = Llama(replace(small, vocab_size=16000, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64,
                          ffn_dim=2432))
    for p in model.parameters():
        p.fill_(0.5)
    model.save(tmp_path / "big")
    result = subprocess.run([sys.executable, "-c", MEMORY_PROBE, str(tmp_path), dtype], cwd=ROOT, capture_output=True,
                            text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    grown, size = json.loads(result.stdout)
    assert size > 200e6
    assert 0.9 * size < grown < 1.3 * size, f"{size / 1e6:.0f} MB of weights took {grown / 1e6:.0f} MB at the peak"


# ---------------------------------------------------------------------------------------------------------------------
# The autoregressive loop, on a model that is arithmetic

class Toy:
    """Looks like a Llama to the loops. The next token is a hash of all tokens in sight and their positions, which it
    keeps in its KV cache: a wrong slot, position, mask, commit or row changes the text from there on."""

    V = 50
    device, dtype, d2t, graphs = torch.device("cpu"), torch.float32, None, False

    def __init__(self, max_context=100):
        self.config = replace(TINY, vocab_size=self.V, n_layers=1, n_kv_heads=1, head_dim=2, max_context=max_context)

    def __call__(self, tokens, positions, slots, prefix_len, mask, cache, end=None):
        kv = torch.stack([tokens, positions], -1).float()                       # [B, T, 2]
        cache.k[0, :, 0].scatter_(1, slots[..., None].expand_as(kv), kv)
        visible = kernels.TORCH.visibility(prefix_len, mask, cache.capacity)[:, 0]      # [B, T, C]
        token, position = cache.k[0, :, 0].unbind(-1)                           # [B, C]
        return (visible * ((token + 3) * (position + 1) ** 2)[:, None]).sum(-1) % self.V

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden.long(), self.V).float() * 9

    @classmethod
    def text(cls, prompt, n):
        """The n tokens after prompt, by the definition."""
        ids = list(prompt)
        for _ in range(n):
            ids.append(sum((token + 3) * (i + 1) ** 2 for i, token in enumerate(ids)) % cls.V)
        return ids[len(prompt):]


TOY_PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [49, 0, 7], [3, 3]]


def test_budgets_and_batches():
    budgets = [20, 1, 7, 13]
    expected = [Toy.text(prompt, n) for prompt, n in zip(TOY_PROMPTS, budgets)]
    assert texts(Toy(), TOY_PROMPTS, budgets) == expected
    assert [texts(Toy(), [prompt], n)[0] for prompt, n in zip(TOY_PROMPTS, budgets)] == expected
    assert texts(Toy(), TOY_PROMPTS, 9) == [Toy.text(prompt, 9) for prompt in TOY_PROMPTS]


def test_a_stop_id_is_given_out_and_ends_its_sequence():
    long = [Toy.text(prompt, 40) for prompt in TOY_PROMPTS]
    for stop_ids in ((long[0][3],), (long[1][0], long[2][9]), tuple(range(0, 50, 7)), tuple(range(50))):
        cut = [next((i + 1 for i, token in enumerate(text) if token in stop_ids), 40) for text in long]
        expected = [text[:n] for text, n in zip(long, cut)]
        assert min(cut) < 40
        assert texts(Toy(), TOY_PROMPTS, 40, stop_ids=stop_ids) == expected
        assert [texts(Toy(), [prompt], 40, stop_ids=stop_ids)[0] for prompt in TOY_PROMPTS] == expected
    at = next(i for i in range(1, 40) if long[1][i] not in long[1][:i])
    assert texts(Toy(), [TOY_PROMPTS[1]], at + 1, stop_ids=(long[1][at],)) == [long[1][:at + 1]]    # on its last token


class EightSided(Toy):
    """Whatever the text, the next token has the distribution softmax(EIGHT)."""

    V = 8

    def logits(self, hidden):
        return EIGHT.expand(*hidden.shape, 8)


def test_the_loop_gives_every_position_its_own_noise():
    sampling, seeds = Sampling(temperature=1.0), list(range(100))
    out = texts(EightSided(), [[1]] * 100, 90, sampling, seeds=seeds)
    tokens, probs = torch.tensor(out), EIGHT.softmax(-1)                                # [100, 90]
    assert chi_square(torch.bincount(tokens.flatten(), minlength=8), probs) > 1e-4
    pairs = (tokens[:, :-1:2] * 8 + tokens[:, 1::2]).flatten()
    assert chi_square(torch.bincount(pairs, minlength=64), torch.outer(probs, probs).flatten()) > 1e-4
    assert texts(EightSided(), [[1, 2, 3]], 88, sampling, seeds=[7]) == [out[7][2:]]    # that of its place in the text


def test_rounds_and_what_is_measured():
    stats, budgets = Stats(), [5, 2, 2, 4]
    rounds = list(autoregressive(Toy(), TOY_PROMPTS, budgets, Sampling(), stats=stats))
    assert [[chunk.sequence for chunk in chunks] for chunks in rounds] == [[0, 1, 2, 3]] * 2 + [[0, 3]] * 2 + [[0]]
    assert all(len(chunk.tokens) == 1 and chunk.origins == ["bonus"] for chunks in rounds for chunk in chunks)
    assert stats.tokens == 13 and stats.rounds == 5 and stats.sequence_rounds == 13 and stats.tokens_per_round == 1
    assert stats.seconds > 0 and stats.prefill_seconds > 0


def test_requests_that_do_not_fit():
    assert len(texts(Toy(max_context=31), TOY_PROMPTS[1:2], 20)[0]) == 20               # exactly full
    for model, prompts, new, message in (
            (Toy(max_context=30), TOY_PROMPTS[1:2], 20, "11 prompt tokens and 20 new ones exceed .* 30"),
            (Toy(max_context=30), TOY_PROMPTS, [5, 20, 5, 5], "11 prompt tokens and 20 new ones exceed .* 30"),
            (Toy(), [[1], []], 5, "empty"),
            (Toy(), [[1]], 0, "at least 1"),
            (Toy(), [[1], [2]], [3, -1], "at least 1")):
        with pytest.raises(UserError, match=message) as caught:
            list(autoregressive(model, prompts, new, Sampling()))
        assert "\n" not in str(caught.value)


if __name__ == "__main__":
    record_goldens()


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [-1, 1, 1, 2], [-1, 1, 2, 9], [-1, 1, 2, -2]])
def test_bad_d2t_is_refused(tmp_path, ids):
    config = LlamaConfig(vocab_size=4, dim=16, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=16, ffn_dim=16, target_vocab_size=9)
    model = Llama.random(config)
    model.d2t.copy_(torch.tensor([-1, 8, 2, 0]))
    model.save(tmp_path)
    assert Llama.load(tmp_path).d2t.tolist() == [-1, 8, 2, 0]
    model.d2t.copy_(torch.tensor(ids))
    model.save(tmp_path)
    with pytest.raises(UserError, match="d2t must hold -1 and then different ids below 9"):
        Llama.load(tmp_path)

"""kernels/rows.py against its plain-torch twins, in Triton's interpreter where no GPU is."""
import random

import pytest
import torch

import bulk
from grammar import Grammar, lay_out
from kernels import rows
from model import Llama, LlamaConfig

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
TOLERANCE = dict(rtol=2e-2, atol=2e-2) if DTYPE == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape).to(DEVICE, DTYPE)


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 64)])
def test_add_norm_and_swiglu(shape):
    x, y, weight = randn(*shape), randn(*shape), randn(shape[-1])
    for got, want in zip(rows.add_norm(x, y, weight, 1e-5), rows.add_norm_ref(x, y, weight, 1e-5)):
        torch.testing.assert_close(got, want, **TOLERANCE)
    torch.testing.assert_close(rows.swiglu(x), rows.swiglu_ref(x), **TOLERANCE)


@pytest.mark.parametrize("H, KV, D", [(6, 2, 16), (3, 3, 32), (5, 1, 64)])
def test_attend(H, KV, D):
    at = torch.tensor([0, 1, 63, 64, 65, 140], device=DEVICE)
    k, v, qkv = randn(6, KV, 150, D), randn(6, KV, 150, D), randn(6, (H + 2 * KV) * D)
    freqs = (10000.0 ** (-torch.arange(0, D, 2) / D)).to(DEVICE)
    k2, v2 = k.clone(), v.clone()
    want = rows.attend_ref(qkv, at, freqs, k2, v2)
    torch.testing.assert_close(rows.attend(qkv, at, freqs, k, v), want, **TOLERANCE)
    torch.testing.assert_close(k, k2, **TOLERANCE)                          # RoPE on the new keys, nothing else touched
    assert torch.equal(v, v2)


@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_choose(min_p):
    B, V = 12, 5000                                                         # more than one block, the last not whole
    row = torch.randperm(20, device=DEVICE)[:B]
    at, temperature = torch.randint(30, (B,), device=DEVICE), torch.tensor([0.0, 0.7, 1.3, 1.0], device=DEVICE).repeat(5)
    logits = randn(B, V) * 3
    args = logits, row, at, temperature, min_p, 7
    before = logits.clone()
    want = rows.choose_ref(*args)
    assert torch.equal(rows.choose(*args), want) and torch.equal(logits, before)
    greedy = temperature[row] == 0
    assert torch.equal(want[greedy], logits.argmax(-1)[greedy]) and not torch.equal(want, logits.argmax(-1))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU: no graph to record")
def test_sampling_by_kernels_in_a_graph_is_that_of_plain_torch(capsys):
    config = LlamaConfig(vocab_size=5000, dim=96, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, ffn_dim=64,
                         max_context=256, tie_embeddings=True, dtype=torch.float32)
    rng, texts = random.Random(0), []
    prompts = [[3, 1] + [rng.randrange(5000) for _ in range(rng.randrange(1, 90))] for _ in range(300)]
    for device in ("cpu", "cuda:0", "cuda:1")[:1 + torch.cuda.device_count()]:
        model = Llama.random(config, 1, device)
        texts.append(bulk.sample_continuations(model, prompts, 60, [0.0, 0.8], 0.05, 5, range(0, 5000, 90), batch=100))
    captured = capsys.readouterr()
    assert "without" not in captured.err
    for own in texts[1:]:
        same = sum(torch.equal(a[:n], b[:m]) for a, b, n, m in zip(texts[0].tokens, own.tokens, texts[0].end, own.end))
        assert same > 0.9 * len(prompts)                                    # but for near ties


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU: no graph to record")
def test_sampling_along_a_grammar_in_a_graph_is_that_of_plain_torch(capsys):
    config = LlamaConfig(vocab_size=5000, dim=96, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, ffn_dim=64,
                         max_context=256, tie_embeddings=True, dtype=torch.float32)
    rng, texts = random.Random(0), []
    some = lambda least, most: [rng.randrange(5000) for _ in range(rng.randrange(least, most))]
    laid_out = lay_out([[[some(2, 9) for _ in range(3)] for _ in range(6)] for _ in range(300)])
    prompts = [[3, 1, *some(1, 90)] for _ in range(300)]
    for device in "cpu", "cuda":
        grammar = Grammar([laid_out], device)
        texts.append(bulk.sample_continuations(Llama.random(config, 1, device), prompts, grammar.longest, 1.5, seed=5,
                                               grammar=grammar, batch=100))
        assert grammar.sums[0] == (texts[-1].end - texts[-1].start).sum()
    assert "without" not in capsys.readouterr().err
    same = sum(torch.equal(a[:n], b[:m]) for a, b, n, m in zip(*(text.tokens for text in texts), *(text.end for text in texts)))
    assert same > 0.9 * len(prompts)                                        # but for near ties

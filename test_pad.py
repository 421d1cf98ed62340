"""A padded model gives the small model's logits and tokens (fp32)."""
from dataclasses import replace

import pytest
import torch

from errors import UserError
from model import KVCache, Llama, LlamaConfig, prefill
from generate import WEIGHTS
from pad import pad, trim
from saguaro import Options, autoregressive, sd
from sampling import Sampling

SMALL = LlamaConfig(vocab_size=50, dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8, ffn_dim=40, max_context=128,
                    tie_embeddings=True)
SHAPE = LlamaConfig(vocab_size=90, dim=64, n_layers=4, n_heads=16, n_kv_heads=4, head_dim=16, ffn_dim=100)


def logits(model, ids):
    cache = KVCache(model.config, 1, len(ids), "cpu", torch.float32)
    start = prefill(model, cache, [ids])
    at = start[:, None]
    return model.logits(model(torch.tensor([ids[-1:]]), at, at, start, torch.ones(1, 1, dtype=torch.bool), cache))[0, 0]


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (5, 1), (10, 2), (9, 1)])
def test_same_logits_and_tokens(heads, kv_heads):
    """Also where a KV head serves more query heads than one of the shape's can: it is then held several times."""
    small = Llama.random(replace(SMALL, n_heads=heads, n_kv_heads=kv_heads), 3, dtype=torch.float32)
    for name, parameter in small.named_parameters():                   # norms that aren't all one
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    big = pad(small, SHAPE)
    assert big.config.dim == 64 and big.layers[3].wqkv.std() > 0.05
    ids = list(range(5, 45))
    a, b = logits(small, ids), logits(big, ids)
    assert (a - b[:50]).norm() / a.norm() < 1e-4
    assert b[50:].max() < a.min() - 5, "padding of the vocabulary must stay far below every token"
    for temperature in (0.0, 1.0):
        texts = [[t for chunks in autoregressive(model, [ids], 40, Sampling(temperature)) for t in chunks[0].tokens]
                 for model in (small, big)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("change, says", [(dict(dim=24), "dim"), (dict(ffn_dim=39), "ffn_dim"), (dict(n_heads=4), "heads"),
                                          (dict(head_dim=12), "head_dim")])
def test_what_does_not_fit(change, says):
    with pytest.raises(UserError, match=says):
        pad(Llama.random(SMALL, 0, dtype=torch.float32), replace(SHAPE, **change))


def test_embedded_pair_padded():
    """The embedded pair, its target padded: the same tokens, and the draft as good as before though its vocabulary is shorter."""
    target, draft = (Llama.load(WEIGHTS / name, dtype=torch.float32) for name in ("target", "draft"))
    shape = LlamaConfig(vocab_size=5000, dim=384, n_layers=7, n_heads=8, n_kv_heads=2, head_dim=128, ffn_dim=768)
    big, ids = pad(target, shape), list(range(300, 312))
    alone, padded = (list(autoregressive(model, [ids], 24, Sampling())) for model in (target, big))
    drafted = list(sd(big, trim(draft, 5000), [ids], 24, Sampling(), Options()))
    tokens = [[token for chunks in run for token in chunks[0].tokens] for run in (alone, padded, drafted)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(drafted) < 20, "the draft helps"

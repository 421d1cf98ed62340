"""A padded model gives the small model's logits and tokens (fp32)."""
import pytest
import torch

from errors import UserError
from model import KVCache, Llama, LlamaConfig, prefill
from pad import pad
from saguaro import autoregressive
from sampling import Sampling

SMALL = LlamaConfig(vocab_size=50, dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8, ffn_dim=40, max_context=128,
                    tie_embeddings=True)
SHAPE = LlamaConfig(vocab_size=90, dim=64, n_layers=4, n_heads=16, n_kv_heads=4, head_dim=16, ffn_dim=100)


def logits(model, ids):
    cache = KVCache(model.config, 1, len(ids), "cpu", torch.float32)
    start = prefill(model, cache, [ids])
    at = start[:, None]
    return model.logits(model(torch.tensor([ids[-1:]]), at, at, start, torch.ones(1, 1, dtype=torch.bool), cache))[0, 0]


def test_same_logits_and_tokens():
    small = Llama.random(SMALL, 3, dtype=torch.float32)
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


@pytest.mark.parametrize("change, says", [(dict(dim=24), "dim"), (dict(ffn_dim=39), "ffn_dim"), (dict(n_heads=8), "heads"),
                                          (dict(head_dim=12), "head_dim")])
def test_what_does_not_fit(change, says):
    from dataclasses import replace
    with pytest.raises(UserError, match=says):
        pad(Llama.random(SMALL, 0, dtype=torch.float32), replace(SHAPE, **change))

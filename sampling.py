"""From logits to tokens: temperature, top-k, top-p and the shared noise that makes sampling look like greedy decoding."""
import copy
from dataclasses import dataclass

import torch

import kernels
from graphs import cross
from kernels.noise import TARGET
from model import Llama


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0    # 0 is greedy
    top_k: int = 0              # 0 is off
    top_p: float = 1.0
    seed: int = 0

    greedy = property(lambda self: self.temperature == 0)


def filter_logits(logits, top_k, top_p):
    """Keep the top_k largest logits and of those the smallest set with mass >= top_p; the others become -inf.

    Logits that tie with the last one kept are kept too, so that nothing depends on the order of a sort.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        values = logits.sort(dim=-1, descending=True).values
        probs = values.softmax(-1)
        drop = probs.cumsum(-1) - probs >= top_p                    # mass before the token: the first is always kept
        last = values.masked_fill(drop, torch.inf).min(-1, keepdim=True).values
        logits = logits.masked_fill(logits < last, -torch.inf)
    return logits


def saguaro_probs(logits, fan_out, c, widest=None):
    """Saguaro sampling (Def. 14): q_C(t) ~ C e^{z_t} for t among the top F tokens, e^{z_t} for the others.

    Tokens that sit in the speculation cache are drafted less, so the residual max(p - q, 0) puts more mass on them:
    more hits, fewer acceptances. logits [..., V] (tempered); fan_out, F, int or int64 [...]; c in [0, 1], 1 is softmax;
    widest: a host-side bound on fan_out, which saves looking. Returns q [..., V].
    """
    q = logits.softmax(-1)
    if c == 1:
        return q
    fan_out = torch.as_tensor(fan_out, device=logits.device).expand(logits.shape[:-1])
    top = logits.topk(int(fan_out.max()) if widest is None else widest).indices
    weight = torch.where(torch.arange(top.shape[-1], device=logits.device) < fan_out[..., None], c, 1.0)
    scaled = q * torch.ones_like(q).scatter(-1, top, weight)
    total = scaled.sum(-1, keepdim=True)
    return torch.where(total > 0, scaled / total, q)                # C = 0 and nothing outside the top F: plain q


class Sampler:
    """Sampling for B sequences with a seed each. The text of a sequence depends on its seed, not on its batch."""

    def __init__(self, sampling, seeds, device):
        self.temperature, self.top_k, self.top_p = sampling.temperature, sampling.top_k, sampling.top_p
        self.greedy = sampling.greedy
        self.seeds = torch.tensor(seeds, dtype=torch.int64).to(device)      # [B]

    def on(self, device):
        """A sampler of its own on `device`, with the same seeds."""
        other = copy.copy(self)
        other.seeds = cross(self.seeds, device).clone()
        return other

    def keep(self, rows):
        self.seeds = self.seeds[rows]

    def tempered(self, logits):
        """logits / temperature after top-k and top-p: softmax of it is the distribution sampled from."""
        return logits if self.greedy else filter_logits(logits / self.temperature, self.top_k, self.top_p)

    def noise(self, stream, positions, ids):
        """Gumbel noise of the tokens `ids` [n] at positions [B, T] -> [B, T, n]."""
        return kernels.gumbel(self.seeds, stream, positions, ids)

    def scores(self, logits, positions, ids=None):
        """Scores whose argmax is the token at each position: an exact sample, by the Gumbel-max trick.

        logits [B, T, n], positions [B, T] of the token to choose, ids [n] the vocabulary ids of the logits (default
        0..n-1). The noise depends on (seed, position, id) alone, so two models that score the same position share it:
        the better they agree, the more often they sample the same token (the `coupled` rule).
        """
        if self.greedy:
            return logits
        ids = torch.arange(logits.shape[-1], device=logits.device) if ids is None else ids
        return self.tempered(logits) + self.noise(TARGET, positions, ids)

    def choose(self, model, hidden, positions, n, ids=None):
        """The n best tokens by `scores`, as indices of the model's vocabulary: hidden [B, T, dim] -> [B, T, n]."""
        return self.rank(model, hidden, positions, n, ids)[0]

    def rank(self, model, hidden, positions, n, ids=None):
        """What `choose` chooses, and its scores [B, T, n] float32.

        Logits are written out only where a filter must see them all, or more is asked for than the kernel gives, or the
        model is no Llama whose head it could read.
        """
        filtered = not self.greedy and (self.top_k or self.top_p < 1)
        T = hidden.shape[1]
        if not filtered and isinstance(model, Llama) and n <= kernels.MAX_BEST and T <= kernels.MAX_ROWS:
            step = kernels.MAX_ROWS // T                                    # sequences that fit into one launch
            parts = [model.ops.best(x, model.head, n, self.temperature, seeds, TARGET, at, ids)
                     for x, seeds, at in zip(*(y.split(step) for y in (hidden, self.seeds, positions)))]
            return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))
        scores = self.scores(model.logits(hidden), positions, ids)
        if ids is not None:
            scores = scores.masked_fill(ids < 0, -torch.inf)                # "any other token" is no choice
        best = scores.topk(min(n, scores.shape[-1]))
        return best.indices, best.values

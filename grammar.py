"""
Sampling along a grammar: the model writes every token of a text, but only from those that the grammar allows next.

A grammar is a sequence of parts, each in several wordings. As token ids, the wordings of a part are a trie; where one of them
ends, the next part's trie begins. Where the trie has one branch, the model has no choice; where it has several, they share out
the model's probability. All is decided on the device, without a look from the host: a step of sampling stays one CUDA graph.

The tries of all texts lie in flat arrays, an entry an edge. The edges of a state lie side by side, and the first one's number
is the state's: 150,000 stories of 185 tokens in three wordings are 80 million edges, 9 bytes each.

Reference: sampling by a finite automaton over tokens: Willard and Louf 2023, https://arxiv.org/abs/2307.09702
Shapes: B rows, P texts, E edges, W most edges of a state, V vocabulary.
"""
import itertools
from array import array

import torch
import torch.nn.functional as F

from kernels.noise import TARGET, gumbel_ref

OVER = -1               # where an edge goes at the end of a text, in what `lay_out` returns


def lay_out(texts):
    """texts: for each its parts, for each its wordings, as token ids. Returns arrays (token, goes, fan, start, longest).

    Of each edge its token, the state that it leads to and, at a state's first edge, how many edges the state has; of each text its
    first state and its greatest length. Plain arrays, since processes hand them over fast.
    """
    token, goes, fan, start, longest = array("i"), array("i"), array("B"), array("i"), array("i")

    def lay(wordings, end):
        """The trie of some wordings, behind which comes state `end`. Returns its first state."""
        state = len(token)
        if len(wordings) == 1:                                              # no more branches
            n = len(wordings[0])
            token.extend(wordings[0])
            goes.extend([*range(state + 1, state + n), end])
            fan.extend(b"\1" * n)
            return state
        branches = {}
        for wording in wordings:
            branches.setdefault(wording[0], []).append(wording[1:])
        token.extend(branches)
        goes.extend([end] * len(branches))
        fan.extend([len(branches), *[0] * (len(branches) - 1)])
        for edge, rests in enumerate(branches.values(), state):
            if rests := [rest for rest in rests if rest]:                   # one that begins another wording can't be told
                goes[edge] = lay(rests, end)
        return state
    for parts in texts:
        state = OVER
        for wordings in reversed(parts):
            state = lay(wordings, state)
        start.append(state)
        longest.append(sum(max(map(len, wordings)) for wordings in parts))
    return token, goes, fan, start, longest


class Grammar:
    """The grammars of P texts, and how far each text has come."""

    def __init__(self, laid_out, device="cpu"):
        """laid_out: what `lay_out` returned for the first texts, for those that follow, ..."""
        tensors = lambda arrays: [torch.frombuffer(x, dtype=torch.uint8 if x.typecode == "B" else torch.int32) for x in arrays]
        token, goes, fan, start, longest = map(tensors, zip(*laid_out))
        shift = [*itertools.accumulate(map(len, token), initial=1)]         # edge 0: a text that is over stays there
        moved = lambda xs: [torch.where(x == OVER, 0, x + n) for x, n in zip(xs, shift)]
        zero = torch.zeros(1, dtype=torch.int32)
        self.token, self.goes = torch.cat([zero, *token]).to(device), torch.cat([zero, *moved(goes)]).to(device)
        self.fan = torch.cat([zero.byte() + 1, *fan]).to(device)
        self.start = torch.cat([*moved(start), zero]).long().to(device)     # [P + 1], the last for rows without a text
        self.longest = int(torch.cat(longest).max())
        self.branches = torch.arange(int(self.fan.max()), device=device)    # [W]
        self.begin()

    def begin(self):
        """All texts are at their beginning."""
        self.state = self.start.clone()
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.start.device)

    def choose(self, hidden, head, row, at, temperature, seed):
        """The next token of each text, as kernels.rows.choose, but along the grammar; changes nothing.

        hidden [B, dim], head [V, dim]: only the logits that count are computed. row, at [B]; temperature [P + 1]. Returns token
        [B], the state behind it [B] (0: the text is over) and, for the sums [B, 3]: 1, was there a choice, its entropy in nats.
        """
        state = self.state[row]
        edges = (state[:, None] + self.branches).clamp(max=len(self.token) - 1)             # [B, W]
        fan = self.fan[state].long()
        ids, T = self.token[edges].long(), temperature[row, None]
        scores = torch.einsum("bd,bwd->bw", hidden, F.embedding(ids, head)).float() / torch.where(T > 0, T, 1.0)
        scores = scores.masked_fill(self.branches >= fan[:, None], -torch.inf)
        noise = gumbel_ref(seed + row, TARGET, at[:, None], ids[:, None])[:, 0]
        best = torch.where(T > 0, scores + noise, scores).argmax(-1, keepdim=True)
        nats = torch.special.entr(scores.softmax(-1)).sum(-1)
        told = torch.stack([torch.ones_like(nats), (fan > 1).float(), nats], dim=1)
        return ids.gather(1, best)[:, 0], self.goes[edges.gather(1, best)[:, 0]].long(), told

    def go_on(self, row, active, after, told):
        """The texts `row` [B] that are active go to the states `after`."""
        self.state[row] = torch.where(active, after, self.state[row])
        self.sums += torch.where((active & (row < len(self.state) - 1))[:, None], told, 0.0).sum(0)

    def report(self):
        """What the texts were made of, in words."""
        tokens, choices, nats = self.sums.tolist()
        return (f"{tokens:,.0f} tokens sampled, {choices / max(1, tokens):.1%} of them where the grammar left a choice, of "
                f"{nats / max(1, choices):.2f} nats on average")

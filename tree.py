"""Token trees: the shape of a speculation. A plain lookahead of K tokens is a tree that is a chain."""
import heapq

import torch

from kernels import Ancestors


class Tree:
    """A static speculation topology: the parent of every node, nodes sorted by depth, children by rank.

    Rank r means "the draft's r-th choice (from 0) after the parent". All tensors are constants of the topology.
    """

    def __init__(self, parents, device="cpu"):
        """parents: parent of each node, parents[0] = -1, every parent before its children, levels in order."""
        self.parents = list(parents)
        self.size = len(self.parents)                                       # M + 1
        self.depths, self.ranks, self.n_children = [0] * self.size, [0] * self.size, [0] * self.size
        mask = torch.eye(self.size, dtype=torch.bool)                       # [M+1, M+1]: row sees its ancestors and itself
        for node in range(1, self.size):
            up = self.parents[node]
            self.depths[node], self.ranks[node] = self.depths[up] + 1, self.n_children[up]
            self.n_children[up] += 1
            mask[node] |= mask[up]
        self.depth = self.depths[-1]                                        # K
        self.forks = max(self.n_children) > 1                               # else any accepted path lies where it belongs
        self.levels = [[n for n in range(self.size) if self.depths[n] == d] for d in range(self.depth + 1)]
        self.mask = mask.to(device)
        self.ancestors = Ancestors.of(self.mask)
        self.parent = torch.tensor(self.parents, device=device)
        self.node_depth = torch.tensor(self.depths, device=device)
        slots = torch.arange(self.size, device=device)
        self.rows = torch.stack([self.node_depth, self.node_depth + 1, slots])  # position, the next one, slot: from the root's
        children = torch.full((self.size, max(1, *self.n_children)), -1)    # [M+1, C], -1 where there is none
        for node in range(1, self.size):
            children[self.parents[node], self.ranks[node]] = node
        self.children = children.to(device)
        self.first_child = children[:, 0].tolist()                          # host copy, -1 for a leaf
        self.copies = {self.mask.device: self}                              # this tree, device by device

    def __eq__(self, other):
        if not isinstance(other, Tree):
            return NotImplemented
        return self.parents == other.parents and self.mask.device == other.mask.device

    def __hash__(self):
        return hash((tuple(self.parents), self.mask.device))

    def on(self, device):
        """This tree with its constants on `device`: the same object each time."""
        if device not in self.copies:
            self.copies[device] = Tree(self.parents, device)
            self.copies[device].copies = self.copies
        return self.copies[device]

    @classmethod
    def chain(cls, k, device="cpu"):
        return cls(range(-1, k), device)

    @classmethod
    def from_widths(cls, widths, device="cpu"):
        """widths[d]: how many children each node of depth d has, e.g. [4, 2, 1, 1]."""
        parents, level = [-1], [0]
        for width in widths:
            first = len(parents)
            parents += [node for node in level for _ in range(width)]
            level = range(first, len(parents))
        return cls(parents, device)

    @classmethod
    def best(cls, nodes, accept, max_depth, device="cpu"):
        """The tree of `nodes` drafted tokens with the most expected accepted tokens, grown best-first.

        accept[r]: chance that the target takes the draft's r-th choice, taken as independent of the place (Sequoia,
        Chen et al. 2024). A node's chance to be accepted is the product along its path, and the expected number of
        accepted tokens is the sum of these chances, so the most likely node is always the next to add.
        """
        heap = [(-accept[0], 0, 0, 1)]                                      # (-chance, parent, rank, depth)
        chances, depths, edges = [1.0], [0], []                             # edges in order of chance
        while len(edges) < nodes and heap:
            chance, parent, rank, depth = heapq.heappop(heap)
            node = len(edges) + 1
            edges.append((depth, parent, rank, node))
            chances.append(-chance)
            depths.append(depth)
            if rank + 1 < len(accept):
                heapq.heappush(heap, (-chances[parent] * accept[rank + 1], parent, rank + 1, depth))
            if depth < max_depth:
                heapq.heappush(heap, (chance * accept[0], node, 0, depth + 1))
        name, parents = {0: 0}, [-1]                                        # renumber level by level
        for depth, parent, rank, node in sorted(edges, key=lambda e: e[0]):
            name[node] = len(parents)
            parents.append(name[parent])
        return cls(parents, device)

    def stop_probability(self, accept):
        """P(node): chance that verification ends at each node, if the r-th choice is taken with chance accept[r].

        On a chain with acceptance rate a that is (1 - a) a^k for k < K and a^K for k = K. Returns a list of M+1.
        """
        return [chance * (1 - sum(accept[:n])) for chance, n in zip(self.reach(accept), self.n_children)]

    def reach(self, accept):
        """Chance that verification gets to each node; their sum is the expected tokens of a round. Returns a list of M+1. A choice of
        which accept says nothing is never taken."""
        chances = [1.0] * self.size
        for node in range(1, self.size):
            rank = self.ranks[node]
            chances[node] = chances[self.parents[node]] * (accept[rank] if rank < len(accept) else 0.0)
        return chances

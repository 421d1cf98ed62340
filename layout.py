"""Where everything goes while a tree is drafted: the constants of one tree and fan-out, made once, read by every round.

Shapes: R trees side by side, w nodes of a depth, N outcomes, T = R*w rows of a forward.
"""
from dataclasses import dataclass

import torch

from kernels import Ancestors


@dataclass
class Level:
    """One forward of drafting R trees side by side: the constants that say what goes where."""
    nodes: torch.Tensor                     # [w] the nodes of this depth
    offsets: torch.Tensor                   # [R*w] slot of each row, from prefix_len
    ancestors: Ancestors                    # of the R*w rows
    children: torch.Tensor                  # nodes of the next depth ...
    parents: torch.Tensor                   # ... the index of their parent in `nodes` ...
    ranks: torch.Tensor                     # ... and which choice of it they are
    n_choices: int                          # most children of a node
    fan_out: torch.Tensor                   # [R*w] F of each row's node


class Layout:
    """Drafting `tree` at the trunk and, with a fan-out, behind every outcome (node, f < fan_out[node])."""

    def __init__(self, tree, fan_out, device):
        """fan_out: F_node for each node of the tree, or None where only speculations are wanted (SD)."""
        tensor = lambda x: torch.tensor(x, device=device)
        self.tree, self.counts = tree, fan_out or [0] * tree.size           # F_node
        self.width = max(self.counts)                                       # F: guesses kept per node
        self.fan_out = tensor(self.counts)
        self.trunk = self.levels(0, torch.zeros(1, 0, dtype=torch.bool, device=device))
        # [previous token, root]: the first sees the prefix, which ends in itself; the second also its own slot.
        self.refeed = tensor([-1, 0]), tensor([-1, 0]), Ancestors.of(tensor([[False], [True]]))
        self.leaves, self.all = tensor(tree.levels[-1]), tensor(range(tree.size))
        self.leaf_ancestors = Ancestors.of(tree.mask[tree.levels[-1]])
        spine = [0]                                                         # the path of first choices
        while tree.first_child[spine[-1]] > 0:
            spine.append(tree.first_child[spine[-1]])
        self.spine = tensor(spine)
        if fan_out:
            outcomes = [(node, f) for node in range(tree.size) for f in range(fan_out[node])]
            self.nodes, self.guess_ranks = map(tensor, zip(*outcomes))      # [N] each
            self.branch_choice = [f for _, f in outcomes]
            self.branches = self.levels(tree.size, tree.mask[self.nodes])

    def levels(self, base, sees):
        """Plan the K forwards that draft R trees into slots base.. ; sees [R, base]: the trunk slots above each root."""
        tree, R, device = self.tree, len(sees), sees.device
        own = torch.eye(R, dtype=torch.bool, device=device)[:, None, :, None]                   # [R, 1, R, 1]
        tensor = lambda x: torch.tensor(x, device=device)
        plan = []
        for nodes, below in zip(tree.levels, tree.levels[1:]):
            w = len(nodes)
            slots = base + torch.arange(R, device=device)[:, None] * tree.size + tensor(nodes)
            inside = (own & tree.mask[nodes][:, None]).reshape(R * w, R * tree.size)
            plan.append(Level(
                tensor(nodes), slots.flatten(), Ancestors.of(torch.cat([sees.repeat_interleave(w, 0), inside], 1)),
                tensor(below), tensor([nodes.index(tree.parents[node]) for node in below]),
                tensor([tree.ranks[node] for node in below]), max(tree.n_children[node] for node in nodes),
                self.fan_out[nodes].repeat(R)))
        return plan

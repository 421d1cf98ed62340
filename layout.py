"""Where everything goes while a tree is drafted: the constants of one tree and fan-out, made once, read by every round.

Shapes: R trees side by side, w nodes of a depth, N outcomes, T = R*w rows of a forward.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kernels import Ancestors


@dataclass
class Level:
    """One forward of drafting R trees side by side: the constants that say what goes where."""
    nodes: slice                            # the w nodes of this depth ...
    below: slice                            # ... and those of the next, their children
    rows: torch.Tensor                      # [3, T] position, position of the next token, slot: each from prefix_len
    ancestors: Ancestors                    # of the T rows
    n_choices: int                          # most children of a node, at least 1
    n_ranked: int                           # so many best tokens hold a node's children and its guesses
    fan_out: torch.Tensor                   # [T] F of each row's node


class Forwards:
    """Levels that are fed one after the other; everything about them but the prefix is known."""

    def __init__(self, levels):
        even = [F.pad(level.rows, (0, level.rows.shape[1] % 2)) for level in levels]    # 16 bytes: where the address isn't
        self.levels, self.widths = levels, [rows.numel() for rows in even]              # divisible by that, Triton compiles
        self.rows = torch.cat([rows.flatten() for rows in even])                        # its kernels once more

    def behind(self, prefix_len):
        """A list of (level, its rows [3][B, T] behind prefix_len [B], its Ancestors), by one op; in a batch one more each lines
        them up."""
        rows = (prefix_len[:, None] + self.rows).split(self.widths, 1)
        rows = [x.unflatten(1, (3, -1)).transpose(0, 1)[..., :level.rows.shape[1]] for level, x in zip(self.levels, rows)]
        rows = rows if len(prefix_len) == 1 else [x.contiguous() for x in rows]
        return [(level, x, level.ancestors) for level, x in zip(self.levels, rows)]


GUESSES = 4             # tokens a node that are kept as likely outcomes, of which the likeliest of all nodes get a branch
ALIGNED = 4             # rows to which levels are filled up in the kernel's tables: 16 bytes of anything


class Branching:
    """N branches behind outcomes that are chosen in each round (kernels/outcomes.py): what doesn't depend on the choice."""

    def __init__(self, tree, levels, N):
        """levels: the Levels of N branches that see nothing of the trunk."""
        self.N, self.levels, self.starts, lines, device = N, levels, [], [], tree.mask.device
        for level in levels:
            (own, _, slot), slots, start, T = level.rows, level.ancestors.slots, sum(map(len, lines)), level.rows.shape[1]
            self.starts.append(start)
            branch = torch.arange(T, device=device) // (T // N)
            table = torch.stack([torch.full_like(own, start), torch.full_like(own, T), branch, own, slot], 1)
            table = torch.cat([table, F.pad(slots.long(), (0, tree.depth - slots.shape[1]))], 1)
            lines.append(F.pad(table, (0, 0, 0, -T % ALIGNED)))
        # [rows, 5 + K] int32: where the row's level starts and how many rows it has, its branch, its depth and slot in there, and
        # the slots of the branch that it sees; rows of zeros fill a level up
        self.table = torch.cat(lines).to(torch.int32)
        self.paths = tree.ancestors.slots.contiguous()                      # [M+1, K+1] int32: the path to each node, root first


class Layout:
    """Drafting `tree` at the trunk and, with a fan-out, behind every outcome (node, f < fan_out[node]), or behind N of them that
    each round chooses."""

    def __init__(self, tree, fan_out, device, confident=False):
        """fan_out: F_node for each node of the tree, or None where only speculations are wanted (SD). confident: only its sum N
        counts, and each round chooses where they go."""
        tensor = lambda x: torch.tensor(x, device=device)
        N, self.branching = sum(fan_out or ()), None
        if confident and fan_out:
            fan_out = [max(GUESSES, -(-N // tree.size))] * tree.size
        self.tree, self.counts = tree, fan_out or [0] * tree.size           # F_node: guesses kept behind each node
        self.width = max(self.counts)                                       # F: guesses kept per node
        self.fan_out = tensor(self.counts)
        alone = torch.zeros(1, 0, dtype=torch.bool, device=device)
        root, *deeper = self.levels(0, alone)
        # [previous token, root]: the first sees the prefix, which ends in itself; the second also its own slot.
        self.last_two = tensor([-1, 0])
        both = replace(root, rows=tensor([[-1, 0], [0, 1], [-1, 0]]), ancestors=Ancestors.of(tensor([[False], [True]])))
        self.trunk, self.refeed = Forwards([root, *deeper]), Forwards([both, *deeper])
        spine = [0]                                                         # the path of first choices
        while tree.first_child[spine[-1]] > 0:
            spine.append(tree.first_child[spine[-1]])
        self.spine = tensor(spine)
        if fan_out:
            leaves = self.level(tree.levels[-1], [], 0, alone)
            every = self.level(range(tree.size), range(1, tree.size), 0, alone)
        if fan_out and confident:
            unseen = torch.zeros(N, tree.size, dtype=torch.bool, device=device)
            self.branching = Branching(tree, self.levels(tree.size, unseen), N)
            self.ahead, self.glued = Forwards([leaves]), Forwards([every])
        elif fan_out:
            outcomes = [(node, f) for node in range(tree.size) for f in range(fan_out[node])]
            self.nodes = tensor([node for node, _ in outcomes])             # [N]
            self.guesses = tensor([node * self.width + f for node, f in outcomes])      # [N] in guesses [M+1, F], flat
            branches = self.levels(tree.size, tree.mask[self.nodes])
            self.ahead, self.glued = Forwards([leaves, *branches]), Forwards([every, *branches])

    def levels(self, base, sees):
        """Plan the K forwards that draft R trees into slots base.. ; sees [R, base]: the trunk slots above each root."""
        return [self.level(nodes, below, base, sees) for nodes, below in zip(self.tree.levels, self.tree.levels[1:])]

    def level(self, nodes, below, base, sees):
        """The forward that feeds `nodes` of R trees; below: the nodes that are their children."""
        tree, R, w, device = self.tree, len(sees), len(nodes), sees.device
        nodes, span = list(nodes), lambda some: slice(some[0], some[-1] + 1) if some else slice(0, 0)   # without gaps
        own = torch.eye(R, dtype=torch.bool, device=device)[:, None, :, None]                   # [R, 1, R, 1]
        inside = (own & tree.mask[nodes][:, None]).reshape(R * w, R * tree.size)
        position = sees.sum(1)[:, None] + tree.node_depth[nodes]                                # [R, w]
        slot = base + torch.arange(R, device=device)[:, None] * tree.size + torch.tensor(nodes, device=device)
        n_choices = max(1, *(tree.n_children[node] for node in nodes))
        return Level(span(nodes), span(below), torch.stack([position, position + 1, slot]).flatten(1),
                     Ancestors.of(torch.cat([sees.repeat_interleave(w, 0), inside], 1)), n_choices,
                     n_choices + max(self.counts[node] for node in nodes), self.fan_out[nodes].repeat(R))

"""CUDA graphs: a step of a few hundred kernel launches becomes one launch, recorded the second time it is asked for."""
import torch
from torch.utils import _pytree as pytree


class Graphs:
    """Calls functions of tensors, by CUDA graph where `on`.

    A function may read and write tensors that it owns (KV cache, prefix lengths) in place; its arguments (tensors, or
    tuples of them) are copied to fixed addresses before each replay, its results are at fixed addresses and hold until
    the next call. One object serves one stream: its graphs share their memory.
    """

    def __init__(self, on):
        self.on, self.recorded, self.pool = on, {}, None

    def clear(self):
        """Forget all graphs: what they own has moved."""
        self.recorded = {}

    def __call__(self, f, *args):
        if not self.on:
            return f(*args)
        leaves, structure = pytree.tree_flatten(args)
        tensors = [x for x in leaves if torch.is_tensor(x)]
        key = (f.__func__, *(tuple(x.shape) if torch.is_tensor(x) else x for x in leaves))
        if key not in self.recorded:            # the first time as it is: that compiles the kernels
            self.recorded[key] = None
            return f(*args)
        if self.recorded[key] is None:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            static = [x.clone() if torch.is_tensor(x) else x for x in leaves]
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                results = f(*pytree.tree_unflatten(static, structure))
            self.recorded[key] = graph, [x for x in static if torch.is_tensor(x)], results
        graph, static, results = self.recorded[key]
        for fixed, x in zip(static, tensors):
            fixed.copy_(x)
        graph.replay()
        return results

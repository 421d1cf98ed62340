"""How steps run: as CUDA graphs, where a few hundred kernel launches become one, and two of them side by side."""
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils import _pytree as pytree


class Graphs:
    """Calls functions of tensors, by CUDA graph where `on`; one is recorded the second time it is asked for.

    A function may read and write tensors that its owner keeps (KV cache, prefix lengths) in place. Its arguments
    (tensors, tuples of them, or constants) are copied to fixed addresses before each replay; its results stand at fixed
    addresses and hold until the same function is called with the same shapes and constants again. What it does in
    Python happens only while it is recorded. Every graph has memory of its own: in a shared pool the scratch space of one
    would lie over the results of another.
    """

    def __init__(self, on):
        # A stream of its own to record on, since libraries keep a workspace per stream, and graphs run side by side.
        self.on, self.recorded, self.stream = on, {}, torch.cuda.Stream() if on else None

    def clear(self):
        """Forget all graphs: what their functions keep has moved."""
        self.recorded = {}

    def __call__(self, f, *args):
        if not self.on:
            return f(*args)
        leaves, structure = pytree.tree_flatten(args)
        key = (f.__func__, *(tuple(x.shape) if torch.is_tensor(x) else x for x in leaves))
        if key not in self.recorded:            # the first time as it is: that compiles the kernels
            self.recorded[key] = None
            return f(*args)
        if self.recorded[key] is None:
            static = [x.clone() if torch.is_tensor(x) else x for x in leaves]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                results = f(*pytree.tree_unflatten(static, structure))
            self.recorded[key] = graph, static, results
        graph, static, results = self.recorded[key]
        for fixed, x in zip(static, leaves):
            if torch.is_tensor(x):
                fixed.copy_(x)
        graph.replay()
        return results


class Beside:
    """Runs the draft side next to the verify: on a second stream of a GPU, in a worker thread on a CPU."""

    def __init__(self, device):
        self.device, self.cuda = device, device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            self.stream = torch.cuda.Stream(self.device)
        else:
            self.pool, self.threads = ThreadPoolExecutor(1), torch.get_num_threads()
            torch.set_num_threads(max(1, self.threads // 2))            # both sides get half of the cores
        return self

    def __exit__(self, *_):
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        else:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)

    def start(self, work, *args):
        """Start work(*args); returns a function that joins and gives its result."""
        if self.cuda:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                result = work(*args)

            def join():
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
                return result
            return join

        @torch.inference_mode()
        def run():
            torch.set_num_threads(max(1, self.threads // 2))
            return work(*args)
        return self.pool.submit(run).result

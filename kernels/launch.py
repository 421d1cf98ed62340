"""What the kernels share: block shapes per weight shape, launch options, int8 weights, and the two PDL helpers.

Programmatic dependent launch (PDL) lets a kernel start while the one before it still runs. It then fetches its first
weights, which don't depend on anybody, into the L2 cache, and waits only then for its inputs: the launch latency and
the ramp-up of 6 kernels a layer disappear behind each other.
"""
import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

PREFETCH = 64 << 10                     # bytes of weights that a waiting program fetches into L2
SHARED_MEMORY = 200e3, 84e3             # bytes of tiles in flight that fit beside 16 KB for the end: on a Hopper GPU, on any other
FETCHED = 8 << 10                       # the same beside another model
LATE = tl.constexpr(4)                  # steps along K before its end at which a streaming kernel lets the next one start
MAX_ROWS = 128                          # rows of x that the skinny kernels take; above that, cuBLAS is the right tool
AT_ONCE, MOST_K = 4 << 20, 2048         # a weight of fewer elements, and no more of them in a row, is taken at once ...
TILE = 16                               # ... by programs of so many rows of it and of x: one tensor core instruction


class Int8Weight(NamedTuple):
    """A weight rounded to 8 bits per row (W8A16): w = values * scale[:, None]."""
    values: torch.Tensor                # [N, K] int8
    scale: torch.Tensor                 # [N] float32

    @classmethod
    def of(cls, w):
        scale = w.float().abs().amax(dim=1) / 127
        return cls((w.float() / scale.clamp(min=1e-12)[:, None]).round().to(torch.int8), scale)

    def dense(self, dtype):
        return (self.values.float() * self.scale[:, None]).to(dtype)


def dense(w, x):
    """w as plain torch can multiply it with x."""
    return w.dense(x.dtype) if isinstance(w, Int8Weight) else w


class Blocks(NamedTuple):
    BN: int                             # output rows a program: decides which tensor core instruction is used
    BK: int                             # step along K: only how often the loop turns, not the order of the sum
    stages: int                         # tiles in flight
    warps: int
    split: int = 1                      # programs that share the K of a block


class Tables(NamedTuple):
    """Block shapes that were measured on a GPU (python -m kernels.tune): (N, K) -> Blocks. For what isn't in them see `blocks_for`.
    Only `split` shows in the bits of a sum: mma.sync and wgmma give the same for any BN, BK, stages and warps (test_kernels.py)."""
    narrow: dict                        # up to 16 rows of x
    wide: dict                          # more: every program reads all of x, so it needs many rows of the weight. Measured at 64
    int8: dict                          # int8 weights, any number of rows


H100 = Tables(
    narrow={
        (6144, 4096): Blocks(32, 256, 4, 4), (4096, 4096): Blocks(32, 256, 6, 4), (28672, 4096): Blocks(32, 256, 6, 4),
        (4096, 14336): Blocks(64, 128, 6, 4, 2), (128256, 4096): Blocks(64, 128, 6, 4),                     # Llama 3.1 8B
        (3072, 2048): Blocks(32, 256, 6, 4), (2048, 2048): Blocks(64, 128, 4, 4, 4), (16384, 2048): Blocks(32, 256, 3, 4),
        (2048, 8192): Blocks(64, 128, 6, 4, 4), (128256, 2048): Blocks(64, 128, 6, 4),                      # Llama 3.2 1B
        (49152, 576): Blocks(128, 64, 6, 4),                                                                # SmolLM2 135M
    },
    wide={
        (6144, 4096): Blocks(64, 128, 4, 4), (4096, 4096): Blocks(64, 128, 5, 4), (28672, 4096): Blocks(128, 128, 3, 8),
        (4096, 14336): Blocks(64, 128, 5, 4, 2), (128256, 4096): Blocks(64, 128, 3, 4),
        (3072, 2048): Blocks(32, 256, 3, 4), (2048, 2048): Blocks(64, 128, 4, 4, 4), (16384, 2048): Blocks(64, 128, 3, 4),
        (2048, 8192): Blocks(64, 128, 5, 4, 4), (128256, 2048): Blocks(64, 128, 3, 4),
        (49152, 576): Blocks(128, 64, 3, 4),
    },
    int8={
        (3072, 2048): Blocks(32, 256, 6, 4), (2048, 2048): Blocks(32, 256, 3, 4, 2), (16384, 2048): Blocks(64, 256, 4, 2),
        (2048, 8192): Blocks(32, 256, 6, 4, 4), (128256, 2048): Blocks(64, 256, 3, 2),
        (49152, 576): Blocks(128, 64, 3, 2),
    })
H200 = Tables(          # the same processor behind a memory that is 1.4 times as fast: what differs
    narrow=H100.narrow | {
        (6144, 4096): Blocks(64, 128, 6, 4), (4096, 4096): Blocks(64, 128, 6, 4, 2), (28672, 4096): Blocks(64, 128, 4, 4),
        (128256, 4096): Blocks(64, 128, 4, 4),
        (2048, 2048): Blocks(16, 512, 3, 2), (16384, 2048): Blocks(128, 128, 3, 8), (128256, 2048): Blocks(128, 128, 3, 8),
    },
    wide=H100.wide | {
        (6144, 4096): Blocks(64, 128, 5, 4), (4096, 4096): Blocks(64, 128, 5, 8, 2), (28672, 4096): Blocks(64, 128, 3, 4),
        (4096, 14336): Blocks(64, 128, 5, 8, 2), (128256, 4096): Blocks(128, 64, 4, 4),
        (3072, 2048): Blocks(64, 128, 4, 8), (2048, 2048): Blocks(16, 256, 6, 4), (16384, 2048): Blocks(128, 64, 6, 8),
        (2048, 8192): Blocks(64, 256, 3, 8, 4), (128256, 2048): Blocks(128, 64, 4, 4),
    },
    int8=H100.int8)


def is_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@functools.cache
def tables():
    """The Tables for the GPU at hand: none but a Hopper GPU has any."""
    if not is_hopper():
        return Tables({}, {}, {})
    return H200 if "H200" in torch.cuda.get_device_name() else H100


def blocks_for(N, K, rows=1, int8=False):
    """Block shapes for a weight [N, K] and a number of rows of x. `split` is the same for any number of rows."""
    BK = min(256 if K >= 2048 else 128, max(16, triton.next_power_of_2(K)))
    narrow = tables().narrow.get((N, K), Blocks(64 if N >= 16384 else 32, BK, 4, 4, 2 if N <= 4096 <= K else 1))
    if int8 and is_hopper():
        # For wgmma an int8 weight would come in copies of 4 bytes instead of 16; 2 warps use mma.sync, as BN < 64 does.
        return tables().int8.get((N, K), narrow._replace(warps=2) if narrow.BN >= 64 else narrow)
    if rows > 16 and (N, K) in tables().wide:
        return tables().wide[N, K]
    if rows > 16 and N * K >= 4 << 20:
        return Blocks(128 if N >= 16384 else 64, 64, 4, 4, narrow.split)
    return narrow


def warps_at_once(N, K):
    """Warps of a program that takes a weight [N, K] at once (kernels/at_once.py), each with a part of K; 0: it's too large."""
    if K % 64 or K > MOST_K or N * K >= AT_ONCE:
        return 0
    return 8 if K > 1024 and K % 128 == 0 else 4


class Share(NamedTuple):
    """What the linears of a model may use of a GPU while another model works beside it."""
    ctas: int                           # programs, where there is work for twice as many; they then loop
    in_flight: int = 48                 # KB of weights that each has asked for and not yet got

    def __str__(self):
        return f"{self.ctas} CTAs, {self.in_flight} KB in flight in each"


class Operands:
    """What is known of a skinny linear by its operands: x [..., K] with M rows, w [N, K] or Int8Weight."""

    def __init__(self, x, w):
        self.INT8 = isinstance(w, Int8Weight)
        self.weight, self.scale = w if self.INT8 else (w, w)
        (self.N, self.K), self.M, self.device = self.weight.shape, x.numel() // x.shape[-1], x.device
        assert x.shape[-1] == self.K and x.is_contiguous() and self.weight.is_contiguous() and self.M <= MAX_ROWS


class AtOnce(Operands):
    """Shapes, grid and launch options of a linear that is taken at once; `warps` 0: it isn't."""

    def __init__(self, x, w):
        super().__init__(x, w)
        self.warps = warps_at_once(self.N, self.K)
        self.grid = triton.cdiv(self.N, TILE), triton.cdiv(self.M, TILE)
        # PIECES: at_once.all_columns cuts K into the powers of two that it consists of.
        self.shape = dict(BM=TILE, BN=TILE, PARTS=self.warps, PIECES=self.K.bit_count(), INT8=self.INT8, PDL=pdl(x.device),
                          num_warps=self.warps, **launch_options(x.device))


class Launch(Operands):
    """Shapes, block shapes, grid and launch options of one skinny linear.

    most: the largest BN that fits. share: None, or a Share beside another model. What that one asks the memory for waits behind
    all that this one has asked for, so few bytes are in flight.
    """

    def __init__(self, x, w, most=1 << 30, share=None):
        super().__init__(x, w)
        self.BM = max(16, triton.next_power_of_2(self.M))
        self.BN, self.BK, stages, warps, self.SPLIT = blocks_for(self.N, self.K, self.M, self.INT8)
        self.BN = min(self.BN, most)
        self.blocks, fetch = triton.cdiv(self.N, self.BN), PREFETCH
        programs = self.blocks * self.SPLIT
        if share is not None:
            programs, fetch = programs if programs < 2 * share.ctas else share.ctas, FETCHED
            stages = min(stages, 1 + max(2, (share.in_flight << 10) // (self.BN * self.BK * self.weight.element_size())))
        # More rows need more shared memory. What gives way is what rounding doesn't see: SPLIT stays.
        tile = lambda: (self.BN * self.weight.element_size() + self.BM * x.element_size()) * self.BK
        while tile() * stages > SHARED_MEMORY[not is_hopper()] and (stages > 2 or self.BK > 32):
            stages, self.BK = (stages - 1, self.BK) if stages > 2 else (stages, self.BK // 2)
        self.grid = (programs,)
        self.options = dict(PREFETCH=fetch, PDL=pdl(x.device), num_warps=warps, num_stages=stages, **launch_options(x.device))

    def scratch(self):
        """Partial tiles and arrival counters of split-K."""
        arrivals = self.weight.__dict__.setdefault("arrivals", {})      # one a stream, since streams run side by side
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.weight.is_cuda else 0
        if (stream, self.blocks) not in arrivals:
            arrivals[stream, self.blocks] = torch.zeros(self.blocks, dtype=torch.int32, device=self.device)
        part = torch.empty(self.blocks * self.SPLIT * self.BN * self.BM, device=self.device, dtype=torch.float32)
        return part, arrivals[stream, self.blocks]


ONE_THREAD, PARSER = threading.Lock(), threading.Lock()


@contextlib.contextmanager
def compiling_together():
    """What this thread launches in here is only compiled, many kernels at a time: each takes half a second, when it is new."""
    with ONE_THREAD:                                        # at a time may change how Triton launches
        run, parse, here = JITFunction.run, JITFunction.parse, threading.get_ident()

        def compile_only(kernel, *args, warmup, **more):
            return run(kernel, *args, warmup=warmup or threading.get_ident() == here, **more)

        def parse_alone(kernel):                            # ast.parse in two threads at a time fails, now and then
            with PARSER:
                return parse(kernel)

        with patch.object(JITFunction, "parse", parse_alone), ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
            with patch.object(JITFunction, "run", compile_only):
                yield


def pdl(device):
    """Whether this device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device):
    return {"launch_pdl": True} if pdl(device) else {}


@triton.jit
def wait_for_inputs(PDL: tl.constexpr, LATER: tl.constexpr = False):
    """Wait until what the previous kernel wrote is visible, then let the next one start, unless `next_may_start` does so LATER.

    In this order a kernel that has started knows that all but its direct predecessor are done: their outputs may be read
    before the wait. That holds because in each kernel some program waits, each lets the next kernel start after its wait, or
    ends, and none writes before it.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        if not LATER:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def next_may_start(left, PDL: tl.constexpr):
    """To be called in every step of a loop, with how many are left. What the next kernel asks for must not delay this one's
    weights, nor its shared memory take the room of another model's kernels."""
    if PDL:
        if left == LATE:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(w_ptr, row, N, K: tl.constexpr, k0, ROWS: tl.constexpr, BYTES: tl.constexpr, PDL: tl.constexpr):
    """Fetch the first columns from k0 on of W[row:row+ROWS], some BYTES, into L2, without waiting for them."""
    if PDL:
        LINE: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)        # 128 bytes
        LINES: tl.constexpr = triton.next_power_of_2(min((K + LINE - 1) // LINE, max(1, BYTES // (ROWS * 128))))
        rows = row + tl.arange(0, ROWS)
        kk = k0 + tl.arange(0, LINES) * LINE
        at = w_ptr + tl.minimum(rows, N - 1)[:, None].to(tl.int64) * K + tl.minimum(kk, K - 1)[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False,
                                  pack=1)

"""python -m kernels.tune: find the block shapes of the linears for a Hopper GPU and print a table for kernels/launch.py.

Every candidate runs in a CUDA graph over weights that rotate past the L2 cache, as in a real step. Candidates are
compiled in parallel first; that takes most of the time.
"""
import argparse
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from errors import UserError, exit_on_user_error
from kernels import launch
from kernels.head import best
from kernels.launch import Blocks, Int8Weight
from kernels.linear import Stream, add_linear, qkv_rope, swiglu_linear
from shapes import SHAPES

L2_BYTES = 300e6        # weights to rotate over: several times any L2 cache


def operations(shape):
    """(op, N, K, head_dim, kv heads) of a layer's linears and the head. "best" is the head; of the others small ones have no
    block shapes to choose."""
    c = SHAPES[shape]
    heads = c.n_heads * c.head_dim
    return [("qkv", heads + 2 * c.n_kv_heads * c.head_dim, c.dim, c.head_dim, c.n_kv_heads),
            ("linear", c.dim, heads, 0, 0), ("swiglu", 2 * c.ffn_dim, c.dim, 0, 0),
            ("linear", c.dim, c.ffn_dim, 0, 0), ("best", c.vocab_size, c.dim, 0, 0)]


def candidates(op, N, K, head_dim, element_size, rows):
    """Block shapes worth trying: tiles in flight of 48 to 115 KB (int8: 24), a grid that isn't tiny. (Not all there are: an H200's
    table has some with other numbers of warps.)"""
    for BN, BK, stages, warps, split in itertools.product((16, 32, 64, 128), (64, 128, 256, 512), (2, 3, 4, 5, 6),
                                                          (2, 4, 8), (1, 2, 4)):
        flight, programs, steps = BN * BK * element_size * stages, -(-N // BN) * split, -(-K // BK // split)
        usual = 2 if element_size == 1 and BN >= 64 else 8 if BN * BK >= 64 * 256 else 4       # 2: see blocks_for
        if (not 24e3 * element_size < flight < 115e3 or stages > max(2, steps) or BK > K or K % BK or warps != usual
                or head_dim and BN > head_dim or split > 1 and (op != "linear" or programs > 600 or steps < 2)
                or programs < (40 if rows > 16 else 90) or BN > 32 and programs > 4200 or BN < 32 * element_size and N > 100000):
            continue
        yield Blocks(BN, BK, stages, warps, split)


def table_for(rows, int8):
    """What counts for so many rows of x and such weights, of the Tables of this GPU."""
    return getattr(launch.tables(), table_name(rows, int8))


def table_name(rows, int8):
    return "int8" if int8 else "narrow" if rows <= 16 else "wide"


def workload(op, N, K, head_dim, kv, rows, int8, copies):
    """A function i -> None that runs the op on the i-th copy of its weight."""
    device, dtype = "cuda", torch.bfloat16
    x, norm = torch.randn(1, rows, K, device=device, dtype=dtype), torch.ones(K, device=device, dtype=dtype)
    weights = [torch.randn(N, K, device=device, dtype=dtype) * K ** -0.5 for _ in range(copies)]
    weights = [Int8Weight.of(w) for w in weights] if int8 else weights
    stream = Stream(x, x, (x.float().pow(2).sum(-1) * 2.0 ** 28).to(torch.int64))
    if op == "qkv":
        cos = sin = torch.rand(1, rows, head_dim // 2, device=device)
        slots, cache = torch.arange(rows, device=device)[None], torch.zeros(1, kv, 256, head_dim, device=device, dtype=dtype)
        return lambda i: qkv_rope(stream, norm, 1e-5, weights[i % copies], cos, sin, slots, cache, cache)
    if op == "swiglu":
        return lambda i: swiglu_linear(stream, norm, 1e-5, weights[i % copies])
    if op == "best":
        seeds, positions = torch.zeros(1, device=device, dtype=torch.int64), torch.zeros(1, rows, device=device).long()
        return lambda i: best(x, weights[i % copies], 1, 0.0, seeds, 0, positions)
    residual = Stream(torch.randn(1, rows, N, device=device, dtype=dtype), None, None)
    norm, sums = torch.ones(N, device=device, dtype=dtype), torch.zeros_like(stream.sums)
    return lambda i: add_linear(x, weights[i % copies], residual, norm, sums)


def compile_one(job):
    (op, N, K, head_dim, kv), blocks, rows, int8 = job
    table_for(rows, int8)[N, K] = blocks
    try:
        workload(op, N, K, head_dim, kv, rows, int8, 1)(0)
        torch.cuda.synchronize()
        return True
    except Exception as error:          # too much shared memory, or a shape the compiler refuses
        return f"{type(error).__name__}: {error}"[:200]


def microseconds(run, launches=24, repeats=7):
    """Median time of one launch inside a CUDA graph."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches * 1e3)
    return sorted(times)[len(times) // 2]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=8, help="rows of x (default 8); above 16 it is the table of wide blocks")
    parser.add_argument("--int8", action="store_true", help="weights in int8, which have a table of their own")
    parser.add_argument("--json", help="write every measurement to this file")
    args = parser.parse_args(argv)
    if not launch.is_hopper():
        raise UserError("needs a Hopper GPU: on others kernels/launch.py goes by its rule and reads no table")
    if not 0 < args.rows <= launch.MAX_ROWS:
        raise UserError(f"--rows: the kernels take 1 to {launch.MAX_ROWS}")
    if unknown := set(args.shapes.split(",")) - set(SHAPES):
        raise UserError(f"unknown shape {', '.join(sorted(unknown))}; expected some of {', '.join(SHAPES)}")
    table, everything = {}, []
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=get_context("spawn")) as pool:
        plans = {}
        for shape in args.shapes.split(","):
            for operation in operations(shape):
                if operation[0] != "best" and launch.warps_at_once(*operation[1:3]):
                    continue
                blocks = list(candidates(*operation[:4], 1 if args.int8 else 2, args.rows))
                if args.rows > 16 and not args.int8:    # the split shows in the bits: it is that of a single row
                    split = launch.blocks_for(*operation[1:3]).split
                    blocks = [b for b in blocks if b.split == split]
                blocks = blocks or [launch.blocks_for(*operation[1:3], args.rows, args.int8)]
                plans[shape, operation] = blocks, pool.map(compile_one, [(operation, b, args.rows, args.int8)
                                                                         for b in blocks])
        compiled = {key: [*zip(blocks, oks)] for key, (blocks, oks) in plans.items()}
    for (shape, operation), tried in compiled.items():
        blocks = [b for b, ok in tried if ok is True]
        if not blocks:
            print(f"{shape} {operation[0]}: none compiled, the first: {tried[0][1]}", flush=True)
            continue
        op, N, K, head_dim, kv = operation
        bytes_moved = N * K * (1 if args.int8 else 2)
        copies = max(2, min(64, int(L2_BYTES / bytes_moved)))
        run = workload(*operation, args.rows, args.int8, copies)
        results = []
        for b in blocks:
            table_for(args.rows, args.int8)[N, K] = b
            results.append((microseconds(run), b))
            everything.append(dict(shape=shape, op=op, N=N, K=K, blocks=b, us=results[-1][0]))
        results.sort()
        table[N, K] = results[0][1]
        print(f"{shape} {op} {N}x{K}: " + "; ".join(f"{us:.1f} us {bytes_moved / us / 1e6:.2f} TB/s {tuple(b)}"
                                                    for us, b in results[:4]), flush=True)
        del run
        torch.cuda.empty_cache()
    print(f"{table_name(args.rows, args.int8)}={{")
    for (N, K), b in table.items():
        print(f"    ({N}, {K}): Blocks{tuple(b)},")
    print("},")
    if args.rows <= 16 and not args.int8:
        print("# --rows above 16 goes by the splits that stand in kernels/launch.py: paste this there first")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(everything, file)


if __name__ == "__main__":
    with exit_on_user_error():
        main()

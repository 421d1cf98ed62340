"""Speculation without a clock: tokens per round, acceptance, hit rates and draft forwards, the same on every machine."""
import time

import torch

from batch import FANOUTS, Options, Stats
from errors import UserError
from measure.pairs import text_pairs
from saguaro import sd, ssd
from sampling import Sampling


def configurations(small):
    """(table, row, Sampling, Options, loop) of every run."""
    for temperature in (0.0, 0.7, 1.0):
        for accept, c in (("coupled", 1.0), ("residual", 1.0), ("residual", 0.5)):
            if temperature or accept == "coupled":
                name = accept if accept == "coupled" else f"residual, C = {c}"
                yield ("accept", f"T = {temperature}, {name}", Sampling(temperature),
                       Options(accept=accept, saguaro_c=c, rests=False), ssd)
    for temperature in (0.0, 1.0):
        for budget in (8, 16, 32):
            for fanout in FANOUTS:
                if not small or budget == 16:
                    yield ("fan-out", f"T = {temperature}, budget {budget}, {fanout}", Sampling(temperature),
                           Options(fanout=fanout, fanout_budget=budget, rests=False), ssd)
    for k in (2, 4, 6, 8):
        yield "speculation", f"chain, K = {k}", Sampling(), Options(k=k), sd
    for nodes in (8, 16, 32, 64):
        yield "speculation", f"best tree of {nodes}", Sampling(), Options(k=10, tree=str(nodes)), sd


def speculation(args):
    """Tokens per round, acceptance, hit rate and draft forwards of many configurations: the same on every machine."""
    pair, rows, size = next(text_pairs(args, args.pad, args.pad_draft)), [], args.batch[0]
    if pair.draft is None:
        raise UserError("--speculation needs a draft: give --draft DIR or --round-draft BITS")
    for table, row, sampling, options, loop in configurations(args.small):
        totals, began = Stats(), time.time()
        for first in range(0, len(pair.prompts), size):
            group = pair.prompts[first:first + size]
            for _ in loop(pair.target, pair.draft, group, args.max_new_tokens, sampling, options, pair.stop_ids, stats=totals,
                          seeds=list(range(first, first + len(group)))):
                pass
        rows.append(dict(table=table, row=row, **{k: v for k, v in totals.summary().items() if "seconds" not in k}))
        print(f"{table}: {row}: {totals.tokens_per_round:.2f} tokens a round, acceptance {totals.acceptance_rate:.3f}, "
              f"hit rate {totals.hit_rate:.3f}  ({time.time() - began:.0f} s)", flush=True)
    what = f"{pair.name[0].upper()}{pair.name[1:]}, {len(pair.prompts)} prompts, up to {args.max_new_tokens} new tokens, " \
           f"{str(args.dtype)[6:]}; K = 6 and budget 16 where not said otherwise"
    return dict(kind="speculation", what=what, rows=rows, torch=torch.__version__, device=str(args.device))


"""--draft-device: target and draft on devices of their own, between which only token ids and outcomes cross.

Without two GPUs the devices are two kinds of CPU tensors, which refuse to meet in an operation.
"""

import pytest
import torch

import batch
import draft
import graphs
import sampling
import saguaro
from model import Llama, LlamaConfig
from saguaro import Options, Stats, autoregressive, sd, ssd
from sampling import Sampling

CONFIG = LlamaConfig(vocab_size=67, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, max_context=96,
                     dtype=torch.float32)
PROMPTS, NEW = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]], [24, 9, 16]
OPTIONS = [Options(k=4), Options(k=3, tree="3,2,1", fanout_budget=24), Options(k=4, tree="12", backup="fast"),
           Options(k=3, fanout="auto")]


def pair(target_device, draft_device):
    target = Llama.random(CONFIG, 0, target_device)
    target.head.mul_(4)
    near = Llama(CONFIG, draft_device)
    for weight, ours, noise in zip(near.parameters(), target.parameters(), Llama.random(CONFIG, 1).parameters()):
        weight.copy_(ours if ours.dim() == 1 else 0.9975 * ours + 0.07 * noise.to(target_device))
    return target, near


def texts(loop, models, *options, temperature=0.0, stats=None):
    out = [[] for _ in PROMPTS]
    for chunks in loop(*models, PROMPTS, NEW, Sampling(temperature, seed=5), *options, stats=stats):
        for chunk in chunks:
            out[chunk.sequence] += chunk.tokens
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Two devices on a CPU

class Sided(torch.Tensor):
    """A tensor of one device; whatever is computed from it is there too, and no operation takes tensors of both."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        sides = {kind for kind in types if issubclass(kind, Sided)}
        assert len(sides) < 2, f"{func} mixes tensors of two devices"
        return super().__torch_function__(func, types, args, kwargs)


class OnTarget(Sided):
    pass


class OnDraft(Sided):
    device = property(lambda self: torch.device("cpu", 0))                  # unequal to "cpu"


def place(model, side):
    """Put the weights of a model on a side."""
    for module in (model, *model.layers):
        for name, weight in list(module.named_parameters(recurse=False)):
            module._parameters[name] = weight.detach().as_subclass(side)
    model.freqs = model.freqs.as_subclass(side)
    return model


@pytest.fixture
def two_sides(monkeypatch):
    """(target, draft, what crossed) on a side each: the loops' own `cross`, with clones instead of peer copies."""
    target, near = (place(model, side) for model, side in zip(pair("cpu", "cpu"), (OnTarget, OnDraft)))
    crossed = []

    def cross(x, device):
        if x is None or not torch.is_tensor(x):
            return x if x is None else type(x)(*(cross(part, device) for part in x))
        side = OnTarget if device.index is None else OnDraft
        if isinstance(x, Sided) and type(x) is not side:                    # the others are there, or prompts and seeds
            crossed.append((type(x), x.dtype, x.numel()))
        return x if type(x) is side else x.as_subclass(torch.Tensor).clone().as_subclass(side)
    def started(start):
        def wrapper(self, *args):
            start(self, *args)
            side = OnTarget if self.model.device.index is None else OnDraft
            for name in {"prefix_len", "history", "found", "root"} & vars(self).keys():     # what follows from these is there too
                setattr(self, name, getattr(self, name).as_subclass(side))
        return wrapper
    for kind in (draft.Drafter, saguaro.Target):
        monkeypatch.setattr(kind, "start", started(kind.start))
    receipt = graphs.Mailbox.receipt

    def receipt_from_its_side(self, x):
        assert type(x) is (OnTarget if self.device.index is None else OnDraft), "a box takes mail from its own device"
        return receipt(self, x)
    monkeypatch.setattr(graphs.Mailbox, "receipt", receipt_from_its_side)
    for module in (batch, draft, graphs, saguaro, sampling):
        if hasattr(module, "cross"):
            monkeypatch.setattr(module, "cross", cross)
    return target, near, crossed


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_only_ids_and_outcomes_cross(two_sides, options, temperature):
    *models, crossed = two_sides
    expected = texts(autoregressive, models[:1], temperature=temperature)
    assert not crossed
    for loop in sd, ssd:
        stats = Stats()
        assert texts(loop, models, options, temperature=temperature, stats=stats) == expected
        assert {kind for kind, *_ in crossed} == {OnTarget, OnDraft}        # both ways
        assert {dtype for _, dtype, _ in crossed} <= {torch.int64, torch.int32, torch.bool}
        assert max(size for *_, size in crossed) <= len(PROMPTS) * 16 and len(crossed) <= 10 * stats.rounds
        crossed.clear()


def test_q_crosses_for_rejection_sampling(two_sides):
    """The residual rule asks for what the draft drew from; it is the one thing of size that crosses."""
    *models, crossed = two_sides
    same = texts(ssd, pair("cpu", "cpu"), Options(k=4, accept="residual"), temperature=0.8)
    assert texts(ssd, models, Options(k=4, accept="residual"), temperature=0.8) == same
    large = {(kind, dtype) for kind, dtype, size in crossed if size > len(PROMPTS) * 16}
    assert large == {(OnDraft, torch.float32)}


def test_sides_refuse_to_mix():
    with pytest.raises(AssertionError, match="two devices"):
        torch.ones(2).as_subclass(OnTarget) + torch.ones(2).as_subclass(OnDraft)
    assert type(torch.ones(2).as_subclass(OnDraft).argmax() + torch.tensor(1)) is OnDraft


# ---------------------------------------------------------------------------------------------------------------------
# Two GPUs

@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_gpus(options, graphs):
    here, there = pair("cuda:0", "cuda:0"), pair("cuda:0", "cuda:1")
    assert there[1].device == torch.device("cuda", 1)
    for model in (*here, *there):
        model.run_with("triton", graphs)
    expected = texts(autoregressive, here[:1], temperature=0.8)
    for loop in sd, ssd:
        same, stats = Stats(), Stats()
        assert texts(loop, here, options, temperature=0.8, stats=same) == expected
        assert texts(loop, there, options, temperature=0.8, stats=stats) == expected
        assert (stats.rounds, stats.accepted, stats.hits) == (same.rounds, same.accepted, same.hits)

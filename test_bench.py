"""bench.py: README's tables are what results/ says, and rounding a model keeps what it promises to keep."""
import json
from pathlib import Path

import torch

import bench
from model import Llama, LlamaConfig

ROOT = Path(__file__).resolve().parent


def test_readme_tables_come_from_results():
    readme, found = (ROOT / "README.md").read_text(encoding="utf-8"), sorted((ROOT / "results").glob("speculation_*.json"))
    assert found
    for path in found:
        table = bench.tables(json.loads(path.read_text(encoding="utf-8")))
        assert f"<!-- {path.name} -->\n{table}<!-- end of {path.name} -->" in readme, "run python bench.py --report"


def test_rounded_keeps_embeddings_and_uses_few_levels():
    config = LlamaConfig(vocab_size=20, dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=128)
    model, before = bench.rounded(Llama.random(config, 0, dtype=torch.float32), 4), Llama.random(config, 0, dtype=torch.float32)
    assert torch.equal(model.embed, before.embed) and torch.equal(model.head, before.head)
    for name in ("wqkv", "wo", "w_gate_up", "w_down"):
        new, old = (getattr(m.layers[0], name) for m in (model, before))
        assert all(len(group.unique()) <= 16 for group in new.view(-1, 64))
        step = (old.view(-1, 64).amax(1) - old.view(-1, 64).amin(1)) / 15
        assert ((new - old).view(-1, 64).abs() <= step[:, None] / 2 + 1e-6).all()


def test_step_times_count_the_bytes(monkeypatch):
    config = LlamaConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48, tie_embeddings=True)
    monkeypatch.setitem(bench.SHAPES, "tiny", config)
    rows = bench.step_times("tiny", 20, torch.device("cpu"), rows=(1, 4))
    model = Llama.random(config, dtype=torch.float32)
    moved = 4 * (sum(p.numel() for p in model.parameters()) + 2 * 2 * 16 * 20)
    assert [row["rows"] for row in rows] == [1, 4]
    for row in rows:
        assert row["ms_10"] <= row["ms"] <= row["ms_90"]
        assert abs(row["bandwidth"] * row["ms"] / 1e3 / moved - 1) < 1e-6


def test_unknown_shape(capsys):
    try:
        bench.main(["--steps", "llama-9", "--device", "cpu"])
        raise AssertionError("accepted")
    except bench.UserError as error:
        assert "llama-9" in str(error) and "llama-3.1-8b" in str(error)

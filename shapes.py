"""Shapes of published models, for measuring with random weights: the time of a step depends on nothing else."""
from model import LlamaConfig

SHAPES = {
    "llama-3.1-8b": LlamaConfig(vocab_size=128256, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
                                ffn_dim=14336, rope_theta=500000.0, max_context=131072),
    "llama-3.2-3b": LlamaConfig(vocab_size=128256, dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, head_dim=128,
                                ffn_dim=8192, rope_theta=500000.0, max_context=131072, tie_embeddings=True),
    "llama-3.2-1b": LlamaConfig(vocab_size=128256, dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64,
                                ffn_dim=8192, rope_theta=500000.0, max_context=131072, tie_embeddings=True),
    "tinyllama-1.1b": LlamaConfig(vocab_size=32000, dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64,
                                  ffn_dim=5632),
    "smollm2-360m": LlamaConfig(vocab_size=49152, dim=960, n_layers=32, n_heads=15, n_kv_heads=5, head_dim=64,
                                ffn_dim=2560, rope_theta=100000.0, max_context=8192, tie_embeddings=True),
    "smollm2-135m": LlamaConfig(vocab_size=49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
                                ffn_dim=1536, rope_theta=100000.0, max_context=8192, tie_embeddings=True),
}

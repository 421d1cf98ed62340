"""
Llama in a single file: config, weights, KV cache, and one forward that serves every step of speculative decoding.

The forward takes T new tokens per sequence that sit behind a committed prefix and form a *tree*: `mask[t, j]` says
whether new token t descends from (or is) speculative slot j. Decoding one token, verifying a chain or a tree, drafting
many branches at once and prefilling a chunk are all the same call with another mask.

Shapes: B sequences, T new tokens, S speculative slots, C cache slots, H query heads, KV key/value heads, D head_dim,
V vocabulary.

After https://github.com/meta-llama/llama-models, in the checkpoint layout of Hugging Face transformers; in the manner of
https://github.com/karpathy/nanoGPT/blob/master/model.py.
"""
import contextlib
import json
import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import kernels
from errors import UserError
from kernels.tree_attention import sequences

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_json(path):
    """The object in a JSON file; UserError if the file is missing or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected a Hugging Face checkpoint folder with {Path(path).name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}); download the checkpoint again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Config

@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None            # Llama 3.1's, as in HF's config.json
    max_context: int = 2048
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple = ()
    dtype: torch.dtype = torch.bfloat16
    target_vocab_size: int | None = None        # set for a draft with a trimmed vocabulary: the size of its target's

    @classmethod
    def from_folder(cls, folder):
        """Read config.json (and eos from generation_config.json) in the spelling of transformers 4 or 5."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"no such checkpoint folder: {folder}")
        path = folder / "config.json"
        hf = read_json(path)
        if hf.get("model_type") != "llama" or hf.get("architectures", ["LlamaForCausalLM"]) != ["LlamaForCausalLM"]:
            found = hf.get("architectures") or hf.get("model_type")
            raise UserError(f"{path}: architecture is {found}, only LlamaForCausalLM (model_type llama) is supported")
        if hf.get("attention_bias") or hf.get("mlp_bias") or hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"{path}: biases or hidden_act other than silu are not supported")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}                # transformers 5 | 4
        if not isinstance(rope, dict):
            raise UserError(f"{path}: the RoPE parameters are {rope!r}; expected a JSON object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise UserError(f"{path}: RoPE scaling '{kind}' is not supported, only 'default' and 'llama3'")
        generation = folder / "generation_config.json"
        eos = (read_json(generation) if generation.exists() else {}).get("eos_token_id", hf.get("eos_token_id"))

        def size(key, default=None):
            value = default if hf.get(key) is None else hf[key]
            if type(value) is not int or not 0 < value < 2**31:
                raise ValueError(f"{key} is {value!r}, expected a positive integer")
            return value

        try:
            dim, n_heads = size("hidden_size"), size("num_attention_heads")
            n_kv_heads, head_dim = size("num_key_value_heads", n_heads), size("head_dim", dim // n_heads)
            if n_heads % n_kv_heads or head_dim % 2:
                raise ValueError(f"{n_heads} heads of size {head_dim} over {n_kv_heads} KV heads")
            return cls(
                vocab_size=size("vocab_size"), dim=dim, n_layers=size("num_hidden_layers"), n_heads=n_heads,
                ffn_dim=size("intermediate_size"), n_kv_heads=n_kv_heads, head_dim=head_dim,
                norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
                rope_scaling={k: rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor",
                                                   "original_max_position_embeddings")} if kind == "llama3" else None,
                max_context=size("max_position_embeddings", 2048),
                tie_embeddings=hf.get("tie_word_embeddings", False), bos_id=hf.get("bos_token_id"),
                eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
                dtype=DTYPES[hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"],
                target_vocab_size=hf.get("saguaro_target_vocab_size"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: missing or broken value ({error!r}); expected a Llama config.json") from None

    def to_hf(self):
        """The config.json of this model; plain Llama unless the vocabulary is trimmed."""
        rope = {"rope_type": "default"} if self.rope_scaling is None else {"rope_type": "llama3", **self.rope_scaling}
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        hf = dict(
            architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=self.vocab_size, hidden_size=self.dim,
            num_hidden_layers=self.n_layers, num_attention_heads=self.n_heads, num_key_value_heads=self.n_kv_heads,
            head_dim=self.head_dim, intermediate_size=self.ffn_dim, rms_norm_eps=self.norm_eps,
            rope_theta=self.rope_theta, rope_scaling=None if self.rope_scaling is None else rope,
            rope_parameters={"rope_theta": self.rope_theta, **rope}, max_position_embeddings=self.max_context,
            tie_word_embeddings=self.tie_embeddings, bos_token_id=self.bos_id, eos_token_id=eos,
            hidden_act="silu", attention_bias=False, mlp_bias=False,
            torch_dtype=next(name for name, dtype in DTYPES.items() if dtype == self.dtype))
        if self.target_vocab_size is not None:
            hf["saguaro_target_vocab_size"] = self.target_vocab_size
            hf["saguaro_note"] = "Trimmed draft vocabulary: tensor d2t maps our ids to the target's; only saguaro reads it."
        return hf


def rope_frequencies(config):
    """Angle per position for each pair of dimensions, [D/2] float32 (Su et al. 2021; scaling of Llama 3.1)."""
    D = config.head_dim
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
    if (s := config.rope_scaling) is None:
        return freqs
    # Long wavelengths are slowed down by `factor`, short ones kept, those between are blended.
    turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)   # rotations within the original context
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return freqs * (keep + (1 - keep) / s["factor"])


# ---------------------------------------------------------------------------------------------------------------------
# KV cache

class KVCache:
    """Keys and values of B sequences in C preallocated slots: k, v [L, B, KV, C, D].

    A sequence's committed prefix is slots 0..prefix_len-1, slot = position; the slots behind it are scratch for
    speculation, where slot is only storage. The owner keeps prefix_len.
    """

    def __init__(self, config, batch, capacity, device, dtype):
        shape = (config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        # Zeros, not empty: masked slots still enter a product with weight 0, and 0 * NaN would be NaN.
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    capacity = property(lambda self: self.k.shape[3])

    def clear(self):
        """Zero it: what an earlier text left may be NaN, and a masked NaN is still one."""
        self.k.zero_(), self.v.zero_()

    def part(self, first, last):
        """The cache of sequences first..last-1: the same memory."""
        part = object.__new__(KVCache)
        part.k, part.v = self.k[:, first:last], self.v[:, first:last]
        return part

    def commit(self, src, dst):
        """Copy slots src[b, i] to dst[b, i], all reads before all writes (src, dst [B, P] int64)."""
        kernels.ops_for(self.k).commit(self.k, self.v, src, dst)

    def keep(self, rows):
        """Go on with the sequences `rows` (list of int, ascending) alone; later steps cost nothing for the others."""
        index = torch.tensor(rows, device=self.k.device)
        for cache in (self.k, self.v):
            for layer in cache:                                             # a layer at a time bounds the temporary
                layer[:len(rows)] = layer[index]
        self.k, self.v = self.k[:, :len(rows)], self.v[:, :len(rows)]


# ---------------------------------------------------------------------------------------------------------------------
# Model

class Layer(nn.Module):
    def __init__(self, c, new):
        super().__init__()
        self.attn_norm = new(c.dim)
        self.wqkv = new((c.n_heads + 2 * c.n_kv_heads) * c.head_dim, c.dim)     # rows: q, then k, then v
        self.wo = new(c.dim, c.n_heads * c.head_dim)
        self.mlp_norm = new(c.dim)
        self.w_gate_up = new(2 * c.ffn_dim, c.dim)                              # rows: gate, then up
        self.w_down = new(c.dim, c.ffn_dim)


class Llama(nn.Module):
    def __init__(self, config, device=None, dtype=None):
        """Uninitialised weights on `device` in `dtype` (default: the config's)."""
        super().__init__()
        c = self.config = config
        new = lambda *shape: nn.Parameter(torch.empty(shape, device=device, dtype=dtype or c.dtype), requires_grad=False)
        self.embed = new(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Layer(c, new) for _ in range(c.n_layers))
        self.norm = new(c.dim)
        self.head = self.embed if c.tie_embeddings else new(c.vocab_size, c.dim)
        # How it runs, see `run_with`: on a GPU with Triton kernels inside CUDA graphs, elsewhere as plain torch.
        self.graphs = torch.device(device or "cpu").type == "cuda"
        self.ops = kernels.TRITON if self.graphs and kernels.takes(c.head_dim) else kernels.TORCH
        if self.graphs and self.ops is kernels.TORCH:
            warnings.warn(f"head_dim {c.head_dim} is no power of two from 16 on: plain torch instead of the Triton kernels")
        self.compiled = set()                           # kinds of steps whose kernels are there
        self.register_buffer("freqs", rope_frequencies(c).to(device), persistent=False)
        # A trimmed draft's id -> target id; draft id 0 stands for every token it doesn't know and maps to -1.
        trimmed = c.target_vocab_size is not None
        self.register_buffer("d2t", torch.full((c.vocab_size,), -1, device=device) if trimmed else None)

    device = property(lambda self: self.embed.device)
    dtype = property(lambda self: self.embed.dtype)

    def forward(self, tokens, positions, slots, prefix_len, mask, cache, end=None):
        """One step over a token tree; writes the new tokens' K and V into `cache`.

        tokens, positions, slots [B, T] int64: token ids (-1, an empty tree node, reads as 0), RoPE positions (depth in
        the text), cache slots (storage). prefix_len [B] int64. mask [T, S] bool, or kernels.Ancestors.of it, or Ancestors of
        each sequence: new token t sees speculative slot j, i.e. cache slot prefix_len + j, besides the whole prefix; parents
        stand before their children, and no token sees a slot above its step's highest.
        end: a host-side bound on the slots in use, if the caller knows one. Returns hidden [B, T, dim], after the final norm.
        """
        B, T = tokens.shape
        if self.ops is not kernels.TORCH and T <= kernels.MAX_ROWS < B * T:
            # More rows than the kernels take: as many sequences at a time as fit, and each computes what it would alone.
            n = kernels.MAX_ROWS // T
            return torch.cat([self(*(x[i:i + n] for x in (tokens, positions, slots, prefix_len)), sequences(mask, i, i + n),
                                   cache.part(i, i + n), end) for i in range(0, B, n)])
        if end is None:     # looking costs a sync on the GPU; there the whole capacity is the bound
            end = cache.capacity if tokens.is_cuda else int(slots.max()) + 1
        ops = self.ops if T <= kernels.MAX_ROWS else kernels.TORCH          # a long prefill chunk: cuBLAS is best
        step = partial(self.step, ops, tokens, positions, slots, prefix_len, mask, cache, end)
        if ops is not kernels.TORCH and tokens.is_cuda and (id(ops), B, T) not in self.compiled:
            self.compiled.add((id(ops), B, T))
            with contextlib.suppress(Exception), kernels.compiling_together():      # what fails is launched, and fails, below
                step(self.layers[:1])                                               # the other layers use the same kernels
        return step(self.layers)

    def step(self, ops, tokens, positions, slots, prefix_len, mask, cache, end, layers):
        """The forward itself, through the first of the layers or all."""
        visible, eps = ops.visibility(prefix_len, mask, end), self.config.norm_eps
        # x, the residual stream, travels with what the norm that reads it next must know (kernels.linear.Stream); the final
        # norm, an op of its own, goes by x alone.
        x, cos, sin, sums = ops.embed(tokens, positions, self.embed, self.freqs, self.layers[0].attn_norm, 2 * len(self.layers))
        next_norms = [layer.attn_norm for layer in self.layers[1:]] + [self.norm]
        for i, (layer, norm, k, v) in enumerate(zip(layers, next_norms, cache.k, cache.v)):
            q = ops.qkv_rope(x, layer.attn_norm, eps, layer.wqkv, cos, sin, slots, k, v)                # [B, T, H, D]
            y = ops.tree_attention(q, k, v, visible)
            x = ops.add_linear(y.flatten(2), layer.wo, x, layer.mlp_norm, sums[2 * i])
            h = ops.swiglu_linear(x, layer.mlp_norm, eps, layer.w_gate_up)                              # [B, T, ffn]
            x = ops.add_linear(h, layer.w_down, x, norm, sums[2 * i + 1])
        return ops.rms_norm(x.x, self.norm, eps)

    def logits(self, hidden):
        """hidden [..., dim] -> [..., V] float32."""
        rows = hidden.flatten(0, -2).split(kernels.MAX_ROWS)
        return torch.cat([self.ops.head(x, self.head) for x in rows]).view(*hidden.shape[:-1], -1)

    def run_with(self, ops=None, graphs=None, share=None):
        """Choose how this model runs: ops "torch" or "triton", CUDA graphs or not; None keeps what it is.
        share: a kernels.Share that Triton linears keep to, so that another model finds room beside this one."""
        if (ops == "triton" or graphs) and self.device.type != "cuda":
            raise UserError(f"Triton kernels and CUDA graphs need a CUDA GPU, the model is on {self.device}; "
                            f"leave out --kernels or choose torch")
        if ops == "triton" and not kernels.takes(self.config.head_dim):
            raise UserError(f"the Triton kernels need a head_dim that is a power of two from 16 on, the model's is "
                            f"{self.config.head_dim}; leave out --kernels or choose torch")
        plain = ops == "torch" or ops is None and self.ops is kernels.TORCH
        self.ops = kernels.TORCH if plain else kernels.triton_ops(share)
        self.graphs = self.graphs if graphs is None else graphs
        return self

    def to_int8(self):
        """Round the linear weights to int8 with a scale per row (W8A16), in place.

        For drafts on a GPU: half the bytes to read, and what a draft gets wrong costs speed, never exactness. In plain
        torch it is slower, as the weights are widened in every forward. Such a model can't be saved.
        """
        for module in (self, *self.layers):
            for name in ("head",) if module is self else ("wqkv", "wo", "w_gate_up", "w_down"):
                weight = getattr(module, name)
                delattr(module, name)                   # a parameter's place only takes parameters
                setattr(module, name, kernels.Int8Weight.of(weight))
        return self

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def hf_tensors(self):
        """Yield (name in a HF checkpoint, the view of ours that holds it): a fused weight is several of HF's, stacked."""
        c = self.config
        yield "model.embed_tokens.weight", self.embed
        for i, layer in enumerate(self.layers):
            q, k, v = layer.wqkv.split([n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
            gate, up = layer.w_gate_up.chunk(2)
            for name, view in (("input_layernorm", layer.attn_norm), ("self_attn.q_proj", q), ("self_attn.k_proj", k),
                               ("self_attn.v_proj", v), ("self_attn.o_proj", layer.wo),
                               ("post_attention_layernorm", layer.mlp_norm), ("mlp.gate_proj", gate),
                               ("mlp.up_proj", up), ("mlp.down_proj", layer.w_down)):
                yield f"model.layers.{i}.{name}.weight", view
        yield "model.norm.weight", self.norm
        if not c.tie_embeddings:
            yield "lm_head.weight", self.head
        if self.d2t is not None:
            yield "d2t", self.d2t

    @classmethod
    def load(cls, folder, device="cpu", dtype=None, progress=None):
        """Read a HF folder, one tensor at a time out of memory-mapped files straight into its place.

        progress: called as progress(done, total) in bytes. Raises UserError for anything wrong with the folder.
        """
        folder = Path(folder)
        config = LlamaConfig.from_folder(folder)
        files = checkpoint_files(folder)                                    # tensor name -> open file
        model = cls(config, device=device, dtype=dtype)
        views = list(model.hf_tensors())
        total, done = sum(view.numel() * view.element_size() for _, view in views), 0
        for name, view in views:
            if name not in files:
                raise UserError(f"{folder}: tensor {name} is missing from the safetensors files")
            tensor = files[name].get_tensor(name)
            if tensor.shape != view.shape:
                raise UserError(f"{folder}: tensor {name} has shape {list(tensor.shape)}, "
                                f"config.json asks for {list(view.shape)}")
            if tensor.dtype != view.dtype and tensor.dtype not in DTYPES.values():      # quantised: the scales are elsewhere
                raise UserError(f"{folder}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}; expected one of "
                                f"{', '.join(DTYPES)}: use the checkpoint that isn't quantised")
            view.copy_(tensor)
            done += view.numel() * view.element_size()
            if progress:
                progress(done, total)
        if model.d2t is not None and ((ids := model.d2t.tolist())[0] != -1 or len(set(ids)) < len(ids)
                                      or not all(0 <= i < config.target_vocab_size for i in ids[1:])):
            raise UserError(f"{folder}: d2t must hold -1 and then different ids below {config.target_vocab_size}; "
                            f"distil the draft again")
        return model

    def save(self, folder):
        """Write config.json, generation_config.json and model.safetensors as transformers lays them out."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: view.detach().cpu().contiguous() for name, view in self.hf_tensors()},
                  folder / "model.safetensors", metadata={"format": "pt"})
        hf = {**self.config.to_hf(), "torch_dtype": str(self.dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        generation = {key: hf[key] for key in ("bos_token_id", "eos_token_id")}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    @classmethod
    def random(cls, config, seed=0, device="cpu", dtype=None):
        """Seeded weights, the same on every device: normal, scaled so that activations keep their size."""
        model = cls(config, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            if param.dim() == 1:
                param.fill_(1.0)
            else:
                param.copy_(torch.empty(param.shape).normal_(0, param.shape[1] ** -0.5, generator=generator))
        return model


def checkpoint_files(folder):
    """Open the safetensors file or shards of a folder: {tensor name: open file}."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: no weight_map; expected tensor name -> shard file")
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"]
    files = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing; download the checkpoint again (only safetensors are read)")
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or broken ({error}); download it again") from None
        files.update(dict.fromkeys(file.keys(), file))
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Prefill

@torch.inference_mode()
def prefill(model, cache, prompts, chunk=512):
    """Fill the cache with all but the last token of each prompt; that one is the root of the first decoding step.

    prompts: list of B token lists (model ids), not empty. Returns prefix_len [B] int64. Sequence by sequence, so that
    what is computed for a prompt doesn't depend on its batch.
    """
    device = model.device
    for b, prompt in enumerate(prompts):
        tokens, own = torch.tensor([prompt[:-1]], dtype=torch.int64).to(device), cache.part(b, b + 1)
        for start in range(0, len(prompt) - 1, chunk):
            positions = torch.arange(start, min(start + chunk, len(prompt) - 1), device=device)[None]       # [1, T]
            T = positions.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
            prefix_len = torch.full((1,), start, device=device)
            model(tokens[:, start:start + T], positions, positions, prefix_len, causal, own, end=start + T)
    return torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int64).to(device)

"""Layer tables of real networks: names and shapes only, no weights.

Names are those of the usual implementations (torchvision, Hugging Face), so that tensors are
grouped into layers by module as `Layout.build` does. Totals are checked against published counts
in tests/test_bench.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from aadp_kernels import Layout

Table = dict[str, tuple[int, ...]]


def _weight_bias(name: str, *shape: int) -> Table:
    """A module with a weight and a bias as long as its first dimension."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> Table:
    """ResNet-18 is (2, 2, 2, 2), ResNet-50 (3, 4, 6, 3) with bottlenecks; 1000 classes."""
    table: Table = {"conv1.weight": (64, 3, 7, 7)} | _weight_bias("bn1", 64)
    width = 64
    for stage, count in enumerate(blocks):
        planes = 64 << stage
        out = planes * (4 if bottleneck else 1)
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            if bottleneck:
                kernels = [(planes, width, 1), (planes, planes, 3), (out, planes, 1)]
            else:
                kernels = [(planes, width, 3), (planes, planes, 3)]
            for i, (to, by, side) in enumerate(kernels, 1):
                table[f"{name}.conv{i}.weight"] = (to, by, side, side)
                table |= _weight_bias(f"{name}.bn{i}", to)
            if block == 0 and width != out:
                table[f"{name}.downsample.0.weight"] = (out, width, 1, 1)
                table |= _weight_bias(f"{name}.downsample.1", out)
            width = out
    return table | _weight_bias("fc", 1000, width)


def vit_b16() -> Table:
    """ViT-B/16 on 224 x 224 images, 1000 classes."""
    d = 768
    table: Table = {"class_token": (1, 1, d)} | _weight_bias("conv_proj", d, 3, 16, 16)
    table["encoder.pos_embedding"] = (1, 197, d)
    for i in range(12):
        name = f"encoder.layers.{i}"
        table |= _weight_bias(f"{name}.ln_1", d)
        table |= {
            f"{name}.self_attention.in_proj_weight": (3 * d, d),
            f"{name}.self_attention.in_proj_bias": (3 * d,),
        }
        table |= _weight_bias(f"{name}.self_attention.out_proj", d, d)
        table |= _weight_bias(f"{name}.ln_2", d)
        table |= _weight_bias(f"{name}.mlp.0", 4 * d, d) | _weight_bias(f"{name}.mlp.3", d, 4 * d)
    return table | _weight_bias("encoder.ln", d) | _weight_bias("heads.head", 1000, d)


def bert_base() -> Table:
    """BERT-base, uncased, with its pooler."""
    d = 768
    rows = {"word": 30522, "position": 512, "token_type": 2}
    table: Table = {f"embeddings.{k}_embeddings.weight": (n, d) for k, n in rows.items()}
    table |= _weight_bias("embeddings.LayerNorm", d)
    for i in range(12):
        name = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            table |= _weight_bias(f"{name}.attention.self.{part}", d, d)
        table |= _weight_bias(f"{name}.attention.output.dense", d, d)
        table |= _weight_bias(f"{name}.attention.output.LayerNorm", d)
        table |= _weight_bias(f"{name}.intermediate.dense", 4 * d, d)
        table |= _weight_bias(f"{name}.output.dense", d, 4 * d)
        table |= _weight_bias(f"{name}.output.LayerNorm", d)
    return table | _weight_bias("pooler.dense", d, d)


def gpt2_small() -> Table:
    """GPT-2 small; the output layer is the token embedding."""
    d = 768
    table: Table = {"wte.weight": (50257, d), "wpe.weight": (1024, d)}
    for i in range(12):
        name = f"h.{i}"
        table |= _weight_bias(f"{name}.ln_1", d)
        # The Conv1D of the original stores [in, out], so its bias is as long as the last dimension.
        table |= {f"{name}.attn.c_attn.weight": (d, 3 * d), f"{name}.attn.c_attn.bias": (3 * d,)}
        table |= _weight_bias(f"{name}.attn.c_proj", d, d) | _weight_bias(f"{name}.ln_2", d)
        table |= {f"{name}.mlp.c_fc.weight": (d, 4 * d), f"{name}.mlp.c_fc.bias": (4 * d,)}
        table |= {f"{name}.mlp.c_proj.weight": (4 * d, d), f"{name}.mlp.c_proj.bias": (d,)}
    return table | _weight_bias("ln_f", d)


LLAMA_PROJECTIONS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def llama_3_8b(layers: int = 32, embeddings: bool = True) -> Table:
    """Llama-3-8B, or `layers` of its 32 layers alone."""
    table: Table = {"embed_tokens.weight": (128256, 4096)} if embeddings else {}
    for i in range(layers):
        for name, shape in LLAMA_PROJECTIONS.items():
            table[f"layers.{i}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            table[f"layers.{i}.{name}.weight"] = (4096,)
    if embeddings:
        table |= {"norm.weight": (4096,), "lm_head.weight": (128256, 4096)}
    return table


def lora_llama_3_8b(rank: int) -> Table:
    """LoRA adapters on all projections of Llama-3-8B: 448 tensors."""
    table: Table = {}
    for i in range(32):
        for name, (out, width) in LLAMA_PROJECTIONS.items():
            table[f"layers.{i}.{name}.lora_A.weight"] = (rank, width)
            table[f"layers.{i}.{name}.lora_B.weight"] = (out, rank)
    return table


def project_cnn() -> Table:
    """The CNN of `bench.cohort`: two convolutions and a linear layer on 28 x 28 images."""
    table = _weight_bias("conv1", 16, 1, 6, 6) | _weight_bias("conv2", 32, 16, 4, 4)
    return table | _weight_bias("fc1", 10, 1568)


def project_mlp() -> Table:
    """The MLP of `bench.cohort`, 784-64-10."""
    return _weight_bias("fc1", 64, 784) | _weight_bias("fc2", 10, 64)


@dataclass(frozen=True)
class Case:
    """A layer table and how many clients have an update of that shape.

    Attributes:
        title: How tables call it.
        table: Makes the shapes.
        clients: Rows of a cohort, or None for one update.
        gpu_only: Too large for a CPU run.
        quick: Part of `--quick`.
    """

    title: str
    table: Callable[[], Table]
    clients: int | None = None
    gpu_only: bool = False
    quick: bool = False

    @property
    def elements(self) -> int:
        """Elements of all updates together."""
        return sum(map(prod, self.table().values())) * (self.clients or 1)

    def layout(self) -> Layout:
        """The layout of one update, a layer a module."""
        meta = {n: torch.empty(s, device="meta") for n, s in self.table().items()}
        return Layout.build(meta)


CASES = {
    "cnn_100": Case("CNN × 100 clients", project_cnn, clients=100, quick=True),
    "mlp_100": Case("MLP × 100 clients", project_mlp, clients=100, quick=True),
    "resnet18": Case("ResNet-18", lambda: resnet((2, 2, 2, 2), False), quick=True),
    "resnet50": Case("ResNet-50", lambda: resnet((3, 4, 6, 3), True)),
    "vit_b16": Case("ViT-B/16", vit_b16),
    "bert_base": Case("BERT-base", bert_base),
    "gpt2": Case("GPT-2 small", gpt2_small),
    "lora": Case("LoRA r=8 of Llama-3-8B, 448 tensors", lambda: lora_llama_3_8b(8)),
    "llama_slice": Case("2 layers of Llama-3-8B", lambda: llama_3_8b(2, False), gpu_only=True),
    "one_tensor": Case("one tensor of 2^30", lambda: {"w": (1 << 30,)}, gpu_only=True),
}

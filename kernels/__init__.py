"""Fused Triton kernels, each beside its PyTorch reference; installs as ds_stacking.kernels.

On a GPU the kernels run; on a CPU, and on GPUs older than Ampere, the references. Every operator is a
`torch.library.triton_op`, differentiable, deterministic, and works under `torch.compile`. No two programs add to the
same element; one kernel, attention's whole-heads backward pass, adds atomically, to scratch of the program's own.
"""

from ds_stacking.kernels._dropout import new_seed, new_seeds
from ds_stacking.kernels._launch import runs_kernels
from ds_stacking.kernels.add_layer_norm import add_layer_norm
from ds_stacking.kernels.attention import attention, attention_padded
from ds_stacking.kernels.bias_gelu import bias_gelu, linear_gelu
from ds_stacking.kernels.embedding_norm import embedding_norm
from ds_stacking.kernels.gather_rows import gather_rows, inverse_index, scatter_rows
from ds_stacking.kernels.linear_cross_entropy import linear_cross_entropy
from ds_stacking.kernels.selected_attention import selected_attention
from ds_stacking.kernels.small_tables import look_up

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_padded",
    "bias_gelu",
    "embedding_norm",
    "gather_rows",
    "inverse_index",
    "linear_cross_entropy",
    "linear_gelu",
    "look_up",
    "new_seed",
    "new_seeds",
    "runs_kernels",
    "scatter_rows",
    "selected_attention",
]

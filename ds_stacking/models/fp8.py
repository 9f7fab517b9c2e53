"""The linear layers of the blocks with their products in 8 bits (Micikevicius et al. 2022, "FP8 Formats for Deep
Learning", sections 3 and 4): activations and weights in e4m3, gradients in e5m2.

Every tensor has one scale, from its largest element now. So nothing is carried from step to step: a growth or a
resumption has nothing to move. Scales stay on the device. Results are in the type of the input; weights, biases,
attention, embeddings and heads are as without. The weight is cast in the forward pass and, transposed, again in the
backward pass: a copy kept between them would cost a byte for every weight, whole on every rank under ZeRO 3 too. Of
the input the transposed 8-bit copy is kept, half of what a 16-bit product keeps.

Imported by training/build.py where it is asked for, since the kernels' import takes seconds.
Shapes: M tokens, K inputs and N outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_stacking.kernels.fp8_cast import cast_fp8, largest_magnitude
from ds_stacking.models.bert import Bert
from ds_stacking.models.blocks import Linear

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias; the gradients of x and weight are products in 8 bits too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [M, K], [N, K], [N] -> [M, N]
        amax = largest_magnitude(weight)
        x8, turned, x_scale = cast_fp8(x, largest_magnitude(x), FORWARD)
        weight8, _, weight_scale = cast_fp8(weight, amax, FORWARD, turned=False)
        ctx.save_for_backward(turned, x_scale, weight, amax)
        return multiply(x8, x_scale, weight8, weight_scale, bias, dtype=x.dtype, fast=True)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # [M, N] -> [M, K], [N, K], [N]
        x8, x_scale, weight, amax = ctx.saved_tensors
        dout = gradients[0].contiguous()
        dout8, turned, scale = cast_fp8(dout, largest_magnitude(dout), BACKWARD)
        _, weight8, weight_scale = cast_fp8(weight, amax, FORWARD, straight=False)
        dx = multiply(dout8, scale, weight8, weight_scale, dtype=dout.dtype)
        dweight = multiply(turned, scale, x8, x_scale, dtype=dout.dtype)
        return dx, dweight, dout.sum(0) if ctx.needs_input_grad[2] else None


def multiply(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """a @ b.T times both scales, plus bias: 8-bit [M, K] and [N, K] -> [M, N] of `dtype`.

    With `fast` the matrix units add up in fewer bits than fp32, which suits the forward pass only.
    """
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [..., K], [N, K], [N] -> [..., N]
    """x @ weight.T + bias with its products in 8 bits; K and N are multiples of 16, the number of tokens is any.

    A tensor with an element that is not finite makes the whole product NaN, and so the step be skipped.
    """
    product: Tensor = _Linear.apply(x.flatten(0, -2).contiguous(), weight.contiguous(), bias)
    return product.unflatten(0, x.shape[:-1])


def use_fp8(model: Bert) -> None:
    """Let the four linear layers of every block multiply in 8 bits."""
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, Linear):
                module.product = linear

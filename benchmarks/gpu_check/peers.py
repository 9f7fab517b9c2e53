"""The peers, each by name; what is not installed or does not run is named with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_check.measure import Run

Function = Callable[..., torch.Tensor]


def modes(function: Function, *inputs: torch.Tensor) -> dict[str, Run]:
    """Forward without a graph, backward alone, both; inputs that require gradients get them."""
    wanted = [x for x in inputs if x.requires_grad]
    out = function(*inputs)
    dout = torch.randn_like(out)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(*inputs)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True),
        "both": lambda: torch.autograd.grad(function(*inputs), wanted, dout),
    }


def collect(candidates: dict[str, Callable[[], dict[str, Run]]]) -> tuple[dict[str, dict[str, Run]], dict[str, str]]:
    """Modes of those candidates that run once, and why the others do not."""
    found, absent = {}, {}
    for name, make in candidates.items():
        try:
            made = make()
            for run in made.values():
                run()
            found[name] = made
        except Exception as error:  # a peer may fail in any way; ours must not
            if name == "ours":
                raise
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    return found, absent


def sdpa(backend: str, causal: bool) -> Function:
    """torch's attention with one backend forced, on [B, S, 3, H, D]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def run(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def flex(causal: bool) -> Function:
    """FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention)

    def run(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mask = None
        if causal:
            length = q.shape[2]
            mask = create_block_mask(lambda b, h, m, n: m >= n, None, None, length, length, device=q.device.type)
        return compiled(q, k, v, block_mask=mask)

    return run


def varlen(starts: torch.Tensor, longest: int) -> Function:
    """torch's attention over unpadded sequences, on [T, 3, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    def run(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.contiguous() for part in qkv.unbind(1))
        return varlen_attn(q, k, v, starts, starts, longest, longest)

    return run


def norm_chain(p: float, eps: float = 1e-12) -> Function:
    """What add_layer_norm does, operation by operation."""

    def run(x, residual, bias, weight, shift):
        return F.layer_norm(residual + F.dropout(x + bias, p), x.shape[-1:], weight, shift, eps)

    return run


def liger_norm() -> Function:
    """Liger's LayerNorm."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, shift: LigerLayerNormFunction.apply(x, weight, shift, 1e-12)


def eager_head(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Logits, then their cross entropy."""
    return F.cross_entropy(F.linear(h, weight, bias), target, reduction="sum")


def liger_head() -> Function:
    """Liger's fused linear cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda h, weight, bias, target: loss(weight, h, target, bias)


def cut_head() -> Function:
    """Apple's cut-cross-entropy, exact variant."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, weight, bias, target: linear_cross_entropy(
        h, weight, target, bias=bias, reduction="sum", impl="cce_exact"
    )


def torch_head() -> Function:
    """torch's own fused head, where it has one."""
    function = F.linear_cross_entropy  # type: ignore[attr-defined]
    return lambda h, weight, bias, target: function(h, weight, target, linear_bias=bias, reduction="sum")

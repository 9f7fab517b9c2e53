"""The peers, each by name and in the layout that suits it; what does not run is named with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.catalogue import Function, Machine
from benchmarks.gpu_check.measure import Run

Modes = dict[str, Run]
Candidates = Mapping[str, Callable[[], Modes]]


def modes(function: Function, *inputs: Tensor) -> Modes:
    """Forward as in training (what the backward pass needs is kept), backward alone, both; forward only of what has
    no gradient."""
    wanted = [x for x in inputs if x.requires_grad]
    out = function(*inputs)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    if not wanted:
        return {"forward": lambda: function(*inputs)}
    douts = [torch.randn_like(x) for x in outputs]

    def both() -> object:
        again = function(*inputs)
        return torch.autograd.grad([again] if isinstance(again, Tensor) else list(again), wanted, douts)

    return {
        "forward": lambda: function(*inputs),
        "backward": lambda: torch.autograd.grad(outputs, wanted, douts, retain_graph=True),
        "both": both,
    }


class DeviceLost(RuntimeError):
    """After an error of a peer the CUDA context is of no use; this process cannot go on."""


def collect(candidates: Candidates, at: Machine) -> tuple[dict[str, Modes], dict[str, str]]:
    """Modes of those candidates that run once, and why the others do not. Ours must."""
    torch._dynamo.reset()  # or the shapes of this row would be compiled as changes of the last one's: dynamic, slower
    found: dict[str, Modes] = {}
    absent = {name: "it ended the process before" for name in candidates if name in at.without}
    for name, make in candidates.items():
        if name in absent:
            continue
        at.say(name)
        try:
            found[name] = make()
            for run in found[name].values():
                run()
            if not at.healthy():
                raise DeviceLost(name)
        except Exception as error:
            if name == "ours":
                raise
            if not at.healthy():
                raise DeviceLost(f"{name}: {error}") from error
            found.pop(name, None)
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    at.say("timing")
    return found, absent


def compiled(function: Function, at: Machine) -> Function:
    """`function` under torch.compile; traced but not translated in a dry run, which would take minutes."""
    # a backward pass that is timed by itself is run again and again, so that its inputs cannot be given away
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, backend="aot_eager" if at.dry else "inductor")


def sdpa(backend: str, causal: bool, p: float) -> Function:
    """torch's attention with one backend forced, on q, k, v of [B, H, S, D]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=p)

    return run


def flex(length: int, causal: bool, at: Machine) -> Function:
    """FlexAttention, compiled, on q, k, v of [B, H, S, D]; it has no dropout."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, m, n: m >= n, None, None, length, length, device=at.device)
    attend = compiled(flex_attention, at)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


def varlen(starts: Tensor, longest: int) -> Function:
    """torch's attention over unpadded sequences, on q, k, v of [T, H, D]; it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    return lambda q, k, v: varlen_attn(q, k, v, starts, starts, longest, longest)


def jagged(starts: Tensor, shortest: int, longest: int, p: float) -> Function:
    """torch's attention over nested tensors, by the backend that it chooses, on q, k, v of [T, H, D]."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nested = [
            torch.nested.nested_tensor_from_jagged(x, starts, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
            for x in (q, k, v)
        ]
        return F.scaled_dot_product_attention(*nested, dropout_p=p).transpose(1, 2).values()

    return run


def norm_chain(p: float, pre: bool, eps: float = 1e-12) -> Function:
    """What add_layer_norm does, operation by operation."""

    def run(x, residual, bias, weight, shift):
        z = residual + F.dropout(x + bias, p)
        y = F.layer_norm(z, x.shape[-1:], weight, shift, eps)
        return (y, z) if pre else y

    return run


def liger_norm() -> Function:
    """Liger's LayerNorm."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, shift: LigerLayerNormFunction.apply(x, weight, shift, 1e-12)


def eager_head(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
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
    function: Any = getattr(F, "linear_cross_entropy")  # noqa: B009  absent in some versions, which mypy sees
    return lambda h, weight, bias, target: function(h, weight, target, linear_bias=bias, reduction="sum")

"""torch.compile of the model's parts, so that a growth compiles nothing: all blocks share one graph, at any depth.

Compiled are the embeddings, each block and the head by themselves. The blocks of a model run the same code on tensors
of the same shapes, so that the first one's graph serves them all; the last block, which computes predicted tokens
only, has one more. A model compiled as a whole would be compiled anew at every depth, the longer the deeper it is.

The compiled code lies in a folder of the user, where the next run finds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_stacking.common.environment import cache_folder
from ds_stacking.models.bert import Bert


@dataclass(frozen=True, kw_only=True)
class Compilations:
    """What this process has compiled."""

    graphs: int
    """Graphs traced."""
    cached: int
    """Those whose code a former run had left on the disk."""


def compile_parts(model: Bert, backend: str = "inductor") -> None:
    """Let embeddings, blocks and the MLM head run compiled while they train; evaluation, with its odd shapes, not."""
    if backend == "inductor":
        keep_compiled_code()
    for part in (model.embeddings, *model.blocks, model.mlm_head):
        _compile(part, backend)


def keep_compiled_code() -> None:
    """Keep compiled code under $DS_STACKING_CACHE or ~/.cache/ds_stacking, unless torch's own variable names a folder.

    By default it would lie in the machine's temporary folder, which a restart empties.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))


def compilations() -> Compilations:
    """Count what has been compiled so far."""
    from torch._dynamo.utils import counters  # seconds to import

    cached = counters["aot_autograd"]["autograd_cache_hit"]
    return Compilations(graphs=counters["stats"]["unique_graphs"], cached=cached)


def compile_anew(tag: str) -> None:
    """Forget what this process has compiled, and of the code on the disk use only what was compiled under `tag`."""
    torch.compiler.reset()
    torch.compiler.config.cache_key_tag = tag


def _compile(part: nn.Module, backend: str) -> None:
    # Not part.compile(): that compiles Module.__call__, whose code all classes share, and with it a limit on graphs.
    eager: Callable[..., Any] = part.forward
    compiled = torch.compile(eager, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if part.training and torch.is_grad_enabled() else eager)(*args, **kwargs)

    part.forward = forward  # type: ignore[method-assign]

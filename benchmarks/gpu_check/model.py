"""Training steps of BERT-base and BERT-large on one GPU: our model beside transformers', at every depth of stacking.

Where DeepSpeed is installed, both run in a ZeRO-2 engine, ours in a bare PyTorch loop too; elsewhere both run bare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_check.catalogue import Machine, Ours, Row, present
from benchmarks.gpu_check.fp8 import refusal

ENGINE = ("ours", "ours compiled", "bare", "peer", "peer compiled")
BARE = ("bare", "bare compiled", "peer bare", "peer bare compiled")
MICRO_BATCH, STEP = 32_768, 262_144
"""Tokens of a micro-batch and of an optimizer step."""
PADDED = (
    "real tokens; the peer computes padded rows, with a mask in SDPA: it unpads in attention alone, with flash-attn, "
    "which is not among what this runs with"
)
"""Of a row of documents."""


@dataclass(kw_only=True)
class Check:
    """A case. The original BERT is post-LN; the stacking recipes are pre-LN."""

    size: str = "base"
    layers: int = 12
    length: int = 128
    norm: str = "post"
    padded: bool = False
    dropout: float = 0.1
    """Without it the losses of all are compared, after one step and after the last one."""
    peers: bool = True
    """Whether transformers' model runs beside ours."""
    fp8: bool = False
    """Whether our compiled model runs beside itself with products in 8 bits, and nothing else."""


CHECKS: dict[str, tuple[float, Check]] = {
    "base S=128": (100, Check()),
    "base S=128 pre-LN": (60, Check(norm="pre", peers=False)),
    "base S=512": (100, Check(length=512)),
    "base S=512 pre-LN": (60, Check(length=512, norm="pre", peers=False)),
    "base S=512 documents": (80, Check(length=512, padded=True)),
    "large S=128": (140, Check(size="large", layers=24)),
    "large S=512": (140, Check(size="large", layers=24, length=512)),
    "large S=512 fp8": (90, Check(size="large", layers=24, length=512, fp8=True)),
    "base 2 layers S=512 documents p=0": (60, Check(layers=2, length=512, padded=True, dropout=0.0)),
    "base 3 layers S=128 pre-LN": (45, Check(layers=3, norm="pre", peers=False)),
    "base 6 layers S=128 pre-LN": (50, Check(layers=6, norm="pre", peers=False)),
}
"""Seconds and case, in order of worth."""


def rows() -> list[Row]:
    """A row for every case."""
    return [
        Row(
            name=f"model: {name}", seconds=seconds, part="model", run=_run(check), ours=_ours(check),
            needs=("transformers",), interpret=False, choose_tiles=True,
        )
        for name, (seconds, check) in CHECKS.items()
    ]  # fmt: skip


def model_config(check: Check, *, dry: bool) -> Any:
    """The check's model; tiny in a dry run."""
    from ds_stacking.config import ModelConfig

    width = {"base": 768, "large": 1024}[check.size]
    return ModelConfig(
        hidden_size=32 if dry else width,
        num_heads=1 if dry else width // 64,
        vocab_size=96 if dry else 30_528,
        norm=check.norm,  # type: ignore[arg-type]
        dropout=check.dropout,
        attention_dropout=check.dropout,
        max_positions=16 if dry else check.length,
    )


def _run(check: Check) -> Callable[[Machine], dict[str, Any]]:
    def run(at: Machine) -> dict[str, Any]:
        from benchmarks.contenders import Case
        from benchmarks.throughput import compare

        if check.fp8 and refusal(at):
            return {"skipped": refusal(at)}
        length = 16 if at.dry else check.length
        case = Case(
            model=model_config(check, dry=at.dry), layers=1 if at.dry else check.layers, length=length,
            sequences=2 if at.dry else MICRO_BATCH // length, accumulation=2 if at.dry else STEP // MICRO_BATCH,
            bf16=not at.dry, fused=True, padded=check.padded, backend="aot_eager" if at.dry else "inductor",
        )  # fmt: skip
        contenders = _contenders(check, at)
        found = compare(case, contenders, repeats=1 if at.dry else 7, say=at.say)
        missing = [name for name in contenders if "seconds" not in found[name]]
        if len(missing) == len(contenders) or (at.dry and missing):
            raise RuntimeError(f"no steps of {', '.join(missing)}: {found}")
        note = {"note": PADDED} if check.padded else {}
        return {"contenders": found, "absent": dict.fromkeys(at.without, "it ended the process before"), **note}

    return run


def _contenders(check: Check, at: Machine) -> list[str]:
    names: tuple[str, ...] = BARE
    if present("deepspeed"):
        from ds_stacking.engine.factory import init_distributed

        if not torch.distributed.is_initialized():
            init_distributed(alone=True)
        names = ENGINE
    if check.fp8:
        return [name for name in (f"{names[0]} compiled", f"{names[0]} fp8 compiled") if name not in at.without]
    with_peers = [name for name in names if check.peers or not name.startswith("peer")]
    return [name for name in with_peers if name not in at.without]


def _ours(check: Check) -> Callable[[Machine], Ours]:
    """Two layers of the model, for the kernels that it launches: the last layer has some of its own."""

    def make(at: Machine) -> Ours:
        from ds_stacking.models.fp8 import use_fp8
        from ds_stacking.models.variants import bert_class

        config = model_config(check, dry=at.dry)
        length = config.max_positions
        sequences = 2 if at.dry else MICRO_BATCH // length
        with torch.device(at.device):
            model = bert_class(True)(config, 2).to(at.dtype).train()
            if check.fp8 and not refusal(at):
                use_fp8(model)
            ids = torch.zeros(sequences, length, dtype=torch.int64)
            masked = torch.arange(round(0.15 * length) * sequences)

        def loss(*parameters: torch.Tensor) -> torch.Tensor:
            return model(ids, masked_positions=masked, labels=masked).loss_sum

        return loss, list(model.parameters())

    return make

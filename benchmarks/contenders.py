"""Optimizer steps to be timed side by side: our model and transformers', in a ZeRO engine and in a bare loop.

All contenders of a case have the same weights, data, optimizer and clipping, in one process. The peer is
BertForMaskedLM (for pre-LN, MegatronBertForMaskedLM) with SDPA attention and -100 as the label of tokens that are not
predicted, as its users run it. What either reads of a batch is made before the first step. DeepSpeed is loaded for
contenders in an engine only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ds_stacking.config import ModelConfig, OptimizerConfig
from ds_stacking.models.bert import Bert
from ds_stacking.models.compiling import compile_parts
from ds_stacking.models.convert import to_huggingface
from ds_stacking.models.variants import bert_class

MASKING_RATE = 0.15
RATE = 1e-4
DIFFERENT = 4
"""Micro-batches with a number of predicted tokens of their own; a step takes them in turn. In training it changes in
almost every batch, upon which compiled code may be compiled anew and kernels be launched in other forms."""
OPTIMIZER = OptimizerConfig()
PEERS = {"post": "BertForMaskedLM", "pre": "MegatronBertForMaskedLM"}


def device() -> torch.device:
    """The device of all contenders."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What each model is given: keyword arguments."""

    ours: dict[str, Any]
    theirs: dict[str, Any]

    @property
    def predicted(self) -> int:
        """Predicted tokens."""
        return len(self.ours["labels"])


@dataclass(kw_only=True)
class Case:
    """A model and its micro-batches."""

    model: ModelConfig
    layers: int
    sequences: int
    """Sequences of a micro-batch."""
    length: int
    """Tokens of a sequence."""
    accumulation: int = 1
    """Micro-batches of a step."""
    zero_stage: int = 2
    bf16: bool = False
    fused: bool = False
    """Our model with its kernels."""
    padded: bool = False
    """Sequences are documents of random lengths up to `length`; the peer pads them, we pack them."""
    backend: str = "inductor"
    """Of compiled contenders."""
    lengths: Tensor = field(init=False)
    """Real tokens of every sequence, on the host."""
    tokens: int = field(init=False)
    """Real tokens of a step."""
    batches: list[MicroBatch] = field(init=False)
    """Those of a step."""
    predicted: int = field(init=False)
    """Predicted tokens of a step."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.hf_config, self.state = to_huggingface(
            Bert(self.model, self.layers).named_parameters(), self.model, self.layers
        )
        self.lengths = torch.full((self.sequences,), self.length)
        if self.padded:
            self.lengths = torch.randint(8, self.length + 1, (self.sequences,))
        self.tokens = int(self.lengths.sum()) * self.accumulation
        different = [self._micro_batch(index) for index in range(min(DIFFERENT, self.accumulation))]
        self.batches = [different[index % len(different)] for index in range(self.accumulation)]
        self.predicted = sum(batch.predicted for batch in self.batches)

    def _micro_batch(self, more: int) -> MicroBatch:
        """Drawn by torch's generator, with so many predicted tokens more than the masking rate gives."""
        real = torch.arange(self.length) < self.lengths[:, None]  # [B, T]
        ids = torch.randint(1, self.model.vocab_size, real.shape) * real
        number = max(1, round(MASKING_RATE * float(self.lengths.sum()))) + more
        chosen = torch.rand(real.shape).masked_fill(~real, 2).flatten().argsort()[:number]
        labels = torch.full_like(ids, -100)
        labels.view(-1)[chosen] = ids.view(-1)[chosen]
        own_ids, own_labels = (ids[real][None], labels[real]) if self.padded else (ids, labels.flatten())
        positions = (own_labels >= 0).nonzero()[:, 0]
        ours: dict[str, Any] = {
            "input_ids": own_ids, "masked_positions": positions, "labels": own_labels[positions],
        }  # fmt: skip
        theirs = {"input_ids": ids, "labels": labels}
        if self.padded:
            ours["cu_seqlens"] = torch.cat([torch.zeros(1), self.lengths.cumsum(0)]).int()
            theirs["attention_mask"] = real.long()
        ours, theirs = ({name: value.to(device()) for name, value in given.items()} for given in (ours, theirs))
        return MicroBatch(ours=ours | ({"max_seqlen": self.length} if self.padded else {}), theirs=theirs)


def our_model(case: Case, *, compiled: bool, fp8: bool = False) -> Bert:
    """Our model with the case's weights; with `fp8` its blocks multiply in 8 bits."""
    torch.manual_seed(0)
    model = bert_class(case.fused)(case.model, case.layers)
    if fp8:
        from ds_stacking.models.fp8 import use_fp8

        use_fp8(model)
    if compiled:
        compile_parts(model, case.backend)
    return model


def their_model(case: Case) -> nn.Module:
    """transformers' model with the case's weights."""
    peer = getattr(transformers, PEERS[case.model.norm])
    model = peer._from_config(case.hf_config, attn_implementation="sdpa")
    model.load_state_dict(case.state, strict=False)  # the tied decoder has no entry of its own
    return model.train()


def our_loss(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Mean loss of a micro-batch; documents are packed without padding."""
    return model(**batch.ours).loss_sum / batch.predicted


def their_loss(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Mean loss of a micro-batch, padded where documents are shorter."""
    return model(**batch.theirs).loss


def _engine(build: Callable[[int, bool], nn.Module], case: Case) -> Any:
    from ds_stacking.engine.factory import EngineFactory, EngineSpec

    factory = EngineFactory(
        build_model=build,
        ds_config={"zero_optimization": {"stage": case.zero_stage, "overlap_comm": False}},
        optimizer=OPTIMIZER,
        bf16=case.bf16,
    )
    spec = EngineSpec(layers=case.layers, micro_batch_size=case.sequences, accumulation=case.accumulation)
    engine = factory.build(spec)
    for group in engine.optimizer.param_groups:
        group["lr"] = RATE
    return engine


class InEngine:
    """Steps of a model in a ZeRO engine."""

    def __init__(
        self, build: Callable[[int, bool], nn.Module], loss: Callable[[nn.Module, MicroBatch], Tensor], case: Case
    ) -> None:
        self.engine, self.loss, self.case = _engine(build, case), loss, case

    def step(self) -> Tensor:
        from ds_stacking.engine.stepping import optimizer_step

        total = torch.zeros((), device=device())

        def losses():
            for batch in self.case.batches:
                loss = self.loss(self.engine, batch) / self.case.accumulation
                total.add_(loss.detach())
                yield loss

        optimizer_step(self.engine, losses())
        return total

    def close(self) -> None:
        from ds_stacking.engine.release import collect, release

        release(self.engine)
        collect()


class Bare:
    """The same steps without DeepSpeed: one list of fp32 masters, torch's fused AdamW, clipping, 16-bit copies."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, MicroBatch], Tensor], case: Case) -> None:
        self.case, self.loss = case, loss
        self.model = model.to(device(), torch.bfloat16 if case.bf16 else torch.float32)
        self.working = list(self.model.parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.working] if case.bf16 else self.working
        groups = [
            {"params": [p for p in self.masters if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in self.masters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)

    def step(self) -> Tensor:
        total = torch.zeros((), device=device())
        for batch in self.case.batches:
            loss = self.loss(self.model, batch) / self.case.accumulation
            loss.backward()
            total += loss.detach()
        if self.case.bf16:
            for master, working in zip(self.masters, self.working, strict=True):
                master.grad = working.grad.float()
        clip_grad_norm_(self.masters, OPTIMIZER.clip)
        self.adamw.step()
        if self.case.bf16:
            torch._foreach_copy_([p.data for p in self.working], [p.data for p in self.masters])
        self.model.zero_grad()
        return total

    def close(self) -> None:
        del self.model, self.working, self.masters, self.adamw


WHO = ("ours", "bare", "ours fp8", "bare fp8", "peer", "peer bare")
NAMES = tuple(f"{who}{how}" for who in WHO for how in ("", " compiled"))


def make_contender(name: str, case: Case) -> InEngine | Bare:
    """One of NAMES: our model in an engine or bare, transformers' in an engine or bare, each eager or compiled."""
    assert name in NAMES, name
    compiled, fp8 = name.endswith("compiled"), "fp8" in name
    if name.startswith("bare"):
        return Bare(our_model(case, compiled=compiled, fp8=fp8), our_loss, case)
    if name.startswith("ours"):
        return InEngine(lambda *_: our_model(case, compiled=compiled, fp8=fp8), our_loss, case)
    if name.startswith("peer bare"):
        loop = Bare(their_model(case), their_loss, case)
        if compiled:
            loop.model.compile(backend=case.backend)
        return loop
    peer = InEngine(lambda *_: their_model(case), their_loss, case)
    if compiled:
        peer.engine.compile(backend=case.backend)
    return peer

"""Optimizer steps to be timed side by side: our model and transformers', in a ZeRO engine and in a bare loop.

All contenders of a case have the same weights, data, optimizer and clipping, in one process. The peer is
BertForMaskedLM (for pre-LN, MegatronBertForMaskedLM) with SDPA attention and -100 as the label of tokens that are not
predicted, as its users run it. DeepSpeed is loaded for contenders in an engine only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
OPTIMIZER = OptimizerConfig()
PEERS = {"post": "BertForMaskedLM", "pre": "MegatronBertForMaskedLM"}


def device() -> torch.device:
    """The device of all contenders."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(kw_only=True)
class Case:
    """A model and a batch."""

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

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.hf_config, self.state = to_huggingface(
            Bert(self.model, self.layers).named_parameters(), self.model, self.layers
        )
        lengths = torch.full((self.sequences,), self.length)
        if self.padded:
            lengths = torch.randint(8, self.length + 1, (self.sequences,))
        self.real = (torch.arange(self.length) < lengths[:, None]).to(device())  # [B, T]
        self.ids = torch.randint(1, self.model.vocab_size, self.real.shape, device=device()) * self.real
        ranks = torch.rand(self.real.shape, device=device()).masked_fill(~self.real, 2).argsort(1).argsort(1)
        predicted = ranks < (MASKING_RATE * lengths[:, None].to(device())).round().clamp(min=1)
        self.labels = torch.where(predicted, self.ids, -100)
        self.bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(device())

    @property
    def tokens(self) -> int:
        """Real tokens of a step."""
        return int(self.bounds[-1]) * self.accumulation


def our_model(case: Case, *, compiled: bool) -> Bert:
    """Our model with the case's weights."""
    torch.manual_seed(0)
    model = bert_class(case.fused)(case.model, case.layers)
    if compiled:
        compile_parts(model, case.backend)
    return model


def their_model(case: Case) -> nn.Module:
    """transformers' model with the case's weights."""
    peer = getattr(transformers, PEERS[case.model.norm])
    model = peer._from_config(case.hf_config, attn_implementation="sdpa")
    model.load_state_dict(case.state, strict=False)  # the tied decoder has no entry of its own
    return model.train()


def our_loss(model: nn.Module, case: Case) -> Tensor:
    """Mean loss of a micro-batch; documents are packed without padding."""
    labels = case.labels[case.real] if case.padded else case.labels.flatten()
    positions = (labels >= 0).nonzero()[:, 0]
    documents = {"cu_seqlens": case.bounds, "max_seqlen": case.length} if case.padded else {}
    ids = case.ids[case.real][None] if case.padded else case.ids
    output = model(ids, masked_positions=positions, labels=labels[positions], **documents)
    return output.loss_sum / len(positions)


def their_loss(model: nn.Module, case: Case) -> Tensor:
    """Mean loss of a micro-batch, padded where documents are shorter."""
    mask = {"attention_mask": case.real.long()} if case.padded else {}
    return model(input_ids=case.ids, labels=case.labels, **mask).loss


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
        self, build: Callable[[int, bool], nn.Module], loss: Callable[[nn.Module, Case], Tensor], case: Case
    ) -> None:
        self.engine, self.loss, self.case = _engine(build, case), loss, case

    def step(self) -> Tensor:
        from ds_stacking.engine.stepping import optimizer_step

        total = torch.zeros((), device=device())

        def losses():
            for _ in range(self.case.accumulation):
                loss = self.loss(self.engine, self.case) / self.case.accumulation
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

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Case], Tensor], case: Case) -> None:
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
        for _ in range(self.case.accumulation):
            loss = self.loss(self.model, self.case) / self.case.accumulation
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


NAMES = tuple(f"{who}{how}" for who in ("ours", "bare", "peer", "peer bare") for how in ("", " compiled"))


def make_contender(name: str, case: Case) -> InEngine | Bare:
    """One of NAMES: our model in an engine or bare, transformers' in an engine or bare, each eager or compiled."""
    assert name in NAMES, name
    compiled = name.endswith("compiled")
    if name.startswith("bare"):
        return Bare(our_model(case, compiled=compiled), our_loss, case)
    if name.startswith("ours"):
        return InEngine(lambda *_: our_model(case, compiled=compiled), our_loss, case)
    if name.startswith("peer bare"):
        loop = Bare(their_model(case), their_loss, case)
        if compiled:
            loop.model.compile(backend=case.backend)
        return loop
    peer = InEngine(lambda *_: their_model(case), their_loss, case)
    if compiled:
        peer.engine.compile(backend=case.backend)
    return peer

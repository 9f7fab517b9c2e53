"""The run configuration: one dataclass per concept, checked when built, read from a recipe and the command line.

Every message says what is wrong and how to mend it. Nothing here imports another room, torch or deepspeed, so bad
input is refused in a fraction of a second and before anything is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ds_stacking.common.errors import UserError, require
from ds_stacking.common.words import shown

RENAMED = {"eval_blocks": "eval_sequences"}
"""Settings by the names that they had in earlier versions, as recipes and checkpoints still have them."""
LARGEST_VOCABULARY = 2**22
"""Entries of a tokenizer at most: four times those of the largest in use."""
OPTIMIZER_STATES = ("stack", "new_reset", "reset", "second_only")
"""Optimizer state policies without an argument; `scale:c` takes one."""


LARGEST = {
    **{"layers": 10_000, "num_heads": 10_000, "hidden_size": 1_000_000, "intermediate_size": 10_000_000},
    **{"max_positions": 10_000_000, "sequence_length": 10_000_000, "vocab_size": 100_000_000},
    **{"seed": 2**32 - 1, "zero_stage": 3},
}
"""Whole numbers beyond which nothing works any more, by the last part of their names."""
SMALLEST_FP8 = 1024
"""Hidden size from which on products in fp8 save more time than the casts cost, by count (docs/performance.md)."""
LARGEST_COUNT = 10**12
"""All others: steps, tokens, sequences, documents."""
LONGEST_TEXT = 4000
"""Characters; the longest path that Linux opens has 4,095 bytes."""


def check_values(config: object, where: str = "") -> None:
    """Raise UserError for a number that is infinite, NaN or too large for its field, and for text that names no file.

    `config` is a dataclass, `where` its place in the recipe with a dot, such as `model.`.
    """
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, item.name), where + item.name
        if isinstance(value, str):
            _check_text(name, value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                require(math.isfinite(number), f"{name} is {number}; it must be a finite number.")
            if isinstance(number, int):
                most = LARGEST.get(item.name, LARGEST_COUNT)
                require(number <= most, f"{name} is {_short(number)}; it must be {most:,} or less.")
                require(number >= -most, f"{name} is {_short(number)}; it must not be that small.")


def _short(number: int) -> str:
    """A whole number in a sentence; Python itself refuses to write more than 4,300 digits."""
    return str(number) if abs(number) < 10**40 else "a number of more than 40 digits"


def _check_text(name: str, text: str) -> None:
    require("\0" not in text, f"{name} holds a NUL character, which no name has; remove it.")
    require(
        len(text) <= LONGEST_TEXT,
        f"{name} has {len(text):,} characters ({text[:20]!r}...); {LONGEST_TEXT:,} are the most.",
    )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is {ascii(text)}, which is no text in UTF-8; rename that file or folder.") from None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A BERT encoder, its depth left to the stages."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_heads: int = 2
    """Attention heads; divides hidden_size."""
    intermediate_size: int = 0
    """Width of the feed-forward layer; 0 means four times hidden_size."""
    vocab_size: int = 0
    """Rows of the embedding; 0 means the tokenizer's size."""
    max_positions: int = 512
    """Longest sequence that the position embedding knows."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm before each sub-layer (as Megatron-LM's BERT) or after the residual sum (as the original BERT)."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Exact (erf) GELU or its tanh approximation."""
    dropout: float = 0.0
    """Dropout of embeddings and of both sub-layers' outputs; BERT's is 0.1."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities; BERT's is 0.1."""
    layer_norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""
    initializer_range: float = 0.05
    """Standard deviation of the normal initialisation; BERT's 0.02 suits a width of 768, a narrow model wants more."""
    next_sentence: bool = False
    """Train BERT's next-sentence head beside masked language modelling; the data then come as segment pairs."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""

    def __post_init__(self) -> None:
        check_values(self, "model.")
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)
        for name in ("hidden_size", "num_heads", "intermediate_size", "max_positions"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive.")
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}; "
            f"choose a head count that divides it.",
        )
        require(self.vocab_size >= 0, f"model.vocab_size is {self.vocab_size}; it must be positive, or 0.")
        for name in ("layer_norm_eps", "initializer_range"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive.")
        for name in ("dropout", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name} is {getattr(self, name)}; it must lie in [0, 1).")


def require_text(name: str, value: str) -> None:
    """Raise UserError for a setting that names something and is empty, or has characters that no name has."""
    require(value.strip(), f"{name} is empty; give it a value, or leave it out.")
    _check_text(name, value)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How text is read and tokenised. The source itself is `--data`."""

    subset: str | None = None
    """Configuration name of a hub dataset, such as 20231101.en."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit or tag of a hub dataset; pin it to be able to repeat a run."""
    column: str = "text"
    """Column (parquet, hub) or key (jsonl) that holds the text."""
    streaming: bool = False
    """Read a hub dataset while it downloads instead of downloading it whole first."""
    max_documents: int = 0
    """Stop reading after this many documents; 0 means all."""
    vocab_size: int = 4096
    """Vocabulary of a tokenizer that is trained here (`--tokenizer train`)."""
    lowercase: bool = True
    """Lower-case text in a tokenizer that is trained here."""
    eval_percent: float = 5.0
    """Share of documents, in percent, held out for evaluation; chosen by a hash of the document."""
    max_document: int = 2**26
    """Characters of a document at most: of a line of jsonl, a page of a dump, a value of parquet (bytes). Reading one
    takes up to 30 bytes of memory for each."""
    max_expansion: int = 1000
    """Times its size that a compressed file may become at most, from 64 MB on; text becomes 3 to 20 times."""
    zstd_window: int = 2**27
    """Bytes of memory that a .zst file may ask for to be decompressed; 2147483648 for zstd --long=31."""
    follow_links: bool = False
    """Read links in a folder or glob that lead out of it, such as to files on another disk."""

    def __post_init__(self) -> None:
        require(
            0 < self.eval_percent < 100, f"corpus.eval_percent is {self.eval_percent}; it must lie between 0 and 100."
        )
        require(
            100 <= self.vocab_size <= LARGEST_VOCABULARY,
            f"corpus.vocab_size is {self.vocab_size}; it must lie between 100 and {LARGEST_VOCABULARY}.",
        )
        for name, least, most in (
            ("max_documents", 0, 2**62),
            ("max_document", 1, 2**30),
            ("max_expansion", 1, 2**30),
            ("zstd_window", 2**10, 2**31),
        ):
            value = getattr(self, name)
            require(least <= value <= most, f"corpus.{name} is {value}; it must lie between {least} and {most}.")
        for name in ("split", "column"):
            require_text(f"corpus.{name}", getattr(self, name))


MOST_WORKERS = 1024
"""Processes that prepare data; each has a copy of the tokenizer and of some documents."""


@dataclass(frozen=True, kw_only=True)
class PreparationOptions:
    """What is done to the documents of a source, whether a run prepares them (`corpus.`) or prepare_data.py."""

    sentences: bool = False
    """Store where sentences begin, for sentence pairs that meet at a sentence's end (model.next_sentence)."""
    near_duplicates: float = 0.0
    """Jaccard similarity of word 5-grams from which a document is dropped as a near duplicate; 0: equal ones only."""
    max_leak: float = 1.0
    """Largest share, in percent, of held-out 13-grams that may stand in the training split too; what prepare_data.py
    made has its own."""
    workers: int = 0
    """Processes that clean and tokenise; 0: none for a small source, one per core, 16 at most, for a larger one."""

    def __post_init__(self) -> None:
        _check_preparation(self)


def _check_preparation(options: PreparationOptions, where: str = "") -> None:
    for name, most in (("near_duplicates", 0.95), ("max_leak", 100), ("workers", MOST_WORKERS)):
        value = getattr(options, name)
        require(0 <= value <= most, f"{where}{name} is {value}; it must lie between 0 and {most}.")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(PreparationOptions, SourceConfig):
    """Where text comes from and how it becomes sequences of tokens. The source itself is `--data`."""

    sequence_length: int = 64
    """Tokens per sequence, special tokens included."""
    separate_documents: bool = False
    """Tokens attend to their own document only, and its positions begin at 0; else a sequence is attended to whole."""
    masking_rate: float = 0.15
    """Share of a sequence's ordinary tokens that are predicted (BERT: 15 %, of which 80/10/10 masked/random/kept)."""
    masking_rate_end: float | None = None
    """Rate that masking_rate changes to, linearly over the run; default: masking_rate. Evaluation uses this one."""
    masking: Literal["token", "word", "span"] = "token"
    """What is masked together: single tokens, whole words, or spans of words (SpanBERT)."""
    cache_dir: str | None = None
    """Where prepared data are kept; default $DS_STACKING_CACHE, else ~/.cache/ds_stacking."""
    verify: bool = False
    """Compare every byte of the prepared data with its hash before the first step, not the sizes of files alone."""
    fingerprint: str | None = None
    """Fingerprint that the prepared data must have; they are then taken from the cache as they are, whatever has
    become of their source."""

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        _check_preparation(self, "corpus.")
        if self.cache_dir is not None:
            require_text("corpus.cache_dir", self.cache_dir)
        require(
            self.fingerprint is None or re.fullmatch("[0-9a-f]{16}", self.fingerprint),
            f"corpus.fingerprint is {shown(str(self.fingerprint))}; it must be the 16 digits of data_fingerprint in a "
            f"run's config.json.",
        )
        require(self.sequence_length >= 8, f"corpus.sequence_length is {self.sequence_length}; it must be 8 or more.")
        for name in ("masking_rate", "masking_rate_end"):
            rate = getattr(self, name)
            require(rate is None or 0 < rate < 1, f"corpus.{name} is {rate}; it must lie between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and gradient clipping."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = 1e-6
    """Epsilon of the denominator."""
    eps_correction: bool = True
    """Divide by sqrt(v / (1 - beta2^t)) + eps, as PyTorch; false: by (sqrt(v) + eps) / sqrt(1 - beta2^t), as fairseq
    0.6 and so the code of Gong et al. does, where eps weighs more in the first thousands of steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    decay_all: bool = False
    """Decay biases and LayerNorm parameters too (as the code of Gong et al. does)."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        check_values(self, "optimizer.")
        object.__setattr__(self, "betas", (float(self.betas[0]), float(self.betas[1])))
        for beta in self.betas:
            require(0 <= beta < 1, f"optimizer.betas holds {beta}; both must lie in [0, 1).")
        for name in ("weight_decay", "clip"):
            require(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}; it must not be negative.")
        require(self.eps > 0, f"optimizer.eps is {self.eps}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A period of training at one depth. Fields left out take the run's value."""

    layers: int
    """Transformer blocks."""
    steps: int
    """Optimizer steps."""
    lr: float | None = None
    """Learning rate at the stage's start (after its warm-up); replaces the run's schedule for this stage."""
    lr_end: float | None = None
    """Learning rate that the stage falls to linearly; default: lr."""
    lr_steps: int | None = None
    """Steps in which lr falls to lr_end; default: steps. More than steps leaves the decay unfinished."""
    warmup_steps: int = 0
    """Linear warm-up at the start of this stage; needs lr."""
    sequence_length: int | None = None
    """Tokens of a sequence in this stage, such as 512 after 128; evaluation keeps corpus.sequence_length."""
    tokens_per_step: int | None = None
    """Tokens of one optimizer step over all ranks."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Largest number of sequences that one rank holds at a time, or auto."""
    zero_stage: int | None = None
    """ZeRO stage of this stage's engine; default: that of the DeepSpeed configuration."""
    operator: str | None = None
    """Growth operator into this stage."""
    optimizer_state: str | None = None
    """Optimizer state policy of the growth into this stage."""
    rewarm_steps: int = 0
    """After the growth into this stage, warm up the learning rate of the new blocks alone over these steps."""

    def __post_init__(self) -> None:
        where = f"Stage {_short(self.layers)}:{_short(self.steps)}"
        check_values(self, f"{where}: ")
        require(self.layers > 0 and self.steps > 0, f"{where} has no layers or no steps; both must be positive.")
        require(
            self.lr is not None or not (self.lr_end is not None or self.lr_steps or self.warmup_steps),
            f"{where} sets lr_end, lr_steps or warmup_steps without lr; give lr, or leave all to the run's schedule.",
        )
        for name in ("lr", "lr_end", "warmup_steps", "rewarm_steps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{where}: {name} is {value}; it must not be negative.")
        for name in ("lr_steps", "tokens_per_step", "micro_batch_size"):
            value = getattr(self, name)
            require(value in (None, "auto") or value > 0, f"{where}: {name} is {value}; it must be positive.")
        length = self.sequence_length
        require(length is None or length >= 8, f"{where}: sequence_length is {length}; it must be 8 or more.")
        span = min(self.steps, self.lr_steps or self.steps)
        require(
            self.warmup_steps <= span,
            f"{where}: warmup_steps {self.warmup_steps} is more than the {span} steps of the stage or its lr_steps.",
        )
        require(
            self.zero_stage in (None, 0, 1, 2, 3),
            f"{where}: zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3.",
        )


QUICKSTART_STAGES = "2:450,4:450,8:400"


def parse_stages(text: str) -> list[StageConfig]:
    """Read `3:50000,6:70000,12:280000` (layers:optimizer steps)."""
    stages = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20}):([0-9]{1,20})\s*", part)
        require(
            match,
            f"Stage {part.strip()[:80]!r} of {text[:80]!r} is not LAYERS:STEPS; write for example 3:50000,6:70000.",
        )
        assert match is not None
        stages.append(StageConfig(layers=int(match[1]), steps=int(match[2])))
    return stages


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One pre-training run. The defaults are the quickstart. It never changes; where a run stands is TrainState."""

    name: str = "quickstart"
    """Name of the recipe; the default output directory is runs/<name>."""
    description: str = ""
    """What the recipe is and, for a published one, where it deviates."""
    deepspeed_config: str = "ds_configs/zero2.json"
    """DeepSpeed configuration; batch sizes, clipping and precision in it stay "auto"."""
    output_dir: str | None = None
    """The run directory."""
    resume: str | None = None
    """auto: go on from the newest valid checkpoint of output_dir, or start where there is none; or a folder."""
    branch_from: str | None = None
    """A run directory or checkpoint of another run on the same model and data: begin with its state, whatever its
    recipe was. What is to come is this recipe's."""
    overwrite: bool = False
    """Delete what an earlier run left in output_dir."""
    shared: bool = False
    """Let the group of output_dir read and write the run, so that a colleague can go on with it; else it is its
    user's alone."""
    data: str = "docs"
    """Text: `docs` (documentation of the installed Python packages), a folder, file or glob, a hub dataset, a folder
    of prepare_data.py, or a JSON file that mixes such folders (docs/data.md)."""
    tokenizer: str = "train"
    """`train` (WordPiece on the corpus), a folder with a tokenizer, or a hub name."""
    stages: list[StageConfig] = field(
        default_factory=lambda: parse_stages(QUICKSTART_STAGES), metadata={"notation": QUICKSTART_STAGES}
    )
    """Stages as LAYERS:STEPS,... or, in a recipe, as a list of objects."""
    trigger: str = "steps"
    """When it grows: after the stages' steps, or tokens:N,... flops:N,... prop:A, gstack, plateau:SLOPE; or
    trial:stack,interleave:20, the stages' steps with the operator chosen by a trial (docs/growth.md)."""
    operator: str = "stack"
    """How blocks are copied at a growth: stack (ABAB), interleave (AABB), middle, last, fresh or a list (0,1,1,0), if
    wanted on some blocks only (stack[1:-1]) and with modifiers of the copies (+zero_output, +scale:C, +noise:C)."""
    optimizer_state: str = "stack"
    """What a growth does to Adam's state: stack, new_reset, reset, second_only or scale:C."""
    growth_memory: Literal["normal", "low"] = "normal"
    """low: at a growth the old state waits on the host; its device memory is free before the new engine is built."""
    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it natively, else fp32; fp8: bf16 with the blocks'
    linear layers multiplying in 8 bits (docs/training.md)."""
    kernels: Literal["auto", "fused", "torch"] = "auto"
    """fused: the Triton kernels around the matrix products (on a CPU their slow references); torch: PyTorch's own
    operations; auto: fused on GPUs that run them."""
    tiles: Literal["measure", "predict"] = "measure"
    """How the fused kernels get their tile sizes: measured on the GPU by rank 0 before the first step and kept in
    tiles.json; predict: the package's own table and predictions."""
    compile: bool = False
    """torch.compile what the kernels leave over: embeddings, blocks and head; ZeRO stages 0 to 2."""
    tokens_per_step: int = 2048
    """Tokens of one optimizer step over all ranks and micro-batches."""
    micro_batch_size: int | Literal["auto"] = 32
    """Largest number of sequences that one rank holds at a time; the rest is gradient accumulation. auto: what fits
    and is fastest, measured for each stage before the first."""
    lr: float = 2e-3
    """Peak learning rate."""
    schedule: Literal["wsd", "linear", "constant"] = "wsd"
    """Warm-up, then stable and decay (wsd), linear to 0, or constant; over the steps of all stages."""
    warmup_steps: int = 50
    """Linear warm-up of the run's schedule."""
    decay_percent: float = 30.0
    """Share of all steps, in percent, over which wsd falls linearly to 0 at the end."""
    seed: int = 1
    """Seed of initialisation, dropout, data order and masking."""
    eval_every: int = 100
    """Optimizer steps between evaluations; each stage's end is evaluated too. 0: only there."""
    eval_after_growth: int = 100
    """Optimizer steps after a growth at which its held-out loss is evaluated once more, for its record. 0: never."""
    eval_sequences: int = 256
    """Held-out sequences of one evaluation, the same ones each time."""
    log_every: int = 10
    """Optimizer steps between lines in metrics.jsonl."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints; each stage's end is saved too. 0: only there."""
    checkpoint_keep: int = 2
    """Newest valid checkpoints that are kept beside those of the stages' ends."""
    checkpoint_async: bool = True
    """Write checkpoints in the background; training waits for the copy out of the engine only."""
    max_skipped_steps: int = 10
    """Optimizer steps in a row that may be skipped (see docs/reliability.md) before the run ends. 0: any number."""
    skip_above_sigma: float = 0.0
    """Skip a step whose loss lies this many standard deviations above the mean of the last 128, such as 6. 0: none."""
    hang_timeout: float = 1800.0
    """Seconds without any progress after which a rank ends itself, and the run with it. 0: never."""
    tracking: Literal["wandb", "none"] = "wandb"
    """wandb (offline without a key or a network) or none; metrics.jsonl is always written."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The encoder."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""

    def __post_init__(self) -> None:
        check_values(self)
        check_values(self.corpus, "corpus.")
        for name in ("output_dir", "resume", "branch_from", "deepspeed_config"):
            require(getattr(self, name) != "", f"{name} is empty; give it a value, or leave it out for its default.")
        if isinstance(self.stages, str):
            object.__setattr__(self, "stages", parse_stages(self.stages))
        require(self.stages, "stages is empty; give at least one, such as 2:100.")
        for name in ("tokens_per_step", "micro_batch_size", "eval_sequences", "log_every", "checkpoint_keep"):
            value = getattr(self, name)
            require(value == "auto" or value > 0, f"{name} is {getattr(self, name)}; it must be positive.")
        for name in (
            *("lr", "warmup_steps", "eval_every", "eval_after_growth", "checkpoint_every", "seed"),
            *("max_skipped_steps", "skip_above_sigma", "hang_timeout"),
        ):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative.")
        require(
            re.fullmatch(r"\w[\w.-]*", self.name),
            f"name is {self.name!r}; it names a folder, so give letters, digits, '_', '-' and '.' only.",
        )
        require(0 <= self.decay_percent <= 100, f"decay_percent is {self.decay_percent}; it must lie in 0 to 100.")
        check_optimizer_state(self.optimizer_state)
        for name in ("data", "tokenizer"):
            require_text(name, getattr(self, name))
        length, positions = self.corpus.sequence_length, self.model.max_positions
        require(
            length <= positions,
            f"corpus.sequence_length {length} is longer than model.max_positions {positions}; "
            f"shorten the one or raise the other.",
        )
        require(
            not (self.corpus.separate_documents and self.model.next_sentence),
            "corpus.separate_documents hides from a sentence what model.next_sentence asks for; turn off one of them.",
        )
        if self.precision == "fp8":
            check_fp8_sizes(self.model)
        first = self.stages[0]
        require(
            not (first.operator or first.optimizer_state or first.rewarm_steps),
            f"Stage {first.layers}:{first.steps} is the first, so no growth leads into it; "
            f"remove its operator, optimizer_state and rewarm_steps.",
        )
        for stage in self.stages:
            if stage.optimizer_state is not None:
                check_optimizer_state(stage.optimizer_state)
            tokens, length = stage.tokens_per_step or self.tokens_per_step, self.length_of(stage)
            require(
                length <= positions,
                f"Stage {stage.layers}:{stage.steps} has sequences of {length}, longer than model.max_positions "
                f"{positions}; shorten the one or raise the other.",
            )
            least = tokens // length * length
            near = " and ".join(str(size) for size in (least, least + length) if size)
            require(
                tokens % length == 0,
                f"tokens_per_step {tokens} is no multiple of the sequence length {length}; the nearest are {near}.",
            )

    def length_of(self, stage: StageConfig) -> int:
        """Tokens of a training sequence of a stage."""
        return stage.sequence_length or self.corpus.sequence_length

    @property
    def run_dir(self) -> str:
        """The run directory."""
        return self.output_dir or f"runs/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def check_fp8_sizes(model: ModelConfig) -> None:
    """Raise UserError for a model that gains nothing by products in fp8, or that the hardware cannot multiply."""
    require(
        model.hidden_size >= SMALLEST_FP8,
        f"precision fp8 does not pay with model.hidden_size {model.hidden_size}: it needs {SMALLEST_FP8:,} or more; "
        f"use bf16.",
    )
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(model, name)
        require(
            size % 16 == 0,
            f"precision fp8 multiplies by 16 columns at a time, and model.{name} is {size}; give it a multiple of 16, "
            f"or use bf16.",
        )


def check_optimizer_state(policy: str) -> None:
    """Raise UserError unless `policy` is a known optimizer state policy."""
    if policy in OPTIMIZER_STATES or re.fullmatch(r"scale:[0-9]{0,9}\.?[0-9]{1,9}", policy):
        return
    known = ", ".join(OPTIMIZER_STATES)
    raise UserError(
        f"optimizer_state {shown(policy)} is unknown; choose one of {known} or scale:C, such as scale:0.5."
    )

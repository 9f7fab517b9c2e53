"""The loop in docs/growth.md, run as it stands there, with models of Hugging Face and ours."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ds_stacking.common.errors import UserError
from ds_stacking.engine.grow import grow_engine
from ds_stacking.engine.parameter_groups import make_groups
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.state import KINDS
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

GUIDE = Path(__file__).parents[2] / "docs" / "growth.md"
TOKENS = torch.arange(24).view(2, 12) * 7 % 50


def gpt2(layers: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 18, "n_head": 2, "vocab_size": 50, "n_positions": 12, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 18, "intermediate_size": 30, "num_attention_heads": 3, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **sizes))


MODELS = {"gpt2": (gpt2, "transformer.h"), "llama": (llama, "model.layers")}


def loss(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def train(engine) -> None:
    for _ in range(3):
        engine.backward(loss(engine))
        engine.step()


def config(zero_stage: int, **more) -> dict:
    zero = {"stage": zero_stage}
    return {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "steps_per_print": 2**31, **more}


SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
"""With these ZeRO stage 1 has an optimizer of its own, BF16_Optimizer."""


def guide() -> list[str]:
    """The Python blocks of the guide: the loop, saving, loading."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    return blocks


def by_hand(name: str, *, moments: bool = True) -> list[float]:
    """The guide's loop in plain PyTorch: losses after it, one for each of two further steps."""
    make_model, container = MODELS[name]
    old = make_model(2)
    optimizer = torch.optim.AdamW(old.parameters(), lr=1e-3)

    def steps(model, optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            losses.append(loss(model))
            losses[-1].backward()
            optimizer.step()
        return [value.item() for value in losses]

    steps(old, optimizer, 3)
    new = make_model(4)
    grown = torch.optim.AdamW(new.parameters(), lr=1e-3)
    sources = dict(old.named_parameters())
    for target, parameter in new.named_parameters():
        source = re.sub(rf"{re.escape(container)}\.(\d+)", lambda m: f"{container}.{int(m[1]) % 2}", target)
        parameter.data.copy_(sources[source].data)
        state = optimizer.state[sources[source]]
        if moments:
            grown.state[parameter] = {key: value.clone() for key, value in state.items()}
    return steps(new, grown, 3 + 2)[3:]


def two_steps(engine) -> list[float]:
    losses = []
    for _ in range(2):
        value = loss(engine)
        losses.append(value.item())
        engine.backward(value)
        engine.step()
    return losses


def run_guide(name: str, zero_stage: int, **more) -> tuple[list[float], bool, int]:
    make_model, container = MODELS[name]
    scope = {"make_model": make_model, "train": train, "ds_config": config(zero_stage, **more)}
    exec(guide()[0], scope)
    engine = scope["engine"]
    losses = two_steps(engine)
    module = engine.module
    tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
    verified = scope["record"].tensors_verified
    found = len(module.get_submodule(container)) == 4 and verified == len(list(module.named_parameters()))
    release(engine)
    collect()
    return losses, tied, found


def cases() -> dict:
    found = {(name, stage): run_guide(name, stage) for name in MODELS for stage in (0, 2, 3)}
    return found | {("gpt2", stage, "bf16"): run_guide("gpt2", stage, **SUMS) for stage in (1, 2, 3)}


def test_the_loop_of_the_guide_grows_hugging_face_models() -> None:
    results = run_ranks(2, cases)[0]
    for (name, *case), (losses, tied, found) in results.items():
        exact = 5e-3 if "bf16" in case else 1e-3
        assert losses == pytest.approx(by_hand(name), rel=exact), (name, case)
        assert tied and found, (name, case)
        if "bf16" not in case:
            assert losses != pytest.approx(by_hand(name, moments=False), rel=exact), (name, case)


def test_the_guide_needs_at_most_ten_lines() -> None:
    assert len([line for line in guide()[0].splitlines() if line.strip()]) <= 10


def held(engine) -> tuple[list[bytes], dict[str, int], list]:
    """This rank's masters and moments, all step counts, and the births of the groups."""
    state = LiveState(engine)
    values = [state.read(piece, kind).numpy().tobytes() for piece in state.slices() for kind in KINDS]
    return values, state.steps(), [group["birth"] for group in state.base.param_groups]


def saved(folder: Path, zero_stages: tuple[int, ...], optimizer: str) -> dict:
    """Grow as the guide does, save, and go on: the state that was saved, and the losses after it."""
    found = {}
    for zero_stage in zero_stages:
        (folder / str(zero_stage)).mkdir(exist_ok=True)
        os.chdir(folder / str(zero_stage))
        scope = {"make_model": gpt2, "train": train, "ds_config": config(zero_stage)}
        exec(guide()[0].replace("AdamW", optimizer), scope)
        exec(guide()[1], scope)
        found[zero_stage] = held(scope["engine"]), two_steps(scope["engine"])
        release(scope["engine"])
    return found


def loaded(folder: Path, zero_stages: tuple[int, ...], optimizer: str) -> dict:
    """Load in a new process as the guide does, and go on; then grow once more."""
    found = {}
    for zero_stage in zero_stages:
        os.chdir(folder / str(zero_stage))
        scope = {"make_model": gpt2, "train": lambda engine: None, "ds_config": config(zero_stage)}
        loop, _, load = guide()
        building = loop[: loop.index("engine = build_engine(2)")].replace("AdamW", optimizer)
        exec(f"import json\nfrom pathlib import Path\n{building}", scope)
        scope["make_groups"] = make_groups
        exec(load, scope)
        found[zero_stage] = held(scope["engine"]), two_steps(scope["engine"])
        engine, record = grow_engine(scope["engine"], scope["build_engine"], 8)
        assert record.stage == 2 and set(held(engine)[2]) == {0, 1, 2}
        release(engine)
    return found


@pytest.mark.parametrize(("zero_stages", "optimizer"), [((0, 1, 2, 3), "AdamW"), ((2,), "Adam")])
def test_deepspeed_saves_and_loads_what_was_grown(
    zero_stages: tuple[int, ...], optimizer: str, tmp_path: Path
) -> None:
    before = run_ranks(2, saved, tmp_path, zero_stages, optimizer)
    after = run_ranks(2, loaded, tmp_path, zero_stages, optimizer)
    for rank in range(2):
        for zero_stage in zero_stages:
            (state, losses), (state_after, losses_after) = before[rank][zero_stage], after[rank][zero_stage]
            assert state_after == state, f"state, ZeRO {zero_stage}"
            assert losses_after == losses, f"losses, ZeRO {zero_stage}"
            assert set(state[1].values()) == {6} and set(state[2]) == {0, 1}


def refusals() -> dict[str, str]:
    """What is refused, and that the engine trains on after it."""
    import deepspeed

    def build(layers, groups=lambda model: model.parameters(), *, change=None):
        model = gpt2(layers)
        if change:
            change(model)
        optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config(2))[0]

    def other(layers, groups):
        return build(
            layers, groups, change=lambda model: model.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
        )

    messages = {}
    engine = build(2)
    train(engine)
    reference = loss(engine).item()
    state = LiveState(engine)
    piece = state.slices()[0]
    cases = {"depth": (build, 3), "architecture": (other, 4), "shallower": (lambda _, groups: build(3, groups), 4)}
    for what, (builder, layers) in cases.items():
        try:
            grow_engine(engine, builder, layers)
        except UserError as error:
            messages[what] = str(error)
    assert loss(engine).item() == reference
    kept = state.read(piece, "exp_avg")[0].item()
    state.read(piece, "exp_avg")[0] = float("nan")
    try:
        grow_engine(engine, build, 4)
    except UserError as error:
        messages["nan"] = str(error)
    state.read(piece, "exp_avg")[0] = kept
    train(engine)
    assert loss(engine).item() < reference
    release(engine)
    return messages


def test_bad_input_is_refused_in_a_sentence_and_the_old_engine_trains_on() -> None:
    messages = run_ranks(1, refusals)[0]
    assert "3 is not a multiple of 2" in messages["depth"]
    assert "parameter extra, which the plan does not know" in messages["architecture"]
    assert "no parameter transformer.h.3" in messages["shallower"]
    assert "NaN or infinite numbers: transformer.wte.weight (exp_avg)" in messages["nan"]

"""Adam's first updates after a growth, by torch's own AdamW, against the closed form; and functions kept."""

from __future__ import annotations

import pytest
import torch

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import OneRank
from ds_stacking.growth.executor import execute
from ds_stacking.growth.operators import layer_map, parse_operator
from ds_stacking.growth.plan import ParameterInfo, make_plan, parameter_groups
from ds_stacking.growth.policies import parse_policy
from ds_stacking.growth.state import FullState
from ds_stacking.models.bert import Bert

OLD, RATE = 1000, 1e-3
POLICIES = ("stack", "new_reset", "reset", "second_only", "scale:0.5")


def first_moment(beta: float, start: float, t: int) -> float:
    """exp_avg after t gradients of 1 from `start`."""
    return start * beta**t + 1 - beta**t


def closed_form(first: float, second: float, step: int, t: int, betas: tuple[float, float]) -> float:
    """Size of update t after a growth in units of the rate, under gradients of 1 and moments `first`, `second`."""
    m = first_moment(betas[0], first, t) / (1 - betas[0] ** (step + t))
    v = first_moment(betas[1], second, t) / (1 - betas[1] ** (step + t))
    return m / v**0.5


def updates(first: float, second: float, step: int, count: int, betas: tuple[float, float]) -> list[float]:
    """The same by torch AdamW."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=RATE, betas=betas, eps=1e-16, weight_decay=0.0)
    state = {"exp_avg": torch.full_like(weight, first), "exp_avg_sq": torch.full_like(weight, second)}
    optimizer.state[weight] = state | {"step": torch.tensor(float(step))}
    sizes = []
    for _ in range(count):
        before = weight.item()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        sizes.append((before - weight.item()) / RATE)
    return sizes


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.98), (0.9, 0.95)])
@pytest.mark.parametrize("name", POLICIES)
def test_first_updates_of_copies_follow_the_closed_form(name, betas) -> None:
    rule = parse_policy(name).copy
    healthy = [first_moment(beta, 0.0, OLD) for beta in betas]
    first, second = rule.first * healthy[0], rule.second * healthy[1]
    step = OLD if rule.keep_step else 0
    found = updates(first, second, step, 20, betas)
    assert found == pytest.approx([closed_form(first, second, step, t, betas) for t in range(1, 21)], rel=1e-6)
    if name in ("stack", "new_reset", "reset"):
        assert found == pytest.approx([1.0] * 20, rel=1e-6), "as in a run that never grew"


def test_a_moment_without_its_step_count_is_the_known_error() -> None:
    betas = (0.9, 0.999)
    zeroed = updates(0.0, 0.0, 100_000, 12, betas)
    assert zeroed[0] == pytest.approx(3.2, abs=0.05) and zeroed[11] == pytest.approx(6.6, abs=0.05)
    forgotten = updates(1.0, 1.0, 0, 12, betas)
    assert forgotten[0] == pytest.approx(0.32, abs=0.01) and forgotten[11] == pytest.approx(0.15, abs=0.01)


def test_after_two_growths_three_step_counts_stand_side_by_side() -> None:
    infos = {
        f"blocks.{i}.{kind}": ParameterInfo(numel=4, decay=kind == "w", step=100) for i in range(2) for kind in "wb"
    }
    for stage, (source, target) in enumerate(((2, 4), (4, 8)), start=1):
        names = find_blocks(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(map(Pair, range(source)))}))
        layers = layer_map("stack", source, target)
        plan = make_plan(infos, names, layers, operator="stack", optimizer_state="new_reset", stage=stage)
        infos = {
            n: ParameterInfo(numel=4, decay=i.decay, birth=i.birth, step=i.step + 50)
            for n, i in plan.parameters.items()
        }
    groups = parameter_groups(infos)
    assert [key for key, _ in groups] == [
        (0, False, 200), (0, True, 200), (1, False, 100), (1, True, 100), (2, False, 50), (2, True, 50),
    ]  # fmt: skip
    assert [len(names) for _, names in groups] == [2, 2, 2, 2, 4, 4]


class Pair(torch.nn.Module):
    """A block of two parameters."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.w, self.b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(4))


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(UserError, match="optimizer_state 'keep' is unknown"):
        parse_policy("keep")


def grown_hidden(operator: str, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a random model computes before and after a growth from 2 layers to 4."""
    config = ModelConfig(hidden_size=30, num_heads=2, vocab_size=50, max_positions=12, norm=norm)
    torch.manual_seed(0)
    old, new = Bert(config, 2), Bert(config, 4)
    infos = {name: ParameterInfo(numel=p.numel(), decay=True) for name, p in old.named_parameters()}
    transform = parse_operator(operator).transform
    plan = make_plan(
        infos, find_blocks(old), layer_map(operator, 2, 4), operator=operator, optimizer_state="stack", stage=1,
        transform=transform,
    )  # fmt: skip
    stores = [
        FullState({n: p.numel() for n, p in model.named_parameters()}, kinds=("master",)) for model in (old, new)
    ]
    for store, model in zip(stores, (old, new), strict=True):
        store.tensors["master"] = {name: p.detach().flatten().clone() for name, p in model.named_parameters()}
    execute(plan, *stores, OneRank(), kinds=("master",))
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            parameter.copy_(stores[1].tensors["master"][name].view_as(parameter))
        tokens = torch.arange(24).view(2, 12)
        return old(tokens).logits, new(tokens).logits


@pytest.mark.parametrize("operator", ["stack", "interleave", "middle", "last", "fresh", "0,*,0,1"])
def test_zero_output_keeps_the_function_of_a_pre_ln_model(operator) -> None:
    before, after = grown_hidden(f"{operator}+zero_output", "pre")
    assert torch.allclose(before, after, atol=1e-5)
    before, after = grown_hidden(operator, "pre")
    assert not torch.allclose(before, after, atol=1e-3), "without the modifier it changes"


@pytest.mark.parametrize(
    "factor", ["nan", "inf", "-1", "1e400", "9" * 5000, "9" * 200, "٣", "", ".", "9" * 100_000 + "x"]
)
def test_factors_that_are_no_number_are_refused_in_one_short_sentence(factor):
    with pytest.raises(UserError, match="is unknown; choose one of") as error:
        parse_policy(f"scale:{factor}")
    assert len(str(error.value)) < 300

"""docs/recipes.md against the recipes: what stacking saves at most, and where a recipe deviates from its model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.training.schedule import Schedule

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recipes.md").read_text()
VOCABULARY = {"bert_base_gong2019": 32768, "bert_base_stacking": 30528, "bert_large_stacking": 30528}


def recipe(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"launchers/recipes/{name}.json").read_text())


def cost(content: dict[str, Any], layers: int, what: str, vocabulary: int) -> float:
    """Multiplications per token of a forward pass, divided by the width; masked tokens alone owe more to the loss."""
    model, length = content["model"], content["corpus"]["sequence_length"]
    width, inner, masked = model["hidden_size"], model["intermediate_size"], content["corpus"]["masking_rate"]
    first = 1 / length if model["next_sentence"] else 0.0  # [CLS] is read by the next-sentence head
    keys, others, attention = 2 * width, 2 * width + 2 * inner, 2 * length
    if what == "blocks alike":
        return layers
    encoder = (layers - 1) * (keys + others + attention) + keys + (masked + first) * (others + attention)
    head = masked * (width + vocabulary) + first * (width + 2)
    return encoder + (head if what == "whole model" else 0.0)


def saved(name: str, against: str, what: str) -> float:
    content = recipe(name)
    given, usual = content["stages"], content["tokens_per_step"]
    if isinstance(given, str):
        stages = [(*map(int, part.split(":")), usual) for part in given.split(",")]
    else:
        stages = [(stage["layers"], stage["steps"], stage["tokens_per_step"]) for stage in given]
    at = {layers: cost(content, layers, what, VOCABULARY[name]) for layers, _, _ in stages}
    last_layers, _, last_tokens = stages[-1]
    spent = sum(steps * tokens * at[layers] for layers, steps, tokens in stages)
    scratch = sum(steps * (last_tokens if against == "updates" else tokens) for _, steps, tokens in stages)
    return 1 - spent / (scratch * at[last_layers])


@pytest.mark.parametrize(
    ("name", "against", "said"),
    [
        ("bert_base_gong2019", "tokens", "as many tokens"),
        ("bert_base_gong2019", "updates", "as many updates, all of 122,880 tokens"),
        ("bert_base_stacking", "updates", "as many updates, and so tokens"),
        ("bert_large_stacking", "updates", "as many updates, and so tokens"),
    ],
)
def test_the_page_says_what_the_stages_before_the_last_save(name: str, against: str, said: str) -> None:
    shares = [saved(name, against, what) for what in ("blocks alike", "encoder", "whole model")]
    assert f"| `{name}` | {said} | {' | '.join(f'{share:.1%}'.replace('%', ' %') for share in shares)} |" in PAGE


def test_the_recipe_of_2019_and_the_page_admit_the_same_deviations() -> None:
    description = recipe("bert_base_gong2019")["description"]
    section = PAGE.split("## bert_base_gong2019")[1].split("\n## ")[0]
    numbered = [int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)]
    assert numbered == [int(number) for number in re.findall(r"\((\d+)\) ", description)] == list(range(1, 11))
    for words in ("1e-12", "1e-5", "384", "[CLS]", "BookCorpus", "8e-8", "eps_correction", "200th paragraph", "bias"):
        assert words in section and words in description, words


def test_rates_are_one_update_ahead_of_the_published_ones_where_the_page_says_so() -> None:
    """The published schedule, written out from its linear_lr_schedule.py: `done` updates were made before this one."""

    def published(done: int, top: float, end: float, warmup: int, total: int, start: float) -> float:
        if done < warmup:
            return start + done * (top - start) / warmup
        return (done - total) * -(top - end) / (total - warmup) + end

    schedule = Schedule(parse_run(["--recipe", "bert_base_gong2019"]))
    assert schedule(0, 0, 0) == pytest.approx(8e-8)
    for done in (10, 5_000, 9_999):
        assert schedule(done, 0, done) == pytest.approx(
            published(done + 1, 8e-4, 5.5e-4, 10_000, 50_000, 1e-7), abs=1e-7
        )
    for done in (10_000, 30_000, 49_999):
        assert schedule(done, 0, done) == pytest.approx(published(done, 8e-4, 5.5e-4, 10_000, 50_000, 1e-7))
    for done in (1, 1_000, 279_999):
        rate = published(done + 1, 3e-4, 0.0, 1, 800_000, 3e-4)
        assert schedule(120_000 + done, 2, done) == pytest.approx(rate, rel=1e-5)

"""The model card: metadata that the Hub's own reader accepts, figures from the summary, and code that runs."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForMaskedLM

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.reports.model_card import write_model_card

SUMMARY = {
    "world_size": 2,
    "zero_stage": 2,
    "parameters": 1_234_567,
    "tokens": 2_867_200,
    "seconds": 185.2,
    "flops": 2.5e15,
    "eval_loss": 4.5,
    "eval_loss_masked": 4.75,
    "eval_loss_shuffled": 5.5,
    "unigram_entropy": 6.25,
    "stages": [{"layers": 2, "steps": 450, "tokens": 921_600}, {"layers": 4, "steps": 950, "tokens": 1_945_600}],
    "growths": [
        {
            "from_layers": 2,
            "to_layers": 4,
            "operator": "stack",
            "optimizer_state": "reset",
            "layer_map": [0, 1, 0, 1],
            "seconds": 0.4,
            "eval_loss_before": 5.61,
            "eval_loss_after": 5.93,
            "tensors_verified": 52,
        }
    ],
}


@pytest.fixture
def export(tmp_path):
    config = BertConfig(
        num_hidden_layers=4, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=100
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_metadata_are_read_back(export):
    card = ModelCard.load(write_model_card(export, summary=SUMMARY, config=RunConfig().to_dict(), licence="mit"))
    assert card.data.model_name == "quickstart-4L"
    assert card.data.license == "mit"
    assert card.data.library_name == "transformers"
    assert [(result.metric_name, result.metric_value) for result in card.data.eval_results] == [
        ("Held-out MLM loss", 4.5),
        ("Held-out MLM loss, [MASK] positions only", 4.75),
    ]


def test_text_holds_what_was_done(export):
    text = write_model_card(export, summary=SUMMARY, config=RunConfig().to_dict()).read_text()
    for fact in (
        "1.2 M parameters",
        "2.9 M tokens, 2.5 PFLOP",
        "3:05 min on 2 rank(s) with ZeRO stage 2",
        "5.930 after",
    ):
        assert fact in text
    assert "2 → 4 layers by `stack`, optimizer state `reset`, in 0.4 s" in text
    assert "peak learning rate 0.002, schedule `wsd`" in text
    assert "No licence has been chosen" in text
    assert "trust_remote_code" not in text


def test_the_code_in_the_card_loads_the_model(export):
    text = write_model_card(export, summary=SUMMARY, config=RunConfig().to_dict()).read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("path/to/this/folder", str(export))
    lines = [line for line in code.splitlines() if not line.startswith("tokenizer")]
    scope = {}
    exec("\n".join(lines), scope)
    assert scope["model"].config.num_hidden_layers == 4


def test_own_modelling_code_is_announced(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForMaskedLM": "modeling.Macaron"}})
    )
    summary = SUMMARY | {"growths": [], "eval_loss_masked": None}
    text = write_model_card(export, summary=summary, config=RunConfig().to_dict()).read_text()
    assert "trust_remote_code=True" in text
    assert "The model was not grown." in text


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        write_model_card(tmp_path, summary=SUMMARY, config=RunConfig().to_dict())


def test_a_model_that_was_not_grown_is_no_stacked_one(export):
    grown = write_model_card(export, summary=SUMMARY, config=RunConfig().to_dict()).read_text()
    text = write_model_card(export, summary=SUMMARY | {"growths": []}, config=RunConfig().to_dict()).read_text()
    assert (
        "modelling with progressive stacking (Gong et al." in grown
        and "its blocks are copied" in grown
        and "- progressive-stacking" in grown
    )
    assert "stacking" not in text and "at one depth from the first step to the last." in text


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([0, 1, None, None], "with growth in depth: a shallow model is trained first, new blocks are added"),
        ([0, 1, 1, None], "with growth in depth: a shallow model is trained first, blocks are copied and new ones"),
    ],
)
def test_blocks_that_are_new_are_no_copies(export, layers, words):
    (growth,) = SUMMARY["growths"]
    summary = SUMMARY | {"growths": [growth | {"operator": "fresh", "layer_map": layers}]}
    text = write_model_card(export, summary=summary, config=RunConfig().to_dict()).read_text()
    assert words in text and "Gong" not in text


def test_rates_are_those_of_the_stages(export):
    stages = [StageConfig(layers=2, steps=5, lr=8e-4, lr_end=3e-4), StageConfig(layers=4, steps=5)]
    config = RunConfig(stages=stages).to_dict()
    text = write_model_card(export, summary=SUMMARY, config=config).read_text()
    assert "by stage: 2 layers 0.0008 falling to 0.0003; 4 layers peak learning rate 0.002, schedule `wsd`" in text

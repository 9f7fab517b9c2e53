"""The closing words say what the figures say, whichever lines a model has passed."""

import pytest

from ds_stacking.reports.closing import verdict


@pytest.mark.parametrize(
    ("model", "shuffled", "words"),
    [
        (6.3, 6.3, ("passed neither line", "cost it nothing")),
        (6.2, 6.3, ("passed the unigram line and not the cache line", "cost it 0.100 nats more")),
        (6.0, 6.4, ("passed the unigram line and not the cache line", "cost it 0.400 nats more")),
        (5.3, 6.3, ("passed both lines", "has read its context", "cost it 1.000 nats more")),
    ],
)
def test_the_words_are_true(model: float, shuffled: float, words: tuple[str, ...]) -> None:
    figures = {"eval_loss_masked": model, "eval_loss_shuffled": shuffled}
    text = verdict({**figures, "unigram_cross_entropy": 6.25, "cache_loss": 6.0})
    assert all(word in text for word in words), text
    assert verdict({**figures, "unigram_entropy": 6.1}) == "", "an older run has no lines"


def test_a_cache_line_above_the_unigram_line() -> None:
    figures = {"eval_loss_masked": 6.3, "eval_loss_shuffled": 6.4, "unigram_cross_entropy": 6.25, "cache_loss": 6.35}
    assert "and not that one" in verdict(figures)

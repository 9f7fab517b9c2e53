"""GLUE's metrics beside their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from ds_stacking.studies.glue.metrics import evaluate


def test_classes_beside_the_formulas() -> None:
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    tp, tn = ((labels == 1) & (guesses == 1)).sum(), ((labels == 0) & (guesses == 0)).sum()
    fp, fn = ((labels == 0) & (guesses == 1)).sum(), ((labels == 1) & (guesses == 0)).sum()
    values = evaluate(("accuracy", "f1", "matthews"), labels.tolist(), guesses)
    assert values["accuracy"] == pytest.approx(100 * (tp + tn) / 200)
    assert values["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert values["matthews"] == pytest.approx(100 * (tp * tn - fp * fn) / root)


def test_scores_beside_the_formulas() -> None:
    rng = np.random.default_rng(1)
    labels = rng.permutation(50) / 10
    guesses = labels**3 + rng.normal(0, 5, 50)
    values = evaluate(("pearson", "spearman"), labels.tolist(), guesses)
    assert values["pearson"] == pytest.approx(100 * np.corrcoef(labels, guesses)[0, 1])
    ranks = [np.argsort(np.argsort(x)) for x in (labels, guesses)]
    assert values["spearman"] == pytest.approx(100 * np.corrcoef(*ranks)[0, 1])


def test_a_constant_answer_is_worth_nothing() -> None:
    assert evaluate(("pearson", "spearman"), [1, 2, 3], np.ones(3)) == {"pearson": 0, "spearman": 0}
    assert evaluate(("matthews", "f1"), [1, 0, 1], np.zeros(3, int)) == {"matthews": 0, "f1": 0}

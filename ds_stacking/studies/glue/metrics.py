"""GLUE's metrics, by scikit-learn and SciPy, in percent."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Metric = Callable[[np.ndarray, np.ndarray], float]


def _correlation(statistic: Callable) -> Metric:
    """A correlation that is 0 where one side is constant, as a model that learned nothing makes it."""

    def compute(labels: np.ndarray, predictions: np.ndarray) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            value = statistic(labels, predictions).statistic
        return float(np.nan_to_num(value))

    return compute


METRICS: dict[str, Metric] = {
    "accuracy": accuracy_score,
    "f1": lambda labels, predictions: f1_score(labels, predictions, zero_division=0.0),
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
"""(labels [N], predictions [N]) -> value from -1 or 0 to 1; F1 is that of class 1."""


def evaluate(metrics: Sequence[str], labels: Sequence[float], predictions: np.ndarray) -> dict[str, float]:
    """Each metric in percent."""
    return {name: 100 * float(METRICS[name](np.asarray(labels), predictions)) for name in metrics}

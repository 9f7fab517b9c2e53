"""Baselines beside a fine-tuned model: words and a linear model, without word order or pre-training.

Two kinds. Plain: counts of words. Weighted: which words stand in a text, each times its log-count ratio under naive
Bayes, as in section 2 of Wang and Manning (2012, Baselines and Bigrams); here with a logistic regression in place of
their support vector machine, and without their interpolation of its weights. N examples, W words, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from ds_stacking.studies.glue.choice import HELD_OUT, Choice, best_setting, hold_out, mean_score
from ds_stacking.studies.glue.metrics import evaluate
from ds_stacking.studies.glue.task_data import Examples, TaskData
from ds_stacking.studies.glue.tasks import Task

WORD = r"[\w']+|[^\w\s']"
"""A word, its apostrophe included, or a sign: `n't` and `!` decide about a sentiment."""
LONGEST_NGRAMS = (1, 2)
"""Words alone, or pairs of neighbours too."""
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse strength of the quadratic penalty, scikit-learn's C; 1 / alpha of a ridge regression."""
SMOOTHING = 1.0
"""What is added to every count before its logarithm."""
Predict = Callable[[Examples], np.ndarray]


def train_baseline(
    task: Task, data: TaskData, share: float, *, weighted: bool
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]], Choice]:
    """Scores of the development sets and of test sets with labels, and the choice that was made before.

    N-grams and penalty are chosen on `share` of the training set. A task on scores gets a ridge regression on counts.
    """
    parts = hold_out(data, share)
    settings = list(itertools.product(LONGEST_NGRAMS, STRENGTHS))
    tried = {setting: mean_score(_scores(task, fit(task, parts.train, *setting, weighted), parts.dev))
             for setting in settings}  # fmt: skip
    chosen = best_setting(tried)
    assert chosen is not None, "a linear model does not diverge"
    predict = fit(task, data.train, *chosen, weighted)
    choice = Choice(
        task=task.name,
        arm="naive_bayes" if weighted else "bag_of_words",
        setting=_named(chosen),
        examples=len(parts.dev[HELD_OUT]),
        seeds=1,
        scores=[(_named(setting), score) for setting, score in tried.items()],
    )
    labelled = {name: split for name, split in data.test.items() if split.labels}
    return _scores(task, predict, data.dev), _scores(task, predict, labelled), choice


def fit(task: Task, train: Examples, ngrams: int, strength: float, weighted: bool) -> Predict:
    """Fit a linear model on the words of `train`; the two sentences of a pair have words of their own."""
    counters = [CountVectorizer(ngram_range=(1, ngrams), token_pattern=WORD).fit(column) for column in train.texts]
    words, labels = _count(counters, train), np.asarray(train.labels)
    if task.regression:
        ridge = Ridge(alpha=1 / strength).fit(words, labels)
        return lambda split: ridge.predict(_count(counters, split))
    if not weighted:
        plain = LogisticRegression(C=strength, max_iter=2000).fit(words, labels)
        return lambda split: plain.predict(_count(counters, split))
    classes = np.unique(labels)
    present = (words > 0).astype(float)
    # Of two classes one is enough: the ratios of the other are the same with the other sign.
    against = classes[1:] if len(classes) == 2 else classes
    ratios = [log_count_ratios(present, labels == one) for one in against]
    models = [
        LogisticRegression(C=strength, max_iter=2000).fit(present.multiply(ratio).tocsr(), labels == one)
        for one, ratio in zip(against, ratios, strict=True)
    ]

    def predict(split: Examples) -> np.ndarray:
        found = (_count(counters, split) > 0).astype(float)
        sides = [model.decision_function(found.multiply(ratio).tocsr())
                 for model, ratio in zip(models, ratios, strict=True)]  # fmt: skip
        if len(sides) == 1:
            return np.where(sides[0] > 0, classes[1], classes[0])
        return classes[np.argmax(sides, axis=0)]

    return predict


def log_count_ratios(present: csr_matrix, positive: np.ndarray) -> np.ndarray:
    """log of a word's share in the texts of a class over its share in the others, [N, W], bool [N] -> [W]."""
    inside = SMOOTHING + np.asarray(present[positive].sum(axis=0)).ravel()
    outside = SMOOTHING + np.asarray(present[~positive].sum(axis=0)).ravel()
    return np.log(inside / inside.sum()) - np.log(outside / outside.sum())


def _scores(task: Task, predict: Predict, splits: dict[str, Examples]) -> dict[str, dict[str, float]]:
    return {name: evaluate(task.metrics, split.labels, predict(split)) for name, split in splits.items()}


def _named(setting: tuple[int, float]) -> dict[str, float]:
    return {"ngrams": setting[0], "strength": setting[1]}


def _count(counters: list[CountVectorizer], split: Examples) -> csr_matrix:
    return hstack([counter.transform(texts) for counter, texts in zip(counters, split.texts, strict=True)]).tocsr()

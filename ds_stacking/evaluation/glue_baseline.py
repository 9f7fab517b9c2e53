"""The baseline beside a fine-tuned model: word counts and a linear model, without word order or pre-training."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from ds_stacking.evaluation.glue_data import Examples, TaskData
from ds_stacking.evaluation.glue_metrics import evaluate
from ds_stacking.evaluation.glue_tasks import Task


def bag_of_words(task: Task, data: TaskData) -> dict[str, dict[str, float]]:
    """Development set -> metric -> percent, of a logistic regression (for scores a ridge regression) on word counts.

    The two sentences of a pair have counts of their own. scikit-learn's defaults, but for iterations enough to end.
    """
    counters = [CountVectorizer().fit(column) for column in data.train.texts]
    model = Ridge() if task.regression else LogisticRegression(max_iter=2000)
    model.fit(_count(counters, data.train), np.asarray(data.train.labels))
    return {
        name: evaluate(task.metrics, split.labels, model.predict(_count(counters, split)))
        for name, split in data.dev.items()
    }


def _count(counters: list[CountVectorizer], split: Examples) -> csr_matrix:
    return hstack([counter.transform(texts) for counter, texts in zip(counters, split.texts, strict=True)]).tocsr()

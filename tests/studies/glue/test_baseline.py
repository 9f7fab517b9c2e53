"""The baselines on words, beside the same computed here in a few lines of numpy and scikit-learn."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression, Ridge

from ds_stacking.studies.glue.baseline import LONGEST_NGRAMS, STRENGTHS, fit, log_count_ratios, train_baseline
from ds_stacking.studies.glue.choice import held_out_mask
from ds_stacking.studies.glue.task_data import Examples, TaskData, load_task
from ds_stacking.studies.glue.tasks import TASKS
from tests.studies.glue.glue_files import write_task


def made_up(classes: int, count: int, seed: int) -> Examples:
    """Texts whose words tell the class a little."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    words = [[f"w{word}" for word in rng.zipf(1.6, 12) % 30 + label * rng.integers(0, 2, 12)] for label in labels]
    signs = ["n't !", "' s ;"]
    return Examples(texts=([f"{' '.join(line)} {signs[len(line[0]) % 2]}" for line in words],), labels=labels.tolist())


def counts(texts: list[str], vocabulary: list[str], ngrams: int) -> np.ndarray:
    """[N, W], by hand."""
    rows = []
    for text in texts:
        words = re.findall(r"[\w']+|[^\w\s']", text.lower())
        found = words + ([f"{a} {b}" for a, b in zip(words, words[1:], strict=False)] if ngrams == 2 else [])
        rows.append([found.count(entry) for entry in vocabulary])
    return np.array(rows, float)


def vocabulary(texts: list[str], ngrams: int) -> list[str]:
    lines = [re.findall(r"[\w']+|[^\w\s']", text.lower()) for text in texts]
    words = {word for line in lines for word in line}
    pairs = {f"{a} {b}" for line in lines for a, b in zip(line, line[1:], strict=False)} if ngrams == 2 else set()
    return sorted(words | pairs)


@pytest.mark.parametrize("ngrams", [1, 2])
@pytest.mark.parametrize("classes", [2, 3])
def test_naive_bayes_weights_are_those_of_wang_and_manning(classes: int, ngrams: int) -> None:
    train, other = made_up(classes, 200, 0), made_up(classes, 100, 1)
    names, labels = vocabulary(train.texts[0], ngrams), np.array(train.labels)
    seen, unseen = (counts(split.texts[0], names, ngrams).clip(max=1) for split in (train, other))
    sides = []
    for one in range(classes):
        p = 1 + sum(row for row, label in zip(seen, labels, strict=True) if label == one)
        q = 1 + sum(row for row, label in zip(seen, labels, strict=True) if label != one)
        ratio = np.log((p / np.abs(p).sum()) / (q / np.abs(q).sum()))
        assert log_count_ratios(csr_matrix(seen), labels == one) == pytest.approx(ratio)
        model = LogisticRegression(C=0.5, max_iter=2000).fit(seen * ratio, labels == one)
        sides.append((unseen * ratio) @ model.coef_[0] + model.intercept_[0])
    task = TASKS["MNLI" if classes == 3 else "SST-2"]
    found = fit(task, train, ngrams, 0.5, True)(other)
    expected = np.argmax(sides, axis=0)
    assert (found == expected).mean() >= 0.99 and len(set(found)) == classes  # a tie within the solver's tolerance


@pytest.mark.parametrize("name", ["SST-2", "STS-B"])
def test_plain_counts_are_those_of_scikit_learn(name: str) -> None:
    train, other = made_up(2, 200, 0), made_up(2, 100, 1)
    if name == "STS-B":
        train, other = (Examples(texts=split.texts * 2, labels=split.labels) for split in (train, other))
    names = vocabulary(train.texts[0], 1)
    seen, unseen = (np.hstack([counts(column, names, 1) for column in split.texts]) for split in (train, other))
    model = Ridge(alpha=2) if name == "STS-B" else LogisticRegression(C=0.5, max_iter=2000)
    expected = model.fit(seen, train.labels).predict(unseen)
    found = fit(TASKS[name], train, 1, 0.5, False)(other)
    assert found == pytest.approx(expected, abs=0.01)  # the solver of sparse counts stops a little earlier


@pytest.mark.parametrize("weighted", [False, True])
def test_ngrams_and_penalty_are_chosen_on_the_training_set(weighted: bool) -> None:
    task, train, dev = TASKS["SST-2"], made_up(2, 400, 0), made_up(2, 300, 1)
    part = held_out_mask(train.labels, 0.5)
    rest, chosen_on = (
        Examples(texts=([train.texts[0][i] for i in rows],), labels=[train.labels[i] for i in rows])
        for rows in (np.flatnonzero(~part), np.flatnonzero(part))
    )
    right = {
        (ngrams, strength): 100 * np.mean(fit(task, rest, ngrams, strength, weighted)(chosen_on) == chosen_on.labels)
        for ngrams in LONGEST_NGRAMS
        for strength in STRENGTHS
    }
    assert len(set(right.values())) > 2, "there is something to choose"
    flipped = Examples(texts=dev.texts, labels=[1 - label for label in dev.labels])
    data = [TaskData(train=train, dev={"dev": one}, test={"SST-2": dev}, notes=[]) for one in (dev, flipped)]
    (scores, tested, choice), (opposite, _, same) = (train_baseline(task, one, 0.5, weighted=weighted) for one in data)
    assert choice == same, "the development set has no say"
    ngrams, strength = max(right, key=lambda setting: right[setting])
    assert choice["setting"] == {"ngrams": ngrams, "strength": strength} and choice["examples"] == 200
    assert [score for _, score in choice["scores"]] == pytest.approx(list(right.values()))
    final = 100 * np.mean(fit(task, train, ngrams, strength, weighted)(dev) == dev.labels)
    assert scores["dev"]["accuracy"] == pytest.approx(final) == tested["SST-2"]["accuracy"]
    assert opposite["dev"]["accuracy"] == pytest.approx(100 - final)


@pytest.mark.parametrize(("name", "metric"), [("SST-2", "accuracy"), ("RTE", "accuracy"), ("STS-B", "pearson")])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_telling_word_is_found(tmp_path: Path, name: str, metric: str, weighted: bool) -> None:
    write_task(tmp_path, name)
    scores, tested, _ = train_baseline(TASKS[name], load_task(TASKS[name], str(tmp_path)), 0.1, weighted=weighted)
    assert scores["dev"][metric] > 95 and tested == {}

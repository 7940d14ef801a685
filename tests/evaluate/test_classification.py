"""Numbers of a classifier: scikit-learn's, with ties, classes that have no clip, a single clip."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from equiav.evaluate.classification import (
    accuracies,
    accuracy,
    area_under_curve,
    average_precision,
    interval,
    mean_average_precision,
    results,
)


@pytest.mark.parametrize("seed", range(30))
def test_they_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(2, 60)), 7
    right = rng.random((n, classes)) < rng.random(classes)
    scores = rng.random((n, classes))
    if seed % 2:
        scores = scores.round(1)  # ties
    if seed % 5 == 0:
        scores[:] = 0.5
    for k in range(classes):
        a, s = right[:, k], scores[:, k]
        if a.any():
            assert average_precision(a, s) == pytest.approx(average_precision_score(a, s), abs=1e-12)
        else:
            assert np.isnan(average_precision(a, s))
        if a.any() and not a.all():
            assert area_under_curve(a, s) == pytest.approx(roc_auc_score(a, s), abs=1e-12)
        else:
            assert np.isnan(area_under_curve(a, s))
    kept = right.any(axis=0)
    if kept.any():
        assert mean_average_precision(right, scores) == pytest.approx(
            average_precision_score(right[:, kept], scores[:, kept], average="macro")
        )


def test_one_clip():
    right, scores = np.array([[True, False]]), np.array([[0.9, 0.1]])
    said = results(right, scores, ["a", "b"])
    assert (said["accuracy"], said["mAP"], said["classes without a clip"]) == (1.0, 1.0, ["b"])
    assert said["accuracy 95%"] == [1.0, 1.0]
    assert accuracy(right, scores[:, ::-1]) == 0.0


def test_an_interval_holds_what_it_is_to_hold():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        hit = rng.random(200) < 0.7
        right = np.stack([hit, ~hit], axis=1)
        scores = np.tile([0.9, 0.1], (200, 1))
        low, high = interval(accuracies, right, scores)
        inside += low <= 0.7 <= high
    assert inside >= 52

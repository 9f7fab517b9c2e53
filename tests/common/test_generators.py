"""Every generator goes on as if nothing had happened."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from ds_stacking.common.generators import capture_generators, restore_generators


def draw() -> list:
    return [
        [random.random(), random.gauss(0, 1), random.getrandbits(70)],
        np.random.rand(3).tolist() + np.random.randn(3).tolist(),
        torch.rand(5).tolist() + torch.randn(37).tolist() + torch.randperm(9).tolist(),
    ]


def test_all_generators_repeat_to_the_bit() -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.gauss(0, 1), np.random.randn(), torch.randn(3)  # half of a pair of normal numbers is left in each
    saved = json.dumps(capture_generators())
    expected = draw()
    assert draw() != expected
    restore_generators(json.loads(saved))
    assert json.dumps(capture_generators()) == saved
    assert draw() == expected


def test_capturing_draws_nothing() -> None:
    before = capture_generators()
    assert capture_generators() == before

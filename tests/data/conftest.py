"""Shared material of the data tests: small real text and synthetic token files."""

import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ds_stacking.data.sources.documentation import docstrings
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import SpecialIds


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Documentation of 40 modules of the standard library, some 150 kB of prose."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = ("\n\n".join(docstrings(path)) for path in paths)
    return [text for text in texts if len(text) > 500][:40]


@pytest.fixture(scope="session")
def special() -> SpecialIds:
    return SpecialIds(pad=0, cls=2, sep=3, mask=4, all_ids=(0, 1, 2, 3, 4))


@pytest.fixture(scope="session")
def make_split(special: SpecialIds) -> Callable[..., Split]:
    """Return a maker of splits of random ordinary tokens with a [SEP] every so many tokens."""

    def make(length: int, vocab_size: int = 1000, document_length: int = 50) -> Split:
        tokens = np.random.default_rng(0).integers(5, vocab_size, length).astype(np.uint16)
        tokens[document_length - 1 :: document_length] = special.sep
        return Split(files=[TokenFile(tokens=tokens, offsets=np.array([0, length]))])

    return make

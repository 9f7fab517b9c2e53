"""What the kernel tests share: the interpreter with poisoned outputs, and comparison with fp64 references."""

import contextlib

import pytest
import torch

from ds_stacking.kernels.interpreter import interpreted


@pytest.fixture
def kernels():
    """A context manager: kernels run in the interpreter, and whatever they fail to write stays NaN."""

    @contextlib.contextmanager
    def run(**blocks):
        torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
        try:
            with interpreted(**blocks):
                yield
        finally:
            torch.use_deterministic_algorithms(False)

    return run


@pytest.fixture
def assert_close():
    """Compare with an fp64 reference: largest error relative to the largest element."""

    def compare(actual, expected, dtype=torch.float32, factor=1.0):
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * factor
        for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
            assert got.shape == want.shape
            error = (got.double() - want.double()).abs().max() if want.numel() else torch.zeros(())
            assert error <= tolerance * want.abs().max().clamp(min=1e-3), f"tensor {index}: error {error:.2e}"

    return compare


@pytest.fixture(autouse=True)
def seeded():
    """Same random numbers in every run."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A kernel test that is skipped proves nothing: it fails."""
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"{item.name} was skipped; kernel tests run everywhere."
    return report

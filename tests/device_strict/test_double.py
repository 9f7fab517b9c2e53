"""The double refuses what CUDA and NCCL refuse, and lets pass what they let pass."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.device_strict.double import Refused, strict_device
from tests.ranks import run_ranks

CUDA = torch.device("cuda", 0)


def on_device(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device=CUDA)


REFUSED: dict[str, Callable[[], object]] = {
    "add": lambda: on_device(3) + torch.ones(3),
    "add in place": lambda: torch.ones(3).add_(on_device(3)),
    "matrix product": lambda: torch.nn.functional.linear(on_device(2, 3), torch.ones(4, 3)),
    "cat with an empty host tensor": lambda: torch.cat([on_device(3), torch.empty(0)]),
    "stack of scalars": lambda: torch.stack([on_device(1).sum(), torch.tensor(1.0)]),
    "equal": lambda: torch.equal(on_device(3), torch.ones(3)),
    "scalar of the host in place": lambda: torch.tensor(1.0).add_(on_device(1).sum()),
    "scalar of the device": lambda: torch.ones(3) * on_device(1).sum(),
    "numpy": lambda: on_device(3).numpy(),
    "numpy, through a view": lambda: np.asarray(on_device(3)[1:].view(-1)),
    "index on the device": lambda: torch.ones(3)[torch.tensor([1], device=CUDA)],
    "gather": lambda: on_device(3).gather(0, torch.tensor([1])),
    "default device": lambda: on_device(3) + torch.zeros_like(on_device(3), device="cpu"),
    "another device": lambda: on_device(3) + torch.ones(3, device="cuda:1"),
    "pin a device tensor": lambda: on_device(3).pin_memory(),
    "pinned memory on the device": lambda: torch.empty(3, device=CUDA, pin_memory=True),
    "pinned memory like a device tensor": lambda: torch.empty_like(on_device(3), pin_memory=True),
    "gradient on the host": lambda: setattr(on_device(3).requires_grad_(), "grad", torch.ones(3)),
    "fused AdamW with a step on the host": lambda: adamw(torch.tensor(0.0)),
    "backward": lambda: (on_device(3).requires_grad_() * 2).backward(torch.ones(3)),
}
ALLOWED: dict[str, Callable[[], object]] = {
    "copy": lambda: torch.empty(3).copy_(on_device(3)),
    "to": lambda: on_device(3).cpu() + torch.ones(3),
    "to like": lambda: torch.ones(3).to(on_device(1)) + on_device(3),
    "scalar of the host": lambda: on_device(3) * torch.tensor(2.0),
    "index on the host": lambda: on_device(3)[torch.tensor([1])],
    "mask on the host": lambda: on_device(3).__setitem__(torch.tensor([True, False, True]), 2.0),
    "factories": lambda: on_device(3) + torch.tensor([1.0, 2, 3], device="cuda") + torch.arange(3, device=CUDA),
    "new": lambda: on_device(3) + on_device(1).new_tensor([1.0, 2, 3]) + on_device(1).new_empty(3),
    "data": lambda: assign_data() + on_device(3),
    "fused AdamW": lambda: adamw(torch.tensor(0.0, device=CUDA)),
    "pin": lambda: torch.ones(3).pin_memory().numpy(),
    "module": lambda: torch.nn.Linear(3, 2).to(CUDA)(on_device(4, 3)).sum().backward(),
    "meta": lambda: torch.empty(3, device="meta") + on_device(3).to("meta"),
}


def assign_data() -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.data = on_device(6)[3:]
    assert parameter.is_cuda and parameter.device == CUDA and parameter.data_ptr() % 4 == 0
    return parameter


def adamw(step: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(on_device(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    optimizer.state[parameter] = {"step": step, **moments}
    parameter.grad = on_device(3)
    optimizer.step()


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_gpu_refuses_is_refused(case: str) -> None:
    with strict_device(0), pytest.raises(Refused):
        REFUSED[case]()


@pytest.mark.parametrize("case", ALLOWED)
def test_what_a_gpu_allows_is_allowed(case: str) -> None:
    with strict_device(0):
        ALLOWED[case]()


def test_waits_of_the_host_are_counted() -> None:
    with strict_device(0) as gpu:
        values = on_device(3)
        pinned = torch.ones(3).pin_memory()
        values.copy_(pinned, non_blocking=True)
        pinned.to(CUDA, non_blocking=True)
        assert gpu.waits == []
        float(values.sum())
        values.cpu()
        values.copy_(torch.ones(3), non_blocking=True)
        torch.ones(3).to(CUDA, non_blocking=True)
        assert len(gpu.waits) == 4


def test_a_thread_begins_with_the_first_device() -> None:
    found = []
    with strict_device(3):
        thread = threading.Thread(target=lambda: found.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        assert [torch.cuda.current_device(), *found] == [3, 0]


def test_nothing_of_it_stays() -> None:
    with strict_device(0):
        kept = on_device(3)
    assert kept.device.type == "cpu" and not torch.cuda.is_available()
    assert torch.equal(kept + torch.ones(3), torch.full((3,), 2.0))


def collectives(rank_of: int = 0) -> dict[str, bool]:
    """Which collectives were refused on this rank."""
    rank = dist.get_rank()
    refused = {}
    with strict_device(rank):
        device = torch.device("cuda", rank)
        here, there = torch.ones(4, device=device), torch.ones(4)
        cases = {
            "device": lambda: dist.all_reduce(here),
            "host": lambda: dist.all_reduce(there),
            "gather into host": lambda: dist.all_gather([torch.empty(4), torch.empty(4)], here),
            "all to all": lambda: dist.all_to_all_single(torch.empty_like(here), here),
            "all to all of the host": lambda: dist.all_to_all_single(there.clone(), there),
            "int16": lambda: dist.all_reduce(here.to(torch.int16)),
            "strided": lambda: dist.all_reduce(torch.ones(4, 4, device=device).t()[1:]),
            "GPU 0 from everywhere": lambda: here + torch.ones(4, device="cuda:0"),
        }
        for name, case in cases.items():
            try:
                case()
                refused[name] = False
            except Refused:
                refused[name] = True
    return refused


@pytest.mark.distributed
def test_collectives_take_tensors_of_the_device_only() -> None:
    first, second = run_ranks(2, collectives)
    allowed = {"device", "all to all"}
    assert {name for name, refused in second.items() if not refused} == allowed
    assert {name for name, refused in first.items() if not refused} == {*allowed, "GPU 0 from everywhere"}

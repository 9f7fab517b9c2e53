"""The host of a rank: threads shared with its neighbours, and freed memory kept."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch

from ds_stacking.common.environment import local_world_size


def limit_threads() -> None:
    """Share the cores between the ranks of a node, unless the user said how many threads each gets."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, which takes the same sizes again.

    By default large buffers go back to the kernel, which clears every page anew; on a CPU that costs a step a tenth
    and more of its time. Elsewhere than on glibc there is no mallopt, and nothing happens.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 32 << 20)  # the largest that it takes
        libc.mallopt(trim_threshold, 1 << 30)

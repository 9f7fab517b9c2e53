"""Training steps in a ZeRO engine: our Bert beside transformers' BertForMaskedLM, same weights, same process.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --padded --fused --length 128
    python -m benchmarks.throughput --contenders ours bare --layers 8 --accumulation 16

Prints one JSON line: per depth the real tokens/s of every contender (medians over interleaved optimizer steps), MFU
where the GPU's peak is known, peak memory on a GPU, and how often ours is faster. Contenders: ours, bare (a
plain PyTorch loop around our model), ours fp8, bare fp8 (blocks that multiply in 8 bits), peer, peer bare, each also
with "compiled" behind it. On a CPU the size is the quickstart's and one thread computes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from benchmarks.contenders import NAMES, Case, device, make_contender
from ds_stacking.config import ModelConfig
from ds_stacking.models.flops import training_flops
from ds_stacking.planning.gpus import gpu_spec_of

WARM_UP = 2


def compare(
    case: Case, contenders: Sequence[str], repeats: int, say: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """Time all in turn; one that cannot run is named with its reason. Without dropout their first losses have to
    agree, and their last ones, which know all gradients. Raises RuntimeError where they do not.

    Each one's peak memory is taken over its own steps and counts from what the process holds beside it. `say` is told
    who runs.
    """
    found: dict[str, Any] = {}
    running = {}
    for name in contenders:
        say(name)
        try:
            before = _allocated()
            running[name] = make_contender(name, case)
            loss = running[name].step().item()
            found[name] = {"loss": loss, "bytes": _peak() - before}
        except Exception as error:  # one's failure must not cost the others
            found[name] = {"absent": f"{type(error).__name__}: {str(error)[:150]}"}
            running.pop(name, None)
    _agree(case, found, "loss")
    say("timing")
    times: dict[str, list[float]] = {name: [] for name in running}
    for repeat in range(repeats + WARM_UP):
        for name, contender in running.items():
            start = time.perf_counter()
            found[name]["last_loss"] = contender.step().item()  # the host waits for the device here
            if repeat >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    for contender in running.values():
        contender.close()
    _agree(case, found, "last_loss")
    for name in running:
        found[name] |= _figures(case, statistics.median(times[name]))
    ours = found.get("ours", {}).get("seconds")
    for name in running:
        if ours and name != "ours":
            found[name]["ours_is_faster"] = round(found[name]["seconds"] / ours, 3)
    return found


def _agree(case: Case, found: dict[str, Any], which: str) -> None:
    """Raise RuntimeError unless, without dropout, all contenders have the same loss but for rounding."""
    losses = [entry[which] for entry in found.values() if which in entry]
    if losses and not case.model.dropout and not max(losses) - min(losses) < (2e-2 if case.bf16 else 1e-3) * losses[0]:
        raise RuntimeError(f"contenders differ in their {which.replace('_', ' ')}: {found}")


def _figures(case: Case, seconds: float) -> dict[str, float]:
    figures = {"seconds": seconds, "tokens_per_second": round(case.tokens / seconds)}
    gpu = gpu_spec_of(torch.cuda.get_device_name()) if device().type == "cuda" else None
    if gpu:
        masked = case.predicted
        pairs = float(case.lengths.double().square().sum()) * case.accumulation
        flops = training_flops(
            case.model,
            case.layers,
            sequences=case.tokens / case.length,
            length=case.length,
            masked=masked,
            pairs=pairs,
            masked_pairs=pairs * masked / case.tokens,
        )
        figures["mfu"] = round(flops / seconds / gpu.bf16, 4)
    return figures


def _allocated() -> int:
    if device().type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else 0


def main() -> None:
    from ds_stacking.engine.factory import init_distributed
    from ds_stacking.engine.host import keep_freed_memory

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=["ours", "peer"], choices=NAMES)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fused", action="store_true", help="our kernels, on a CPU their references")
    parser.add_argument("--padded", action="store_true", help="documents of random lengths: padded there, packed here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # for all contenders, as pretrain.py does
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed speaks there; one JSON line is promised
        init_distributed()
        model = ModelConfig(
            hidden_size=options.hidden_size,
            num_heads=options.hidden_size // 64,
            vocab_size=options.vocab_size,
            norm="post",
            dropout=options.dropout,
            attention_dropout=options.dropout,
            max_positions=options.length,
        )
        shared = {name: getattr(options, name) for name in ("sequences", "length", "accumulation", "zero_stage")}
        shared |= {name: getattr(options, name) for name in ("bf16", "fused", "padded")}
        layers = {
            str(layers): compare(Case(model=model, layers=layers, **shared), options.contenders, options.repeats)
            for layers in options.layers
        }
    result = {
        "benchmark": "throughput",
        **vars(options),
        "layers": layers,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if device().type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, 1 thread",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

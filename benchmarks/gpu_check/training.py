"""Growth of BERT-base between engines, resume to the bit, and the comparison of stacking at 12 layers, on one GPU.

What is too large for the results stays on the machine, in $WORK or a temporary folder. Of the comparison the finished
runs' small files travel with the results as comparison.tar.gz, so that another machine goes on there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.catalogue import Machine, Row

LAUNCHERS = Path(__file__).parents[2] / "launchers"
NEEDS = ("deepspeed", "pydantic", "zstandard")
DEPTHS = (3, 6, 12)


def rows() -> list[Row]:
    """In order of worth."""
    growth = [
        Row(name=f"growth: ZeRO {stage}", seconds=25, part="growth", run=_growth(stage), needs=NEEDS)
        for stage in (2, 1, 3, 0)
    ]
    resumes = [
        Row(name=f"resume: ZeRO {stage}", seconds=60, part="resume", run=_resume(stage), needs=NEEDS)
        for stage in (2, 3)
    ]
    comparison = Row(
        name="comparison", seconds=420, part="comparison", run=compare_depths, needs=NEEDS, takes_the_rest=True
    )
    return [*growth, *resumes, comparison]


def work() -> Path:
    """Where runs are."""
    return Path(os.environ.get("WORK", Path(tempfile.gettempdir()) / "gpu-session"))


def _growth(stage: int) -> Callable[[Machine], dict[str, Any]]:
    def run(at: Machine) -> dict[str, Any]:
        import torch

        from benchmarks.growth import free
        from ds_stacking.engine.factory import init_distributed

        if not torch.distributed.is_initialized():
            init_distributed(alone=True)
        free(_grow(stage, small=True)[0].engine)  # what loads and connects at first use is in nobody's figures
        manager, growths = _grow(stage, small=at.dry)
        free(manager.engine)
        return {"growths": growths}

    return run


def _grow(stage: int, *, small: bool) -> tuple[Any, list[dict[str, Any]]]:
    """3 -> 6 -> 12 layers of BERT-base's width under a ZeRO stage."""
    from benchmarks.growth import peak_memory, reset_peak_memory, start
    from ds_stacking.engine.factory import EngineSpec

    manager, growths = start(stage, argparse.Namespace(small=small), layers=DEPTHS[0]), []
    for layers in DEPTHS[1:]:
        before = state(manager.engine)
        reset_peak_memory()
        record = manager.grow(EngineSpec(layers=layers, micro_batch_size=1))
        peak = peak_memory()
        phases = {name: round(seconds, 4) for name, seconds in record.seconds_by_phase.items()}
        growths.append(
            {
                "from": record.from_layers, "to": layers, "total": record.seconds, "phases": phases,
                "seconds": record.seconds - record.seconds_by_phase["build"], "peak_bytes": peak,
                "bytes_moved": record.bytes_moved, "exact": same(stacked(before, record.from_layers, layers),
                                                                  state(manager.engine)),
            }
        )  # fmt: skip
    return manager, growths


def state(engine: Any) -> dict[str, Any]:
    """Copies of masters and moments by (parameter, kind), of 16-bit weights where they are whole, and step counts."""
    from ds_stacking.engine.zero_state import LiveState
    from ds_stacking.growth.state import KINDS

    live = LiveState(engine)
    found: dict[str, Any] = {}
    for piece in live.slices():  # one rank holds each parameter in one piece
        for kind in KINDS:
            found[f"{piece.name} {kind}"] = live.read(piece, kind).detach().flatten().cpu().clone()
    for name, steps in live.steps().items():
        found[f"{name} step"] = steps
    for name, parameter in engine.module.named_parameters():
        if parameter.numel():  # ZeRO-3 frees them
            found[f"{name} weight"] = parameter.detach().flatten().cpu().clone()
    return found


def stacked(before: dict[str, Any], small: int, large: int) -> dict[str, Any]:
    """The growth written out: block i of the grown model is block i modulo the old depth."""
    found = {}
    for name, value in before.items():
        if not name.startswith("blocks."):
            found[name] = value
            continue
        _, index, rest = name.split(".", 2)
        found |= {f"blocks.{copy}.{rest}": value for copy in range(int(index), large, small)}
    return found


def same(wanted: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether both hold the same names and values, to the bit."""
    import torch

    return wanted.keys() == found.keys() and all(
        torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name]
        for name, value in wanted.items()
    )


def _options(stage: int, folder: Path, dry: bool) -> list[str]:
    """A small run with dropout that saves often: seconds on a GPU, and long enough to be killed in its middle.

    Its tiles are predicted: two runs that each measure their own may sum in different orders, and rightly differ.
    """
    steps, every, width = (10, 6, 64) if dry else (300, 100, 256)
    return [
        "--recipe=quickstart", f"--deepspeed_config=ds_configs/zero{stage}.json", f"--output_dir={folder}",
        f"--stages=2:{steps},4:{steps}", f"--checkpoint_every={every}", "--log_every=1", "--eval_every=0",
        "--eval_after_growth=0", "--tracking=none", "--corpus.max_documents=300", f"--model.hidden_size={width}",
        f"--model.num_heads={width // 64}", "--model.dropout=0.1", "--model.attention_dropout=0.1",
        "--eval_sequences=32", "--checkpoint_async=false", "--tiles=predict", *(["--kernels=torch"] * dry),
    ]  # fmt: skip


def _resume(stage: int) -> Callable[[Machine], dict[str, Any]]:
    def run(at: Machine) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(prefix="resume-", dir=_made(work())))
        whole, cut = folder / "whole", folder / "cut"
        _pretrain(_options(stage, whole, at.dry))
        killed = kill_in_the_middle(_options(stage, cut, at.dry), cut, 14 if at.dry else 450)
        _pretrain([*_options(stage, cut, at.dry), "--resume=auto"])
        wanted, found = losses(whole), losses(cut)
        differ = [step for step in wanted if wanted[step] != found.get(step)]
        return {
            "same_bits": not differ, "steps": len(wanted), "killed_after": killed, "first_difference": differ[:1],
        }  # fmt: skip

    return run


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _command(options: list[str]) -> list[str]:
    return [sys.executable, str(LAUNCHERS / "pretrain.py"), *options]


def _pretrain(options: list[str]) -> None:
    """A whole run. Raises RuntimeError with its last words where it fails."""
    done = subprocess.run(_command(options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"pretrain.py ended with {done.returncode}: {done.stdout[-800:]}")


def kill_in_the_middle(options: list[str], folder: Path, step: int) -> int:
    """Start a run and kill it without warning when it has logged so many steps; how many it had logged."""
    with subprocess.Popen(_command(options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(losses(folder)) < step:
            time.sleep(0.005)
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before it could be killed")
        process.kill()
    return len(losses(folder))


def losses(folder: Path) -> dict[int, float]:
    """Training losses by step; a line that is being written is left out."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["kind"] == "train":
                    found[record["step"]] = record["loss"]
    return found


COMPARISON = (
    "--recipe=bert_base_stacking", "--data=docs", "--tokenizer=train", "--corpus.subset=null",
    "--corpus.revision=null", "--corpus.streaming=false", "--corpus.near_duplicates=0", "--corpus.vocab_size=16384",
    "--corpus.eval_percent=5", "--stages=3:500,6:700,12:2800", "--warmup_steps=80", "--lr=4e-4",
    "--decay_percent=30", "--eval_every=0", "--eval_after_growth=0", "--eval_sequences=1024",
    "--checkpoint_every=500", "--tracking=none", "--arms=scratch,stack", "--seeds=1",
)  # fmt: skip
"""BERT-base from scratch, stacked and shallow, on the built-in corpus, with the recipe's shares of depths."""
DRY = (
    "--stages=1:10,2:10,4:20", "--model.hidden_size=64", "--model.num_heads=1", "--model.intermediate_size=0",
    "--micro_batch_size=8", "--tokens_per_step=1024", "--corpus.max_documents=300", "--corpus.vocab_size=1024",
    "--corpus.sequence_length=64", "--eval_sequences=32", "--warmup_steps=4", "--kernels=torch",
)  # fmt: skip
STOPPING = 75.0
"""Seconds before the end at which the comparison is stopped: a checkpoint, packing and the report take some."""
TO_STOP, TO_KILL, TO_REPORT = 40, 5, 20
"""Seconds of these for the comparison to end by itself, to end when killed, and for its report."""
DRY_SECONDS = 120.0
"""After which it is stopped there: seven runs take long on a CPU."""
TARBALL = "comparison.tar.gz"
KEPT = ("comparison.json", "config.json", "metrics.jsonl", "summary.json")


def compare_depths(at: Machine) -> dict[str, Any]:
    """Go on with the comparison until the time is up; its report so far."""
    folder, out = work() / "comparison", Path(os.environ.get("OUT", "benchmarks/results/gpu"))
    if not folder.exists() and (out / TARBALL).exists():
        with tarfile.open(out / TARBALL) as tar:
            tar.extractall(work(), filter="data")
    minutes = (
        [] if (folder / "comparison.json").exists() or at.dry else [f"--minutes={max(3.0, at.left / 60 - 3):.1f}"]
    )
    options = [*COMPARISON, *(DRY if at.dry else ()), f"--output_dir={folder}"]
    command = [sys.executable, str(LAUNCHERS / "compare.py"), *options]
    state = "finished"
    with (_made(work()) / "comparison.log").open("ab") as log:
        process = subprocess.Popen([*command, *minutes], stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(1.0, min(at.left - STOPPING, DRY_SECONDS if at.dry else at.left)))
            state = "finished" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            state = "cut short"
            _stop(process)
        finally:
            pack(folder, out / TARBALL)
    words = (work() / "comparison.log").read_text(errors="replace")[-600:]
    if state not in ("finished", "cut short"):
        raise RuntimeError(f"{state}: {words}")
    if not (folder / "comparison.json").exists():
        return {"state": "cut short before there was a plan", "report": "", "unfinished": True}
    unfinished = {} if state == "finished" else {"unfinished": True}
    return {"state": state, "report": report_of(command)[-2500:], **unfinished}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the comparison to end, upon which it saves what runs, and end it if it does not; one that is stuck in the
    driver is left behind."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TO_KILL)


def report_of(command: list[str]) -> str:
    """What the comparison says of the runs that are finished."""
    try:
        return subprocess.run([*command, "--report_only"], capture_output=True, text=True, timeout=TO_REPORT).stdout
    except subprocess.TimeoutExpired:
        return f"no report within {TO_REPORT} s"


def pack(folder: Path, tarball: Path) -> None:
    """Small files of the plan, of the pilot and of all finished runs; an earlier one stays until this one is whole."""
    if not (folder / "comparison.json").exists():
        return
    unfinished = tarball.with_name(f"{tarball.name}.part")
    with tarfile.open(unfinished, "w:gz") as tar:
        for path in _finished(folder):
            tar.add(path, arcname=path.relative_to(folder.parent))
    unfinished.replace(tarball)


def _finished(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.json*"):
        done = path.parent == folder or (path.parent / "summary.json").exists()
        if done and path.name in KEPT:
            yield path

"""The real launcher on two ranks, from a corpus to a Hugging Face folder; bad input and a failing rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.corpus import small_options, write_corpus

ROOT = Path(__file__).parents[2]


def deepspeed(script: str, *options: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Start a script by the deepspeed launcher of this environment."""
    environment = os.environ | {
        "LOCAL_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        "deepspeed",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(20000 + os.getpid() % 20000),
        script,
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of three stages and what it printed."""
    folder = tmp_path_factory.mktemp("pretrain")
    write_corpus(folder / "corpus")
    result = deepspeed("launchers/pretrain.py", *small_options(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run", result.stdout


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_the_run_directory_is_complete(finished: tuple[Path, str]) -> None:
    run, _ = finished
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True and summary["world_size"] == 2 and summary["zero_stage"] == 2
    assert [stage["layers"] for stage in summary["stages"]] == [1, 2, 4]
    assert [stage["steps"] for stage in summary["stages"]] == [8, 8, 8]
    assert [stage["tokens"] for stage in summary["stages"]] == [8 * 512] * 3
    assert summary["tokens"] == 24 * 512
    assert summary["eval_loss_masked"] == summary["stages"][-1]["eval_loss_masked_end"]
    assert [(g["from_layers"], g["to_layers"]) for g in summary["growths"]] == [(1, 2), (2, 4)]
    assert all(growth["tensors_verified"] > 0 for growth in summary["growths"])
    assert summary["stages"][0]["flops"] < summary["stages"][1]["flops"] < summary["stages"][2]["flops"]
    assert sum(summary["seconds_by_phase"].values()) == pytest.approx(summary["seconds"], rel=1e-6)
    assert summary["seconds_by_phase"]["training"] > 0 and summary["seconds_by_phase"]["growth"] > 0
    for name in (
        "eval_loss",
        "eval_loss_shuffled",
        "unigram_entropy",
        "unigram_cross_entropy",
        "cache_loss",
        "parameters",
        "seconds",
        "flops",
    ):
        assert summary[name] > 0, name
    assert json.loads((run / "config.json").read_text())["model"]["hidden_size"] == 32
    assert (run / "report" / "curves.png").stat().st_size > 10_000
    assert list((run / "wandb").glob("offline-run-*")), "wandb runs offline without a key"
    assert run.stat().st_mode & 0o077 == 0


@pytest.mark.distributed
def test_metrics_have_every_step_once(finished: tuple[Path, str]) -> None:
    lines = records(finished[0])
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 25))
    growths = [line for line in lines if line["kind"] == "growth"]
    assert [(line["step"], line["stage"], line["layers"]) for line in growths] == [(8, 1, 2), (16, 2, 4)]
    assert all(line["seconds_growth"] < line["seconds"] for line in growths)
    trained = [line["loss"] for line in lines if line["kind"] == "train"]
    assert trained[-1] < trained[0] - 0.3
    assert all(line["grad_norm"] > 0 for line in lines if line["kind"] == "train")


@pytest.mark.distributed
def test_the_export_loads_and_fills_a_mask(finished: tuple[Path, str]) -> None:
    final = finished[0] / "export" / "final"
    model, info = AutoModelForMaskedLM.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 4
    tokenizer = AutoTokenizer.from_pretrained(final)
    batch = tokenizer("the cat sees a red [MASK] in the morning.", return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape and torch.isfinite(logits).all()
    card = (final / "README.md").read_text()
    assert card.startswith("---\n") and "4" in card
    assert {path.name for path in (finished[0] / "export").iterdir()} == {
        "stage-1-1L", "stage-2-2L", "stage-3-4L", "final",
    }  # fmt: skip


@pytest.mark.distributed
def test_a_person_sees_what_happens(finished: tuple[Path, str]) -> None:
    output = finished[1]
    for text in ("2 on cpu", "ZeRO stage 2", "fp32 (as asked)", "growth 1 -> 2 layers", "growth 2 -> 4 layers",
                 "tensors verified", "unigram line", "cache line",
                 "sensitivity to order", "The model has passed "):  # fmt: skip
        assert text in output, text
    assert output.count("growth 1 -> 2") == 1, "only rank 0 speaks"


@pytest.mark.distributed
def test_another_run_is_not_overwritten(finished: tuple[Path, str]) -> None:
    run = finished[0]
    before = (run / "summary.json").read_bytes()
    result = deepspeed("launchers/pretrain.py", *small_options(run.parent))
    assert result.returncode == 2
    assert (result.stdout + result.stderr).count("holds another run") == 1
    assert (run / "summary.json").read_bytes() == before


@pytest.mark.distributed
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "noise.txt").write_bytes(bytes(range(128, 256)) * 10)
    result = deepspeed("launchers/pretrain.py", *small_options(tmp_path))
    said = result.stdout + result.stderr
    assert result.returncode == 2, said
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_failing_rank_ends_all(tmp_path: Path) -> None:
    """With one sentence, and its traceback in a file; a start afresh removes that."""
    write_corpus(tmp_path / "corpus")
    result = deepspeed("tests/launchers/failing_rank.py", *small_options(tmp_path), "--tracking=none")
    assert result.returncode == 1
    traceback = tmp_path / "run" / "traceback-rank1.txt"
    assert result.stderr.count(f"error: RuntimeError: injected; the full traceback is in {traceback}\n") == 1
    assert "RuntimeError: injected" in traceback.read_text() and traceback.stat().st_mode & 0o077 == 0
    assert 'failing_rank.py", line' not in result.stdout + result.stderr, "DeepSpeed's launcher may have a traceback"
    assert not (tmp_path / "run" / "summary.json").exists()
    again = deepspeed("launchers/pretrain.py", *small_options(tmp_path), "--tracking=none", "--overwrite")
    assert again.returncode == 0, again.stdout + again.stderr
    assert not traceback.exists() and (tmp_path / "run" / "summary.json").exists()


def alone(*options: str, shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess[str]:
    """One process, started by a shell that may close streams or send signals."""
    command = ["bash", "-c", shell, "bash", sys.executable, "launchers/pretrain.py", *options, "--tracking=none"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_odd_environments_and_mended_ones(tmp_path: Path) -> None:
    """Each refused start leaves nothing; the last one, mended, has lost its output and runs to its end."""
    write_corpus(tmp_path / "corpus")
    options = [*small_options(tmp_path), "--stages=1:2"]
    for name, value in (("RANK", "abc"), ("DS_ACCELERATOR", "foo"), ("DS_ACCELERATOR", "cuda")):
        if value == "cuda" and torch.cuda.is_available():
            continue
        refused = alone(*options, **{name: value})
        assert refused.returncode == 2 and refused.stderr.count("error: ") == 1, refused.stderr
        assert "Traceback" not in refused.stderr and name in refused.stderr
        assert not (tmp_path / "run").exists()
    done = alone(*options, shell='"$@" >&- 2>&-')
    assert done.returncode == 0 and (done.stdout, done.stderr) == ("", "")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def test_an_interruption_before_training_leaves_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    shell = f'"$@" & until [ -d {tmp_path}/cache ]; do sleep 0.05; done; kill -INT $!; wait $!'
    stopped = alone(*small_options(tmp_path), shell=f"set -m; {shell}")
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.startswith("error: interrupted; the same command starts again.\n")
    assert "Traceback" not in stopped.stderr and not (tmp_path / "run").exists()

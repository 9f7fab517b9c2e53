"""Comparisons whose runs are stand-ins for pretrain.py, and what they leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ds_stacking.command_line import parse_run
from ds_stacking.studies.comparison.running import Comparison

FAKE = Path(__file__).with_name("fake_pretrain.py")


def comparison(folder: Path, *more: str, **fields: Any) -> Comparison:
    options = ["--stages=1:20,2:30,4:50", *more]
    start = [sys.executable, str(FAKE)]
    fields = {"arms": ["scratch", "stack"], "seeds": 2, "log": lambda text: None, "launch": start} | fields
    config = parse_run([*options, f"--output_dir={folder / 'compare'}"])
    return Comparison(config=config, options=options, **fields)


def summaries(folder: Path) -> dict[str, Any]:
    found = (folder / "compare").glob("*/*/*/summary.json")
    return {str(path.parent.relative_to(folder / "compare")): json.loads(path.read_text()) for path in found}


def plan(folder: Path) -> Any:
    return json.loads((folder / "compare/comparison.json").read_text())


def a_run(folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True)
    record = {"data_fingerprint": "a", "versions": {}, "stages": [{"layers": 2, "steps": 60}], **options}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("months of work")
    return folder

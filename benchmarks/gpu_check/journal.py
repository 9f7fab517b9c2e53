"""Results as JSON lines: each on the disk before the next row begins, a line cut short by a crash is skipped."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """A file of records, each with the name of its `row`; what is written later about a row counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        """Write one line and wait until it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a crash cut the last line short
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Record]:
        """All whole records, oldest first."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "row" in record:
                records.append(record)
        return records

    def latest(self) -> dict[str, Record]:
        """The last record of each row."""
        return {record["row"]: record for record in self.read()}

    def settled(self) -> set[str]:
        """Rows that a resumed check leaves alone: those with a result, and those that failed twice."""
        failures: dict[str, int] = {}
        for record in self.read():
            failures[record["row"]] = failures.get(record["row"], 0) + 1 if "error" in record else -1
        return {name for name, count in failures.items() if count < 0 or count > 1}

    def begin(self, earlier: Path | None) -> None:
        """Take over the journal in the folder `earlier`; without one, an older file of this name gets its date's."""
        if earlier is None:
            if self.path.exists():
                date = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self.path.stat().st_mtime))
                self.path.rename(self.path.with_stem(f"{self.path.stem}-{date}"))
            return
        source = earlier / self.path.name
        if not self.path.exists() and source.exists():
            for record in Journal(source).read():
                self.append(record)

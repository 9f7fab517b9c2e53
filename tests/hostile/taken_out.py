"""Mends taken out, in the process of one launcher: what the battery must then find is what it is for."""

from __future__ import annotations

import os
from typing import Any


def follow_links() -> None:
    """Files of a folder are opened by way of links again."""
    os.O_NOFOLLOW = 0
    replace("refuse_links", lambda *_: None)
    replace("refuse_foreign", lambda *_: None)


def leave_folders() -> None:
    """Names with `..` and absolute names are as good as others."""
    replace("is_inside", lambda name: True)


def believe_json() -> None:
    """JSON is read as it comes."""
    import json

    replace("parse_json", lambda content, shape, *, where, mend: json.loads(content))
    replace("read_json", lambda path, shape, *, mend, inside=None, limit=0: json.loads(path.read_bytes()))


def read_lines_whole() -> None:
    """Nothing bounds what is read from a file of text."""
    from dataclasses import fields

    from ds_stacking.config import SourceConfig

    def unbounded(self: Any) -> None:
        for field in fields(self):
            if field.name.startswith("max_") and field.name != "max_documents":
                setattr(self, field.name, 1 << 60)

    SourceConfig.__post_init__ = unbounded  # type: ignore[method-assign]


def replace(name: str, substitute: Any) -> None:
    """Put a function in the place of one in all modules of the library that have it."""
    import sys

    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("ds_stacking") and hasattr(module, name):
            setattr(module, name, substitute)

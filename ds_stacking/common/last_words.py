"""What a process says before it ends itself; it ends all the same where nobody takes the words (a full pipe)."""

from __future__ import annotations

import faulthandler
import sys
import threading

PATIENCE = 3.0
"""Seconds that the words may take."""


def last_words(text: str, *, stacks: bool = False) -> None:
    """Print `text` on standard error, with `stacks` where every thread stands too, in `PATIENCE` seconds at most."""

    def speak() -> None:
        print(text, file=sys.stderr, flush=True)
        if stacks:
            faulthandler.dump_traceback(all_threads=True)

    speaker = threading.Thread(target=speak, name="last words", daemon=True)
    speaker.start()
    speaker.join(PATIENCE)

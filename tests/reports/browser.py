"""Looks at a page in headless Chromium: its picture, and how wide its content is."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
from matplotlib.image import imread
from numpy import ndarray

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; apt-get install chromium")


def look(page: Path, *, width: int, dark: bool) -> tuple[ndarray, int, str]:
    """The picture of `page` in a frame of `width` pixels [height, width, channels], its content's width, its text."""
    picture, wrapper = page.with_suffix(".png"), page.with_suffix(".frame.html")
    wrapper.write_text(
        f'<body style="margin:0"><iframe srcdoc="{escape(page.read_text())}" width="{width}" height="3000" '
        'style="border:0"></iframe><pre></pre><script>onload = () => { const page = '
        'document.querySelector("iframe").contentDocument; document.querySelector("pre").textContent = '
        "`width ${page.documentElement.scrollWidth} text ${page.body.innerText}`; };</script>"
    )
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(width, 600)},3000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={picture}", wrapper.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>width (\d+) text (.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    return imread(picture)[:, :width], int(found[1]), found[2]

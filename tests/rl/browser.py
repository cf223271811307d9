"""Pages in a real browser, for tests: the DOM as it ends up, and how wide the content is at a given width.

Chromium, headless and without a network of its own; without one the tests are skipped. A page's policy lets no script of
ours into it, so its width is measured from outside, by a page that holds it in a frame.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser")
_QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
_SECONDS = 240
"""It takes one or two alone; a machine that runs all tests at once has been seen to need a minute."""
_FRAMES = """<!doctype html><meta charset="utf-8"><body><script>
for (const width of {widths}) {{
  const frame = document.createElement("iframe"), told = document.createElement("p");
  frame.style.cssText = `border: 0; height: 800px; width: ${{width}}px`;
  frame.addEventListener("load", () => {{
    const page = frame.contentDocument.documentElement;
    told.textContent = `at ${{width}}: ${{page.scrollWidth}}`;
  }});
  frame.src = {page!r};
  document.body.append(told, frame);
}}
</script>"""


def dom(page: Path, profile: Path, *options: str) -> str:
    """The page's document after its scripts have run, as HTML."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *_QUIET]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout


def text(html: str) -> str:
    """What stands in <main>, without tags."""
    return re.sub(r"<[^>]+>", " ", html[html.index("<main") : html.index("</main>")])


def content_widths(page: Path, folder: Path, *widths: int) -> dict[int, int]:
    """By the window's width, how wide the page's content is in pixels; more than the window means that it overflows."""
    frames = folder / "frames.html"
    frames.write_text(_FRAMES.format(widths=list(widths), page=page.as_uri()), encoding="utf-8")
    made = dom(frames, folder / "profile-frames", "--allow-file-access-from-files")
    found = {int(width): int(seen) for width, seen in re.findall(r"at (\d+): (\d+)", made)}
    assert set(found) == set(widths), made
    return found

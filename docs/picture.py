"""docs/report.png: the verdict and the first charts of a report, as headless Chromium draws them.

    python docs/picture.py runs/study/report.html

Needs playwright, of the dev extra, and its Chromium (`playwright install chromium`) or one on the PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

_WIDTH, _MARGIN = 1200, 12
_LEFT_OUT = (
    "#curve-controls, .marks, #arms, .caveat, .hint, section.verdict .facts, section:not(.verdict, #arms, #curves)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="report.html of a run or a study")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("report.png"))
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = None if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses its sandbox to root
        browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        page = browser.new_page(viewport={"width": _WIDTH, "height": 1000}, color_scheme="light")
        page.goto(arguments.report.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        page.add_style_tag(content=f"{_LEFT_OUT} {{ display: none }}")
        first = page.locator("div.group").first.bounding_box()
        clip = {"x": 0, "y": 0, "width": _WIDTH, "height": first["y"] + first["height"] + _MARGIN}
        page.screenshot(path=arguments.output, clip=clip, full_page=True)
        browser.close()
    print(f"wrote {arguments.output} ({arguments.output.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()

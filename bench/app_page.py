"""Take a picture of the page of ``wadi app`` with headless Chromium (needs the extra ``app``, playwright and chromium).

python bench/app_page.py --out docs/images/app.png
python bench/app_page.py --out phone.png --width 390
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PATIENCE = 120_000  # milliseconds


def take(url: str, out: Path, width: int, prompt: str) -> None:
    """Generate ``prompt`` with the teacher beside it, and save the whole page, in few colours so that the file is small."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 720})
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.fill("#prompt textarea", prompt)
        page.click("#generate")
        page.wait_for_selector("#teacher img")
        page.wait_for_timeout(2000)
        page.screenshot(path=out, full_page=True)
        browser.close()
    with Image.open(out) as image:
        small = image.convert("RGB").quantize(192)
    small.save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    parser.add_argument("--width", type=int, default=1280, help="of the window in pixels")
    parser.add_argument("--prompt", default="fox, noto style, on a blue background")
    options = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-m", "wadi", "app"], stdout=subprocess.PIPE, text=True)
    try:
        address = next(found for line in server.stdout if (found := re.search(r"http://\S+", line)))
        take(address[0], options.out, options.width, options.prompt)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()

"""How long a browser takes with the pages of a large run: 32 layers of 8,192 latents, from disk.

    python benchmarks/bench_pages.py [--repeats 3]

Headless Chromium opens pages with invented numbers, as large as those of LLaVA-1.5-7B: pictures of 576
patches, 26 examples a latent. Each time is from the user's act until what it asks for is on the screen, in a
browser that has nothing in memory; shown are medians and the slowest.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for what tests write, too

from large_pages import Large, write_large

COUNT = "document.querySelector('#count').textContent === "
ALL = "'262,144 latents'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        large = write_large(Path(folder) / "pages")
        megabytes = sum(f.stat().st_size for f in (Path(folder) / "pages" / "data").glob("list-*")) / 1e6
        times: dict[str, list[float]] = {}
        for _ in range(asked.repeats):
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 812})
            for name, seconds in acts(page, (Path(folder) / "pages" / "index.html").as_uri(), large):
                times.setdefault(name, []).append(seconds)
            browser.close()
    print(f"262,144 latents, lists of {megabytes:.0f} MB\n\n| | median ms | slowest ms |\n|---|---|---|")
    for name, found in times.items():
        print(f"| {name} | {1000 * statistics.median(found):.0f} | {1000 * max(found):.0f} |")


def acts(page: Any, address: str, large: Large) -> Iterator[tuple[str, float]]:
    """What a user does, and the seconds of each."""
    began = time.perf_counter()

    def since() -> float:
        nonlocal began
        before, began = began, time.perf_counter()
        return began - before

    page.goto(address, wait_until="commit")
    page.wait_for_selector("#rows a")
    yield "first rows of the list", since()
    page.wait_for_function(COUNT + ALL)
    yield "all layers' lists, behind it", since()
    page.click('[data-sort="max"]')
    first = f"{large.layer}:{large.latent}"
    page.wait_for_function(
        f"document.querySelector('#rows a .c-id').innerText.replace('\\n', '') === '{first}'"
    )
    yield "sort by another column", since()
    page.fill("#search", "word996")
    page.wait_for_function(COUNT + "'256 latents'")
    yield "search for a token", since()
    page.fill("#search", first)
    page.keyboard.press("Enter")
    page.wait_for_selector(".card .heat i")
    yield "open a latent, heat maps drawn", since()
    page.keyboard.press("Escape")
    page.wait_for_selector("#list-view:not([hidden])")
    yield "back to the list", since()


if __name__ == "__main__":
    main()

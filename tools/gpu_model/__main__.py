"""`make model`: count what is missing of the present kernel, and write gpu-model.md."""

from __future__ import annotations

import argparse
import time

from tools.gpu_model.counting import count, load, save
from tools.gpu_model.model import KEYS
from tools.gpu_model.page import PAGE, page


def count_missing(again: bool = False) -> None:
    """Count what counts.json does not have of these sources, or everything."""
    found = {key: counts for key, counts in load().items() if key in KEYS}
    for key in KEYS:
        if key in found and found[key].source == key.source and not again:
            continue
        start = time.perf_counter()
        found[key] = count(key)
        save(found)
        print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Count, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-count", action="store_true", help="only write the page, from what was counted")
    parser.add_argument("--again", action="store_true", help="count everything, also what is known: half an hour")
    given = parser.parse_args()
    if not given.no_count:
        count_missing(given.again)
    PAGE.write_text(page(load()))


if __name__ == "__main__":
    main()

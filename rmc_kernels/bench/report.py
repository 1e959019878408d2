"""Figures in documents: what stands between markers is written anew from a result, the rest is left alone.

A block is `<!-- bench NAME -->`, lines, `<!-- /bench -->`, NAME one of `markdown.BLOCKS`.
"""

from __future__ import annotations

import re

from rmc_kernels.bench.markdown import BLOCKS
from rmc_kernels.bench.suite import SuiteResult

MARKED = re.compile(r"<!-- bench (?P<name>\S+) -->\n(?P<body>.*?)<!-- /bench -->", re.DOTALL)


def render(text: str, result: SuiteResult) -> str:
    """The document with every block written from `result`.

    Raises:
        ValueError: there is no block, one is of an unknown name, or a marker has no counterpart.
    """
    names = [found["name"] for found in MARKED.finditer(text)]
    unknown = [name for name in names if name not in BLOCKS]
    if unknown:
        raise ValueError(f"a block takes one of {', '.join(BLOCKS)}; got {', '.join(unknown)}")
    if not names or len(names) != text.count("<!-- bench ") or len(names) != text.count("<!-- /bench -->"):
        raise ValueError("document takes blocks `<!-- bench NAME -->`, lines, `<!-- /bench -->`, each closed")
    return MARKED.sub(lambda found: _block(found["name"], result), text)


def everything(result: SuiteResult) -> str:
    """Every block, each between its markers: where a document begins."""
    return "\n\n".join(_block(name, result) for name in BLOCKS)


def _block(name: str, result: SuiteResult) -> str:
    return f"<!-- bench {name} -->\n{BLOCKS[name](result)}\n<!-- /bench -->"

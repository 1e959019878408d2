"""Which layer of csrc/ may include which: `python -m tools.includes`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Folder of csrc/ -> the folders that its files may include from, besides their own.
LAYERS: dict[str, set[str]] = {
    "machine": set(),
    "common": set(),
    "simd": set(),
    "gemm": {"simd", "common", "machine"},
    "cell": {"gemm", "simd", "common", "machine"},
    "isa": {"cell", "gemm", "simd"},
    "python": {"cell", "common", "machine"},
    "tests": {"cell", "common", "machine"},
}
#: What stands in quotes: an include, or a header that a file of csrc/isa/ names for those below.
_INCLUDE = re.compile(r'^#(?:include|define \w+) "([^"]+)"', re.MULTILINE)


def violations(csrc: Path) -> Iterator[str]:
    """A line for each include that points up, past csrc/, or to no file."""
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in (".h", ".cpp"):
            continue
        name = path.relative_to(csrc)
        layer = name.parts[0]
        if layer not in LAYERS:
            yield f"{name}: {layer} is not in LAYERS of tools/includes"
            continue
        for include in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            other = Path(include).parts[0]
            if not (csrc / include).is_file():
                yield f"{name}: csrc has no {include}"
            elif other != layer and other not in LAYERS[layer]:
                yield f"{name}: {layer} must include only {', '.join(sorted(LAYERS[layer] | {layer}))}, got {include}"

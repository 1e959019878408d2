"""The check of the directions of includes finds what it is for, and nothing in csrc/."""

from __future__ import annotations

from pathlib import Path

from tools.includes import LAYERS, ROOT, violations


def test_csrc_keeps_to_its_layers() -> None:
    assert list(violations(ROOT / "csrc")) == []
    assert {path.name for path in (ROOT / "csrc").iterdir()} == set(LAYERS)


def test_what_points_up_or_nowhere_is_found(tmp_path: Path) -> None:
    for name, text in {
        "gemm/panels.h": '#include <vector>\n#include "simd/vectors.h"\n#include "cell/plan.h"\n',
        "cell/plan.h": '#include "gemm/panels.h"\n#include "cell/plan.h"\n#include "gone.h"\n',
        "simd/vectors.h": "#include RMC_SIMD\n",
        "isa/a.cpp": '#define RMC_SIMD "python/native.h"\n#define RMC_ISA generic\n',
        "python/native.h": '#include "cell/plan.h"\n',
        "cuda/b.h": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert list(violations(tmp_path)) == [
        "cell/plan.h: csrc has no gone.h",
        "cuda/b.h: cuda is not in LAYERS of tools/includes",
        "gemm/panels.h: gemm must include only common, gemm, machine, simd, got cell/plan.h",
        "isa/a.cpp: isa must include only cell, gemm, isa, simd, got python/native.h",
    ]

"""What is committed of the compile matrix, and how it is read from assembly; `make matrix` compiles."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from rmc_kernels.backends.triton import tiles
from tools.compile_matrix import traffic
from tools.compile_matrix.matrix import RESULTS, load, save, worse
from tools.compile_matrix.page import PAGE, page
from tools.offline.assembly import Usage, amd


def test_every_tile_fits_and_spills_in_no_inner_loop() -> None:
    for job, compiled in load().items():
        assert compiled.usage.inner == 0, str(job)
        assert compiled.usage.shared <= tiles.SHARED_MEMORY[job.target], str(job)
        assert compiled.usage.mma or (job.kind == "float32" and not job.target.startswith("gfx")), str(job)


def test_more_of_anything_but_products_is_worse() -> None:
    before = Usage(registers=200, spills=2, inner=0, shared=1024, mma=8, barriers=30)
    assert not worse(before, before)
    assert not worse(before._replace(registers=100, spills=0, mma=16), before)
    for name in ("registers", "spills", "inner", "shared", "barriers"):
        assert worse(before._replace(**{name: 1 << 20}), before) == [f"{name}: {1 << 20}, was {getattr(before, name)}"]


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(load(), traffic.load()), "`make matrix` writes it"


def test_results_are_kept_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load()
    path = tmp_path / "results.csv"
    monkeypatch.setattr("tools.compile_matrix.matrix.RESULTS", path)
    assert load() == {}
    stale = next(iter(before))
    save(before | {replace(stale, width=stale.width + 1): before[stale]})
    assert load() == before, "a tile that the table does not have is dropped"
    assert path.read_text() == RESULTS.read_text()


def test_traffic_is_kept_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = traffic.load()
    assert {line.wide for line in before} == {False, True}
    monkeypatch.setattr(traffic, "RESULTS", tmp_path / "traffic.csv")
    assert traffic.load() == []
    traffic.save(before)
    assert traffic.load() == before


#: Time, blocks, then a loop with a product; a spill in each, and one outside.
ASSEMBLY = """
\t.text
\tscratch_store_dword off, v1, s0
.LBB0_1:
\tscratch_load_dword v1, off, s0
.LBB0_2:
\tscratch_load_dword v2, off, s0
.LBB0_3:
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
\tscratch_load_dwordx2 v[3:4], off, s0
\ts_barrier
\ts_cbranch_scc1 .LBB0_3
; %bb.4:
\ts_cbranch_vccnz .LBB0_2
\ts_cbranch_scc0 .LBB0_5
\ts_branch .LBB0_1
.LBB0_5:
\ts_endpgm
    .vgpr_count:     250
"""


def test_spills_are_told_from_those_of_inner_loops() -> None:
    assert amd(ASSEMBLY, 1024) == Usage(registers=250, spills=4, inner=1, shared=1024, mma=1, barriers=1)

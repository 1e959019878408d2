"""The package as built: its version, its extension, and what the distributions would contain."""

from __future__ import annotations

import importlib.metadata
import math
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import rmc_kernels

ROOT = Path(__file__).resolve().parents[2]
BUILD_DIR = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
ISA_FILE = re.compile(r"_(neon|avx2|avx512|avx512bf16|amx)\.cpp$")

if shutil.which("c++") is None:
    pytest.importorskip("rmc_kernels._C", reason="no C++ compiler on this machine, so no extension")

from rmc_kernels import _C  # noqa: E402  (with a compiler, a missing extension is a failure)
from rmc_kernels.backends import extension  # noqa: E402


def test_version_has_one_source() -> None:
    assert importlib.metadata.version("rmc-kernels") == rmc_kernels.__version__
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *ROOT.glob("rmc_kernels/**/*.py")]
    stating = [p.name for p in files if re.search(r"^(__)?version(__)?\s*=\s*\"", p.read_text(), re.MULTILINE)]
    assert stating == ["_version.py"]


def test_makefile_installs_the_declared_build_requirements() -> None:
    declared = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    installed = re.search(r"^BUILD_REQUIRES = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    assert installed is not None
    assert declared[1].replace('"', "").split(", ") == installed[1].replace('"', "").split()


def test_an_extension_of_another_version_is_known_by_all_that_the_backend_calls() -> None:
    source = (ROOT / "rmc_kernels" / "backends" / "cpu.py").read_text()
    assert set(re.findall(r"\b_C\.(\w+)", source)) == set(extension.NEEDED)
    assert (extension.native, extension.missing) == (_C, None)


def test_extension_does_not_import_torch() -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('_C', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "assert m.isas() and not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(_C.__file__)], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf lists the libraries of an ELF file")
def test_extension_links_only_system_libraries() -> None:
    dynamic = subprocess.run(["readelf", "-d", str(_C.__file__)], check=True, capture_output=True, text=True).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)}
    assert "libc" in needed
    assert needed <= {
        "libc",
        "libm",
        "libstdc++",
        "libgcc_s",
        "libgomp",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm lists the symbols of an object file")
def test_isa_files_share_no_code_with_others() -> None:
    """A weak symbol (an inline function or template not in an anonymous namespace) is kept once for all files.

    If the linker keeps the AVX-512 copy, a machine without AVX-512 executes it and dies. What stands in the namespace
    of an instruction set belongs to one file only.
    """
    objects = [p for p in BUILD_DIR.glob("CMakeFiles/**/*.o") if ISA_FILE.search(p.with_suffix("").name)]
    if not objects:
        pytest.skip("the extension was not built in this checkout, or for an architecture of one instruction set")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if re.match(r"^[0-9a-f]+ [WVu] ", line)]
        weak = [line for line in weak if not line.endswith(" DW.ref.__gxx_personality_v0")]  # a pointer, no code
        shared = [line for line in weak if f"rmc::{path.name.split('.')[0].rsplit('_', 1)[1]}::" not in line]
        assert not shared, f"{path.name} defines {shared}"


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump disassembles")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_peak_fma_executes_what_it_counts(isa: str) -> None:
    """Ten chains are counted; a compiler that merges them would make a peak out of one."""
    objects = list(BUILD_DIR.glob(f"CMakeFiles/rmc_core.dir/csrc/machine/loops_{isa}.cpp.o"))
    if not objects:
        pytest.skip("the extension was not built in this checkout, or not for this instruction set")
    code = subprocess.run(["objdump", "-d", str(objects[0])], check=True, capture_output=True, text=True).stdout
    assert code.count("vfmadd") >= 10


def test_every_source_is_built() -> None:
    """A file on disk that CMakeLists.txt does not name would silently be left out."""
    listed = set(re.findall(r"^\s+(csrc/\S+\.cpp)\b", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE))
    on_disk = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp") if p.parent.name != "tests"}
    assert listed == on_disk


def test_cpu_features_agree_with_the_kernel() -> None:
    features = _C.cpu_features()
    assert all(type(present) is bool for present in features.values())
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    if flags is None:
        pytest.skip("this system does not list the CPU's flags")
    known = set(flags[1].split())
    # AMX tiles also take a permission that a sandbox may refuse.
    checked = {name for name in features if not name.startswith("amx")}
    assert {name for name in checked if features[name]} == known & checked
    assert {name for name in features if features[name]} <= known


def test_instruction_sets_start_with_the_generic_one() -> None:
    isas = _C.isas()
    assert isas[0] == "generic"
    assert ("avx512" in isas) <= _C.cpu_features()["avx512f"]
    assert ("amx" in isas) <= _C.cpu_features()["amx_bf16"]


@pytest.mark.parametrize("isa", [*_C.isas(), ""])
def test_peak_fma(isa: str) -> None:
    rate = _C.peak_fma(0.02, isa)
    assert math.isfinite(rate)
    assert rate > 0


def test_peak_amx_is_positive_exactly_with_amx() -> None:
    rate = _C.peak_amx(0.02)
    assert math.isfinite(rate)
    assert (rate > 0) == ("amx" in _C.isas())


@pytest.mark.parametrize("size", [4096, 5000, 1 << 22])
def test_bandwidth(size: int) -> None:
    rate = _C.bandwidth(size, 0.02)
    assert math.isfinite(rate)
    assert rate > 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, 61.0, math.inf, math.nan])
def test_ceilings_refuse_a_time_out_of_range(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^seconds:"):
        _C.peak_fma(seconds)
    with pytest.raises(ValueError, match=r"^seconds:"):
        _C.peak_amx(seconds)
    with pytest.raises(ValueError, match=r"^seconds:"):
        _C.bandwidth(4096, seconds)


def test_ceilings_refuse_other_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^isa: got 'mmx', .* support generic"):
        _C.peak_fma(0.02, "mmx")
    with pytest.raises(ValueError, match=r"^bytes:"):
        _C.bandwidth(4095)
    with pytest.raises(TypeError):
        _C.bandwidth("4096")  # type: ignore[arg-type]

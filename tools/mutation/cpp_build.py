"""The C++ kernels with one file changed: the generic instruction set alone, in one dtype, not optimised.

A mutant compiles one translation unit (0.6 s; 0.9 without the precompiled header) and links it with what does not
change. The module that comes out is `rmc_kernels._C` but for the parts that no call of a cell needs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pybind11

from rmc_kernels import backends
from rmc_kernels.backends import cpu

CSRC = Path(__file__).parents[2] / "csrc"
#: What takes the place of the scratch memory: the red zones that it has under a sanitizer, and who writes to them.
_WATCHED = Path(__file__).parent / "watched"
#: As CMakeLists.txt has them, but for the optimisation.
_FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w",
    "-D__SANITIZE_ADDRESS__",
)  # fmt: skip
_SOURCES = (
    "cell/kernels.cpp", "cell/plan.cpp", "common/bump.cpp", "common/interrupt.cpp", "common/parallel.cpp",
    "common/profile.cpp", "machine/features.cpp", "machine/isa.cpp", "python/bind_cell.cpp", "python/bind_hooks.cpp",
    "python/frozen_step.cpp", "python/tensor_cell.cpp", "python/without_gil.cpp",
)  # fmt: skip
_BINDING = """
#include "python/bindings.h"
#include "watched.h"
PYBIND11_MODULE(_C, module) {
  rmc::register_cell(module);
  rmc::register_tensor_cell(module);
  rmc::register_frozen_step(module);
  rmc::register_hooks(module);
  module.def("touched", rmc::touched);
}
"""
#: What the standard library takes to parse, once.
_STANDARD = (
    "algorithm", "atomic", "cmath", "cstdint", "cstring", "memory", "stdexcept", "string", "utility", "vector",
)  # fmt: skip
_PRECOMPILED = "".join(f"#include <{name}>\n" for name in _STANDARD)
#: The kernels of one dtype; those of the other are there for the linker.
_KERNELS = """
#define RMC_ISA generic
#define RMC_SIMD "simd/generic.h"
#include "cell/hook_table.h"
#include "cell/table.h"
namespace rmc {{
const Kernels& kernels_generic{suffix}() {{
  static constexpr Kernels kernels = generic::table<generic::Vector<{type}>>();
  return kernels;
}}
const Kernels& kernels_generic{other}() {{ throw 0; }}
const Hooks& hooks_generic() {{ {hooks} }}
}}  // namespace rmc
"""
#: Of float32.
_HOOKS = "static constexpr Hooks hooks = generic::hook_table<generic::Vector<float>>(); return hooks;"


class DoesNotCompile(Exception):
    """The compiler refused a source."""


class Build:
    """Where mutants are built.

    Args:
        folder: for objects and modules; what is in it is used again.
        dtype: "float64" or "float32".
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self._folder, self._dtype = folder, dtype
        folder.mkdir(parents=True, exist_ok=True)
        self._removed_at_the_end = TemporaryDirectory(dir=folder)  # two runs may share the rest
        self._overlay = Path(self._removed_at_the_end.name)
        standard = self._write("standard.h", _PRECOMPILED)
        self._unchanged: dict[Path, bytes] = {}
        sources = [path for place in (CSRC, _WATCHED) for path in place.rglob("*.[hc]*")]
        newest = max(path.stat().st_mtime for path in (*sources, Path(__file__)))
        for optimise in ("-O0", "-O1"):
            to = folder / "standard.h.gch" / optimise  # the compiler takes the one that fits
            to.parent.mkdir(exist_ok=True)
            if not to.exists() or to.stat().st_mtime < newest:
                self._run(str(standard), to, optimise, "-xc++-header")
        wide = dtype == "float64"
        kernels = _KERNELS.format(
            type="double" if wide else "float", suffix="_double" * wide, other="_double" * (not wide),
            hooks="throw 0;" if wide else _HOOKS,
        )  # fmt: skip
        self._kernels = self._write(f"kernels_{dtype}.cpp", kernels)
        fixed = [self._kernels, self._write("binding.cpp", _BINDING), _WATCHED / "scratch.cpp"]
        self._fixed = {source: folder / f"{source.stem}.o" for source in (*fixed, *(CSRC / name for name in _SOURCES))}
        for source, to in self._fixed.items():
            if not to.exists() or to.stat().st_mtime < newest:
                self._compile(source, to, "-O0" if source.is_relative_to(folder) else "-O1")

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.write_text(text)
        return path

    def _compile(self, source: Path, to: Path, optimise: str = "-O0") -> None:
        self._run(str(source), to, optimise, "-include", str(self._folder / "standard.h"))

    def _run(self, source: str, to: Path, optimise: str, *more: str) -> None:
        folders = (self._overlay, _WATCHED, CSRC, pybind11.get_include(), sysconfig.get_path("include"))
        found = subprocess.run(
            ["c++", *_FLAGS, optimise, *(f"-I{folder}" for folder in folders), *more, "-c", source, "-o", str(to)],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if found.returncode:
            raise DoesNotCompile(next((line for line in found.stderr.splitlines() if "error" in line), found.stderr))

    def _changed(self, file: str, source: str) -> tuple[Path, Path]:
        """The translation unit that a changed file belongs to, and the object that it replaces."""
        relative = Path(file).relative_to("csrc")
        overlay = self._overlay / relative
        overlay.parent.mkdir(parents=True, exist_ok=True)
        overlay.write_text(source)
        unit = overlay if relative.suffix == ".cpp" else self._kernels
        return unit, self._fixed[CSRC / relative if relative.suffix == ".cpp" else self._kernels]

    def module(self, file: str, source: str) -> Path:
        """The extension module with `file`, relative to the repository, replaced by `source`.

        Raises:
            DoesNotCompile: the compiler refused it.
        """
        unit, replaced = self._changed(file, source)
        mutated, to = self._overlay / "mutated.o", self._overlay / "_C.so"
        try:
            self._compile(unit, mutated)
        finally:
            (self._overlay / Path(file).relative_to("csrc")).unlink()
        objects = [mutated, *(found for found in self._fixed.values() if found != replaced)]
        subprocess.run(["c++", "-shared", *map(str, objects), "-o", str(to), "-lpthread"], check=True)
        return to

    def same_code(self, file: str, source: str) -> bool:
        """Whether the optimising compiler makes the same of a changed file: an equivalent mutant."""
        original = (CSRC.parent / file).read_text()
        unit, _ = self._changed(file, original)
        if unit not in self._unchanged:
            self._unchanged[unit] = self._optimised(unit)
        self._changed(file, source)
        changed = self._optimised(unit)
        (self._overlay / Path(file).relative_to("csrc")).unlink()
        return changed == self._unchanged[unit]

    def _optimised(self, unit: Path) -> bytes:
        to = self._overlay / "optimised.o"
        self._compile(unit, to, "-O1")
        return to.read_bytes()

    def backend(self, module: Path) -> backends.Backend:
        """The CPU backend with that module in place of the extension, in this process."""
        spec = importlib.util.spec_from_file_location("rmc_kernels._C", module)
        assert spec is not None
        assert spec.loader is not None
        loaded: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        vars(cpu).update(_C=loaded, _KERNELS=[(self._dtype, "generic")])
        # Results are watched where Python allocates them: ordinary calls give C++ addresses, frozen steps tensors.
        vars(cpu).update(_TENSORS=cpu._tensors())
        vars(cpu).update(planned_cell=cache(lambda *key: cpu.PlannedCell(cpu.plan_cell(*key), None)))
        return backends.CpuBackend(isa="generic", test_double=True)

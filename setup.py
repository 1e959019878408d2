"""Builds the optional C++ extension through CMake; everything else is in pyproject.toml.

The extension needs neither torch nor a GPU. When it cannot be built the package is installed without it, and
its CPU backend is then unavailable: set RMC_EXTENSION=required to make that an error instead. Further CMake
arguments are taken from CMAKE_ARGS, and the compiler from CXX.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

#: As rmc_kernels/backends/extension.py has it.
REBUILD = "pip install --no-cache-dir --force-reinstall --no-deps ."
NOTICE = """
================================================================================================
rmc_kernels: the C++ extension was NOT built, because
    {reason}
The package works without it: the fused CPU backend is off, PyTorch and Triton backends are not
affected. To get it, install a C++17 compiler and run, in a checkout of rmc_kernels,
    {rebuild}
since pip keeps the wheel without it in its cache. `-v` shows the compiler's messages.
================================================================================================
"""


class BuildExtension(build_ext):
    """Configures and builds the CMake project, or leaves a working package without the extension."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._run_cmake(target)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("RMC_EXTENSION") == "required":
                raise
            # A stale binary beside newer sources would be worse than none.
            target.unlink(missing_ok=True)
            (ROOT / "rmc_kernels" / target.name).unlink(missing_ok=True)
            print(NOTICE.format(reason=_reason(error), rebuild=REBUILD), file=sys.stderr, flush=True)

    def _run_cmake(self, target: Path) -> None:
        import pybind11

        cmake, ninja = _tool("cmake"), _tool("ninja")
        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRMC_OUTPUT_DIR={target.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        had_cache = (build_dir / "CMakeCache.txt").exists()
        try:
            subprocess.run(configure, check=True)
        except subprocess.CalledProcessError:
            # A cache made by another checkout, compiler or (since deleted) isolated environment is of no use.
            if not had_cache:
                raise
            subprocess.run([*configure, "--fresh"], check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--target", "_C"], check=True)


def _tool(name: str) -> str:
    """Finds a build tool on PATH or, where an environment was not activated, beside its interpreter."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which(name) or shutil.which(name, path=scripts)
    if found is None:
        raise FileNotFoundError(f"{name} was found neither on PATH nor in {scripts}")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        step = "build" if "--build" in error.cmd else "configuration"
        return f"the CMake {step} failed (exit status {error.returncode}; its messages are above)"
    return f"{type(error).__name__}: {error}"


setup(
    packages=find_packages(include=["rmc_kernels", "rmc_kernels.*"]),
    ext_modules=[Extension("rmc_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)

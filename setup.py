"""Builds csrc/ into one plain shared library inside the package, and copies the page of errors into it; everything
else is in pyproject.toml.

No torch is needed: the library has a C interface and is called through ctypes, so a wheel serves every Python and
every torch. Without a compiler the install succeeds, and the first use of the 4-bit functions says that plain PyTorch
runs.
"""

from __future__ import annotations

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

NAME = "rankwise.ops.cpu._native"
ERROR_PAGE = "docs/errors.md"
# No contraction of a * b + c: the results equal PyTorch's to the bit.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
FAMILIES = ("level", "training")
LEVEL_FLAGS = {f"{family}_{level}": flags for family in FAMILIES for level, flags in LEVELS.items()}
for family in ("attention", "products"):
    LEVEL_FLAGS[f"{family}_avx2"] = LEVELS["avx2"]
    LEVEL_FLAGS[f"{family}_avx512_bf16"] = LEVELS["avx512_bf16"]
for family in ("attention", "products"):
    LEVEL_FLAGS[f"{family}_amx"] = [*LEVELS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
OPTIONAL = {"_avx512_bf16": "-mavx512bf16", "_amx": "-mamx-bf16"}
# Levels that an older compiler may lack; the one below takes their place.
SOURCES = ["native", "attention", "parallel", "products", "training"]
SOURCES += ["level_portable", "training_portable", *LEVEL_FLAGS]


class BuildNative(build_ext):
    """Each source with the flags of its instruction set; the file is called after the library, not after a Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dylib" if sys.platform == "darwin" else ".so")

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        # Any failure of any compiler means the same thing here: go on without the library, and say so.
        except Exception as error:  # noqa: BLE001
            self.warn(
                f"the native 4-bit kernels were not built ({error}). rankwise works without them, in plain PyTorch; "
                "for the fast ones install a C++17 compiler and install rankwise again."
            )

    def _build(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(
                f"only compilers that take GCC's options are supported, not {self.compiler.compiler_type}"
            )
        with ThreadPoolExecutor() as pool:
            objects = [one for made in pool.map(self._compile, SOURCES) for one in made]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-pthread"], target_lang="c++")

    def _compile(self, name: str) -> list[str]:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        flags = [*FLAGS, *(LEVEL_FLAGS.get(name, []) if x86 else [])]
        try:
            return self._object(name, flags)
        except CompileError:
            missing = next((flag for ending, flag in OPTIONAL.items() if name.endswith(ending)), None)
            if missing is None:
                raise
            self.warn(f"this compiler has no {missing}; the level below takes its place")
            return self._object(name, FLAGS)

    def _object(self, name: str, flags: list[str]) -> list[str]:
        return self.compiler.compile([f"csrc/{name}.cpp"], output_dir=self.build_temp, extra_postargs=flags)


class TagForEveryPython(bdist_wheel):
    """The library is bound to a platform, not to a Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class CarryErrorPage(build_py):
    """``rankwise explain`` prints sections of this page of the documentation; a checkout reads it where it lies."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(ERROR_PAGE, str(Path(self.build_lib, "rankwise", "errors.md")))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), ERROR_PAGE]


commands: dict[str, Any] = {"build_py": CarryErrorPage, "build_ext": BuildNative, "bdist_wheel": TagForEveryPython}
sources = [f"csrc/{name}.cpp" for name in SOURCES]
depends = [str(path) for path in sorted(Path("csrc").glob("*.h*"))]
setup(cmdclass=commands, ext_modules=[Extension(NAME, sources, depends=depends, optional=True)])

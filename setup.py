"""Builds csrc/ into one plain shared library inside the package; everything else is in pyproject.toml.

No torch is needed: the library has a C interface and is called through ctypes, so a wheel serves every Python and
every torch. Without a compiler the install succeeds, and the first use of the 4-bit functions says that plain PyTorch
runs.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NAME = "rankwise.ops.cpu._native"
FAMILIES = ("attention", "elementwise", "four_bit", "products")
# Besides the options of csrc/levels.txt.
FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-Icsrc"]
# Set where a wheel is built to be given to others: then nothing may be missing from the library.
STRICT = bool(os.environ.get("RANKWISE_REQUIRE_NATIVE"))
# Of `dev/wheels.py`: zig's program, and the platform tag of the wheel that it compiles for.
ZIG, PLATFORM = os.environ.get("RANKWISE_ZIG"), os.environ.get("RANKWISE_PLATFORM", "")
# Its name for each platform, with the oldest glibc and macOS; those of torch's own wheels.
TARGETS = {
    "manylinux_2_28_x86_64": "x86_64-linux-gnu.2.28",
    "manylinux_2_28_aarch64": "aarch64-linux-gnu.2.28",
    "win_amd64": "x86_64-windows-gnu",
    "macosx_14_0_arm64": "aarch64-macos.14.0",
    "macosx_14_0_x86_64": "x86_64-macos.14.0",
}
# Compiled once, for any processor of the platform.
PLAIN = ("common/huge_pages", "common/level", "common/parallel", *(f"{name}/{name}" for name in FAMILIES))


def read_levels() -> dict[str, tuple[list[str], list[str]]]:
    """Families and compiler options by instruction set. The name ``"every"`` has the options of all files."""
    lines = [line.split() for line in Path("csrc/levels.txt").read_text(encoding="utf-8").splitlines()]
    return {line[0]: (line[1].split(","), line[2:]) for line in lines if line and line[0] != "#"}


def zig_compiler(zig: str, folder: str) -> Any:
    """zig as the compiler for ``PLATFORM``. What the library needs of C++ becomes part of it."""
    # distutils is setuptools' own once setuptools is imported.
    from distutils.ccompiler import new_compiler

    compiler = new_compiler(compiler="unix")
    command = [zig, "c++", "-target", TARGETS[PLATFORM]]
    compiler.set_executables(**dict.fromkeys(("compiler_cxx", "compiler_so_cxx", "linker_exe_cxx"), command))
    named = {
        "win": [f"-Wl,--out-implib={folder}/native.lib"],
        # Else the library holds the path under which it was built.
        "mac": ["-Wl,-install_name,@rpath/_native.dylib"],
    }
    compiler.set_executables(linker_so_cxx=[*command, "-shared", "-s", *named.get(PLATFORM[:3], [])])
    return compiler


class BuildNative(build_ext):
    """Each source with the flags of its instruction set; the file is called after the library, not after a Python."""

    def get_ext_filename(self, fullname: str) -> str:
        system = PLATFORM or sys.platform
        suffix = ".dll" if system.startswith("win") else ".dylib" if system.startswith(("darwin", "macosx")) else ".so"
        return str(Path(*fullname.split("."))) + suffix

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        # Any failure of any compiler means the same thing here: go on without the library, and say so.
        except Exception as error:
            if STRICT:
                raise
            self.warn(
                f"the native 4-bit kernels were not built ({error}). rankwise works without them, in plain PyTorch; "
                "for the fast ones install a C++17 compiler and install rankwise again."
            )

    def _build(self, ext: Extension) -> None:
        if ZIG:
            self.compiler = zig_compiler(ZIG, self.build_temp)
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(
                f"only compilers that take GCC's options are supported, not {self.compiler.compiler_type}"
            )
        with ThreadPoolExecutor() as pool:
            objects = [one for made in self._compile(pool) for one in made]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-pthread"], target_lang="c++")

    def _compile(self, pool: Executor) -> list[list[str]]:
        levels = read_levels()
        _, every = levels.pop("every")
        if not (PLATFORM or platform.machine().lower()).endswith(("x86_64", "amd64")):
            levels = {"portable": levels["portable"]}
        begun = {
            name: [
                pool.submit(self._object, f"{family}/kernels", name, [*every, *flags, f"-DRW_ISA={name}"])
                for family in families
            ]
            for name, (families, flags) in levels.items()
        }
        made = [one.result() for one in begun.pop("portable")]
        has = []
        for name, kernels in begun.items():
            try:
                made += [one.result() for one in kernels]
                has.append(f"-DRW_HAS_{name}")
            except CompileError:
                if STRICT:
                    raise
                self.warn(f"this compiler cannot make code for {name}; the instruction sets before it take its place")
        return [*made, *pool.map(lambda name: self._object(name, "any", [*every, *has]), PLAIN)]

    def _object(self, name: str, level: str, flags: list[str]) -> list[str]:
        folder = str(Path(self.build_temp, level))
        return self.compiler.compile([f"csrc/{name}.cpp"], output_dir=folder, extra_postargs=[*FLAGS, *flags])


class TagForEveryPython(bdist_wheel):
    """The library is bound to a platform, not to a Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", PLATFORM or super().get_tag()[2]


commands: dict[str, Any] = {"build_ext": BuildNative, "bdist_wheel": TagForEveryPython}
sources = [f"csrc/{name}.cpp" for name in (*PLAIN, *(f"{family}/kernels" for family in FAMILIES))]
depends = [str(path) for path in (*sorted(Path("csrc").rglob("*.h*")), Path("csrc/levels.txt"))]
setup(cmdclass=commands, ext_modules=[Extension(NAME, sources, depends=depends, optional=not STRICT)])

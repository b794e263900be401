"""Make the sdist and a wheel for each platform, all on Linux with zig as the compiler, and check what is in them.

    python dev/wheels.py [PLATFORM ...]        # into dist/; every platform of setup.py by default

Needs the packages build, ziglang and lief, which `make wheels` installs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
# The libraries of each system that every installation of it has, as regular expressions.
SYSTEM = {
    "manylinux": r"(libc|libm|libpthread|libdl|ld-linux-[a-z0-9_-]+)\.so\.\d",
    "win": r"KERNEL32\.dll|api-ms-win-crt-[a-z0-9-]+\.dll",
    "macosx": r"@rpath/_native\.dylib|/usr/lib/libSystem\.B\.dylib",
}
SUFFIX = {"manylinux": ".so", "win": ".dll", "macosx": ".dylib"}
MOST_BYTES = 4 << 20
# What zig exports by itself: operator new and delete of its libc++, and names that its linker gives on macOS.
ZIGS_OWN = re.compile(r"_Z(nw|na|dl|da)|__dso_handle|_mh_dylib_header")
# A folder of a build: of a user, of the system's temporary files or of a runner.
BUILD_PATH = re.compile(rb"/(?:tmp|home|root|Users|build|work)/[\w.-]+/|csrc/\w+/\w+\.[ch]pp|zig-cache")


def main(platforms: list[str]) -> None:
    targets = targets_of_setup()
    if unknown := set(platforms) - set(targets):
        raise SystemExit(f"no such platform: {', '.join(sorted(unknown))}; there are {', '.join(targets)}.")
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT], check=True)
    sdist = max(DIST.glob("*.tar.gz"), key=lambda file: file.stat().st_mtime)
    for platform in platforms or targets:
        wheel = build(sdist, platform)
        problems = list(check(wheel, platform))
        print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB  {'; '.join(problems) or 'checked'}", flush=True)
        if problems:
            raise SystemExit(1)


def targets_of_setup() -> dict[str, str]:
    """zig's name of each platform, from setup.py."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = re.findall(r'^ {4}"(\w+)": "([\w.-]+)",$', text[text.index("TARGETS = {") :], re.MULTILINE)
    return dict(found)


def build(sdist: Path, platform: str) -> Path:
    import ziglang

    zig = str(Path(ziglang.__file__).with_name("zig"))
    environment = {**os.environ, "RANKWISE_ZIG": zig, "RANKWISE_PLATFORM": platform, "RANKWISE_REQUIRE_NATIVE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--no-cache-dir", "-w", folder, sdist], check=True, env=environment)
        (made,) = Path(folder).glob("*.whl")
        kept = DIST / made.name
        kept.write_bytes(made.read_bytes())
    return kept


def check(wheel: Path, platform: str) -> Iterator[str]:
    """What is wrong with a wheel, in words."""
    system = re.match("[a-z]+", platform)[0]
    if not wheel.name.endswith(f"-py3-none-{platform}.whl"):
        yield f"its tag is not py3-none-{platform}"
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
            yield "the licence is missing"
        binary = [name for name in names if re.search(r"\.(so|dll|dylib|lib|a|o|pyd)(\.|$)", name)]
        library = f"rankwise/ops/cpu/_native{SUFFIX[system]}"
        if binary != [library]:
            yield f"its binary files are {binary}, not {library} alone"
            return
        data = content.read(library)
    if len(data) > MOST_BYTES:
        yield f"the library has {len(data)} bytes, more than {MOST_BYTES}"
    if found := BUILD_PATH.search(data):
        yield f"the library names a path of the build, {found[0].decode(errors='replace')}"
    yield from check_library(data, platform)


def check_library(data: bytes, platform: str) -> Iterator[str]:
    import lief

    # It reports parts of Mach-O files that it cannot read.
    lief.logging.disable()
    parsed: Any = lief.parse(list(data))
    declared = set(re.findall(r"RW_EXPORT [\w ]+?\**(rw_\w+)\(", (ROOT / "csrc/rankwise_native.h").read_text("utf-8")))
    # Mach-O puts an underscore before each name.
    underscore = "_" if platform.startswith("macosx") else ""
    exported = {function.name.removeprefix(underscore) for function in parsed.exported_functions}
    exported = {name for name in exported if not ZIGS_OWN.match(name)}
    if exported != declared:
        yield f"the library exports other functions than rankwise_native.h: {sorted(exported ^ declared)}"
    system = next(name for name in SYSTEM if platform.startswith(name))
    needed = [one.name for one in parsed.imports] if system == "win" else parsed.libraries
    needed = [getattr(one, "name", one) for one in needed]
    if others := [name for name in needed if not re.fullmatch(SYSTEM[system], name)]:
        yield f"the library needs {', '.join(others)}"
    yield from {"manylinux": check_linux, "macosx": check_macos, "win": check_windows}[system](parsed, data, platform)


# Instruction sets by Linux's names, in the order of csrc/rankwise_native.h.
LEVELS = ("", "avx2", "avx_vnni", "avx512vl", "avx512_bf16", "amx_int8")


def check_levels(data: bytes) -> Iterator[str]:
    """On a processor that the library is for: it finds each instruction set that the kernel lists."""
    found = re.search(r"^flags\s*:(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(data)
        file.flush()
        usable = ctypes.CDLL(file.name).rw_levels()
    for number, flag in enumerate(LEVELS):
        if flag in flags and not usable >> number & 1:
            yield f"the library does not find the processor's {flag}"


def check_linux(parsed: Any, data: bytes, platform: str) -> Iterator[str]:
    oldest = version(re.search(r"(\d+_\d+)_", platform)[1].replace("_", "."))
    asked = {name.name for one in parsed.symbols_version_requirement for name in one.get_auxiliary_symbols()}
    if newer := sorted(name for name in asked if version(name.partition("_")[2]) > oldest):
        yield f"the library needs {', '.join(newer)}"
    machine = {"x86_64": "X86_64", "aarch64": "AARCH64"}[platform.partition("_")[2].split("_", 2)[2]]
    if parsed.header.machine_type.name != machine:
        yield f"the library is for {parsed.header.machine_type.name}"
    elif os.uname().machine == "x86_64" and platform.endswith("x86_64"):
        yield from check_levels(data)


def check_macos(parsed: Any, data: bytes, platform: str) -> Iterator[str]:
    _, major, minor, machine = platform.split("_", 3)
    if list(parsed.build_version.minos[:2]) != [int(major), int(minor)]:
        yield f"the library's oldest macOS is {parsed.build_version.minos}"
    if parsed.header.cpu_type.name != {"arm64": "ARM64", "x86_64": "X86_64"}[machine]:
        yield f"the library is for {parsed.header.cpu_type.name}"
    if machine == "arm64":
        yield from check_signature(parsed, data)


def check_signature(parsed: Any, data: bytes) -> Iterator[str]:
    """Apple's processors load no code without a signature: here an ad-hoc one, the hash of each page of the file."""
    if not parsed.has_code_signature:
        yield "the library is not signed"
        return
    place = parsed.code_signature.data_offset

    def number(offset: int, size: int = 4) -> int:
        return int.from_bytes(data[offset : offset + size], "big")

    # The first blob of the signature is the code directory (<kern/cs_blobs.h>: CS_CodeDirectory).
    directory = place + number(place + 16)
    if (number(place), number(directory)) != (0xFADE0CC0, 0xFADE0C02) or not number(directory + 12) & 2:
        yield "the library's signature is not an ad-hoc one"
        return
    hashes, count, limit = (number(directory + offset) for offset in (16, 28, 32))
    page = 1 << data[directory + 39]
    for index in range(count):
        kept = data[directory + hashes + 32 * index :][:32]
        if kept != hashlib.sha256(data[index * page : min((index + 1) * page, limit)]).digest():
            yield f"page {index} of the library is not the one that was signed"
            return


def check_windows(parsed: Any, data: bytes, platform: str) -> Iterator[str]:
    if parsed.header.machine.name != "AMD64":
        yield f"the library is for {parsed.header.machine.name}"


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


if __name__ == "__main__":
    main(sys.argv[1:])

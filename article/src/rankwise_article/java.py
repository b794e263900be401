"""Java programs of ``pycocoevalcap``: found without importing it, fed through pipes, never left running.

No temporary file is written. A process ends with the block that started it, and at the end of its input when this
process is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from rankwise.errors import DataError

PACKAGE = "pycocoevalcap"
TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"
METEOR_TABLE = "meteor/data/paraphrase-en.gz"
# UTF-8 and a decimal point whatever the user's locale says; one collector thread is enough.
OPTIONS = ("-Xmx2G", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-Duser.language=en")
PROBE_SECONDS = 60


def missing_java() -> str | None:
    """What METEOR and the tokenizer need that is missing here, and how to get it, as a clause; None if nothing is
    missing.
    """
    absent = [name for name in (TOKENIZER_JAR, METEOR_JAR, METEOR_TABLE) if not _file(name).is_file()]
    if absent:
        return f"{PACKAGE} is not installed; get it with `pip install pycocoevalcap`"
    java = _java()
    if java is None:
        return (
            "there is no `java` on the PATH; install a Java runtime, such as OpenJDK 17 (Debian: default-jre-headless)"
        )
    try:
        probe = subprocess.run([java, "-version"], capture_output=True, timeout=PROBE_SECONDS, check=False)
        works = probe.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return None if works else f"{java} does not run; install a Java runtime, such as OpenJDK 17"


def _java() -> str | None:
    home = os.environ.get("JAVA_HOME")
    return (home and shutil.which("java", path=str(Path(home) / "bin"))) or shutil.which("java")


def _file(name: str) -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0] if folders else PACKAGE) / name


class Program:
    """A running Java program: a line in, lines out."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self.name = name
        self._process = process
        self._errors = errors

    def tell(self, line: str) -> None:
        """Give one line. Raises DataError (RA237) when the program is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except OSError:
            raise self.crash() from None

    def read_line(self) -> str:
        """The next line of output. Raises DataError (RA237) when there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self.crash()
        return line.rstrip("\n")

    def filter(self, text: str) -> str:
        """The output for ``text`` as the whole input. Raises DataError (RA237) when the program fails."""
        output, _ = self._process.communicate(text)
        if self._process.returncode:
            raise self.crash()
        return output

    def crash(self) -> DataError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        reason = next((line.strip() for line in said if "Exception" in line or "rror" in line), "it said nothing")
        code = self._process.returncode
        return DataError(
            "RA237",
            f"the Java program {self.name} stopped before its work was done (exit code {code}: {reason[:200]}); run it "
            "again, with more free memory if that is what it lacks.",
        )


@contextlib.contextmanager
def java_program(name: str, jar: str, arguments: Sequence[str], *, seconds: float) -> Iterator[Program]:
    """Start ``java -cp jar arguments`` and end it with the block, or after ``seconds`` at the latest."""
    command = [str(_java()), *OPTIONS, "-cp", str(_file(jar)), *arguments]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            cwd=_file(jar).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        )
        watchdog = threading.Timer(seconds, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield Program(name, process, errors)
        finally:
            watchdog.cancel()
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            process.wait()

"""``read_rows``: a file, a folder, a hub id or the demo set, as ``Rows``.

Rows to evaluate on can be limited, and are compared with the training rows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rankwise.data.files import KINDS, kind_of, read_file, table_records
from rankwise.data.formats import Columns, Format, Record, rows_from_records
from rankwise.data.rows import NEVER, Problem, Row, Rows
from rankwise.errors import DataError, one_line, some_of, warn

if TYPE_CHECKING:
    from datasets import Dataset

# owner/name, owner/name:configuration, owner/name:split, owner/name:configuration:split; each may end with a slice.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?::([\w.-]+))?(?::([\w.-]+))?(\[[^\[\]]*\])?")
NAMED_FILES = 10
SPLIT_WORDS = {
    "train": ("train",),
    "validation": ("valid", "val", "dev", "eval"),
    "test": ("test",),
}


def read_rows(
    source: str | Path | Dataset | Sequence[Record],
    *,
    split: str = "train",
    prompt_column: str | None = None,
    completion_column: str | None = None,
    skip_bad_rows: int | None = NEVER,
    formats: Collection[Format] | None = None,
) -> Rows:
    """Read and check all rows of ``source``; up to ``skip_bad_rows`` bad ones (None: all) are left out with a warning.

    ``source`` is a .jsonl, .json, .csv, .tsv, .parquet or .txt file (also .gz); a folder of such files or one that
    ``datasets`` saved; a hub id; or ``stdlib``, the demo set. A hub id may name a configuration, a split and a slice:
    ``owner/name:configuration:train[:5%]``, or any of them. If it names no split, ``split`` chooses, as it does
    among a folder's parts; a single file is read whole. Rows in memory are a Dataset or a list of dicts. The layout is
    told by the columns (see ``docs/data.md``) unless both column names are given. ``formats``: other layouts than those
    of training data.

    Raises DataError: RW201 nothing there, RW202 unknown extension, RW203 bad rows by line or number, RW204 no rows,
    RW205 not UTF-8, RW206 damaged file, RW207 unknown columns, RW208 hub or split not available,
    RW209 files of different layouts in one folder.
    """
    columns = prompt_column, completion_column
    make = functools.partial(rows_from_records, columns=columns, skip_bad_rows=skip_bad_rows, formats=formats)
    if not isinstance(source, str | Path):
        return _in_memory(source, make)
    if str(source) == STDLIB:
        return stdlib_rows(split, formats, columns)
    check_there(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split, make)
    if path.exists():
        return _read_path(path, path.name, make)
    return _read_hub(str(source), split, make)


# ``rows_from_records`` with the caller's options.
Make = Callable[..., Rows]


def check_there(source: str | Path) -> None:
    """Raise DataError (RW201) if ``source`` must be a path and does not exist. Nothing is read."""
    name = str(source)
    is_path = kind_of(Path(name)) is not None or name.endswith(".gz") or not HUB_ID.fullmatch(name)
    if is_path and not Path(source).expanduser().exists():
        raise DataError("RW201", f"there is no file or folder {source}; check the path.")


def _read_path(path: Path, name: str, make: Make) -> Rows:
    content = read_file(path)
    return make(content.records, name, sha256=content.sha256, counted_in=content.counted_in)


def _read_folder(folder: Path, split: str, make: Make) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_saved(folder, split, make)
    parts: list[Rows] = []
    for file in _files_of_split(folder, split):
        # ``skip_bad_rows`` counts the bad rows of all files together.
        before = sum(len(part.problems) for part in parts)
        parts.append(_read_path(file, str(file.relative_to(folder)), functools.partial(make, bad_before=before)))
    formats = {part.format: part.source for part in parts}
    if len(formats) > 1:
        found = "; ".join(f"{source} is {name}" for name, source in formats.items())
        raise DataError("RW209", f"the files in {folder} have different layouts: {found}. Give one of them.")
    names_and_hashes = "\n".join(f"{part.source} {part.sha256}" for part in parts)
    return dataclasses.replace(
        parts[0],
        items=[row for part in parts for row in part],
        source=folder.name,
        sha256=hashlib.sha256(names_and_hashes.encode()).hexdigest(),
        problems=_numbered_on(parts),
    )


def _numbered_on(parts: Sequence[Rows]) -> tuple[Problem, ...]:
    """The bad rows of all files, numbered continuously."""
    problems: list[Problem] = []
    before = 0
    for part in parts:
        problems += [dataclasses.replace(item, index=before + (item.index or 0)) for item in part.problems]
        before += len(part) + len(part.problems)
    return tuple(problems)


def _files_of_split(folder: Path, split: str) -> Sequence[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and kind_of(file) and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise DataError("RW204", f"{folder} holds no data file ({', '.join(KINDS)}, also .gz).")
    # The split that the file's name gives, or else its nearest folder's.
    parts = {file: reversed(file.relative_to(folder).parts) for file in files}
    by_split = {file: next(filter(None, map(_split_of, names)), None) for file, names in parts.items()}
    if not any(by_split.values()):
        return files
    chosen = [file for file, name in by_split.items() if name == _split_of(split)]
    if not chosen:
        raise _no_split(folder, split, [str(file.relative_to(folder)) for file in files])
    if unnamed := [str(file.relative_to(folder)) for file, name in by_split.items() if name is None]:
        warn(
            "RW187",
            f"{folder} has files named after splits, and the others are left out: {some_of(unnamed, NAMED_FILES)}. "
            f"Name each after its split ({split}-more{kind_of(files[0])}), or give only that file.",
        )
    return chosen


def _no_split(folder: Path, split: str, held: Sequence[str]) -> DataError:
    option = {"train": "--data ", "validation": "--eval-data "}.get(split, "")
    return DataError(
        "RW208",
        f"{folder} has no split {split!r}; it holds {some_of(held, NAMED_FILES)}. To read one of them, give "
        f"{option}{folder / held[0]}.",
    )


def _split_of(name: str) -> str | None:
    """The split in a file name: ``trainset.csv`` is train, ``dev.jsonl`` is validation."""
    for split, words in SPLIT_WORDS.items():
        if re.search(rf"(^|[^a-z])({'|'.join(words)})", name.lower()):
            return split
    return None


def _read_saved(folder: Path, split: str, make: Make) -> Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError("RW206", f"cannot read {folder} as a saved data set: {one_line(error)}.") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise _no_split(folder, split, list(loaded))
        loaded = loaded[split]
    return _from_dataset(loaded, folder.name, make)


def _hub_parts(source: str, split: str) -> tuple[str, str | None, str]:
    """``owner/name:train[:5%]`` -> name, configuration and split, as ``datasets.load_dataset`` takes them.

    A single word behind the name is a split if it has a slice or one of the usual names, else a configuration.
    """
    found = HUB_ID.fullmatch(source)
    assert found is not None
    name, configuration, named, part = found.groups()
    if named is None and configuration is not None and (part or configuration in SPLIT_WORDS):
        configuration, named = None, configuration
    return name, configuration, f"{named or split}{part or ''}"


def _read_hub(source: str, split: str, make: Make) -> Rows:
    """The rows of a hub data set. ``datasets`` 4 and later runs no code of a repository and refuses loading scripts."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, configuration, split = _hub_parts(source, split)
    try:
        loaded = datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            "RW208",
            f"{source!r} is not a file or folder here, and the hub does not give its split {split!r}: "
            f"{one_line(error)}. Check the name and the network, or give a local file.",
        ) from None
    return _from_dataset(loaded, source, make)


IN_MEMORY = "the data in memory"


def records_in_memory(source: Any) -> list[Record]:
    """The rows of a Dataset or of a list of dicts. Raises DataError (RW202) for anything else."""
    import datasets

    is_list = isinstance(source, datasets.Dataset | list | tuple)
    records = list(source) if is_list else []
    odd = {type(record).__name__ for record in records if not isinstance(record, dict)}
    if odd or not is_list:
        kinds = " or ".join(sorted(odd)) or type(source).__name__
        raise DataError("RW202", f"rows in memory are a datasets.Dataset or a list of dicts, not {kinds}; give these.")
    return records


def _in_memory(source: object, make: Make) -> Rows:
    import datasets

    if isinstance(source, datasets.Dataset):
        return _from_dataset(source, IN_MEMORY, make)
    return make(enumerate(records_in_memory(source), 1), IN_MEMORY, counted_in="row")


def _from_dataset(dataset: Dataset, source: str, make: Make) -> Rows:
    return make(table_records(dataset.with_format("arrow")[:], source), source, counted_in="row")


EVAL_ROWS = 256
NAMED_ROWS = 5


def limited(rows: Rows, limit: int | None, usual: int = EVAL_ROWS) -> Rows:
    """The first ``limit`` rows (all for 0); by default ``usual`` ones spread evenly, because files are often sorted."""
    if limit is not None:
        return rows[:limit] if limit else rows
    if len(rows) <= usual:
        return rows
    warn(
        "RW528",
        f"each evaluation takes {usual} of the {len(rows):,} rows of {rows.source}, spread evenly; --eval-limit 0 "
        "takes all.",
    )
    chosen = [rows.items[number * len(rows) // usual] for number in range(usual)]
    return dataclasses.replace(rows, items=chosen)


def warn_of_overlap(train: Rows, evaluation: Rows, kind: str = "evaluation") -> int:
    """Count the rows of ``evaluation`` whose text is in ``train``, case and white space ignored, and name them in a
    warning (RW218)."""
    seen: dict[str, Row] = {}
    for row in train:
        seen.setdefault(_normalised(row), row)
    pairs = ((row, seen.get(_normalised(row))) for row in evaluation)
    twins = [(row, twin) for row, twin in pairs if twin is not None]
    if twins:
        named = "; ".join(f"{row.place} is {twin.place}" for row, twin in twins[:NAMED_ROWS])
        more = f"; and {len(twins) - NAMED_ROWS} more" if len(twins) > NAMED_ROWS else ""
        warn(
            "RW218",
            f"{len(twins)} of {len(evaluation)} {kind} rows are also in the training data, word for word "
            f"({named}{more}); their loss says nothing about new text.",
            stacklevel=3,
        )
    return len(twins)


def _normalised(row: Row) -> str:
    return " ".join(row.content().casefold().split())


# The demo data set, made from Python itself: what functions, classes and methods of the standard library do. The prompt
# is the signature in a short instruction. The completion is the first sentence of the docstring.

STDLIB = "stdlib"
SPLITS = {"train": False, "eval": True, "validation": True, "test": True}
# A tenth of the 256 values of a hash's first byte.
EVAL_BYTES = 26
SENTENCE_CHARACTERS = (12, 200)
SIGNATURE_CHARACTERS = 160
SENTENCE_END = re.compile(r"[.!?](?= [A-Z`'\"(]|$)")
# Written in Python or always built in, and quiet on import: nothing that opens windows, browsers or sockets, and
# nothing that a Python may have been built without (ssl, sqlite3, lzma, curses, tkinter). Not `inspect`: torch
# replaces one of its functions, and the rows must not depend on what else is loaded.
MODULE_NAMES = """
abc argparse array ast asyncio base64 bdb bisect builtins calendar cmath cmd code codecs codeop collections
collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg csv
dataclasses datetime decimal difflib dis doctest email.charset email.header email.headerregistry email.message
email.mime.base email.policy email.utils enum errno filecmp fileinput fnmatch fractions ftplib functools gc
getopt getpass gettext glob graphlib hashlib heapq hmac html html.parser http http.client http.cookiejar
http.cookies http.server imaplib importlib importlib.abc importlib.machinery importlib.metadata
importlib.resources importlib.util io ipaddress itertools json keyword linecache locale logging
logging.config logging.handlers mailbox marshal math mimetypes modulefinder multiprocessing.connection
multiprocessing.managers multiprocessing.pool multiprocessing.queues netrc ntpath numbers operator optparse os
pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile
pyclbr pydoc queue quopri random re reprlib rlcompleter runpy sched secrets select selectors shelve shlex shutil
signal smtplib socket socketserver stat statistics string stringprep struct subprocess symtable sys sysconfig
tabnanny tarfile tempfile textwrap threading time timeit token tokenize trace traceback tracemalloc types typing
unicodedata unittest unittest.mock urllib.error urllib.parse urllib.request urllib.response urllib.robotparser
uuid warnings wave weakref wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util xml.dom.minidom
xml.dom.pulldom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client
xmlrpc.server zipapp zipfile zipimport zoneinfo
"""


def stdlib_rows(
    split: str = "train", formats: Collection[Format] | None = None, columns: Columns = (None, None)
) -> Rows:
    """A tenth of the rows is ``split="eval"`` and the rest is ``"train"``. The split is by hash, and no sentence is in
    both.

    The same Python gives the same rows in the same order. Raises DataError: RW208 unknown split, RW204 when Python runs
    without docstrings (``-OO``), RW207 if ``formats`` have none for prompts with completions, or ``columns``
    names others.
    """
    if split not in SPLITS:
        raise DataError("RW208", f"the demo data has no split {split!r}; it has train and eval.")
    records = [
        (number, record)
        for number, record in enumerate(_unique(), 1)
        if (hashlib.sha256(record["completion"].encode()).digest()[0] < EVAL_BYTES) == SPLITS[split]
    ]
    return rows_from_records(records, STDLIB, formats=formats, columns=columns)


def _unique() -> Iterator[Record]:
    """The first row of each sentence. Twin modules (posixpath and ntpath) and aliases repeat sentences."""
    seen = set()
    for record in (record for name in MODULE_NAMES.split() for record in _module_records(name)):
        if record["completion"] not in seen:
            seen.add(record["completion"])
            yield record


def _module_records(name: str) -> Iterator[Record]:
    module = importlib.import_module(name)
    for member, value in sorted(_public(module, module.__dict__)):
        path = f"{name}.{member}" if name != "builtins" else member
        if inspect.isclass(value):
            yield from _records("class", path, value)
            for method, function in sorted(_public(module, value.__dict__)):
                yield from _records("method", f"{path}.{method}", function)
        elif inspect.isroutine(value):
            yield from _records("function", path, value)


def _public(module: ModuleType, members: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The members with a public name that this module defines itself."""
    names = module.__dict__.get("__all__")
    for name, member in members.items():
        if isinstance(member, classmethod | staticmethod):
            member = member.__func__
        exported = members is not module.__dict__ or names is None or name in names
        # Programs replace hooks (pytest does), and the rows must not depend on what else is loaded.
        fixed = not name.startswith("_") and not name.endswith("hook")
        if fixed and exported and _belongs(module, member):
            yield name, member


def _belongs(module: ModuleType, member: object) -> bool:
    """Whether the module defines the member. Members of its C accelerator (``_json``) count; imported ones do not."""
    home = getattr(member, "__module__", None)
    return home is None or home.lstrip("_").split(".")[0] == module.__name__.split(".")[0]


def _records(kind: str, path: str, value: object) -> Iterator[Record]:
    signature, sentence = _signature(value), _first_sentence(value)
    if signature and sentence:
        yield {"prompt": f"Say in one sentence what this Python {kind} does: {path}{signature}", "completion": sentence}


def _signature(value: object) -> str | None:
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
    except (ValueError, TypeError, NameError):
        # Some functions written in C tell no signature, and some annotations cannot be evaluated.
        return None
    # A default shown by its address differs from run to run, a path from machine to machine.
    usable = " at 0x" not in text and "='/" not in text and len(text) <= SIGNATURE_CHARACTERS
    return text if usable else None


def _first_sentence(value: object) -> str | None:
    documentation = value.__doc__
    if not isinstance(documentation, str):
        return None
    paragraph = " ".join(inspect.cleandoc(documentation).split("\n\n")[0].split())
    end = SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.start() + 1] if end else paragraph
    shortest, longest = SENTENCE_CHARACTERS
    # Signatures, lists and code are not sentences.
    is_prose = (
        sentence[:1].isupper()
        and " " in sentence
        and sentence[-1] != ":"
        and not re.search(r"->|>>>|::|\w\(.*\) ?[-=:]", sentence)
    )
    return sentence if is_prose and shortest <= len(sentence) <= longest else None

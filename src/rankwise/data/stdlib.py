"""The demo data set, made from Python itself: what functions, classes and methods of the standard library do.

The prompt is the signature in a short instruction. The completion is the first sentence of the docstring.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType

from rankwise.data.formats import Columns, Format, Record, rows_from_records
from rankwise.data.rows import Rows
from rankwise.errors import DataError

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

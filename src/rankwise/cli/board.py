"""``rankwise board``: a local page with the runs of a folder, live. The page itself is Gradio's (board_page.py)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import ipaddress
import os
import secrets
import threading
from pathlib import Path
from typing import Annotated

from pydantic import Field

from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output
from rankwise.errors import ConfigError, RunError
from rankwise.options import Panel, Settings, option

LOCALHOST = "127.0.0.1"
# The login name; the token is the password.
USER = "rankwise"
_option = functools.partial(option, Panel.OTHER)


class BoardSettings(Settings):
    """The options of ``rankwise board``."""

    runs: Annotated[Path, _option("Folder with runs and comparisons.", metavar="RUNS", argument=True)] = Path("runs")
    host: Annotated[
        str,
        Field(min_length=1),
        _option("Address to serve on. If other machines can reach it, the page asks for a password."),
    ] = LOCALHOST
    port: Annotated[int | None, _option("Port; default: the first free one from 7860.", ge=1, le=65535)] = None


def run(settings: BoardSettings, output: Output) -> Document:
    if not settings.runs.is_dir():
        raise RunError("RW797", f"there is no folder {settings.runs}; give the folder that holds your runs.")
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("RW795", 'rankwise board needs Gradio; run pip install "rankwise[board]".')
    # Disables Gradio's telemetry; read when Gradio is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from rankwise.cli.board_page import build, serve

    token = None if is_loopback(settings.host) else secrets.token_urlsafe(16)
    page = build(settings.runs)
    url = serve(page, settings.host, settings.port, (USER, token) if token else None)
    output.line(f"{'board':<12}{url}  (Ctrl-C ends it)")
    if token is not None:
        output.line(f"{'log in as':<12}{USER}, with the password {token}")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)
    return {"url": url, "runs": str(settings.runs)}


def is_loopback(host: str) -> bool:
    """Whether the address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


VERB = Verb(
    name="board",
    settings=BoardSettings,
    run=run,
    summary="Open a local page that shows runs live: curves, memory, samples, comparisons, a chat.",
    examples=("rankwise board", "rankwise board runs --port 8000"),
)

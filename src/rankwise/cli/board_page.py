"""The Gradio page of ``rankwise board``: its parts and their content."""

from __future__ import annotations

import functools
import html
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from rankwise.cli.conversations import Conversation
from rankwise.cli.generate import Speaker, base_model_name, load_speaker
from rankwise.cli.settings import GenerateSettings
from rankwise.data.rows import Message
from rankwise.errors import ConfigError, RankwiseError
from rankwise.foreign import Fields
from rankwise.records import record_of
from rankwise.reports.board import comparison_panel, find, overview, run_panels, style

REFRESH_SECONDS = 2.0
NONE = "(none)"
ADAPTER_FILE = "adapter_model.safetensors"
History = list[Message]


def serve(page: gr.Blocks, host: str, port: int | None, login: tuple[str, str] | None) -> str:
    """Serve the page in background threads. Returns its address. Raises ConfigError (RW796) where the port or host
    is taken.
    """
    try:
        _, local, _ = page.launch(
            server_name=host,
            server_port=port,
            auth=login,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            head=f"<style>{style()}</style>",
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        text = f"the board cannot be served on {host}, port {port or 'any'} ({reason}); give another --port or --host."
        raise ConfigError("RW796", text) from None
    return str(local)


def build(root: Path) -> gr.Blocks:
    with gr.Blocks(title="rankwise board", analytics_enabled=False) as page:
        gr.HTML(f"<h2>rankwise board: {html.escape(str(root))}</h2>")
        seen = gr.State("")
        with gr.Tab("Runs"):
            first, second = _chosen(root, seen)
        with gr.Tab("All runs"):
            table = _html("all-runs")
        with gr.Tab("Comparisons"):
            comparison = gr.Dropdown([NONE], value=NONE, label="Comparison", allow_custom_value=True)
            report = _html("comparison")
        with gr.Tab("Chat"):
            adapter = _chat(root)
        refresh = functools.partial(_refresh, root)
        menus = [first, second, comparison, adapter]
        inputs, parts = [*menus, seen], [*menus, table, seen]
        for event in (page.load, gr.Timer(REFRESH_SECONDS).tick):
            event(refresh, inputs, parts, show_progress="hidden", api_visibility="private")
        comparison.change(functools.partial(_report, root), comparison, report, api_visibility="private")
    return page


def _html(name: str) -> gr.HTML:
    """A component for HTML from `rankwise.reports.board`, which has its own style."""
    return gr.HTML(elem_id=name, apply_default_css=False)


def _chosen(root: Path, seen: gr.State) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Two runs side by side, one below the other on a narrow screen: their menus, and their panels below."""
    with gr.Row():
        first = gr.Dropdown([NONE], value=None, label="Run", allow_custom_value=True)
        second = gr.Dropdown([NONE], value=NONE, label="Beside it", allow_custom_value=True)
    panels = []
    with gr.Row():
        for name in ("first-run", "second-run"):
            with gr.Column(min_width=320):
                panels.append(_html(name))
    gr.on(
        [first.change, second.change, seen.change],
        functools.partial(_panels, root),
        [first, second],
        panels,
        # The last choice is drawn last, even if a run is writing meanwhile.
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )
    return first, second


def _refresh(root: Path, first: str, second: str, comparison: str, adapter: str, seen: str) -> list[Any]:
    """Updates of menus, table and state, if the folder has changed since ``seen``; else no updates.

    Menus are updated only if their names change, since an update closes an open menu.
    """
    runs, comparisons = find(root)
    names = [run.name for run in runs]
    tuned = [run.name for run in runs if (run.folder / ADAPTER_FILE).is_file()]
    listed = "\n".join([*sorted(names), "", *sorted(tuned), "", *comparisons, "", ""])
    now = listed + "\n".join(f"{run.name} {run.changed} {run.state.split()[0]}" for run in runs)
    if now == seen:
        return [gr.skip()] * 6
    menus = [gr.skip()] * 4
    if not seen.startswith(listed):
        first = first if first in names else next(iter(names), NONE)
        menus = [
            gr.update(choices=names or [NONE], value=first),
            gr.update(choices=[NONE, *names], value=second if second in names else NONE),
            gr.update(choices=[NONE, *comparisons], value=comparison if comparison in comparisons else NONE),
            gr.update(choices=tuned or [NONE], value=adapter if adapter in tuned else next(iter(tuned), NONE)),
        ]
    return [*menus, str(overview(runs)), now]


def _panels(root: Path, first: str, second: str) -> list[str]:
    """The HTML of two runs; empty for an unknown name."""
    found = {run.name: run for run in find(root)[0]}
    names = [name for name in (first, second) if name in found]
    panels = dict(zip(names, run_panels([found[name] for name in names])))
    return [str(panels.get(name, "")) for name in (first, second)]


def _report(root: Path, name: str) -> str:
    folder = find(root)[1].get(name)
    return "" if folder is None else str(comparison_panel(folder))


def _chat(root: Path) -> gr.Dropdown:
    """The chat, in which base and tuned model answer the same messages, each in its own conversation."""
    adapter = gr.Dropdown([NONE], value=NONE, label="Tuned by the run", allow_custom_value=True)
    with gr.Row():
        books = [gr.Chatbot(label=name, render_markdown=False, min_width=320, height=360) for name in ("base", "tuned")]
    said = gr.Textbox(label="Say something to both", lines=2, submit_btn="Ask both")
    ask = functools.partial(_ask, root)
    said.submit(ask, [adapter, said, *books], [said, *books], concurrency_limit=1, api_visibility="private")
    adapter.change(lambda: ([], []), None, books, api_visibility="private")
    return adapter


def _ask(root: Path, name: str, said: str, base: History, tuned: History) -> Iterator[tuple[str, History, History]]:
    found = {run.name: run for run in find(root)[0]}
    if name not in found or not said.strip():
        raise gr.Error("choose a run with an adapter and write something")
    base, tuned = ([*_plain(history), {"role": "user", "content": said}] for history in (base, tuned))
    yield "", base, tuned
    from rankwise.adapters import adapter_disabled

    try:
        with _LOCK:
            speaker = _speaker(found[name].folder, (found[name].folder / ADAPTER_FILE).stat().st_mtime_ns)
            tuned = [*tuned, {"role": "assistant", "content": _say(speaker, tuned)}]
            yield "", base, tuned
            with adapter_disabled(speaker.model):
                base = [*base, {"role": "assistant", "content": _say(speaker, base)}]
    except (RankwiseError, OSError) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None
    yield "", base, tuned


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=1)
def _speaker(adapter: Path, changed: int) -> Speaker:
    """The model of a run. Only the last one is cached, since loading takes seconds and gigabytes."""
    given = GenerateSettings.model_validate({"adapter": adapter})
    return load_speaker(given, base_model_name(adapter), record_of(adapter))[0]


def _say(speaker: Speaker, messages: History) -> str:
    # Without a chat template, a model answers single prompts only.
    return speaker.say(Conversation(tuple(messages if speaker.wording.chat else messages[-1:]))).text


def _plain(history: Sequence[Fields] | None) -> History:
    """Messages in the form of chat templates. Gradio gives the content as a list of parts."""
    return [{"role": item["role"], "content": _text(item["content"])} for item in history or []]


def _text(content: str | Sequence[str | Fields]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)

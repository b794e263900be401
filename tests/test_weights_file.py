"""safetensors headers are checked as hostile input: every kind of damage is one sentence with the file's name."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from damage import limited
from rankwise.errors import AdapterError, ModelError
from rankwise.weights_file import MAX_HEADER_BYTES, read_header, refuse_pickles, sha256_of, sha256_of_files


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
    "negative dimension": ({"a": entry(shape=[-2])}, "impossible shape"),
    "huge dimension": ({"a": entry(shape=[2**40, 2**40])}, "impossible shape"),
    "dimension that is not a number": ({"a": entry(shape=["2"])}, "impossible shape"),
    "true as a dimension": ({"a": entry(shape=[True, 2])}, "impossible shape"),
    "unknown dtype": ({"a": entry(dtype="F31")}, "not a safetensors dtype"),
    "shape against bytes": ({"a": entry(shape=[3])}, "takes 12"),
    "range backwards": ({"a": entry(offsets=[8, 0])}, "impossible byte range"),
    "range of three": ({"a": entry(offsets=[0, 4, 8])}, "impossible byte range"),
    "range past the end": ({"a": entry(shape=[4], offsets=[0, 16])}, "where its header promises"),
    "gap": ({"a": entry(shape=[1], offsets=[4, 8])}, "belong to no tensor"),
    "overlap": ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "over another tensor's bytes"),
    "bytes left over": ({"a": entry(shape=[1], offsets=[0, 4])}, "where its header promises"),
    "fields missing": ({"a": {"dtype": "F32"}}, "without dtype, shape and data_offsets"),
    "no object": ([1, 2], "not an object"),
    "cut JSON": (b'{"a": {', "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not a finite number"),
    "same name twice": (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "occurs twice"),
    "endless nesting": (b'{"a":' + b"[" * 100_000, "not valid JSON"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, "does not map text to text"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence_with_the_files_name(name: str, tmp_path: Path) -> None:
    header, expected = DAMAGE[name]
    path = write(tmp_path / "model.safetensors", header)

    with pytest.raises(ModelError, match=expected) as caught:
        read_header(path)

    assert caught.value.code == "RW306"
    assert "model.safetensors" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400 + len(str(path))


def test_truncated_file_says_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:1234])

    with pytest.raises(ModelError, match=f"is 1,234 bytes where its header promises {len(whole):,}; download it again"):
        read_header(path)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with limited(10), pytest.raises(ModelError, match="is not a regular file"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kept_bytes", [0, 3, 7, 8, 20])
def test_truncation_inside_the_header(kept_bytes: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"a": entry()})
    path.write_bytes(path.read_bytes()[:kept_bytes])

    with pytest.raises(ModelError, match=f"is {kept_bytes} bytes"):
        read_header(path)


def test_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")

    with pytest.raises(ModelError, match="claims a header of 100,000,001 bytes"):
        read_header(path)


def test_pickle_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(2)}, new)

    for path in (old, new):
        with pytest.raises(AdapterError, match="is a pickle") as caught:
            read_header(path, error=AdapterError, code="RW499")
        assert caught.value.code == "RW499"


def test_header_whose_length_starts_like_a_pickle_is_read(tmp_path: Path) -> None:
    text = json.dumps({"a": entry()}).encode()
    path = write(tmp_path / "model.safetensors", text.ljust(0x0280))

    assert list(read_header(path).tensors) == ["a"]


def test_git_lfs_pointer_names_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")

    with pytest.raises(ModelError, match="git lfs pull"):
        read_header(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no nowhere\.safetensors"):
        read_header(tmp_path / "nowhere.safetensors")


@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    content = bytearray(write(path, {"a": entry(), "bb": entry("U8", [3], [8, 11])}, b"\0" * 11).read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)

    try:
        stored_bytes = sum(info.end - info.begin for info in read_header(path).tensors.values())
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


def test_hashes_of_one_and_of_several_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")

    assert sha256_of(first) == hashlib.sha256(b"1").hexdigest() == sha256_of_files([first])
    assert sha256_of_files([first, second]) == sha256_of_files([second, first]) != sha256_of(first)

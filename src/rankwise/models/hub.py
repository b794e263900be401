"""Download models of the Hugging Face hub into snapshot folders, which get the same checks as any folder."""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import ModelError
from rankwise.models.folder import INDEX_FILE, WEIGHTS_FILE, weights_names
from rankwise.weights_file import PICKLE_SUFFIXES, pickle_refusal

# Configs and tokenizers, from the top folder only, since other folders hold copies for other runtimes.
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
CODE_FILES = ["*.py"]
OTHER_FOLDERS = ["*/*"]


def download(repo: str, *, revision: str | None, code: bool, weights: bool) -> Path:
    """The snapshot folder of ``repo``, named after its commit, with safetensors weights and never a pickle.

    Raises ModelError: RW313 the hub cannot be reached and the cache does not have it; RW314 unknown repository or
    revision; RW315 gated; RW307 the repository has pickled weights only.
    """
    folder = _snapshot(repo, revision, [*SMALL_FILES, *(CODE_FILES if code else [])])
    if not weights:
        return folder
    names = weights_names(folder) if (folder / INDEX_FILE).exists() else [WEIGHTS_FILE]
    # Fetched by commit, so that a push in between cannot mix two versions.
    _snapshot(repo, folder.name, names)
    if not any((folder / name).exists() for name in names):
        _explain_absent_weights(repo, folder.name)
    return folder


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_FOLDERS))
    except Exception as error:
        # The client raises its own exceptions, those of httpx and those of the system.
        raise _explained(error, repo, revision) from error


def _explained(error: Exception, repo: str, revision: str | None) -> ModelError:
    from huggingface_hub import constants, errors

    missing_folder = f"(and there is no folder {repo})"
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
            "unset it, or give a local folder.",
        )
    cause = error.__cause__ or error
    return ModelError(
        "RW313",
        f"{repo} cannot be fetched from {constants.ENDPOINT} ({type(cause).__name__}) {missing_folder}; "
        "check the network, or give a local folder.",
    )


def _explain_absent_weights(repo: str, commit: str) -> None:
    from huggingface_hub import HfApi

    try:
        names = [name for name in HfApi().list_repo_files(repo, revision=commit) if "/" not in name]
    except Exception as error:
        raise _explained(error, repo, commit) from error
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise ModelError(
            "RW305", f"{repo} holds GGUF files and no safetensors; download one ({ggufs[0]}) and give its path."
        )
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise pickle_refusal(repo, pickles)
    raise ModelError("RW305", f"{repo} holds no weights ({WEIGHTS_FILE} or {INDEX_FILE}); give another repository.")

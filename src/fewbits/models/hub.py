"""Models on the Hugging Face Hub: fetched into its cache, or found there when the Hub cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError

# What a model is read from; no other frameworks' weights, and (below) no folders with variants.
_WANTED = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
]
# Only where there are no safetensors: the same weights as pickles.
_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]
_UNWANTED = ["*/*", "consolidated*", "adapter_*"]


def fetch_model(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, subfolder: str = "", **options: Any
) -> Path:
    """The folder in the Hugging Face cache that holds the Hub model `name`, downloaded if need be.

    Pickles are fetched where the model has no safetensors; Python files only with `trust_remote_code`.

    Args:
        name: Its Hub id.
        revision: Branch, tag or commit.
        trust_remote_code: Fetch the Python files too.
        subfolder: The folder within the repository that holds the model.
        options: `cache_dir`, `force_download`, `local_files_only`, `token`: as the Hub's client takes them.

    Raises:
        FewbitsError: No such model, no right to it, or the Hub cannot be reached and the cache does not have it.
        OSError: The disk is full.
    """
    from huggingface_hub import snapshot_download

    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    prefix = f"{subfolder}/" if subfolder else ""

    def fetch(patterns: list[str]) -> Path:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[prefix + pattern for pattern in patterns],
            ignore_patterns=[prefix + pattern for pattern in _UNWANTED],
            **options,
        )
        return Path(folder) / subfolder

    with _told(name, revision):
        folder = fetch(wanted)
        return folder if any(folder.glob("*.safetensors")) else fetch(_PICKLES)


def fetch_config(name: str, *, revision: str | None = None) -> Path:
    """The folder in the Hugging Face cache that holds `config.json` of a Hub model; nothing else is downloaded.

    Raises:
        FewbitsError: As `fetch_model`, or the repository has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _told(name, revision):
        try:
            return Path(hf_hub_download(name, "config.json", revision=revision)).parent
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise FewbitsError(
                f"{name} has no config.json on the Hub; name the model that it was made from, or give its .gguf file"
            ) from error


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """Say what is wrong where the Hub's client raises."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reasons: dict[type[Exception], str] = {  # the first that fits; the classes derive from one another
        GatedRepoError: "asks for its terms to be accepted; do so on its page and log in with `hf auth login`",
        RepositoryNotFoundError: "is neither a file or folder here nor a public model on the Hub; check the spelling",
        RevisionNotFoundError: f"has no revision {revision!r} on the Hub; name a branch, tag or commit of it",
        HFValidationError: "is neither a file or folder here nor a Hub id (owner/name)",
        LocalEntryNotFoundError: "is no file or folder here nor in the Hugging Face cache, and the Hub cannot be "
        "reached; check the spelling or connect",
        HfHubHTTPError: "cannot be fetched from the Hub; try again later",
    }
    try:
        yield
    except tuple(reasons) as error:
        reason = next(reason for kind, reason in reasons.items() if isinstance(error, kind))
        raise FewbitsError(f"{name} {reason}") from error

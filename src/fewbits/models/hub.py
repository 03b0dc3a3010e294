"""Models on the Hugging Face Hub: fetched into its cache, or found there when the Hub cannot be reached."""

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

    try:
        folder = fetch(wanted)
        return folder if any(folder.glob("*.safetensors")) else fetch(_PICKLES)
    except tuple(reasons) as error:
        reason = next(reason for kind, reason in reasons.items() if isinstance(error, kind))
        raise FewbitsError(f"{name} {reason}") from error

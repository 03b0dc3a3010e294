from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from fewbits.errors import FewbitsError
from fewbits.models import hub
from fewbits.models.source import open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and a Hub that nothing reaches."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "model", ["missing/", "./missing", "/missing/model", "a/b/c", "missing.gguf", "owner/na me", "x\0y"]
)
def test_a_path_that_does_not_exist_is_named(cache: Path, model: str) -> None:
    with pytest.raises(
        FewbitsError, match=r"no such file or folder: .*; give a .gguf file, a folder with safetensors, or"
    ):
        open_source(model)


def test_an_empty_name_is_not_the_current_folder(cache: Path) -> None:
    with pytest.raises(FewbitsError, match=r"the model's name is empty; give a .gguf file"):
        open_source("")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    message = r"model.safetensors is not a GGUF file; give a .gguf file, or the folder that holds the safetensors"
    with pytest.raises(FewbitsError, match=message):
        open_source(tmp_path / "model.safetensors")


def test_a_path_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_source("~").tensors["a"].shape == (1,)


def test_a_hub_id_is_found_in_the_cache_when_offline(cache: Path) -> None:
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    save_file({"a": torch.ones(1)}, snapshot / "model.safetensors")
    assert open_source("owner/name").path == snapshot
    assert open_source("owner/name", revision=COMMIT).path == snapshot


@pytest.mark.parametrize("model", ["owner/name", "name"])
def test_a_hub_id_that_cannot_be_reached_is_refused(cache: Path, model: str) -> None:
    message = rf"^{model} is no file or folder here nor in the Hugging Face cache, and the Hub cannot be reached; check"
    with pytest.raises(FewbitsError, match=message) as caught:
        open_source(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, r"owner/name asks for its terms to be accepted; do so on its page and log in"),
        (errors.RepositoryNotFoundError, r"owner/name is neither a file or folder here nor a public model on the Hub"),
        (errors.RevisionNotFoundError, r"owner/name has no revision 'v9' on the Hub; name a branch, tag or commit"),
        (errors.HFValidationError, r"owner/name is neither a file or folder here nor a Hub id"),
        (errors.HfHubHTTPError, r"owner/name cannot be fetched from the Hub; try again later"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def answer(*_args: object, **_options: object) -> str:
        raise error.__new__(error)  # their constructors want a whole HTTP response

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    with pytest.raises(FewbitsError, match=message):
        open_source("owner/name", revision="v9")


SAFE = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
PICKLED = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
BESIDE = ["config.json", "tokenizer.json", "tokenizer_config.json"]
UNWANTED = ["onnx/model.onnx", "original/consolidated.00.pth", "consolidated.safetensors", "training_args.bin"]


def fetched(monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str], **options: bool) -> list[str]:
    """The names that are fetched from a repository with these files."""

    def download(_name: str, *, allow_patterns: list[str], ignore_patterns: list[str], revision: str | None) -> str:
        assert revision == "v9"
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (folder / file).touch()
        return str(folder)

    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.fetch_model("owner/name", revision="v9", **options) == folder
    return sorted(path.name for path in folder.iterdir())


def test_no_pickles_and_no_variants_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*SAFE, *PICKLED, *BESIDE, *UNWANTED, "modeling.py"]
    assert fetched(monkeypatch, tmp_path / "hub", files) == sorted([*SAFE, *BESIDE])


def test_pickles_are_fetched_where_there_is_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*PICKLED, *BESIDE, *UNWANTED]
    assert fetched(monkeypatch, tmp_path / "hub", files) == sorted([*PICKLED, *BESIDE])


def test_code_is_fetched_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*SAFE, *BESIDE, "modeling.py"]
    assert "modeling.py" in fetched(monkeypatch, tmp_path / "hub", files, trust_remote_code=True)

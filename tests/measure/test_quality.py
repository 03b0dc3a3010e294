import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.measure import quality
from fewbits.measure.peak import PeakMemory
from fewbits.measure.positions import standard_error
from fewbits.measure.quality import Reference, compare_models, kl_divergence
from fewbits.measure.scratch import roomy_folder
from fewbits.measure.text import token_windows

Model = Callable[..., SimpleNamespace]
TinyLlama = Callable[..., torch.nn.Module]


def model_with(probabilities: list[list[float]]) -> Model:
    """A model that gives these distributions [T, V] for every window, whatever the tokens."""

    def forward(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tensor(probabilities).log()[None])

    return forward


# Two positions, three tokens. By hand, with P = (1/2, 1/4, 1/4) and Q = (1/4, 1/4, 1/2):
# KL(P || Q) = 1/2 ln 2 + 0 + 1/4 ln 1/2 = 1/4 ln 2; at the second position P = Q and KL = 0.
P, Q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
WINDOW = torch.tensor([[0, 2]])


def test_kl_by_hand() -> None:
    _, found = compare_models(model_with([P, P]), model_with([Q, P]), WINDOW)
    assert found.kl == pytest.approx(math.log(2) / 8, rel=1e-6)
    # two blocks of one position, x and 0: their standard deviation is x/√2, the standard error of their mean x/2
    assert found.kl_stderr == pytest.approx(math.log(2) / 8, rel=1e-6)
    assert found.top1 == 0.5
    assert found.positions == 2


def test_kl_is_from_the_reference_to_the_candidate() -> None:
    certain, unsure = [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]
    _, found = compare_models(model_with([certain] * 2), model_with([unsure] * 2), WINDOW)
    assert found.kl == pytest.approx(math.log(2), rel=1e-6)
    _, found = compare_models(model_with([unsure] * 2), model_with([certain] * 2), WINDOW)
    assert found.kl == math.inf


def test_perplexity_counts_the_known_next_tokens_only() -> None:
    # the one known next token of [0, 2] is 2: P gives it 1/4, Q gives it 1/2
    reference, found = compare_models(model_with([P, Q]), model_with([Q, P]), WINDOW)
    assert reference.perplexity == pytest.approx(4.0)
    assert found.perplexity == pytest.approx(2.0)


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    windows = torch.randint(0, 10, (3, 7), generator=torch.Generator().manual_seed(0))
    reference, found = compare_models(model_with([[0.1] * 10] * 7), model_with([[0.1] * 10] * 7), windows)
    assert reference.perplexity == pytest.approx(10.0)
    assert (found.kl, found.kl_stderr, found.top1, found.positions) == (0.0, 0.0, 1.0, 21)


def test_a_model_that_gives_nan_has_nan_figures() -> None:
    _, found = compare_models(model_with([P, P]), model_with([[math.nan] * 3] * 2), WINDOW)
    assert math.isnan(found.kl)
    assert math.isnan(found.perplexity)


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 256 * 4, 1 << 20])
def test_rows_are_taken_in_chunks_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: TinyLlama, chunk_bytes: int
) -> None:
    reference, candidate = tiny_llama(0), tiny_llama(1)
    windows = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(quality, "_CHUNK_BYTES", chunk_bytes)
    own, found = compare_models(reference, candidate, windows)

    with torch.inference_mode():
        p, q = (model(input_ids=windows).logits.double().log_softmax(-1) for model in (reference, candidate))
    per_position = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(per_position.mean().item(), rel=1e-5)
    assert found.kl_stderr == pytest.approx(standard_error(per_position), rel=1e-5)
    assert torch.tensor(found.kls).allclose(per_position.float(), rtol=1e-4, atol=1e-6)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    for model, scores in ((own, p), (found, q)):
        loss = torch.nn.functional.nll_loss(scores[:, :-1].reshape(-1, 256), windows[:, 1:].flatten())
        assert model.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
        following = -scores[:, :-1].gather(-1, windows[:, 1:, None])[..., 0]
        assert [window[0] for window in model.losses] == [None, None]
        assert torch.tensor([window[1:] for window in model.losses]).allclose(following.float(), rtol=1e-5)
        assert model.perplexity_stderr == pytest.approx(loss.exp().item() * standard_error(following), rel=1e-4)


def test_one_reference_serves_several_candidates(tiny_llama: TinyLlama) -> None:
    windows = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []
    with Reference(tiny_llama(0), windows, lambda done, total: seen.append((done, total))) as reference:
        first = reference.measure(tiny_llama(1))
        itself = reference.measure(tiny_llama(0))
        assert reference.measure(tiny_llama(1)) == first
    assert seen == [(1, 2), (2, 2)]
    assert itself.kl == 0.0
    assert itself.perplexity == reference.quality.perplexity
    assert first.kl > 0.01


def test_low_precision_logits_are_measured_in_float32(tiny_llama: TinyLlama) -> None:
    windows = torch.randint(0, 256, (1, 10), generator=torch.Generator().manual_seed(0))
    _, found = compare_models(tiny_llama(0), tiny_llama(0).bfloat16(), windows)
    assert 0 < found.kl < 0.01


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(
        FewbitsError, match=r"^the vocabularies differ: 4 tokens in the candidate, 3 in the reference; "
    ):
        compare_models(model_with([P, P]), model_with([[0.25] * 4] * 2), WINDOW)


def test_too_little_room_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=23))
    with pytest.raises(FewbitsError, match=r"take 24 bytes, and .* has 23 free: set TMPDIR"):
        compare_models(model_with([P, P]), model_with([P, P]), WINDOW)


def test_a_disk_that_becomes_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("r+b", 0))  # noqa: SIM115
    with pytest.raises(
        FewbitsError, match=r"became full while the reference's log-probabilities were written: set TMPDIR"
    ):
        compare_models(model_with([P, P]), model_with([P, P]), WINDOW)


def test_the_file_goes_where_tmpdir_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert roomy_folder() in ("/var/tmp", tempfile.gettempdir())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert roomy_folder() == str(tmp_path)


def test_the_temporary_file_is_closed_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    files = []

    def recorded(**options: Any) -> object:
        files.append(original(**options))
        return files[-1]

    original = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", recorded)

    def broken(input_ids: torch.Tensor) -> SimpleNamespace:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reference(broken, WINDOW)
    assert files[0].closed


@given(st.lists(st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=2, max_size=2))
def test_kl_is_never_negative_beyond_rounding(logits: list[list[float]]) -> None:
    log_p, log_q = torch.tensor(logits).log_softmax(-1).split(1)
    # each log-probability is off by at most an ulp of its size (60 · 2⁻²³), and the weights add to 1
    assert kl_divergence(log_p, log_q).item() >= -60 * 2**-22
    assert kl_divergence(log_p, log_p).item() == 0.0


@pytest.mark.slow
def test_demo_model_has_the_published_perplexity() -> None:
    """SmolLM2-135M-Instruct in fp32: 16.634 on the built-in text of Python 3.11, if digits are not cut one by one.

    That figure was measured with the tokenizer that transformers makes of the GGUF file. The model itself cuts digits,
    as fewbits and llama.cpp do: more tokens, each easier.
    """
    import hashlib

    from transformers import AutoTokenizer as Theirs

    from fewbits.measure.text import built_in_text
    from fewbits.models.load import AutoModelForCausalLM, AutoTokenizer

    path = Path.home() / ".cache/fewbits/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip(f"{path} is absent: make demo fetches it")
    digest = hashlib.sha256(built_in_text().encode()).hexdigest()
    if not digest.startswith("621dd9979c0fa935"):
        pytest.skip("this Python's help topics are another text than Python 3.11.7's")
    model = AutoModelForCausalLM.from_pretrained(path, precision="fp32")
    tokenizers = {
        16.634: Theirs.from_pretrained(path.parent, gguf_file=path.name),
        16.193: AutoTokenizer.from_pretrained(path),
    }
    for perplexity, tokenizer in tokenizers.items():
        with Reference(model, token_windows(tokenizer)) as reference:
            assert reference.quality.perplexity == pytest.approx(perplexity, abs=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process begin its peak anew")
def test_memory_does_not_grow_with_the_text() -> None:
    """256 MiB of log-probabilities go through a file; in memory are some windows and chunks of 8 MiB."""
    logits = torch.randn(1, 64, 32768, generator=torch.Generator().manual_seed(0))
    windows = torch.zeros(32, 64, dtype=torch.int64)

    def model(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits + 1)

    memory = PeakMemory()
    assert memory.restart()
    compare_models(model, model, windows)
    assert memory.grown() < 150 << 20

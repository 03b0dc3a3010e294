from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.measure.speed import measure_speed

PROMPT = torch.arange(16)


class Recorded(torch.nn.Module):
    """A model that notes the calls made to another."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.device = torch.device("cpu")
        self.calls: list[tuple[list[int], int, dict[str, Any]]] = []

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, **options: Any) -> Any:
        output = self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)
        self.calls.append((input_ids[0].tolist(), logits_to_keep, options))
        return output


def test_reads_the_prompt_at_once_then_writes_the_greedy_tokens(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    recorded = Recorded(model)
    speed = measure_speed(recorded, PROMPT, new_tokens=5, repeats=2)
    assert speed.prefill > 0
    assert speed.decode > 0

    greedy = model.generate(PROMPT[None], max_new_tokens=5, min_new_tokens=5, do_sample=False)[0, 16:].tolist()
    one_run = [(PROMPT.tolist(), 1), *(([token], 0) for token in greedy)]
    assert [(ids, kept) for ids, kept, _ in recorded.calls] == one_run * 2


def test_the_best_run_counts(monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Any]) -> None:
    clock = iter([0.0, 4.0, 6.0, 10.0, 12.0, 20.0])  # prompts take 4 and 2 s, the 8 tokens after them 2 and 8 s
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    seen: list[tuple[int, int]] = []
    speed = measure_speed(
        tiny_llama(), PROMPT, new_tokens=8, repeats=2, progress=lambda done, total: seen.append((done, total))
    )
    assert speed.prefill == 16 / 2
    assert speed.decode == 8 / 2
    assert seen == [(1, 2), (2, 2)]


def test_a_model_without_a_cache_is_refused() -> None:
    class Forgetful(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 4), past_key_values=None)

    with pytest.raises(
        FewbitsError, match=r"^Forgetful returns no past_key_values: decode speed needs a key-value cache"
    ):
        measure_speed(Forgetful(), PROMPT)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT[:0], {}, "prompt tokens is 0: speed needs at least 1"),
        (PROMPT, {"new_tokens": 0}, "new_tokens is 0"),
        (PROMPT, {"repeats": 0}, "repeats is 0"),
    ],
)
def test_nothing_to_time(
    tiny_llama: Callable[..., Any], prompt: torch.Tensor, options: dict[str, int], message: str
) -> None:
    with pytest.raises(FewbitsError, match=message):
        measure_speed(tiny_llama(), prompt, **options)

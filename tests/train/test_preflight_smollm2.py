"""A real model: predicted under- and overflow is within 10 % of what a run in fp16 or fp8 counts, layer by layer."""

import os
from pathlib import Path

import pytest
from torch import nn

import fewbits
from fewbits import Recipe
from fewbits.measure.text import token_windows
from fewbits.train.preflight import preflight
from train.test_preflight import apart, counted, fixed, pairs

MODEL = Path(os.environ.get("FEWBITS_DEMO_MODEL", "~/.cache/fewbits/SmolLM2-135M-Instruct.Q4_1.gguf")).expanduser()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL} is not here: make demo fetches it"),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fewbits.AutoModelForCausalLM.from_pretrained(MODEL, precision="fp32").requires_grad_(True).train()


@pytest.mark.filterwarnings("ignore:recipe fp16. fp16 without loss scaling")
@pytest.mark.parametrize(
    ("recipe", "fewest"), [(fixed("fp16", 1.0), 200), (Recipe.named("fp8"), 50)], ids=["fp16", "fp8"]
)
def test_predicted_is_counted_in_smollm2(model: nn.Module, recipe: Recipe, fewest: int) -> None:
    """fp16 without loss scaling, so that there is much to count; 1,000 counts at least, as in the small tests."""
    windows = token_windows(fewbits.AutoTokenizer.from_pretrained(MODEL), None, 2, 128)
    batches = [{"input_ids": ids[None], "labels": ids[None], "use_cache": False} for ids in windows]
    told = preflight(model, batches, recipe)
    # The weights stay: embeddings that are exactly 0 would become subnormal by the first update.
    found = pairs(told, counted(model, batches, recipe, lr=0.0))
    assert len(found) > fewest
    assert apart(found) == []

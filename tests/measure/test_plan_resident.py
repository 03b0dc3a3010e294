"""The plan against what a process really holds, within 5 %."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

SCRIPT = Path(__file__).parents[2] / "benchmarks/bench_plan.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RSS after malloc_trim is measured on Linux")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_weights_and_cache_take_what_is_planned(precision: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(tmp_path)
    command = [sys.executable, str(SCRIPT), "--one", str(tmp_path), precision, "1024"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["plan_weights"] == pytest.approx(row["weights"], abs=1024)
    assert row["measured_bytes"] == pytest.approx(row["plan_bytes"], rel=0.05)

"""Fine-tune with the Trainer of transformers, matmuls in FP16, on any machine; two words differ from a plain Trainer.

python examples/trainer.py --out build/trainer
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from fewbits.train import MixedPrecisionTrainer

TEXT = b"Precision is a resource: spend it where the numbers need it, and save it where they do not. " * 40
LENGTH = 32


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="fp16", help="fp32, fp16, bf16 or fp8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    pieces = [list(TEXT[start : start + LENGTH]) for start in range(0, len(TEXT) - LENGTH, LENGTH)]
    trainer = MixedPrecisionTrainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            options.out, max_steps=options.steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=3e-3, max_grad_norm=1.0, logging_steps=5, save_steps=options.steps, disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=[{"input_ids": piece, "labels": piece} for piece in pieces],
        precision=options.precision,
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()

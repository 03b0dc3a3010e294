"""Train on several processes: fully_shard, FP16 matmuls, FP32 masters of which each process keeps a part.

    torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py --out build/fsdp2

Run it again with more steps: it goes on from the last checkpoint, with the same bits.
"""

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.train.sharded_checkpoint import load_sharded, save_sharded

TEXT = b"Precision is a resource: spend it where the numbers need it, and save it where they do not. " * 40
LENGTH = 32


def batch_of(step: int, rank: int, ranks: int) -> Tensor:
    """This process's part of the batch of a step: [8, LENGTH], a token for each byte."""
    data = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(step * ranks + rank)
    starts = torch.randint(0, len(data) - LENGTH, (8, 1), generator=generator)
    return data[starts + torch.arange(LENGTH)]


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    # transformers returns a view of its logits; nothing here changes it in place, of which torch warns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    distributed.init_process_group("gloo" if not torch.cuda.is_available() else None)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    mesh = init_device_mesh(device, (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after fully_shard: over the shards

    mp = fewbits.MixedPrecision(model, optimizer, "fp16")
    done = max((int(path.parent.name[5:]) for path in args.out.glob("step-*/.metadata")), default=0)
    if done:
        load_sharded(mp, args.out / f"step-{done}")
    for number in range(done + 1, args.steps + 1):
        tokens = batch_of(number, rank, ranks).to(device)
        with mp.forward():
            loss = model(input_ids=tokens, labels=tokens).loss
        mp.backward(loss)
        step = mp.step(max_grad_norm=1.0)
        if rank == 0:
            print(f"step {number}: loss {loss.item():.3f}, norm {step.grad_norm:.3f}, scale {step.loss_scale:g}")
    save_sharded(mp, args.out / f"step-{args.steps}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

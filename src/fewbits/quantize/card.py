"""The card of a model that a search wrote, ``README.md``: what it is, its numbers, who reads it.

What the original's card says is true of the original: it stands at the end, under a heading that says so, and of its
front matter the licence and the languages are taken over.
"""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import CardData

from fewbits.models.source import Source
from fewbits.quantize.found import Found
from fewbits.quantize.to_folder import FolderConversion

_TAKEN_OVER = ("license", "license_name", "license_link", "language")


def write_card(folder: Path, source: Source, name: str, job: FolderConversion, found: Found, allowed: str) -> None:
    """Write ``README.md``.

    Args:
        folder: The model's folder.
        source: What it was made from.
        name: The original's name: a Hub id, or that of a folder or file.
        job: How it was converted.
        found: What a search found.
        allowed: The precisions that it chose from, with commas between them.
    """
    original = _card_of(source)
    known = {} if original is None else vars(original.data)
    front: dict[str, Any] = {
        **{key: known[key] for key in _TAKEN_OVER if key in known},
        "base_model": name,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["fewbits", job.layout],
    }
    parts = [f"---\n{CardData(**front).to_yaml()}\n---\n", _body(name, job, found, allowed)]
    if original is not None and original.text.strip():
        said = original.text.strip()
        parts.append(f"## What the original's card says\n\nIt speaks of {name}, not of this model.\n\n---\n\n{said}\n")
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _card_of(source: Source) -> RepoCard | None:
    file = source.path / "README.md"
    if not source.path.is_dir() or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return RepoCard(text, ignore_metadata_errors=True)
    except ValueError:  # front matter that is no YAML
        return RepoCard(f"\n{text}", ignore_metadata_errors=True)


def _body(name: str, job: FolderConversion, found: Found, allowed: str) -> str:
    trial = found.trial
    layers = Counter(each.precision for each in found.assignment)
    counts = "\n".join(f"| {precision} | {count} |" for precision, count in layers.most_common())
    losses = [f"| KL to fp32 on text held out from calibration, nats/token | {trial.kl:.4f} |"]
    if trial.evaluated is not None:
        losses.append(f"| KL to fp32 on the evaluation text, nats/token | {trial.evaluated:.4f} |")
    return f"""# {name} in {trial.bits:.2f} bits per weight

Converted by [fewbits](https://pypi.org/project/fewbits/) under a contract, {found.contract}: the precision of each
layer was searched. `fewbits.json` says what each tensor became.

| | |
|---|---|
| bits per weight of the quantized layers, scales included | {trial.bits:.2f} |
| bytes of weights | {trial.nbytes:,} |
{chr(10).join(losses)}
| models that were written and checked | {len(found.tried)} |

| precision | layers |
|---|---|
{counts}

```sh
{_command(name, job, found, allowed)}
```

{_readers(job, layers)}
"""


def _command(name: str, job: FolderConversion, found: Found, allowed: str) -> str:
    contract = found.contract
    words = ["fewbits", "convert", name, "OUT", "--to", allowed, "--method", job.method.name]
    words += [] if contract.max_kl is None else ["--max-kl", f"{contract.max_kl:g}"]
    words += [] if contract.max_bytes is None else ["--max-size", str(contract.max_bytes)]
    words += ["--rotate"] if job.rotate else []
    words += [word for pattern in job.keep for word in ("--keep", pattern)]
    words += [] if job.calibrate is None else ["--calibrate", job.calibrate.name]
    return shlex.join(words)


def _readers(job: FolderConversion, layers: Counter[str]) -> str:
    if job.rotate:
        return (
            "Its weights are rotated, and what layers are given has to be rotated with them: only fewbits reads it, by "
            "`fewbits.AutoModelForCausalLM.from_pretrained(folder)`."
        )
    notes = [
        "fewbits runs each layer in its own precision; transformers reads the folder with the compressed-tensors "
        "package, and computes with the weights as 16- or 32-bit numbers; vLLM has the layout too. The numbers above "
        "are fewbits' own."
    ]
    if layers["int4"]:
        notes.append("Layers in int4 are given 8-bit activations by fewbits, and 16-bit ones by other readers.")
    return " ".join(notes)

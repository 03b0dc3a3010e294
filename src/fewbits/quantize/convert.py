"""Convert a model on disk to another precision: manifest first, then tensor by tensor from source to output.

Never more than one tensor is held, in the source's precision and in the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.models.filling import Progress
from fewbits.models.layouts import compressed_tensors
from fewbits.models.layouts.gguf import gguf_type
from fewbits.models.manifest import ManifestRow
from fewbits.models.quantized_source import as_weights
from fewbits.models.source import open_source
from fewbits.quantize.card import write_card
from fewbits.quantize.contract import Contract
from fewbits.quantize.conversion import Conversion
from fewbits.quantize.fold import fold
from fewbits.quantize.found import Found
from fewbits.quantize.method import Method
from fewbits.quantize.recipe import Recipe
from fewbits.quantize.search import Evaluate, search
from fewbits.quantize.sensitivity import Progress as SearchProgress
from fewbits.quantize.to_folder import FolderConversion
from fewbits.quantize.to_gguf import convert_to_gguf

GGUF = "gguf"


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str | Mapping[str, str] | Recipe | None = None,
    *,
    layout: str = "compressed-tensors",
    keep: Sequence[str] = (),
    rotate: bool = False,
    method: str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    max_kl: float | None = None,
    max_size: str | int | None = None,
    overflow: str | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_manifest: Callable[[Sequence[ManifestRow]], None] | None = None,
    on_block: Callable[[int, int], None] | None = None,
    on_search: SearchProgress | None = None,
    evaluate: Evaluate | None = None,
    on_found: Callable[[Path, Found], None] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a model in another precision.

    Args:
        source: Hub id, folder or ``.gguf`` file.
        out: The folder to write (of GGUF, the file); it appears when it is complete.
        to: ``int8`` (8-bit weights and activations), ``int8-weight``, ``int4``, ``fp8``, or a cast: ``bf16``, ``fp16``,
            ``fp32``; None: int8. In GGUF, int8 is Q8_0 and int4 Q4_0; its own types can be named too. Or a recipe:
            precisions by patterns of module names, ``{"*.mlp.*": "int4", "*": "int8"}``, of which the first that
            matches counts. With a contract (``max_kl``, ``max_size``) the precisions to choose from, with commas
            between them; None: all that the layout can say.
        layout: How it is written: ``compressed-tensors`` (transformers and vLLM read it), ``bitsandbytes``, ``gguf``.
        keep: Patterns of module names that are not quantized (``*`` matches anything).
        rotate: Rotate weights before they are quantized, which makes int8 and int4 several times as accurate; only
            fewbits reads such a folder. Without it, fewbits rotates the weights of int8 when it loads them.
        method: How codes and scales are found: ``absmax``, the usual one: nothing is clipped; ``mse``: scales with the
            least squared error; ``gptq``: what layers give on some text is kept, rather than their weights. Joined to
            it by ``+``, what is folded into neighbouring weights before: ``quarot`` rotates them, ``smoothquant`` evens
            out channels on that text. A folder of these is read by all readers.
        calibrate: A UTF-8 file with that text, which makes the method gptq; None: a built-in one.
        max_kl: The KL divergence from the model in fp32, nats per token, that the model may have: the cheapest
            precisions are searched layer by layer, as ``search`` tells, and nothing is written where none meets it.
        max_size: The most bytes of its weights, as ``3GiB``: the precisions of least loss are searched.
        overflow: What a cast does with values beyond the new format: ``saturate`` writes its largest number, ``ieee``
            Inf; None: Inf where the format has it, else its largest number. Such tensors are warned of by name.
        allow_nonfinite: Write NaN and Inf of the source as they are, in tensors that are not quantized.
        overwrite: Replace ``out`` if it holds a model.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run the model's own code, where transformers does not know its type.
        on_manifest: Called with the manifest before any work.
        on_block: Called with blocks calibrated and blocks in all.
        on_search: Called with what a search does, steps done, and steps in all.
        evaluate: Measures the KL of a written folder for a contract; None: a search uses the text it has held out.
        on_found: Called with the folder and what a search found, before the folder takes its place.
        progress: Called with bytes written and bytes in all.

    Raises:
        FewbitsError: If the source cannot be read or is quantized already, a name or pattern is unknown, a weight
            holds NaN or Inf, or ``out`` is not free.
        OSError: If the output cannot be written. Nothing is left behind then.
        KeyboardInterrupt: What is done is kept, as after a kill: the same conversion, run again, goes on there.
    """
    out = Path(out)
    if (max_kl is not None or max_size is not None) and layout != compressed_tensors.NAME:
        raise FewbitsError(
            f"max_kl, max_size: the layout {layout} has one precision for all layers, so there is nothing to search; "
            f"leave them out, or write {compressed_tensors.NAME}"
        )
    if layout == GGUF:
        to = "int8" if to is None else to
        if not isinstance(to, str):
            raise FewbitsError("to: a GGUF file has one type of matrices; give its name instead of a recipe")
        _refuse_for_gguf(to, keep, rotate, method or calibrate, overflow)
        opened = as_weights(open_source(source, revision=revision, trust_remote_code=trust_remote_code))
        return convert_to_gguf(opened, out, to, overwrite=overwrite, on_manifest=on_manifest, progress=progress)
    contract = Contract.of(max_kl, max_size)
    how = Method.named(method or ("absmax" if calibrate is None else "gptq"))
    text = None if calibrate is None else Path(calibrate)
    job = FolderConversion(layout, how, keep, rotate, text, overflow, allow_nonfinite)
    allowed = None if contract is None else job.allowed(to)
    to = "int8" if to is None else to
    wanted = to if isinstance(to, str) else Recipe.of(to)
    if allowed is None:
        job.precisions(wanted)  # what is wrong with them is found before a model is fetched
    opened = as_weights(open_source(source, revision=revision, trust_remote_code=trust_remote_code))
    opened = fold(opened, how, text, on_block)
    if contract is not None and allowed is not None:

        def finish(folder: Path, found: Found) -> None:
            name = str(source) if not Path(source).exists() else opened.path.name
            write_card(folder, opened, name, job, found, ",".join(each.name for each in allowed))
            if on_found is not None:
                on_found(folder, found)

        conversion, _ = search(
            opened, out, contract, allowed, job,
            overwrite=overwrite, finish=finish, evaluate=evaluate, on_manifest=on_manifest, progress=on_search,
        )  # fmt: skip
        return conversion
    return job.write(
        opened, out, wanted, overwrite=overwrite, on_manifest=on_manifest, on_block=on_block, progress=progress
    )


def _refuse_for_gguf(to: str, keep: Sequence[str], rotate: bool, method: object, overflow: str | None) -> None:
    gguf_type(to)
    if method is not None:
        raise FewbitsError("method: GGUF types have one way to find their codes; leave --method and --calibrate out")
    if rotate:
        raise FewbitsError("rotate: the layout gguf cannot say it; leave --rotate or --layout out")
    if keep:
        raise FewbitsError(f"keep: a GGUF file has one type of matrices; leave --keep out ({', '.join(keep)})")
    if overflow is not None:
        raise FewbitsError(f"overflow={overflow!r}: GGUF files are refused where values overflow; leave it out")

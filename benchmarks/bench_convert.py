"""What a conversion takes: seconds of its own work, and peak memory over the process that does it.

    python benchmarks/bench_convert.py SOURCE [--to int8] [--json FILE]

Each run is a fresh process that first imports everything (fewbits, torch, transformers and the model's code), then
notes its resident size, then converts. The seconds are those of the conversion alone, the best of the runs; the memory
is the highest resident size during it, less the size noted before, the worst of the runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

RUNS = 3


def main() -> None:
    """Parse, run the conversions, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a .gguf file, a folder, or a Hub id")
    parser.add_argument("--to", default="int8", help="the precision")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--one-run-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_run_into:
        print(json.dumps(convert_once(options.source, options.one_run_into, options.to)))
        return
    runs = [run_apart(options.source, options.to) for _ in range(options.runs)]

    from fewbits.measure.machine import this_machine  # after the runs: importing torch here would only take memory

    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": options.source,
        "to": options.to,
        "seconds": min(run["seconds"] for run in runs),
        "peak_over_baseline_bytes": max(run["peak_bytes"] - run["baseline_bytes"] for run in runs),
        "runs": runs,
        "machine": this_machine().to_json(),
    }
    peak, baseline = report["peak_over_baseline_bytes"] / 2**20, runs[0]["baseline_bytes"] / 2**20
    print(
        f"{options.source} to {options.to}: {report['seconds']:.2f} s (best of {len(runs)}), "
        f"peak memory {peak:.0f} MiB over a baseline of {baseline:.0f} MiB"
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def run_apart(source: str, to: str) -> dict[str, float]:
    """One conversion in a process of its own, into a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, source, "--to", to, "--one-run-into", str(Path(folder) / "out")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def convert_once(source: str, out: Path, to: str) -> dict[str, float]:
    """Import, note the resident size, convert; seconds and bytes."""
    import torch

    import fewbits
    from fewbits.measure.memory import peak_resident_bytes, resident_bytes
    from fewbits.models.architecture import empty_model
    from fewbits.models.source import open_source

    convert = fewbits.convert
    empty_model(open_source(source).config, torch.float32)  # imports the model's code, which is half of the imports
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of the imports
    baseline = resident_bytes()
    started = time.perf_counter()
    convert(source, out, to=to, overwrite=True)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "baseline_bytes": baseline, "peak_bytes": peak_resident_bytes()}


if __name__ == "__main__":
    main()

"""Make the gradients that the explore page shows before a file is chosen, from a report of `fewbits preflight`.

    fewbits preflight SmolLM2-135M-Instruct.Q4_1.gguf --steps 1 --length 128 --batch 2 --json preflight.json
    python tools/explore_gradients.py preflight.json

Of 241 matmuls it keeps the output head and some layers from first to last, so that the page stays small.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

OUT = Path(__file__).parents[1] / "src/fewbits/report/page/gradients.json"
KEPT = re.compile(r"lm_head|model\.layers\.(0|10|20|29)\.(self_attn\.[qvo]_proj|mlp\.(up|down)_proj)")
KINDS = ("gradient", "weight_gradient")


def main() -> None:
    """Read the report, write what the page holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    report = json.loads(parser.parse_args().report.read_text())
    rows = [row for row in report["modules"] if row["kind"] in KINDS and KEPT.fullmatch(row["name"])]
    keys = ("name", "kind", "exponents", "zeros", "largest")
    tokens = report["batch"] * report["length"]
    model = Path(report["model"]).name.removesuffix(".gguf")
    what = f"Built in: gradients of {model}, {report['steps']} step of {tokens} tokens in fp32, by fewbits preflight"
    made = {"what": what, "modules": [{key: row[key] for key in keys} for row in rows]}
    OUT.write_text(json.dumps(made, separators=(",", ":")) + "\n")
    print(f"{OUT.name}: {len(rows)} histograms, {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

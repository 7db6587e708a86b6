"""Writes requirements/cpu.txt: every package of a CPU environment by version and SHA-256.

``python -m tests.harden.lock REPORT`` takes what pip would install, as it reports it::

    pip install --dry-run --ignore-installed --report REPORT "torch==2.13.0+cpu" \
        --extra-index-url https://download.pytorch.org/whl/cpu -e ".[train,test,dev]"

so that the resolver and the hashes are pip's own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.harden.supply import LOCK

HEAD = """\
# Linux x86_64, Python 3.11, CPU. Written by python -m tests.harden.lock (its docstring has how).
# pip install --require-hashes -r requirements/cpu.txt
--extra-index-url https://download.pytorch.org/whl/cpu
"""


def locked(report: Path) -> str:
    """The lock of a report of pip; a ValueError where a package has no SHA-256."""
    lines = []
    for entry in json.loads(report.read_text())["install"]:
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        if "dir_info" in entry["download_info"]:  # the project itself
            continue
        digest = entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise ValueError(f"{report}: {name} {version}: no sha256")
        lines.append(f"{name.lower().replace('_', '-')}=={version} \\\n    --hash=sha256:{digest}")
    return HEAD + "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.write_text(locked(Path(sys.argv[1])))

from __future__ import annotations

import json
import subprocess
import sys

MIB = 2**20


def test_memory_is_bounded_whatever_the_scene() -> None:
    """320 MB of scene, 10,000 pixels wide: rows of tiles are held, not the scene."""
    command = [sys.executable, "-m", "tests.spectralx.prediction.memory", "--rows", "2000"]
    child = subprocess.run(
        [*command, "--bands", "8"], capture_output=True, text=True, check=False, timeout=600
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["scene"] > 300 * MIB
    # Neither torch's compiler nor Triton is loaded with a model.
    assert found["loaded"] - found["imported"] < 40 * MIB
    assert found["peak"] - found["before"] < 250 * MIB
    assert found["peak"] < 1500 * MIB

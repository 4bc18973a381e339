"""The public surface under senseless values, without the suite's run-time type checker: see
`senseless`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

LEAST_INPUTS = 1000


def test_every_value_gives_the_right_answer_or_an_error_of_ours() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.senseless"]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout or run.stderr
    found = re.fullmatch(
        r"(\d+) inputs, (\d+) arguments, 0 wrong", run.stdout.strip().splitlines()[-1]
    )
    assert found is not None
    assert int(found[1]) >= LEAST_INPUTS

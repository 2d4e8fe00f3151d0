"""The examples run, and the demo keeps its promise."""

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_random_walk(capsys):
    runpy.run_path(str(EXAMPLES / "random_walk.py"), run_name="__main__")
    out = capsys.readouterr().out
    gaps = [float(gap) for gap in re.findall(r"objective is (\S+)% above the optimum", out)]
    assert len(gaps) == 2
    assert max(gaps) < 1
    pictures = re.findall(r"wrote (\S+)", out)
    assert len(pictures) == 7
    assert all((EXAMPLES.parent / picture).stat().st_size > 10_000 for picture in pictures)

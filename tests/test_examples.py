"""The examples run, and keep their promises."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str], num_pictures: int) -> str:
    """What the example prints; its pictures are there, and not empty."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out = capsys.readouterr().out
    pictures = re.findall(r"wrote (\S+)", out)
    assert len(pictures) == num_pictures
    assert all((EXAMPLES.parent / picture).stat().st_size > 10_000 for picture in pictures)
    return out


def test_random_walk(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("random_walk.py", capsys, num_pictures=7)
    gaps = [float(gap) for gap in re.findall(r"objective is (\S+)% above the optimum", out)]
    assert len(gaps) == 2
    assert max(gaps) < 1


def test_influenza(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("influenza.py", capsys, num_pictures=3)
    inside = re.search(r"(\d+) of 14 days inside", out)
    assert inside is not None
    assert int(inside[1]) >= 10


def test_brock_hommes(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("brock_hommes.py", capsys, num_pictures=6)
    rows = re.findall(r"^    [gb][23] +(\S+) +(\S+) +(\S+) +\[", out, re.MULTILINE)
    assert len(rows) == 4
    # Four standard deviations of the posterior: one of the four beyond that would be rare.
    assert all(abs(float(mean) - float(true)) < 4 * float(sd) for true, mean, sd in rows)
    assert "does not reproduce (two-sided p < 0.02): skewness, excess_kurtosis" in out

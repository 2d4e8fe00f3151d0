"""What the shipped callbacks write and draw, read back by the programs that they write for."""

import base64
import csv
import gc
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import IPython.display
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from traitlets.config import Config

from pyrobirds import callbacks
from pyrobirds.callbacks import LivePlot, Log, Step, TensorBoard

SUFFIXES = (".csv", ".jsonl")


def make_step(step: int, **fields: Any) -> Step:
    """A step whose numbers say which one it is, and need all digits of a float."""
    numbers = Step(step, 100, step + 1 / 3, step / 7, step + 10 / 21, step / 3, 2.5, step / 11, step % 3, step / 13)
    return numbers._replace(**fields)


def run_through(callback: Any, steps: range, **fields: Any) -> None:
    for step in steps:
        callback(make_step(step, **fields))
    callback.close()


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def read(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        if path.suffix == ".csv":
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        return [json.loads(line, parse_constant=no_constant) for line in file]


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in read(path)]


# The log.


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_log_holds_every_field_of_every_step_in_full(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"fit{suffix}"
    run_through(Log(path), range(1, 6))
    assert [Step(**row) for row in read(path)] == [make_step(step) for step in range(1, 6)]
    assert os.listdir(tmp_path) == [path.name]


def test_csv_writes_what_is_not_finite_as_float_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "fit.csv"
    run_through(Log(str(path)), range(1, 2), smoothed=math.nan, grad_norm=math.inf, loss=-math.inf)
    (row,) = read(path)
    assert math.isnan(row["smoothed"])
    assert (row["grad_norm"], row["loss"]) == (math.inf, -math.inf)


def test_json_writes_what_is_not_finite_as_null(tmp_path: Path) -> None:
    path = tmp_path / "fit.jsonl"
    run_through(Log(path), range(1, 2), smoothed=math.nan, grad_norm=math.inf, loss=-math.inf)
    (row,) = read(path)
    assert [name for name, value in row.items() if value is None] == ["loss", "smoothed", "grad_norm"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_log_of_some_steps(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"fit{suffix}"
    run_through(Log(path, every=4), range(1, 14))
    assert steps_in(path) == [4, 8, 12]
    run_through(Log(path, every=4), range(8, 17))
    assert steps_in(path) == [4, 8, 12, 16]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("old", ["", "a letter to a friend", "step,num_steps\n1,2\n"])
def test_a_new_fit_overwrites_the_file(tmp_path: Path, suffix: str, old: str) -> None:
    path = tmp_path / f"fit{suffix}"
    path.write_text(old)
    run_through(Log(path, every=3), range(1, 8))
    assert steps_in(path) == [3, 6]
    run_through(Log(path), range(1, 3))
    assert steps_in(path) == [1, 2]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("lost", range(1, 30, 7), ids="{} characters of the last row lost".format)
def test_after_a_kill_and_a_resumption_each_step_is_logged_once(tmp_path: Path, suffix: str, lost: int) -> None:
    path = tmp_path / f"fit{suffix}"
    run_through(Log(path), range(1, 11), w=1.0)
    path.write_text(path.read_text()[:-lost])
    run_through(Log(path), range(6, 13), w=2.0)
    assert [(row["step"], row["w"]) for row in read(path)] == [
        (step, 1.0 if step < 6 else 2.0) for step in range(1, 13)
    ]
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_half_written_row_goes_even_if_its_step_is_not_done_again(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"fit{suffix}"
    run_through(Log(path), range(1, 6))
    path.write_text(path.read_text()[:-1])  # a row that looks complete may have lost digits
    run_through(Log(path), range(6, 8))
    assert steps_in(path) == [1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("left", [None, "", "step,num"], ids=["no file", "an empty file", "half a header"])
def test_a_resumed_fit_without_rows_to_keep(tmp_path: Path, suffix: str, left: str | None) -> None:
    path = tmp_path / f"fit{suffix}"
    if left is not None:
        path.write_text(left)
    run_through(Log(path), range(4, 6))
    assert steps_in(path) == [4, 5]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("text", ["Dear friend,\n", "[1, 2]\n", '{"epoch": 1}\n', "epoch,loss\n1,2\n", "\xff\n"])
def test_a_resumed_fit_refuses_a_file_that_is_no_log_and_leaves_it(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"fit{suffix}"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(
        ValueError, match=r"path must name the log of the fit that goes on at step 4, but .*fit\."
    ) as error:
        Log(path)(make_step(4))
    assert str(error.value).endswith("holds something else: move that away, or log to another file")
    assert path.read_text(encoding="latin-1") == text


def test_a_log_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.csv"
    run_through(Log(path), range(1, 6))
    before = path.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Log(path)(make_step(3))
    assert path.read_text() == before


def test_a_log_serves_one_fit_after_another(tmp_path: Path) -> None:
    path = tmp_path / "fit.csv"
    log = Log(path)
    log.close()
    assert not path.exists()
    run_through(log, range(1, 6))
    run_through(log, range(4, 8))
    log.close()
    assert steps_in(path) == [1, 2, 3, 4, 5, 6, 7]
    run_through(log, range(1, 2))
    assert steps_in(path) == [1]


def test_a_log_stays_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = Log("fit.csv")
    monkeypatch.chdir("/")
    run_through(log, range(1, 3))
    assert steps_in(tmp_path / "fit.csv") == [1, 2]


@pytest.mark.parametrize("name", ["fit.txt", "fit", "fit.csv.gz"])
def test_a_log_of_another_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"path must end in \.csv or \.jsonl, .* got '.*{name}'"):
        Log(tmp_path / name)


def test_a_log_in_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists: create '.*runs' first"):
        Log(tmp_path / "runs" / "fit.csv")


@pytest.mark.parametrize("make", [Log, TensorBoard])
def test_every_is_a_number_of_steps(tmp_path: Path, make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        make(tmp_path / "fit.csv", every=0)
    with pytest.raises(TypeError, match=r"every must be a whole number of at least 1, got 0\.5"):
        make(tmp_path / "fit.csv", every=0.5)


KILLED = """
import os, signal, sys
from pyrobirds.callbacks import Log, Step, TensorBoard
watchers = Log("fit.csv"), Log("fit.jsonl"), TensorBoard("board")
for step in range(1, 6):
    for watcher in watchers:
        watcher(Step(step, 100, 1.0, 2.0, 3.0, 3.0, 1.0, 1.0, 0, 0.5))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no kill -9")
def test_a_killed_process_loses_no_step(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for suffix in SUFFIXES:
        assert steps_in(tmp_path / f"fit{suffix}") == [1, 2, 3, 4, 5]
    assert steps_of(events(tmp_path / "board"), "objective/total") == [1, 2, 3, 4, 5]


# TensorBoard.


def events(log_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})  # 0: all of them
    return accumulator.Reload()


def steps_of(accumulator: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in accumulator.Scalars(tag)]


def test_tensorboard_shows_every_field_of_every_step(tmp_path: Path) -> None:
    run_through(TensorBoard(tmp_path / "new" / "board"), range(1, 6))
    read_back = events(tmp_path / "new" / "board")
    tags = {f"objective/{name}" for name in ("loss", "divergence", "total", "smoothed")}
    tags |= {f"fit/{name}" for name in ("w", "grad_norm", "num_failed", "seconds")}
    assert set(read_back.Tags()["scalars"]) == tags
    for tag in tags:
        expected = [(step, np.float32(getattr(make_step(step), tag.split("/")[1]))) for step in range(1, 6)]
        assert [(event.step, event.value) for event in read_back.Scalars(tag)] == expected


def test_tensorboard_leaves_out_nan_but_not_infinity(tmp_path: Path) -> None:
    run_through(TensorBoard(tmp_path), range(1, 3), loss=math.nan, grad_norm=math.inf)
    read_back = events(tmp_path)
    assert "objective/loss" not in read_back.Tags()["scalars"]
    assert [event.value for event in read_back.Scalars("fit/grad_norm")] == [math.inf, math.inf]


def test_tensorboard_of_some_steps(tmp_path: Path) -> None:
    run_through(TensorBoard(tmp_path, every=4), range(1, 14))
    assert steps_of(events(tmp_path), "fit/w") == [4, 8, 12]


@pytest.mark.parametrize("first", [1, 6])
def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path: Path, first: int) -> None:
    run_through(TensorBoard(tmp_path), range(1, 11), w=1.0)
    run_through(TensorBoard(tmp_path), range(first, 9), w=2.0)
    shown = [(event.step, event.value) for event in events(tmp_path).Scalars("fit/w")]
    assert shown == [(step, 1.0 if step < first else 2.0) for step in range(1, 9)]


def test_tensorboard_serves_one_fit_after_another(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.close()
    run_through(board, range(1, 6))
    run_through(board, range(4, 8))
    board.close()
    assert steps_of(events(tmp_path), "fit/w") == [1, 2, 3, 4, 5, 6, 7]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r'needs the package tensorboard: pip install "pyrobirds\[tensorboard\]"'):
        TensorBoard(tmp_path)


# The live plot.


@pytest.fixture
def shell(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InteractiveShell]:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    yield request.param.instance(config=Config({"HistoryManager": {"enabled": False}}))
    request.param.clear_instance()


notebook = pytest.mark.parametrize("shell", [InteractiveShell], indirect=True)
terminal = pytest.mark.parametrize("shell", [TerminalInteractiveShell], indirect=True)


def shown_in(shell: InteractiveShell, code: str, **names: Any) -> list[Any]:
    shell.push({"LivePlot": LivePlot, "run_through": run_through, **names})
    with capture_output() as captured:
        shell.run_cell(code).raise_error()
    assert captured.stderr == ""
    return captured.outputs


@notebook
def test_a_notebook_shows_one_picture_and_updates_it(shell: InteractiveShell) -> None:
    outputs = shown_in(shell, "run_through(LivePlot(seconds=0), range(1, 6))")
    assert [output.update for output in outputs] == [False, *[True] * 5]  # five steps, and the end
    assert len({output.transient["display_id"] for output in outputs}) == 1
    assert [output.data["text/plain"].split(":")[0] for output in outputs] == [
        f"step {step} of 100" for step in (1, 2, 3, 4, 5, 5)
    ]
    pictures = [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(output.data["image/png"])), format="png")
        for output in outputs
    ]
    for output, picture in zip(outputs, pictures, strict=True):
        size = output.metadata["image/png"]
        assert picture.shape[:2] == (2 * size["height"], 2 * size["width"])
    assert all((one != other).any() for one, other in pairwise(pictures[:5]))  # each step changes the picture
    blue = np.array([0x00, 0x72, 0xB2]) / 255
    assert (abs(pictures[-1][..., :3] - blue).max(-1) < 0.1).sum() > 100  # the loss is there


@notebook
def test_each_fit_has_a_picture_of_its_own(shell: InteractiveShell) -> None:
    outputs = shown_in(shell, "live = LivePlot()\nrun_through(live, range(1, 3))\nrun_through(live, range(1, 3))")
    assert [output.update for output in outputs] == [False, True, False, True]
    first, second = outputs[0].transient["display_id"], outputs[2].transient["display_id"]
    assert first != second


@notebook
def test_the_plot_is_there_to_look_at_after_the_fit(shell: InteractiveShell) -> None:
    live = LivePlot()
    assert shell.display_formatter.format(live)[0] == {"text/plain": "LivePlot of a fit that has not begun"}
    shown_in(shell, "run_through(live, range(1, 6))", live=live)
    assert shell.display_formatter.format(live)[0].keys() == {"text/plain", "image/png"}


@notebook
def test_a_plot_of_no_fit_shows_nothing(shell: InteractiveShell) -> None:
    assert shown_in(shell, "LivePlot().close()") == []


@notebook
def test_plots_leave_pyplot_alone_and_do_not_pile_up(shell: InteractiveShell) -> None:
    settings, figures, figures_in_memory = dict(plt.rcParams), plt.get_fignums(), count_figures()
    live = LivePlot(seconds=0)
    shown_in(shell, "run_through(live, range(1, 11))", live=live)
    assert dict(plt.rcParams) == settings
    assert plt.get_fignums() == figures
    assert count_figures() == figures_in_memory


def count_figures() -> int:
    gc.collect()
    return sum(type(thing) is Figure for thing in gc.get_objects())


@terminal
def test_a_terminal_gets_lines_of_text(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    run_through(LivePlot(seconds=1e9), range(1, 4), smoothed=math.nan)
    assert capsys.readouterr().out.splitlines() == [
        "step 1 of 100: total 1.476, loss 1.333, divergence 0.1429",
        "step 3 of 100: total 3.476, loss 3.333, divergence 0.4286",
    ]


def test_a_script_gets_lines_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    run_through(LivePlot(seconds=1e9), range(1, 4), loss=math.nan, divergence=math.nan, smoothed=1e6)
    assert capsys.readouterr().out.splitlines() == [
        "step 1 of 100: total 1.476, smoothed 1e+06",
        "step 3 of 100: total 3.476, smoothed 1e+06",
    ]


def test_the_plot_waits_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    now, shown = 0.0, []

    def show(live: LivePlot, **_: Any) -> None:
        nonlocal now
        now += 1.0  # a slow picture: the wait begins when it is drawn
        shown.append(repr(live).split(" of ")[0])

    monkeypatch.setattr(IPython.display, "display", show)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    live = LivePlot(seconds=1.5)
    for step in range(1, 8):
        live(make_step(step))
        now += 0.5
    assert shown == ["step 1", "step 4", "step 7"]
    live.close()
    assert shown == ["step 1", "step 4", "step 7", "step 7"]


def lines(live: LivePlot, last: Step) -> dict[str, Any]:
    (axes,) = live._figure(last).axes
    return {line.get_label(): line for line in axes.lines}


def test_the_plot_shows_the_terms_and_says_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    live, steps = LivePlot(), [make_step(step) for step in range(1, 21)]
    for step in steps:
        live(step)
    drawn = lines(live, steps[-1])
    names = {"total": "total", "total, smoothed": "smoothed", "loss": "loss", "divergence times w": "divergence"}
    assert list(drawn) == list(names)
    for label, name in names.items():
        assert drawn[label].get_xydata().tolist() == [[step.step, getattr(step, name)] for step in steps]
    assert drawn["total"].get_linewidth() < 1 < 2 < drawn["total, smoothed"].get_linewidth()
    figure = live._figure(steps[-1])
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "Step 20 of 100",
        "optimisation step",
        "objective",
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(names)


def test_the_plot_leaves_out_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    live = LivePlot()
    run_through(live, range(1, 4), loss=math.nan, divergence=math.nan)
    assert list(lines(live, make_step(3))) == ["total", "total, smoothed"]
    run_through(live, range(1, 4), loss=math.nan, divergence=math.nan, total=math.nan, smoothed=math.nan)
    assert live._figure(make_step(3)).legends == []


@pytest.mark.parametrize(
    ("totals", "scale"),
    [
        ([9.0, 2.0, 1.0, 1.0], "linear"),
        ([99.0, 2.0, 1.0, 1.0], "symlog"),
        ([-99.0, -2.0, -1.0, -1.0], "symlog"),
        ([math.inf, 2.0, 1.0, math.nan], "linear"),
        ([5.0, 0.0, 0.0, 0.0], "linear"),
        ([math.nan, math.nan], "linear"),
    ],
)
def test_an_outlier_does_not_flatten_the_rest(
    capsys: pytest.CaptureFixture[str], totals: list[float], scale: str
) -> None:
    live = LivePlot()
    for step, total in enumerate(totals, start=1):
        live(make_step(step, total=total))
    (axes,) = live._figure(make_step(4)).axes
    assert axes.get_yscale() == scale


def test_a_long_history_is_thinned_out_evenly(capsys: pytest.CaptureFixture[str]) -> None:
    live = LivePlot(seconds=1e9)
    for step in range(1, 30_001):
        live(make_step(step))
        assert len(live._steps) <= 2000
    drawn = lines(live, make_step(30_000))["total"].get_xdata()
    assert len(drawn) > 1000
    assert set(np.diff(drawn)) == {16}
    assert drawn[0] == 16
    assert drawn[-1] == 30_000
    live.close()
    live(make_step(1))
    assert lines(live, make_step(1))["total"].get_xdata().tolist() == [1]


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf])
def test_seconds_is_a_duration(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"seconds must be a finite number of at least 0, got {seconds}"):
        LivePlot(seconds=seconds)
    with pytest.raises(TypeError, match="seconds must be a number of at least 0, got '1'"):
        LivePlot(seconds="1")


def test_without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'needs the package IPython: pip install "pyrobirds\[notebook\]"'):
        LivePlot()

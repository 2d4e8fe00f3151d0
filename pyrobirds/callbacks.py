"""Watching a fit: what is known of a step, and callbacks that log it, send it to TensorBoard or draw it.

A callback is any callable that takes a :class:`Step`. ``fit(svi, ..., callbacks=(a, b))`` calls each one after every
step, and its method ``close``, if it has one, when the fit ends.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from pyrobirds import _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Step(NamedTuple):
    """What one step of a fit did.

    Attributes:
        step: its number, from 1.
        num_steps: how many steps the whole fit takes at most.
        loss: the expected loss; NaN with an ELBO that is not pyrobirds' own.
        divergence: the divergence from the prior, times ``w``; NaN likewise.
        total: the objective.
        smoothed: the median of the last totals, by which improvement is judged; NaN while there are too few of them.
        w: the weight of the divergence; NaN with an ELBO that is not pyrobirds' own.
        grad_norm: norm of the gradient over all parameters, before clipping; if it is not finite, the step was not
            taken.
        num_failed: how many runs of simulators failed.
        seconds: time since the fit began.

    Example:
        >>> def report(step: Step) -> None:
        ...     print(f"{step.step} of {step.num_steps}: {step.total}")
        >>> report(Step(3, 100, 50.5, 10.0, 60.5, 61.2, 100.0, 4.2, 0, 0.7))
        3 of 100: 60.5
    """

    step: int
    num_steps: int
    loss: float
    divergence: float
    total: float
    smoothed: float
    w: float
    grad_norm: float
    num_failed: int
    seconds: float


class _Format(NamedTuple):
    """How a log is written, in lines that each hold one step."""

    header: str
    row: Callable[[Step], str]
    step_of: Callable[[str], int]  # the number of the step that a row holds


def _csv_row(step: Step) -> str:
    return ",".join(map(str, step)) + "\n"


def _json_row(step: Step) -> str:
    row = {name: value if math.isfinite(value) else None for name, value in step._asdict().items()}
    return json.dumps(row) + "\n"


_FORMATS = {
    ".csv": _Format(",".join(Step._fields) + "\n", _csv_row, lambda row: int(row.split(",")[0])),
    ".jsonl": _Format("", _json_row, lambda row: int(json.loads(row)["step"])),
}


class Log:
    """Writes the steps of a fit to a file, one row each, which another program can read meanwhile.

    Rows are flushed as they come, so that a killed process loses none. A fit that begins anew overwrites the file. One
    that is resumed keeps the rows of the steps before its first, so that each step stands there once.

    Args:
        path: the file; its suffix says the format. ``.csv`` has a header; ``.jsonl`` has one JSON object a line, in
            which null stands for NaN and infinity.
        every: write the steps whose number is a multiple of it.

    Raises:
        ValueError: ``path`` ends in something else, ``every`` is below 1, or, at the first step of a resumed fit, the
            file holds no such log.
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        TypeError: ``every`` is no whole number.

    Example:
        >>> import csv, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "fit.csv"
        >>> log = Log(path)
        >>> log(Step(1, 100, 50.5, 10.0, 60.5, math.nan, 100.0, 4.2, 0, 0.7))
        >>> log.close()
        >>> with path.open() as file:
        ...     [row["total"] for row in csv.DictReader(file)]
        ['60.5']
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1) -> None:
        self._path = Path(path).absolute()
        if self._path.suffix.lower() not in _FORMATS:
            raise ValueError(f"path must end in .csv or .jsonl, which says the format of the log, got {str(path)!r}")
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"path must be in a folder that exists: create {str(self._path.parent)!r} first")
        if self._path.is_dir():
            raise IsADirectoryError(f"path must be that of a file, but {str(self._path)!r} is a folder")
        self._format = _FORMATS[self._path.suffix.lower()]
        self._every = _checks.positive_int("every", every)
        self._file: TextIO | None = None

    def __call__(self, step: Step) -> None:
        """Write a row."""
        if self._file is None:
            self._file = self._open(step.step)
        if step.step % self._every == 0:
            self._file.write(self._format.row(step))
            self._file.flush()

    def close(self) -> None:
        """Close the file; a further step opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, first: int) -> TextIO:
        kept = self._rows_before(first)
        # The rows that are kept must survive a kill at any moment, so they are never missing under the file's name.
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(self._format.header + "".join(kept))
        os.replace(temporary, self._path)
        return self._path.open("a")

    def _rows_before(self, first: int) -> list[str]:
        if first == 1 or not self._path.exists():
            return []
        try:
            text = self._path.read_text()
            text = text[: text.rfind("\n") + 1]  # a kill may have left half a row
            rows = text.removeprefix(self._format.header).splitlines(keepends=True)
            return [row for row in rows if self._format.step_of(row) < first]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"path must name the log of the fit that goes on at step {first}, but {str(self._path)!r} holds "
                "something else: move that away, or log to another file"
            ) from error


class TensorBoard:
    """Sends the steps of a fit to TensorBoard: ``tensorboard --logdir LOG_DIR`` shows them as they come.

    The tags are ``objective/loss``, ``objective/divergence``, ``objective/total`` and ``objective/smoothed``, and
    ``fit/w``, ``fit/grad_norm``, ``fit/num_failed`` and ``fit/seconds``. What is NaN is left out. A fit hides what the
    folder holds of its first step and later ones: a new fit all, a resumed one what it does again.

    Args:
        log_dir: the folder; created if need be.
        every: send the steps whose number is a multiple of it.

    Raises:
        ImportError: the package tensorboard is not installed.
        TypeError, ValueError: ``every`` is no whole number of at least 1.

    Example:
        >>> import tempfile
        >>> board = TensorBoard(tempfile.mkdtemp())
        >>> board(Step(1, 100, 50.5, 10.0, 60.5, math.nan, 100.0, 4.2, 0, 0.7))
        >>> board.close()
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, every: int = 1) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoard needs the package tensorboard: pip install "pyrobirds[tensorboard]"'
            ) from error
        self._make_writer = SummaryWriter
        self._log_dir = Path(log_dir).absolute()
        self._every = _checks.positive_int("every", every)
        self._writer: SummaryWriter | None = None

    def __call__(self, step: Step) -> None:
        """Send the step."""
        if self._writer is None:
            self._writer = self._make_writer(str(self._log_dir), purge_step=step.step)
        if step.step % self._every == 0:
            for name, value in step._asdict().items():
                if name in ("step", "num_steps") or math.isnan(value):
                    continue
                group = "objective" if name in ("loss", "divergence", "total", "smoothed") else "fit"
                self._writer.add_scalar(f"{group}/{name}", value, step.step)
            self._writer.flush()  # a killed process loses nothing

    def close(self) -> None:
        """Close the files; a further step opens new ones."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


# Okabe and Ito's colours, which colour-blind readers tell apart.
_BLACK, _GREY, _BLUE, _ORANGE = "#000000", "#767676", "#0072B2", "#E69F00"
_MAX_POINTS = 2000  # more than a screen shows


class LivePlot:
    """Draws the objective while a notebook waits for the fit, in one picture that is updated in place.

    The picture stays when the fit ends. Where pictures cannot be shown, a line of text takes its place. A long history
    is thinned out for drawing: memory and time do not grow with it.

    Args:
        seconds: update at most that often.

    Raises:
        ImportError: the package IPython is not installed.
        TypeError, ValueError: ``seconds`` is no finite number of at least 0.

    Example:
        >>> live = LivePlot()
        >>> live(Step(1, 100, 50.5, 10.0, 60.5, math.nan, 100.0, 4.2, 0, 0.7))
        step 1 of 100: total 60.5, loss 50.5, divergence 10
    """

    def __init__(self, *, seconds: float = 1.0) -> None:
        try:
            from IPython.display import display
        except ImportError as error:
            raise ImportError('LivePlot needs the package IPython: pip install "pyrobirds[notebook]"') from error
        self._display_new: Callable[..., Any] = display
        self._seconds = _checks.non_negative("seconds", seconds)
        self._last: Step | None = None
        self._running = False

    def __call__(self, step: Step) -> None:
        """Take the step into the picture, and show it if it is time."""
        if not self._running:
            self._begin()
        self._last = step
        if step.step % self._stride == 0:
            self._steps.append(step)
        if len(self._steps) > _MAX_POINTS:
            self._stride *= 2
            self._steps = [kept for kept in self._steps if kept.step % self._stride == 0]
        if time.monotonic() - self._shown_at >= self._seconds:
            self._show()

    def close(self) -> None:
        """Show the last step; a further one begins a new picture."""
        if self._running:
            self._show()
            self._running = False

    def _begin(self) -> None:
        self._running = True
        self._steps: list[Step] = []
        self._stride = 1  # how far apart the steps are that are kept
        self._shown_at = -math.inf
        self._handle: Any = None

    def _show(self) -> None:
        if self._handle is None:
            self._handle = self._display_new(self, display_id=True)
        else:
            self._handle.update(self)
        self._shown_at = time.monotonic()  # after drawing, so that slow drawing does not hold up the fit

    def __repr__(self) -> str:
        if self._last is None:
            return "LivePlot of a fit that has not begun"
        others = ((name, getattr(self._last, name)) for name in ("smoothed", "loss", "divergence"))
        shown = "".join(f", {name} {value:.4g}" for name, value in others if not math.isnan(value))
        return f"step {self._last.step} of {self._last.num_steps}: total {self._last.total:.4g}{shown}"

    def _repr_png_(self) -> tuple[str, dict[str, int]] | None:
        """What IPython shows: the picture, and its size in pixels of the screen, of which finer screens have more."""
        if self._last is None:
            return None
        png = io.BytesIO()
        figure = self._figure(self._last)
        figure.savefig(png, format="png", dpi=200)
        width, height = figure.get_size_inches()
        return base64.b64encode(png.getvalue()).decode(), {"width": int(100 * width), "height": int(100 * height)}

    def _figure(self, last: Step) -> Figure:
        # Here, so that fits without a picture need not wait for the import. Not from pyplot, which keeps figures alive.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        self._draw(axes)
        axes.set(title=f"Step {last.step} of {last.num_steps}", xlabel="optimisation step", ylabel="objective")
        if axes.lines:
            figure.legend(loc="outside lower center", ncols=4, frameon=False)
        return figure

    def _draw(self, axes: Axes) -> None:
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", integer=True)
        number = [step.step for step in self._steps]
        for name, label, colour, width, layer in (
            ("total", "total", _GREY, 0.6, 2.0),
            ("smoothed", "total, smoothed", _BLACK, 2.5, 2.2),
            ("loss", "loss", _BLUE, 0.6, 2.0),
            ("divergence", "divergence times w", _ORANGE, 1.5, 2.1),
        ):
            values = [getattr(step, name) for step in self._steps]
            if any(map(math.isfinite, values)):
                axes.plot(number, values, label=label, color=colour, linewidth=width, zorder=layer)
        sizes = sorted(abs(step.total) for step in self._steps if math.isfinite(step.total))
        if sizes and sizes[-1] > 10 * sizes[len(sizes) // 2] > 0:
            # A high start or an outlier would press the rest flat; below the median size the scale stays linear.
            axes.set_yscale("symlog", linthresh=sizes[len(sizes) // 2])
            axes.yaxis.set_major_formatter("{x:g}")

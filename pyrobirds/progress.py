"""How far a fit is: a bar in terminals and notebooks, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress

from tqdm.auto import tqdm

from pyrobirds.callbacks import Step

_SECONDS = 30.0  # between lines


class Progress:
    """Shows the terms of the last step, the lowest smoothed total (``best``) and for how many steps it has stood."""

    def __init__(self, num_steps: int, done: int, *, show: bool) -> None:
        self._show = show
        self._bar = tqdm(total=num_steps, initial=done, disable=not (show and has_bar()))
        self._num_steps = num_steps
        self._last_line = time.monotonic()
        self._text = ""

    def update(self, step: Step, best: float, stall: int) -> None:
        """Show a step, as long as there is something to show it on."""
        try:
            self._update(step, best, stall)
        except OSError:  # such as that of a pipe which nobody reads any more
            self._show = False

    def _update(self, step: Step, best: float, stall: int) -> None:
        terms = {"loss": step.loss, "reg": step.divergence, "total": step.total, "best": best}
        shown = {name: f"{value:.5g}" for name, value in terms.items() if math.isfinite(value)}
        shown["stall"] = str(stall)
        if step.num_failed:
            shown["failed"] = str(step.num_failed)
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif self._show:
            fields = ", ".join(f"{name} {value}" for name, value in shown.items())
            self._text = f"step {step.step}/{self._num_steps}, {step.seconds:.0f} s: {fields}"
            if time.monotonic() - self._last_line > _SECONDS:
                self._print()

    def close(self) -> None:
        """Show the last step, if it was not shown yet."""
        with suppress(OSError):
            self._bar.close()
            self._print()

    def _print(self) -> None:
        if self._text and sys.stderr is not None:
            print(self._text, file=sys.stderr, flush=True)
        self._text, self._last_line = "", time.monotonic()


def has_bar() -> bool:
    """Whether there is a terminal or a notebook to show a bar in."""
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return in_notebook or getattr(sys.stderr, "isatty", lambda: False)()

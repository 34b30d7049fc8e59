"""Long work says where it stands: on a terminal in one line, in a log file every few seconds."""

import sys
import time

from recsys.trainer import Progress


class Ticker:
    """Prints at most one line per interval."""

    def __init__(self, what: str, *, rows: str = "rows", interval_seconds: float | None = None) -> None:
        self.what, self.rows = what, rows
        self.live = sys.stderr.isatty()
        self.interval = interval_seconds if interval_seconds is not None else (0.2 if self.live else 10.0)
        self.last = time.perf_counter()
        self.started = self.last

    def on_step(self, at: Progress) -> None:
        """One training step."""
        if self._due(at.step == at.steps):
            self._print(
                f"epoch {at.epoch}/{at.epochs}  step {at.step:,}/{at.steps:,}  loss {at.loss:.4f}  "
                f"{at.rows_per_second:,.0f} rows/s  ETA {_clock(at.eta_seconds)}"
            )

    def on_rows(self, done: int, total: int) -> None:
        """Some rows more; none yet starts the clock, so that what was loaded before does not count."""
        if not done:
            self.started = time.perf_counter()
            return
        if self._due(done == total):
            rate = done / max(time.perf_counter() - self.started, 1e-9)
            self._print(
                f"{done:,}/{total:,} {self.rows}  {rate:,.0f} {self.rows}/s  ETA {_clock((total - done) / rate)}"
            )

    def close(self) -> None:
        """End the live line."""
        if self.live:
            print(file=sys.stderr)

    def _due(self, last: bool) -> bool:
        now = time.perf_counter()
        if now - self.last < self.interval and not last:
            return False
        self.last = now
        return True

    def _print(self, text: str) -> None:
        start, end = ("\r\x1b[K", "") if self.live else ("", "\n")
        print(f"{start}{self.what}: {text}", end=end, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"

"""What commands print on a terminal: tables, counters, remaining time, and failures.

Tables are results and go to stdout, everything else to stderr. Lines are overwritten only on a
terminal: if stderr is a file, counters print nothing, and the remaining time is printed once a
minute. `rich` is imported only when there is something to show, so that `--help` is instant.
"""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from daybreak import host
from daybreak.failure import BadRecipe, BadStorage, Failure

if TYPE_CHECKING:
    from daybreak.data.shards import Progress
    from daybreak.doctor import Finding

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
CLOSED = errno.EACCES  # this user may not open the file, or the folder it is in


def tables(shown: Iterable[tuple[Sequence[str], Sequence[Sequence[str]]]]) -> None:
    """Print tables, each with a head and lines; brackets in a cell are not markup."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    for head, lines in shown:
        rows = Table(*map(escape, head), box=None)
        for line in lines:
            rows.add_row(*map(escape, line))
        Console().print(rows)


def findings(found: "Iterable[Finding]") -> None:
    """Print what was found out about this machine, one line for each finding."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "slow": "yellow", "-": "dim"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for one in found:
        mark = f"[{colours[one.mark]}]{one.mark}[/]"
        table.add_row(mark, *map(escape, (one.name, one.value, one.remark)))
    Console().print(table)


def counter(verb: str) -> Callable[[int, int], None]:
    """Show a count on one line of a terminal; print nothing elsewhere."""

    def show(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{of} {verb} ", end="\n" if done == of else "", file=sys.stderr)

    return show


def remaining() -> "Callable[[Progress], None]":
    """Show the progress of `prepare`: on one line of a terminal, elsewhere once a minute."""
    start = told = time.monotonic()

    def show(now: "Progress") -> None:
        nonlocal told
        seconds, terminal = time.monotonic() - start, sys.stderr.isatty()
        if not terminal and time.monotonic() - told < 60:
            return
        told = time.monotonic()
        line = f"{now.read:,} read, {now.rejected:,} left out, {now.read / seconds:.0f}/s"
        if now.of and now.bytes:
            left = int(seconds * max(0, now.of / now.bytes - 1))
            clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            line += f", {min(1, now.bytes / now.of):.0%}, {clock} left"
        # The next line overwrites this one.
        print(f"\r\x1b[K{line}\r" if terminal else f"{line}\n", end="", file=sys.stderr, flush=True)

    return show


def clear() -> None:
    """Erase the last line that `remaining` has written."""
    if sys.stderr.isatty():
        print("\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def plain_failures() -> Iterator[None]:
    """Print a Failure as one sentence and exit with its code; other errors keep their traceback."""
    try:
        if sys.platform == "win32":
            raise BadRecipe("daybreak runs on Linux and macOS; on Windows, inside WSL")
        yield
    except Exception as error:
        many, code = host.processes() > 1, 1
        if isinstance(error, Failure):
            code = error.code
            print(f"daybreak: {error}", file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in {*FULL, CLOSED}:
            code, what = BadStorage.code, error.filename or "its output"
            verb = "read or write" if error.errno == CLOSED else "write"
            print(f"daybreak: cannot {verb} {what}: {error.strerror}", file=sys.stderr)
        elif many:
            traceback.print_exc()
        else:
            raise
        if many:
            _leave(code)
        raise SystemExit(code) from None


def _leave(code: int) -> NoReturn:
    """Exit at once: a normal exit of one of many processes would wait for the others, or abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

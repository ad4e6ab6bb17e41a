"""Failures that are not bugs of the program, and their exit codes.

Each message is one sentence that any user can act on: what is wrong, where, and how to fix it.
`daybreak` prints it without a traceback and exits with the code; anything else is a bug and keeps
its traceback (code 1).

    2   recipe, command line or run folder refused, before anything was touched
    3   data that cannot be used
    4   no run where one was named, or no good checkpoint, although one was needed
    5   the loss or its gradient stopped being finite
    6   the processes of a run lost one another; the same command continues
    7   storage: full, read-only, or failing
"""


class Failure(Exception):  # noqa: N818 - what it says, not what it is
    """A failure: one clear sentence, and the exit code of its kind."""

    code = 1


class BadRecipe(Failure):
    """The recipe, the command line or the run folder cannot be used as they are."""

    code = 2


class BadData(Failure):
    """A dataset is missing, empty or damaged."""

    code = 3


class NoCheckpoint(Failure):
    """A checkpoint is needed, but there is no run, or no checkpoint that can be trusted."""

    code = 4


class NotFinite(Failure):
    """Training met a NaN or an infinity."""

    code = 5


class LostPeer(Failure):
    """A process of the run is missing, hangs, died, or holds other weights than the rest."""

    code = 6

    def __init__(self, sentence: str, rank: int | None = None) -> None:
        super().__init__(sentence)
        self.rank = rank  # the process that caused it, if known


class BadStorage(Failure):
    """The disk is full, read-only or failing."""

    code = 7


def told(error: BaseException) -> str:
    """The first line of another library's error message; the error's type if it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

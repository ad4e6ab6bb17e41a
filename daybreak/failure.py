"""What can go wrong through no fault of the program, and the exit code that says so.

Each message is one sentence a stranger can act on: what is wrong, where, and how to mend it.
`daybreak` prints it without a traceback and leaves with the code; anything else is a bug and
keeps its traceback (code 1).

    2   recipe, command line or run folder refused, before anything was touched
    3   data that cannot be used
    4   no run where one was named, or no good checkpoint, although one was needed
    5   the loss or its gradient stopped being finite
    6   the processes of a run lost one another; the same command continues
    7   storage: full, read-only, or failing
"""


class Failure(Exception):  # noqa: N818 - what it says, not what it is
    """One clear sentence, and the exit code of its kind."""

    code = 1


class BadRecipe(Failure):
    """The recipe, the command line or the run folder cannot be used as they are."""

    code = 2


class BadData(Failure):
    """A dataset is missing, empty or damaged."""

    code = 3


class NoCheckpoint(Failure):
    """A run's checkpoint was asked for, and there is no run or none that can be trusted."""

    code = 4


class NotFinite(Failure):
    """Training met a NaN or an infinity."""

    code = 5


class LostPeer(Failure):
    """A process of the run is missing, hangs, died, or holds other weights than the rest."""

    code = 6

    def __init__(self, sentence: str, rank: int | None = None) -> None:
        super().__init__(sentence)
        self.rank = rank  # the one to blame, where that is known


class BadStorage(Failure):
    """The disk is full, read-only or failing."""

    code = 7


def told(error: BaseException) -> str:
    """The first line of what an error of another library says; its kind, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

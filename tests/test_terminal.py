"""What is done with a terminal, and with what is none."""

import os
import subprocess
import sys

import pytest

from daybreak import terminal

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_brackets_in_a_table_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.tables([(("recipe", "[b]"), [("sample.prompts=['x [/b]']", "[red]")])])
    said = capsys.readouterr().out
    assert "sample.prompts=['x [/b]']" in said
    assert "[red]" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("RuntimeError('no such luck')", 1, "RuntimeError: no such luck"),
        ("OSError(28, 'No space left on device', 'run/x')", 7, "daybreak: cannot write run/x: No "),
        ("OSError(13, 'Permission denied', 'a')", 7, "daybreak: cannot read or write a: Permis"),
        ("BadData('tooth.png is no picture')", 3, "daybreak: tooth.png is no picture"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_of_many_processes_leaves_at_once(error: str, code: int, said: str, ranks: int) -> None:
    lines = (
        "import atexit",
        "from daybreak import terminal",
        "from daybreak.failure import BadData",
        "atexit.register(print, 'took its time')",  # as a device that is broken
        f"with terminal.plain_failures(): raise {error}",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT | {"WORLD_SIZE": str(ranks)},
        check=False,
    )
    assert done.returncode == code
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    assert done.stdout == ("took its time\n" if ranks == 1 else "")

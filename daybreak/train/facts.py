"""What is known about a run besides its recipe: RUN/run.json.

Versions, precision, machine, arguments, code revision, sha256 of its data (train/runs writes them),
and the ledger (train/ledger).
"""

import json
from pathlib import Path
from typing import Any

from daybreak.failure import BadStorage


def read(run: Path) -> dict[str, Any]:
    """Read RUN/run.json; empty if it does not exist. Errors: BadStorage if it is damaged."""
    try:
        found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError) as error:
        raise BadStorage(
            f"{run / 'run.json'} is damaged ({error}): restore it, or remove it, and the run "
            "forgets what it has spent and which data it used"
        ) from error
    return found

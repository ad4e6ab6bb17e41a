"""The fault matrix: real faults, and what a run does about them (docs/reliability.md).

make test-faults        every row
make test               the rows and cases without the mark `fault`, a minute in one process
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.jobs import Place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the rows one after the other, in one process: they share what takes long to make."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("faults"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Where a run of the base recipe will be."""
    return Place(tmp_path / "job")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Place]:
    """The run that nothing happened to, by what is set otherwise; each is made once."""
    made: dict[tuple[tuple[str, ...], int], Place] = {}

    def reference(*sets: str, ranks: int = 1) -> Place:
        if (sets, ranks) not in made:
            place = Place(tmp_path_factory.mktemp("unbroken"))
            place.finish(*sets, ranks=ranks)
            made[sets, ranks] = place
        return made[sets, ranks]

    return reference


@pytest.fixture(scope="session")
def many_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 pictures, each with a caption of its own: two batches an epoch."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(48):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}")
    return folder

"""The suite: truth scores all, noise nothing, and shuffled prompts chance."""

import json
import signal

import numpy as np
import numpy.typing as npt
import pytest

from daybreak.data import scenes
from daybreak.data.scenes import Config
from daybreak.evaluate import scenes_suite
from daybreak.evaluate.scenes_checker import Marks, Verdict
from daybreak.evaluate.scenes_questions import TASKS, Item, held_out, tasks
from daybreak.evaluate.scenes_suite import evaluate, table
from daybreak.train import stop

Pictures = npt.NDArray[np.uint8]
pytestmark = pytest.mark.xdist_group("scenes_suite")  # one process makes what its tests share

SMALL = Config(canvas="32")


class Truth:
    """A model that draws what it is asked to, for it has seen the exam."""

    def __init__(self, config: Config, seed: int, per_task: int) -> None:
        items = [*tasks(config, seed, per_task), *held_out(config, seed, per_task)]
        self.pictures = {item.seed: scenes.render(item.scene) for item in items}

    def __call__(self, prompts: list[str], seeds: list[int]) -> Pictures:
        assert len(prompts) == len(seeds)
        return np.stack([self.pictures[seed] for seed in seeds])


def noise(prompts: list[str], seeds: list[int]) -> Pictures:
    return np.stack(
        [
            np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            for seed in seeds
        ]
    )


def first_half_red_circle(prompts: list[str], seeds: list[int]) -> Pictures:
    thing = scenes.Thing("circle", "red", None, 15.5, 15.5, 6.0)
    scene = scenes.Scene("32", (thing,), 90.0, scenes.Dice(0, 0, 0, 0, 0, 0))
    return np.stack([scenes.render(scene)] * len(prompts))


@pytest.fixture(scope="module")
def perfect() -> dict[str, object]:
    return evaluate(Truth(SMALL, 5, 40), SMALL, 5, 40)


def at(result: object, path: str) -> object:
    for key in path.split("."):
        assert isinstance(result, dict)
        result = result[key]
    return result


def test_a_model_that_draws_the_truth_scores_all(perfect: dict[str, object]) -> None:
    assert at(perfect, "overall.exact") >= 0.995  # type: ignore[operator]
    assert at(perfect, "controls.ground_truth.exact") >= 0.995  # type: ignore[operator]
    for split in ("H1", "H2", "H3", "H4"):
        assert at(perfect, f"held_out.{split}.exact") == 1
    for attribute in ("count", "colours", "shapes", "relation"):
        assert at(perfect, f"attributes.{attribute}.exact") == 1
    assert at(perfect, "product.position") == 1


def test_shuffled_prompts_score_near_chance(perfect: dict[str, object]) -> None:
    chance = [1 / 5, 1 / 32, 1 / 10, 1 / 31, 0, 0]
    shuffled = at(perfect, "controls.shuffled.exact")
    assert shuffled == pytest.approx(sum(chance) / 6, abs=0.05)


def test_noise_scores_nothing() -> None:
    result = evaluate(noise, SMALL, 0, 6)
    assert at(result, "overall.exact") == 0
    assert at(result, "overall.low") == 0


def test_always_the_same_circle_scores_where_it_is_asked_for() -> None:
    result = evaluate(first_half_red_circle, SMALL, 1, 40)
    assert at(result, "tasks.single.exact") == pytest.approx(0.2, abs=0.15)
    assert at(result, "tasks.position.exact") == 0
    assert at(result, "attributes.count.exact") == pytest.approx(2 / 6)


def test_a_result_is_json_with_the_promised_keys(perfect: dict[str, object]) -> None:
    result = json.loads(json.dumps(perfect, allow_nan=False))
    shares = [result["overall"], *result["controls"].values(), *result["attributes"].values()]
    shares += [*result["tasks"].values(), *result["held_out"].values(), *result["gaps"].values()]
    assert all(list(share) == ["exact", "low", "high", "n"] for share in shares)
    assert set(result["tasks"]) == set(TASKS)
    assert set(result["held_out"]) == set(SMALL.held_out)
    assert set(result["checker"]) == {"version", "thresholds"}
    assert result["prompts"] == len(result["items"]) == (6 + 4) * 40
    assert {"prompt", "task", "seed", "passed", "marks"} <= set(result["items"][0])


def test_the_truth_has_no_gap_confuses_nothing_and_is_drawn_cleanly(
    perfect: dict[str, object],
) -> None:
    for split in ("H1", "H2", "H3", "H4"):
        assert at(perfect, f"gaps.{split}.exact") == pytest.approx(0, abs=0.02)
        assert at(perfect, f"gaps.{split}.low") < 0 < at(perfect, f"gaps.{split}.high")  # type: ignore[operator]
    confusion = at(perfect, "confusion.model")
    assert isinstance(confusion, dict)
    assert set(confusion) == {"count", "shapes", "colours", "relation"}
    assert all(wanted in seen for table in confusion.values() for wanted, seen in table.items())
    assert sum(map(len, confusion["shapes"].values())) == 5
    assert confusion == at(perfect, "confusion.ground_truth")
    assert at(perfect, "fidelity.model") == at(perfect, "fidelity.ground_truth")
    assert at(perfect, "fidelity.model.psnr") > 30  # type: ignore[operator]
    assert at(perfect, "fidelity.model.leftover") == 0


def test_a_model_that_draws_the_held_out_pairs_as_others_falls_behind() -> None:
    truth = Truth(SMALL, 5, 15)
    for item in held_out(SMALL, 5, 15):
        if item.split == "H1":
            things = tuple(thing._replace(shape="circle") for thing in item.scene.things)
            truth.pictures[item.seed] = scenes.render(item.scene._replace(things=things))
    result = evaluate(truth, SMALL, 5, 15)
    gap = at(result, "gaps.H1.exact")
    assert gap == pytest.approx(1 - at(result, "held_out.H1.exact"), abs=0.03)  # type: ignore[operator]
    assert at(result, "gaps.H1.low") > 0.2  # type: ignore[operator]
    confusion = at(result, "confusion.model.shapes")
    assert isinstance(confusion, dict)
    assert all("circle" in seen for seen in confusion.values())


def test_what_is_noise_is_far_from_what_is_found_in_it() -> None:
    result = evaluate(noise, SMALL, 0, 6)
    assert at(result, "fidelity.model.psnr") < 15  # type: ignore[operator]


@pytest.mark.parametrize("task", ["tasks.size", "tasks.three", "held_out.H5", "gaps.H5"])
def test_what_a_canvas_cannot_draw_has_no_score(perfect: dict[str, object], task: str) -> None:
    assert at(perfect, task) == {"exact": None, "low": None, "high": None, "n": 0}


def test_checking_in_processes_changes_nothing() -> None:
    one = evaluate(Truth(SMALL, 2, 5), SMALL, 2, 5)
    two = evaluate(Truth(SMALL, 2, 5), SMALL, 2, 5, workers=2)
    assert one == two


def test_progress_ends_at_the_number_of_pictures() -> None:
    heard: list[tuple[int, int]] = []
    evaluate(noise, SMALL, 0, 7, progress=lambda done, of: heard.append((done, of)))
    assert heard == [(60, 70), (70, 70)]


def test_pictures_that_were_not_asked_for_stop_the_evaluation() -> None:
    def short(prompts: list[str], seeds: list[int]) -> Pictures:
        return noise(prompts, seeds)[1:]

    with pytest.raises(ValueError, match="asked for 60 pictures"):
        evaluate(short, SMALL, 0, 10)


def test_a_table_has_a_row_for_each_share(perfect: dict[str, object]) -> None:
    rows = table(perfect)
    assert rows[0][0] == "overall"
    assert rows[0][3] == "240"
    assert ("tasks: size", "-", "-", "0") in rows
    assert len(rows) == 1 + len(TASKS) + 5 + 2 + 4 + 1


def test_its_workers_do_not_hear_what_asks_to_stop() -> None:
    with scenes_suite._pool(2) as pool:
        with stop.deaf():
            asked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        assert set(stop.STOPS) <= set(asked.result())
    assert not set(stop.STOPS) & set(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def verdict(
    passed: bool,
    number: bool = True,
    colours: bool | None = True,
    shapes: bool = True,
    relation: bool | None = None,
) -> Verdict:
    return Verdict(passed, False, (), 0, Marks(number, colours, shapes, relation))


def test_attributes_are_multiplied_where_the_number_is_right_and_they_are_asked_for() -> None:
    seen = [
        verdict(True),
        verdict(False, colours=False),
        verdict(False, number=False, colours=False, shapes=False),
        verdict(False, number=False, colours=False, shapes=False),
    ]
    assert scenes_suite._product(seen) == pytest.approx(1 / 2 * 1 / 2)  # number, then colours


def width(rows: list[tuple[Item, Verdict]]) -> float:
    share = scenes_suite._mean(rows)
    assert share["low"] is not None
    assert share["high"] is not None
    return share["high"] - share["low"]


def test_pictures_of_one_specification_are_one_piece_of_evidence() -> None:
    items = [item for item in tasks(SMALL, 5, 24) if item.task == "position"]
    passed = [verdict(number < 12) for number in range(24)]
    alike = [
        item._replace(specification=items[number // 6].specification)
        for number, item in enumerate(items)
    ]
    apart, together = (list(zip(asked, passed, strict=True)) for asked in (items, alike))
    assert width(together) > 1.5 * width(apart)


def test_what_differs_between_tasks_and_never_within_one_is_no_doubt() -> None:
    asked = [item for item in tasks(SMALL, 5, 24) if item.task in ("position", "attribution")]
    rows = [(item, verdict(item.task == "position")) for item in asked]
    assert scenes_suite._mean(rows)["exact"] == 0.5
    assert width(rows) == 0

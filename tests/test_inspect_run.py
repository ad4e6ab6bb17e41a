"""What is shown of a run: its state in one sentence, its pictures, its curves, and nothing else."""

import base64
import io
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from daybreak import config
from daybreak.failure import NoCheckpoint
from daybreak.train import loop
from daybreak.web import run
from daybreak.web.curve import FRAME, Curve, curve
from tests import warm
from tests.pages import EVIL, Reader


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """A run that draws two prompts after steps 4, 8 and 10, and is measured there."""
    folder = tmp_path_factory.mktemp("told")
    recipe = folder / "tiny.toml"
    recipe.write_text(tiny_text.format(out=(folder / "run").as_posix()))
    sets = (
        "sample.every=4",
        f"sample.prompts={json.dumps(['a red circle', EVIL])}",
        "evaluate={every=4, pictures=32, suites=['validation'], best='validation.loss'}",
    )
    loop.train(config.load(recipe, sets), lambda line: None)
    return folder / "run"


@pytest.fixture
def begun(tiny: Path) -> Path:
    """A folder of a run without a step."""
    folder = tiny.parent / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text(config.dump(config.load(tiny)))
    return folder


def lines(file: Path, *rows: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step(number: int, **more: Any) -> dict[str, Any]:
    usual = {"loss": 0.5, "images": 8 * number, "images_per_second": 80.0}
    return {"step": number, "seconds": 3700.0, "memory_mib": 100, **usual, **more}


# The page


def test_the_page_stands_alone_and_can_be_read_by_everybody(trained: Path) -> None:
    page = run.page(run.read(trained))
    reader = Reader(page)
    assert reader.open == []
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert all(uri.startswith("data:image/webp;base64,") for uri in reader.attributes("img", "src"))
    assert not [name for _, found in reader.elements for name in found if name.startswith("on")]
    places = [found["id"] for _, found in reader.elements if "id" in found]
    assert {link.removeprefix("#") for link in reader.attributes("a", "href")} <= set(places)
    assert all(found["alt"] for tag, found in reader.elements if tag == "img")
    assert all(found["aria-label"] for tag, found in reader.elements if tag == "svg")


def test_each_prompt_is_a_row_and_each_step_that_drew_a_column(trained: Path) -> None:
    reader = Reader(run.page(run.read(trained)))
    for number in (4, 8, 10):
        assert f"step {number}" in reader.text
    assert len(reader.attributes("img", "src")) == 6
    assert len(set(reader.attributes("img", "src"))) > 2, "they differ"
    assert EVIL in reader.text


def test_a_prompt_that_is_new_has_no_picture_of_before(trained: Path, tmp_path: Path) -> None:
    for number in (4, 8):
        place = tmp_path / "samples" / f"step-{number:07d}"
        place.mkdir(parents=True)
        prompts = ["old", "kept"] if number == 4 else ["new", "kept"]
        rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
        (place / "prompts.json").write_text(json.dumps(rows))
        for picture in ("00.png", "01.png"):
            there = trained / "samples" / "step-0000004" / picture
            (place / picture).write_bytes(there.read_bytes())
    shown = list(run._shown(run._drawn(tmp_path)))
    assert [(one.prompt, [bool(uri) for uri in one.pictures]) for one in shown] == [
        ("new", [False, True]),
        ("kept", [True, True]),
    ]
    (tmp_path / "samples" / "step-0000008" / "00.png").write_bytes(b"half a picture")
    assert next(run._shown(run._drawn(tmp_path))).pictures == ["", ""]


def test_many_steps_are_shown_by_the_first_the_newest_and_some_between(tmp_path: Path) -> None:
    for number in range(1, 101):
        place = tmp_path / "samples" / f"step-{number:07d}"
        place.mkdir(parents=True)
        (place / "prompts.json").write_text("[]")
    drawn = [number for number, _ in run._drawn(tmp_path)]
    assert (len(drawn), drawn[0], drawn[-1]) == (run.COLUMNS, 1, 100)
    assert drawn == sorted(set(drawn))


def test_curves_and_scores_are_those_of_the_files(trained: Path) -> None:
    story = run.read(trained)
    assert [one.title for one in run._curves(story)] == ["loss", *run.LINES.values()]
    assert "validation.loss" in [one.title for one in run._measured(story)]
    lines(
        trained / "evaluation" / "scenes-steps20.json",
        {"values": {"exact": {"value": 0.75, "low": 0.7, "high": 0.8}, "odd": {"value": None}}},
    )
    way, score = run._scores(story)
    assert way.name == "during training, step 10"
    assert score == ("scenes-steps20", [("exact", "0.75", "0.7 to 0.8"), ("odd", "-", "")])


def test_the_best_checkpoint_is_told(trained: Path) -> None:
    story = run.read(trained)
    taken = {line["values"]["validation.loss"]["value"]: line["step"] for line in story.evaluations}
    assert run.told(story)["best checkpoint"] == str(taken[min(taken)])


def test_terms_of_a_loss_are_drawn_one_by_one(begun: Path) -> None:
    rows = [step(n, flow=0.4, lpips=0.1, norm=1.0, skipped=1, substituted=2) for n in (1, 2, 3)]
    lines(begun / "metrics.jsonl", *rows)
    titles = [one.title for one in run._curves(run.read(begun))]
    assert titles[:3] == ["loss", "flow", "lpips"]
    assert not {"skipped", "substituted"} & set(titles)


def test_the_verb_knows_a_run_from_a_dataset(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    done = warm.run("-m", "daybreak", "inspect", trained, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "It is finished after step 10 of 10: all steps are done." in done.stdout
    assert done.stdout.splitlines()[-1] == f"page: {out}"
    assert "It is finished" in out.read_text()
    assert not (trained / "inspect.html").exists()
    with pytest.raises(NoCheckpoint):
        run.read(tmp_path)
    refused = warm.run("-m", "daybreak", "inspect", trained / "latest")
    assert refused.returncode == 2
    assert f"latest is a checkpoint: give its run folder, {trained}" in refused.stderr
    assert not (trained / "latest" / "inspect.html").exists()
    refused = warm.run("-m", "daybreak", "inspect", trained, "--batch", 8)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "is a run, and --batch" in refused.stderr


def test_what_is_counted_is_no_part_of_the_loss(begun: Path) -> None:
    paid = [step(n, flow=0.5, dollars=0.1 * n, dollars_to_go=9.0 - n) for n in (1, 2, 3)]
    lines(begun / "metrics.jsonl", *paid)
    assert [one.title for one in run._curves(run.read(begun))] == ["loss", "pictures a second"]


def test_a_run_is_heard_of_by_the_newest_of_its_files(begun: Path) -> None:
    lines(begun / "metrics.jsonl", step(7))
    lines(begun / "status.json", {"state": "running"})  # an evaluation takes long
    then = time.time() - 7300
    os.utime(begun / "metrics.jsonl", (then, then))
    assert run.read(begun).state == "running"


def test_what_is_still_drawn_or_measured_is_left_out(tmp_path: Path) -> None:
    done, begun = (tmp_path / "samples" / f"step-000000{number}" for number in (4, 8))
    for place in (done, begun):
        place.mkdir(parents=True)
    (done / "prompts.json").write_text("[]")
    assert run._drawn(tmp_path) == [(4, done)]


@pytest.mark.parametrize(("size", "shown"), [((64, 512), (32, 256)), ((40, 30), (40, 30))])
def test_large_pictures_are_shown_smaller_and_small_ones_as_they_are(
    tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "00.png")
    data = base64.b64decode(run._picture(tmp_path / "00.png").partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == shown
        assert size != shown or np.array_equal(np.asarray(picture), pixels)


# How it stands


def test_a_run_without_a_step_has_a_page_too(begun: Path) -> None:
    story = run.read(begun)
    assert run.told(story) == {"steps": "none of 10"}
    text = Reader(run.page(story)).text
    assert "None were drawn." in text
    assert "fewer than two steps" in text


@pytest.mark.parametrize(
    ("status", "lock", "silence", "state", "sentence"),
    [
        ({"state": "running"}, "mine", 7300, "running", "step 7 of 10; last written 2 h 01 min"),
        ({"state": "running"}, "dead", 3, "killed", "It was killed after step 7 of 10. The same c"),
        ({"state": "running"}, "far", 3, "running", "step 7 of 10; last written 3 s ago."),
        ({"state": "running"}, "far", 297, "running", "step 7 of 10; last written 4 min 57 s"),
        ({"state": "running"}, "far", 302, "silent", "It has written nothing for 5 min 02 s"),
        (
            {"state": "running"},
            "far",
            7300,
            "silent",
            "written nothing for 2 h 01 min: step 7 of 10.",
        ),
        ({"state": "running"}, "", 7300, "silent", "If it was killed, the same command continues"),
        ({"state": "finished", "reason": "all"}, "", 9, "finished", "after step 7 of 10: all."),
        ({"state": "stopped", "reason": "Ctrl-C"}, "", 9, "stopped", "The same command continues"),
        ({"state": "failed", "reason": "no", "code": 7}, "", 9, "failed", "7 of 10: no (code 7)"),
        ({"state": "lost"}, "", 9, "lost", "Its state is lost: step 7 of 10."),
        (None, "", 9, "unknown", "Its state is not known: step 7 of 10."),
    ],
)
def test_one_sentence_says_how_it_stands(
    begun: Path, status: dict[str, Any] | None, lock: str, silence: int, state: str, sentence: str
) -> None:
    lines(begun / "metrics.jsonl", step(7))
    if status:
        lines(begun / "status.json", status)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    holders = {
        "mine": f"process {os.getpid()} on {host}",
        "dead": f"process {gone.pid} on {host}",
        "far": f"process {gone.pid} on another-{host}",
    }
    (begun / "lock").write_text(holders.get(lock, ""))
    then = time.time() - silence
    for file in begun.iterdir():
        os.utime(file, (then, then))
    story = run.read(begun)
    assert story.state == state
    assert sentence in story.sentence
    assert story.sentence in Reader(run.page(story)).text


def test_what_a_kill_or_a_full_disk_has_left_is_no_reason_to_fail(begun: Path) -> None:
    lines(begun / "metrics.jsonl", step(1), step(2))
    with (begun / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 20 + b'\n{"step": 3, "lo')
    (begun / "incidents.jsonl").write_text('{"step": 1, "lo{"step": 2}\n')
    (begun / "status.json").write_text("")
    place = begun / "samples" / "step-0000002"
    place.mkdir(parents=True)
    (place / "prompts.json").touch()
    (begun / "evaluation").mkdir()
    for name, text in {
        "list": "[1]",
        "flat": '{"values": {"a": 1, "b": {"value": "x"}}}',
        "half": '{"values": {"a',
    }.items():
        (begun / "evaluation" / f"{name}.json").write_text(text)
    story = run.read(begun)
    assert (story.done, story.incidents, story.status) == (2, [], {})
    assert "step 2 of 10" in Reader(run.page(story)).text


def test_all_that_a_run_logs_is_either_counted_or_a_part_of_the_loss(trained: Path) -> None:
    logged = {name for line in run.read(trained).steps for name in line}
    assert logged - run.COUNTED == {"loss", "flow"}


def test_facts_are_those_of_the_newest_steps(begun: Path) -> None:
    rows = [step(n, loss=9.0) for n in range(1, 4)]
    rows += [step(n + 3, loss=0.25) for n in range(1, run.LATE)]
    rows += [step(run.LATE + 3, loss=None, dollars=12.345, dollars_to_go=3.0, share_of_peak=0.42)]
    lines(begun / "metrics.jsonl", *rows)
    lines(begun / "status.json", {"state": "running", "checkpoint": 50})
    incident = {"loss": [math.pi, 1.0], "norm": ["nan", 2.0], "usual": 0.123456, "samples": [8, 9]}
    lines(begun / "incidents.jsonl", {"step": 5, **incident})
    story = run.read(begun)
    told = run.told(story)
    assert told["loss, last 99 steps"] == "0.2500"
    assert told["trained for"] == "1 h 01 min"
    assert (told["paid"], told["still to pay"], told["share of the peak"]) == (
        "$12.35",
        "$3.00",
        "42 %",
    )
    assert (told["newest checkpoint"], told["incidents"]) == ("50", "1, last at 5")
    assert list(run._incidents(story)) == [("5", "3.142, 1", "nan, 2", "0.1235", "8 to 9")]
    console = Console(record=True, width=100)
    console.print(run.summary(story))
    assert "$12.35" in console.export_text()


def test_a_loss_that_was_never_finite_is_called_so(begun: Path) -> None:
    lines(begun / "metrics.jsonl", step(1, loss=None), step(2, loss=None))
    story = run.read(begun)
    assert run.told(story)["loss, last 0 steps"] == "not finite"
    assert "loss" not in [one.title for one in run._curves(story)]


def test_of_many_incidents_the_newest_are_listed(begun: Path) -> None:
    one = {"loss": [9.0], "norm": [1.0], "usual": 0.5, "samples": [8, 9]}
    numbers = range(1, run.LISTED + 6)
    lines(begun / "incidents.jsonl", *({"step": number, **one} for number in numbers))
    listed = [step for step, *_ in run._incidents(run.read(begun))]
    assert listed == [str(number) for number in numbers[5:]]


def test_a_terminal_is_told_of_the_newest_evaluation(begun: Path) -> None:
    lines(begun / "metrics.jsonl", step(1), step(2))
    rows = [{"step": n, "values": {"exact": {"value": n / 16}}} for n in (1, 2)]
    (begun / "evaluation").mkdir()
    lines(begun / "evaluation" / "steps.jsonl", *rows)
    console = Console(record=True, width=100)
    console.print(run.summary(run.read(begun)))
    said = console.export_text()
    assert "during training, step 2" in said
    assert "exact 0.125" in said
    assert "evaluated at 1" not in said


def test_a_curve_says_where_the_next_stage_begins_and_of_which_stage_a_run_is(
    begun: Path, tiny: Path
) -> None:
    two = "stage=[{resolution=16,steps=4,batch=8,lr=1e-3},{resolution=32,steps=6,batch=8,lr=1e-3}]"
    (begun / "recipe.toml").write_text(config.dump(config.load(tiny, (two,))))
    lines(begun / "metrics.jsonl", *(step(number) for number in range(1, 10)))
    story = run.read(begun)
    loss = next(run._curves(story))
    assert loss.stages == [FRAME.left + (FRAME.right - FRAME.left) * 3 / 8]
    told = run.told(story)
    assert (told["stage"], told["memory"]) == ("2 of 2, 32 px", "100 MiB")


# Curves


def points(text: str) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for pair in text.split()]
    return [(float(x), float(y)) for x, y in pairs]


def drawn(values: list[float], stages: tuple[int, ...] = ()) -> Curve:
    found = curve("loss", list(enumerate(values, start=1)), stages, falls=True)
    assert found is not None
    return found


def test_a_line_goes_from_edge_to_edge_and_up_is_more() -> None:
    line = points(drawn([1.0, 2.0, 3.0]).line)
    assert [x for x, _ in line] == [FRAME.left, (FRAME.left + FRAME.right) / 2, FRAME.right]
    assert line[0][1] > line[1][1] > line[2][1]
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.11)


def test_many_steps_are_means_and_the_band_holds_them_all() -> None:
    found = drawn([1.0 + 0.5 * (-1) ** n for n in range(10_000)])
    line, band = points(found.line), points(found.band)
    assert len(line) <= 240
    assert len(band) == 2 * len(line)
    assert max(y for _, y in line) - min(y for _, y in line) < 10
    assert max(y for _, y in band) - min(y for _, y in band) > 100
    assert all(FRAME.top <= y <= FRAME.bottom and FRAME.left <= x <= FRAME.right for x, y in band)
    assert float(found.last) == pytest.approx(1.0, abs=0.02)


def test_what_falls_by_orders_of_magnitude_is_drawn_in_logarithms() -> None:
    line = points(drawn([1.0, 0.1, 0.01]).line)
    assert line[1][1] - line[0][1] == pytest.approx(line[2][1] - line[1][1], abs=0.11)
    assert {tick.text for tick in drawn([1.0, 0.1, 0.01]).up} >= {"1", "0.1", "0.01"}
    plain = curve("lr", [(1, 1.0), (2, 0.1), (3, 0.01)])
    assert plain is not None
    assert not plain.logs
    flat = points(drawn([1.0, 0.5, 0.0]).line)  # nought has no logarithm
    assert flat[1][1] - flat[0][1] == pytest.approx(flat[2][1] - flat[1][1], abs=0.11)


def test_what_is_not_finite_is_left_out_and_too_little_is_no_curve() -> None:
    assert len(points(drawn([1.0, math.nan, 3.0, math.inf]).line)) == 2
    assert curve("loss", [(1, 1.0)]) is None
    assert curve("loss", [(1, math.nan), (2, 1.0)]) is None


def test_a_constant_is_a_line_in_the_middle() -> None:
    for value in (0.0, 5.0, -5.0):
        heights = {y for _, y in points(drawn([value] * 4).line)}
        assert len(heights) == 1
        assert FRAME.top < heights.pop() < FRAME.bottom


def test_stages_begin_within_the_drawing_and_few_values_are_dots() -> None:
    found = drawn([1.0, 2.0, 3.0], (2, 3, 9))
    assert found.stages == [(FRAME.left + FRAME.right) / 2]
    assert len(found.dots) == 3
    assert drawn([1.0, 2.0] * 100).dots == []


def test_what_was_measured_twice_at_one_step_is_no_curve() -> None:
    assert curve("exact", [(3, 0.5), (3, 0.6)]) is None


def test_a_band_goes_there_above_and_back_below() -> None:
    band = points(drawn([1.0 + 0.5 * (-1) ** n for n in range(10_000)]).band)
    half = len(band) // 2
    across = [x for x, _ in band]
    assert across[:half] == sorted(across[:half]) == across[half:][::-1]
    for (_, above), (_, below) in zip(band[:half], band[half:][::-1], strict=True):
        assert above < below


def test_what_is_usual_lies_within_the_drawing() -> None:
    band = points(drawn([1 + n % 100 / 100 for n in range(10_000)]).band)
    assert all(FRAME.top < y < FRAME.bottom for _, y in band)


def test_a_single_nought_does_not_keep_a_curve_from_its_logarithms() -> None:
    values = [100.0 * 0.999**n for n in range(9600)]
    values[5000] = 0.0
    found = drawn(values)
    assert max(y for _, y in points(found.band)) == FRAME.bottom
    assert {tick.text for tick in found.up} >= {"100", "1", "0.01"}


def test_over_many_orders_of_magnitude_only_powers_of_ten_are_marked() -> None:
    ticks = [tick.text for tick in drawn([10.0**-n for n in range(5)]).up]
    assert ticks == ["0.0001", "0.001", "0.01", "0.1", "1"]
    few = [tick.text for tick in drawn([1.0, 10.0]).up]
    assert few == ["1", "2", "5", "10"]

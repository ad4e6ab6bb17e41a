"""What a comparison leaves behind: tables, sentences, and a record that others can check."""

import csv
import gzip
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from daybreak import config
from daybreak.config import Recipe
from daybreak.failure import BadRecipe, BadStorage
from daybreak.train import arms, compare, evaluations, record
from daybreak.train.arms import Arm, Run
from daybreak.train.compare import Comparison, Outcome, Question

BASE, BETTER = [0.50, 0.52, 0.48, 0.51, 0.49], [0.57, 0.58, 0.55, 0.57, 0.56]


def comparison(recipe: Recipe, folder: Path, other: list[float] = BETTER) -> Comparison:
    """Two arms of five runs, with what a run leaves in its folder."""
    made = [Arm("base", recipe, 3, False), Arm("dit.width=64", recipe, 3, False)]
    runs = []
    for number in range(5):
        for place, name in enumerate(("base", "wide")):
            out = (folder / name / f"seed-{3 + number}").as_posix()
            runs.append(
                Run(place, number, recipe.model_copy(update={"out": out, "seed": 3 + number}))
            )
    for run in runs:
        (run.folder / "evaluation").mkdir(parents=True)
        facts = {"revision": "abc", "machine": {"cores": 2}, "versions": {"torch": "2"}}
        (run.folder / "run.json").write_text(json.dumps(facts))
        (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
        (run.folder / evaluations.FILE).write_text('{"step": 1}\n')
    passed = [{"a": False, "b": True}, {"a": True, "b": True}]
    outcomes = [
        Outcome(
            run,
            (BASE, other)[run.arm][run.number],
            [(40.0, 0.3), (80.0, (BASE, other)[run.arm][run.number])],
            2.0,
            9.0,
            passed[run.arm],
        )
        for run in runs
    ]
    question = Question("scenes.exact", "pictures", target=0.5)
    return compare.compare(made, outcomes, question)


@pytest.fixture
def found(tiny: Path, tmp_path: Path) -> Comparison:
    return comparison(config.load(tiny), tmp_path / "runs")


def test_tables_say_what_came_out_and_what_was_spent(found: Comparison) -> None:
    (head, rows), (spent, costs) = record.tables(found)
    assert [len(row) for row in (*rows, *costs)] == [len(head)] * 2 + [len(spent)] * 2
    assert rows[0][0] == "base"
    assert rows[0][2:] == ["-", "-", "-"]
    assert rows[1][1].startswith("0.566 (0.5")
    assert rows[1][2].startswith("+0.066 (+0.06")
    assert rows[1][3:] == ["0.031", "100%"]
    assert costs[0] == ["base", "5", "10", "80", costs[0][4], "2", "more than 80 (3 of 5)"]
    assert float(costs[0][4]) > 1e8, "FLOP"
    assert costs[1][-1].endswith("(5 of 5)")


def test_sentences_say_what_follows(found: Comparison) -> None:
    said = "\n".join(record.sentences(found, measured=False))
    assert "dit.width=64 against base: better: the mean difference over 5 seeds is +0.066" in said
    assert "it passes 5 that base fails, and fails 0 that base passes (McNemar seed by seed" in said
    assert "times the pictures seen of base to reach 0.5" in said
    assert "5 and 3 of 5 runs reached it" in said
    assert "(a record needs 0.01)" in said
    assert "with these, a run took 9 to 9 s up to its last step" in said
    assert "versions of the code" not in said
    assert "turned into steps" not in said
    assert "turned into steps" in "\n".join(record.sentences(found, measured=True))


def test_a_test_of_the_instrument_says_so(tiny: Path, tmp_path: Path) -> None:
    loaded = arms.named([str(tiny)] * 2, (), ())
    found = comparison(config.load(tiny), tmp_path / "runs")
    twin = found.versus[0].row.arm._replace(twin=True, name=loaded[1][0])
    versus = found.versus[0]._replace(row=found.versus[0].row._replace(arm=twin))
    said = "\n".join(record.sentences(found._replace(versus=[versus]), measured=False))
    assert "tiny 2 is an earlier arm with other seeds: an A/A test of the method" in said


def test_a_record_holds_everything_needed_to_check_it(found: Comparison, tmp_path: Path) -> None:
    place = tmp_path / "record"
    record.check(place)
    record.record(found, "200images", True, place)
    kept = json.loads((place / "comparison.json").read_text())
    assert kept["question"] == {
        "metric": "scenes.exact",
        "unit": "pictures",
        "target": 0.5,
        "margin": 0.0,
        "budget": "200images",
    }
    assert kept["revisions"] == ["abc"]
    assert kept["machines"] == [{"cores": 2}]
    assert [arm["seeds"] for arm in kept["arms"]] == [[3, 4, 5, 6, 7]] * 2
    assert [arm["values"] for arm in kept["arms"]] == [BASE, BETTER]
    assert kept["arms"][0]["flops"] > 0
    assert kept["comparisons"][0]["verdict"] == "better"
    assert kept["comparisons"][0]["p"] == 1 / 32
    assert kept["comparisons"][0]["race"]["horizon"] == 80.0
    page = (place / "README.md").read_text()
    assert "| dit.width=64 |" in page
    assert "(chart.png)" in page
    with Image.open(place / "chart.png") as drawn:
        assert drawn.width > 500
    assert sorted(path.name for path in (place / "recipes").iterdir()) == ["base.toml", "wide.toml"]
    again = config.load(place / "recipes" / "wide.toml")
    assert again.dit == found.rows[1].arm.recipe.dit
    logs = sorted(path.name for path in (place / "logs").iterdir())
    assert len(logs) == 20
    assert "base-seed-3-evaluations.jsonl.gz" in logs
    with gzip.open(place / "logs" / "wide-seed-7.jsonl.gz") as file:
        assert file.read() == b'{"step": 1}\n'


def test_runs_of_two_versions_of_the_code_say_so(found: Comparison) -> None:
    file = found.rows[0].outcomes[0].run.folder / "run.json"
    file.write_text(file.read_text().replace("abc", "abd"))
    said = "\n".join(record.sentences(found, measured=False))
    assert "runs were made by 2 versions of the code (abc, abd)" in said


def test_what_keeps_no_rule_of_a_record_is_told_all_of_them(
    found: Comparison, tmp_path: Path
) -> None:
    file = found.rows[0].outcomes[0].run.folder / "run.json"
    file.write_text(file.read_text().replace("abc", "abd-dirty").replace("2}", "4}"))
    (said,) = record.objections(found)
    for why in (
        "dit.width=64 is not a record because it has 5 of the 7 seeds",
        "several versions of the code",
        "ends in -dirty",
        "several machines",
        "its target is not 0.8 or more",
        "do not have 200 prompts",
        "sooner than the standing record with p < 0.01",
    ):
        assert why in said
    record.record(found, None, False, tmp_path / "record")
    assert said in (tmp_path / "record" / "README.md").read_text()


def test_what_keeps_them_all_is_told_so(tiny: Path, tmp_path: Path) -> None:
    recipe = config.load(tiny, ("evaluate={every=5, suites=['scenes'], per_task=200}",))
    rows = []
    for place, (name, costs) in enumerate((("base", 80.0), ("wide", 40.0))):
        outcomes = []
        for number in range(7):
            out = tmp_path / name / f"seed-{number}"
            out.mkdir(parents=True)
            machine = {"device": "cpu", "cores": 2}
            facts = {"revision": "abc", "machine": machine, "versions": {}}
            (out / "run.json").write_text(json.dumps(facts))
            one = recipe.model_copy(update={"out": out.as_posix(), "seed": number})
            value = 0.9 + 0.001 * number
            curve = [(0.5 * costs, 0.1), (costs + number, value)]
            outcomes.append(Outcome(Run(place, number, one), value, curve, 2.0, 9.0, {}))
        rows.append(outcomes)
    made = [Arm(name, recipe, 0, False) for name in ("base", "wide")]
    question = Question("scenes.exact", "seconds", target=0.8)
    found = compare.compare(made, [*rows[0], *rows[1]], question)
    (said,) = record.objections(found)
    assert said.startswith("wide meets the rules of a record that a program can check")
    slower = compare.compare(
        made,
        [one._replace(run=one.run._replace(arm=1 - one.run.arm)) for row in rows for one in row],
        question,
    )
    assert "sooner than the standing record" in record.objections(slower)[0]


def test_a_comparison_without_a_single_point_is_kept_all_the_same(
    tiny: Path, tmp_path: Path
) -> None:
    found = comparison(config.load(tiny), tmp_path / "runs", [math.nan] * 5)
    rows = [
        row._replace(outcomes=[one._replace(curve=[]) for one in row.outcomes])
        for row in found.rows
    ]
    record.write(found._replace(rows=rows), None, False, tmp_path / "out")
    assert "chart.png" not in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "chart.png").exists()


def test_a_network_of_unknown_size_costs_unknown_flops(tiny: Path, tmp_path: Path) -> None:
    recipe = config.load(tiny, ("text={encoder='nobody/nothing', max_tokens=24}",))
    record.write(comparison(recipe, tmp_path / "runs"), None, False, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert kept["arms"][0]["flops"] is None


def test_the_page_of_another_comparison_is_kept_and_that_of_the_same_replaced(
    found: Comparison, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    record.write(found, "200images", False, out)
    first = (out / "README.md").read_text()
    record.write(found, "200images", False, out, ["again"])
    assert "- again" in (out / "README.md").read_text()
    assert not (out / "earlier").exists()
    record.write(found, "400images", False, out)
    record.write(found, "800images", False, out)
    names = ["README.md", "chart.png", "comparison.json", "runs.csv"]
    for number in "12":
        kept = out / "earlier" / number
        assert sorted(path.name for path in kept.iterdir()) == names
    budgets = [
        json.loads((folder / "comparison.json").read_text())["question"]["budget"]
        for folder in (out / "earlier/1", out / "earlier/2", out)
    ]
    assert budgets == ["200images", "400images", "800images"]
    assert first.splitlines()[0] in (out / "earlier/1/README.md").read_text()


def test_a_page_that_nobody_here_has_written_is_kept(found: Comparison, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    record.write(found, None, False, tmp_path)
    assert (tmp_path / "earlier/1/README.md").read_text() == "mine"


def test_every_run_has_a_row_to_plot(tiny: Path, tmp_path: Path) -> None:
    found = comparison(config.load(tiny), tmp_path / "runs")
    first, second = (
        row._replace(
            outcomes=[
                one._replace(step=10, values={"scenes.exact": one.value, "scenes.two": 0.25})
                for one in row.outcomes
            ]
        )
        for row in found.rows
    )
    lost = second.outcomes[0]._replace(step=0, seconds=0.0, values={})
    second = second._replace(outcomes=[lost, *second.outcomes[1:]])
    record.write(found._replace(rows=[first, second]), None, False, tmp_path / "out")
    with (tmp_path / "out/runs.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 10
    assert read[0] == {
        "arm": "base",
        "seed": "3",
        "step": "10",
        "scenes.exact": "0.5",
        "scenes.two": "0.25",
        "seconds": "2.0",
        "images_per_second": "40.0",
    }
    assert list(read[5].values()) == ["dit.width=64", "3", "0", "", "", "0.0", ""]


def test_a_record_is_not_written_over_another(found: Comparison, tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    record.check(tmp_path / "record")
    (tmp_path / "record" / "README.md").write_text("an older one")
    with pytest.raises(BadRecipe, match="exists already"):
        record.check(tmp_path / "record")


def test_a_record_that_cannot_be_written_is_refused_before_the_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadStorage, match="cannot make the record"):
        record.check(tmp_path / "file" / "record")


def test_an_arm_that_diverged_is_written_down_as_that(tiny: Path, tmp_path: Path) -> None:
    found = comparison(config.load(tiny), tmp_path / "runs", [math.nan, *BETTER[1:]])
    (_, rows), _ = record.tables(found)
    assert rows[1][1:] == ["diverged", "-", "-", "-"]
    record.write(found, None, False, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert kept["arms"][1]["values"][0] is None
    assert kept["comparisons"][0]["verdict"] == "worse"

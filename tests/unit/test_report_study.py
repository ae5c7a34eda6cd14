"""What the report says of a study of many arms: what precedes a collapse, what the golden set's size
and the two coefficients do, the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from made_up_pages import panels, report
from made_up_runs import STUDY_ARMS, make_run, make_student, make_study
from opd_ray.report import curves
from opd_ray.report.arms import ACCURACY, MEASURES, group
from opd_ray.report.crossing import crossings, signature
from opd_ray.report.golden import kinds
from opd_ray.report.maps import maps, shade
from opd_ray.report.runs import Run, read_run, read_runs
from opd_ray.report.trust import trusts


def run_of(path: Path, metrics: dict[str, dict[int, float]], **changes) -> Run:
    return Run(path, **{"arm": "a", "seed": 1, "config": {}, "summary": {}, "metrics": metrics} | changes)


def rates(crossed: int, **others: dict[int, float]) -> dict[str, dict[int, float]]:
    """Truncation that passes half at a step, beside metrics of the learner."""
    rate = {step: 0.6 if step >= crossed else 0.1 for step in range(1, crossed + 3)}
    return {"rollouts/truncation_rate": rate} | {f"learner/{name}": values for name, values in others.items()}


def test_advantages_before_the_crossing_are_means_over_tokens(tmp_path):
    metrics = rates(
        20,
        repetitive_share={9: 0.9, 12: 0.5, 13: 0.0, 14: 0.25, 20: 0.9},
        advantage_repetitive={9: 5.0, 12: -0.4, 14: -0.1, 20: 5.0},
        advantage_other={9: 5.0, 12: -1.0, 13: -2.0, 14: -1.0, 20: 5.0},
    )
    metrics["rollouts/length"] = {9: 1.0, 12: 10.0, 13: 20.0, 14: 40.0, 20: 1.0}
    metrics["rollouts/truncated_token_share"] = {3: 0.25, 17: 0.26, 20: 0.9}
    (found,) = crossings(group([run_of(tmp_path, metrics)]))
    assert (found.step, found.alarm_lead) == (20, 3)
    assert found.repetitive == pytest.approx((5 * -0.4 + 10 * -0.1) / 15)  # steps 9 and 20 are outside
    assert found.other == pytest.approx((5 * -1 + 20 * -2 + 30 * -1) / 55)
    assert found.share == pytest.approx(15 / 70)
    assert found.gap == pytest.approx(found.repetitive - found.other)


def test_a_crossing_on_an_abandoned_attempt_counts(tmp_path):
    run = make_run(tmp_path / "run", steps=20, inflates_at=15)
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 11, "rollouts/truncation_rate": 0.1}) + "\n")
    (found,) = crossings(group([read_run(run)]))
    assert (found.step, found.alarm_lead) == (15, 0)
    assert (found.repetitive, found.other) == (pytest.approx(-0.3), pytest.approx(-0.8))


def test_runs_without_repetitive_tokens_are_listed_but_not_counted(tmp_path):
    higher = rates(9, repetitive_share={8: 0.1}, advantage_repetitive={8: -0.1}, advantage_other={8: -0.9})
    lower = rates(9, repetitive_share={8: 0.1}, advantage_repetitive={8: -2.0}, advantage_other={8: -0.9})
    none = rates(9, repetitive_share={8: 0.0}, advantage_other={8: -0.9})
    found = crossings(group([run_of(tmp_path, metrics, seed=i) for i, metrics in enumerate((higher, lower, none))]))
    assert [each.gap for each in found] == [pytest.approx(0.8), pytest.approx(-1.1), None]
    assert signature(found).startswith("In 1 of 2 runs that passed half truncated, repetitive tokens had the higher")
    assert signature(found[2:]).startswith("No advantages")
    assert "did not have" in signature(found[1:2])
    assert crossings(group([run_of(tmp_path, {"rollouts/truncation_rate": {1: 0.5}})])) == []


def test_what_tells_collapses_apart_is_of_the_collapse_or_of_the_beginning(tmp_path):
    collapsed = rates(
        30,
        teacher_logprob_repetitive={2: -9.0, 30: -0.1, 31: -0.3},
        eos_teacher_end={1: 0.0, 20: 0.5, 21: 1.0},
        off_policy_kl={1: 0.0, 2: 3.0, 40: 9.0},
    )
    titles = ("teacher's log-prob of repeats", "teacher's P(stop) at ends", "off-policy KL")
    of = {measure.title: measure.of for measure in MEASURES if measure.title in titles}
    assert [of[title](run_of(tmp_path, collapsed)) for title in titles] == pytest.approx([-0.2, 0.25, 1.5])
    healthy = {"rollouts/truncation_rate": {30: 0.5}, "learner/teacher_logprob_repetitive": {30: -0.1}}
    assert [of[title](run_of(tmp_path, healthy)) for title in titles] == [None] * 3


def kinds_of(*runs: Path):
    return kinds(group([read_run(run) for run in runs], ["small", "large"]))


def golden_run(path: Path, name: str, used: int | None, *, file: str = "", **changes):
    settings = {"data": {"golden": f"{path.parent}/{file or 'golden'}-{used}.parquet"}}
    settings |= changes.pop("config", {})
    return make_run(path, name=name, golden_used=used, config=settings, **changes)


def test_arms_that_differ_in_their_golden_set_only_are_one_line(tmp_path):
    small = [golden_run(tmp_path / f"s{n}", "small", 32, seed=n, accuracy=(0.3, n / 4)) for n in (1, 2)]
    large = [golden_run(tmp_path / f"l{n}", "large", 512, seed=n, accuracy=(0.3, 0.9)) for n in (1, 2)]
    (kind,) = kinds_of(*small, *large)
    assert kind.points == [(32, 0.25), (32, 0.5), (512, 0.9), (512, 0.9)]
    assert kind.at(32).mean == pytest.approx(0.375)
    assert kind.label == "small"  # the names have nothing in common


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"learner": {"steps": 20, "lr": 1.0}}},
        {"file": "teacher-rollouts-4800"},
        {"used": None},
        {"used": 32},
        {"seed": 2},
        {"finished": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arms_that_differ_in_more_or_not_in_size_are_no_line(tmp_path, other):
    small = golden_run(tmp_path / "s", "small", 32)
    assert kinds_of(small, golden_run(tmp_path / "l", "large", **{"used": 512} | other)) == []


def of_coefs(path: Path, golden: object, reference: float, seed: int = 1, **changes) -> Path:
    """A run whose arm is named after its two coefficients."""
    loss = {"student": {"coef": 1}, "golden": {"coef": golden}, "reference": {"coef": reference}}
    settings = {"loss": loss, "buffer": {"golden_per_prompt": int(golden != 0)}} | changes.pop("config", {})
    name = changes.pop("name", f"{golden}, {reference}")
    return make_run(path / f"{name} {seed}", name=name, seed=seed, config=settings, **changes)


def test_arms_that_differ_in_their_coefficients_only_are_a_map(tmp_path):
    runs = [of_coefs(tmp_path, 0, 0, seed, accuracy=(0.3, seed / 10)) for seed in (1, 3)]
    runs += [of_coefs(tmp_path, 0, 1, config={"learner": {"steps": 20, "lr": 0.5}}), of_coefs(tmp_path, 0.1, 1)]
    (found,) = maps(group([read_run(run) for run in runs]))
    assert (found.student_coef, found.lambdas, found.betas) == ("1", [0, 0.1], [0, 1])
    (none, (plain, anchored)), (some, (missing, both)) = found.rows(ACCURACY)
    assert (none, some, plain.text, anchored.text, both.text) == (0, 0.1, ".20 ± .10", ".50", ".50")
    assert missing is None and (shade(missing), shade(plain), shade(both)) == ("0%", "10%", "25%")


@pytest.mark.parametrize(
    "last",
    [
        {"golden": 0, "reference": 3},
        {"golden": [[0, 0.1], [9, 0]], "reference": 1},
        {"golden": 0.1, "reference": 1, "config": {"reference": {"update": "periodic"}}},
    ],
    ids=["one golden coefficient", "a schedule", "another anchor"],
)
def test_arms_that_differ_in_more_or_in_one_coefficient_are_no_map(tmp_path, last):
    runs = [of_coefs(tmp_path, 0, 0), of_coefs(tmp_path, 0, 1), of_coefs(tmp_path, **last, name="last")]
    assert maps(group([read_run(run) for run in runs])) == []


def by_evidence(root: Path, seed: int, shares: list, lengths: list) -> Path:
    run = make_run(root / f"seed-{seed}", name="by evidence", seed=seed)
    summary = json.loads((run / "summary.json").read_text())
    evidence = {"prompts": 4, "taught_by": {}, "shares": shares, "lengths": lengths}
    (run / "summary.json").write_text(json.dumps(summary | {"evidence": evidence}))
    return run


@pytest.mark.slow
def test_where_the_teacher_can_be_trusted_adds_up_over_runs(tmp_path):
    one = by_evidence(
        tmp_path, 1, [[4, 0, {"teacher": 3}], [0, 1, {"golden": 1}]], [[7, 7, 9, 12, 1, 4, {"teacher": 4}]]
    )
    two = by_evidence(
        tmp_path, 2, [[4, 0, {"teacher": 1, "reward": 1}], [None, 0, {"nothing": 2}]], [[9, 11, 0, 0, 1, 2, {}]]
    )
    (found,) = trusts(group([read_run(run) for run in (one, two)]))
    assert found.students == ["0 – .2", ".2 – .4"]
    texts = [(name, [each and (each.prompts, each.share("teacher")) for each in row]) for name, row in found.rows()]
    assert texts == [(".8 – 1", [(5, ".80"), None]), ("0 – .2", [None, (1, ".00")]), ("no verdict", [(2, ".00"), None])]
    assert [(each.tokens, each.teacher, each.student) for each in found.lengths] == [
        ("7", 0.75, 0.25),
        ("9 – 11", None, 0.5),
    ]
    page, _ = report(one, two)
    assert (
        'id="trust"' in page
        and '<td style="--much: 40%">5: .80</td>' in page
        and "by evidence: of 8 prompts .50" in page
    )
    assert 'id="trust"' not in report(make_run(tmp_path / "plain"))[0]


@pytest.mark.slow
def test_the_page_has_the_map(tmp_path):
    runs = [of_coefs(tmp_path, golden, beta, accuracy=(0.3, 0.4)) for golden in (0, 0.3) for beta in (0, 1)]
    page, _ = report(*runs)
    assert 'id="maps"' in page and page.count('<td style="--much: 20%">.40</td>') == 4  # greedy accuracy is .50


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    return make_study(root, logged_steps=[1, 40], steps=60, student=make_student(root.parent / "student"))


@pytest.mark.slow
def test_the_page_of_fourteen_arms_has_them_in_the_order_of_the_study(study):
    page, data = report(study, order=list(STUDY_ARMS))
    assert data["arms"] == list(STUDY_ARMS) and data["shown"] == 7
    assert "ended highest" in page
    assert [kind["name"] for kind in data["golden"]] == ["StableOPD", "SFT"]
    assert [data["arms"][kind["arm"]] for kind in data["golden"]] == ["StableOPD", "SFT, 128 golden"]
    assert [sorted({size for size, _ in kind["points"]}) for kind in data["golden"]] == [[32, 128, 512]] * 2
    points = panels(data)["Accuracy"]["points"]
    assert len(points) == 70 and {line[0][0] for line in points} == {0}
    assert "The same for every arm: sampled accuracy before <b>.30 ± .00</b>" in page


@pytest.mark.slow
def test_the_page_of_a_study_stays_small_and_its_runs_share_the_rollouts_alike(study):
    page, data = report(study)
    numbers = [len(run["rollouts"]) for run in data["runs"]]
    assert len(numbers) == 70 and set(numbers) == {10}
    assert len(page) < 6e6


@pytest.mark.slow
def test_what_a_guarded_run_took_back_is_beside_its_curve_with_the_events_that_belong_there(study):
    _, data = report(study, order=list(STUDY_ARMS))
    guard = data["arms"].index("OPD + guard")
    back = [index for index, run in enumerate(data["runs"]) if run["abandoned"]]
    assert [data["runs"][index]["arm"] for index in back] == [guard, guard]
    series = panels(data)["Truncation"]["series"][0]
    for index, part in zip(back, series["abandoned"], strict=True):
        (first, last, rolled_back), (event,) = *data["runs"][index]["abandoned"], data["runs"][index]["events"]
        assert rolled_back and event["attempt"] == 0 and event["step"] == last
        assert part[:3] == [index, 0, list(range(first - 1, last + 1))] and max(part[3]) > 0.5
        steps, values = series["runs"][index]
        assert steps == list(range(1, 61)) and max(values) < 0.5


def test_long_curves_are_thinned_to_means_and_the_page_says_so(tmp_path):
    steps = 5000
    run = run_of(tmp_path, {"rollouts/length": {step: float(step % 2) for step in range(1, steps + 1)}})
    assert curves.adjacent([run]) == 3
    (panel,) = curves.groups([run], {})[0]["panels"]
    ((at, values),) = panel["series"][0]["runs"]
    assert (at[0], at[-1], len(at)) == (3, steps, 1667) and values[:2] == [0.6667, 0.3333]


def test_a_study_of_some_arms_is_a_page_without_the_sections_that_need_more(tmp_path):
    runs, _ = read_runs([make_run(tmp_path / "a", name="a"), make_run(tmp_path / "b", name="b")])
    assert (crossings(group(runs)), kinds(group(runs))) == ([], [])
    page, data = report(tmp_path / "a", tmp_path / "b")
    assert 'id="golden"' not in page and 'id="crossing"' not in page and data["shown"] == 2

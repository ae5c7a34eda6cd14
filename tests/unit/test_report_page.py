"""The page as a file: what is embedded, that nothing of a run can run in it, and what is refused."""

from __future__ import annotations

import json
import re

import pytest

from made_up_pages import panels, report
from made_up_runs import EVIL, make_rollouts, make_run, make_student, write_rollouts, write_trace
from opd_ray import __main__ as command_line
from opd_ray.errors import InputError
from opd_ray.messages import ROLLOUT_SCHEMA
from opd_ray.report import ReferenceLine, curves, default_output, rollouts, write_report
from opd_ray.report.runs import read_run
from tiny_checkpoints import CHARACTERS


def test_the_page_has_every_arm_run_and_metric(tmp_path):
    first, second = make_run(tmp_path / "a", name="a", steps=9), make_run(tmp_path / "b", name="b", accuracy=(0.1, 0.9))
    page, data = report(first, second)
    assert data["arms"] == ["b", "a"]
    assert [(run["arm"], run["name"]) for run in data["runs"]] == [(0, "seed 1"), (1, "seed 1")]
    charts = panels(data)
    assert charts["Length"]["series"][0]["runs"][1] == [list(range(1, 10)), [20.0] * 9]
    assert charts["Accuracy"]["points"][0] == [[0, 20], [0.1, 0.9]]
    assert [series["name"] for series in charts["Advantage"]["series"]] == ["repetitive tokens", "others"]
    drawn = {metric for panel in charts.values() for metric in panel["metrics"]}
    assert {"learner/loss_student", "throughput/tokens_per_s", "staleness/max", "something/new"} <= drawn
    assert "b rose from .10 to .90" in page


def test_reference_lines_and_notes_are_on_the_page(tmp_path):
    line = ReferenceLine(0.06, "the teacher itself")
    page, data = report(
        make_run(tmp_path / "run"),
        reference_lines={"rollouts/truncation_rate": line},
        title="A study",
        notes=["Mind <this>."],
    )
    lines = [(line["y"], line["text"]) for line in panels(data)["Truncation"]["lines"]]
    assert lines == [(0.06, "the teacher itself"), (0.1, "guard warns at"), (0.25, "guard acts at")]
    assert "<h1>A study</h1>" in page and "Mind &lt;this&gt;." in page


def test_what_a_healthy_run_measures_is_seen_against_what_the_guard_acts_on(tmp_path):
    """The bug: truncation of .00 to .02 filled its chart like a collapse."""
    level = {"guard": {"level": "warn", "truncation_rate": [0.2, 0.3, 0.5]}}
    chart = panels(report(make_run(tmp_path / "a", config=level))[1])["Truncation"]
    assert (chart["lines"], chart["least"]) == ([{"y": 0.2, "text": "guard warns at"}], 0.1)
    off = make_run(tmp_path / "b", seed=2, config={"guard": {**level["guard"], "level": "off"}})
    assert [line["y"] for line in panels(report(tmp_path / "a", off)[1])["Truncation"]["lines"]] == [0.2]
    acts = make_run(tmp_path / "d", seed=4, config={"guard": {**level["guard"], "level": "act"}})
    assert [line["y"] for line in panels(report(tmp_path / "a", acts)[1])["Truncation"]["lines"]] == [0.2, 0.3]
    other = make_run(tmp_path / "c", seed=3, config={"guard": {"level": "warn", "truncation_rate": [0.1, 0.3, 0.5]}})
    assert panels(report(tmp_path / "a", other)[1])["Truncation"]["lines"] == []  # whose would they be?


def test_curves_know_their_errors_and_what_steps_took(tmp_path):
    _, data = report(make_run(tmp_path / "run", steps=20, accuracy=(0.4, 0.7)))
    charts = panels(data)
    assert charts["Accuracy"]["errors"] == [[[0, 20], [0.02, 0.02]]]
    assert charts["Greedy accuracy"]["series"][0]["errors"] == [[[0, 20], [0.02236, 0.01789]]]  # of 500 answers
    assert "Accuracy sampled se" not in charts
    assert data["runs"][0]["axes"]["tokens"] == [list(range(21)), [1000.0 * step for step in range(21)]]
    assert data["runs"][0]["axes"]["minutes"][1][-1] == 1.0


def test_what_a_run_contains_never_becomes_markup(tmp_path):
    run = make_run(tmp_path / "run", name=EVIL, config={"note": EVIL}, logged_steps=[1])
    event = {"step": 2, "signal": EVIL, "value": 1.0, "threshold": 0.5, "level": EVIL, "action": EVIL}
    summary = json.loads((run / "summary.json").read_text()) | {"guard_events": [event]}
    (run / "summary.json").write_text(json.dumps(summary))
    page, data = report(run)
    assert "window.hacked" in page  # it is shown,
    assert "<script>window" not in page and "<img" not in page  # as text
    assert data["runs"][0]["events"][0]["action"] == EVIL


def test_where_every_run_has_a_trace_its_lanes_stand_in_place_of_the_idle_curves(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Idle" in panels(report(run)[1])
    write_trace(run)
    assert not [title for title in panels(report(run)[1]) if title.startswith("Idle")]


def test_of_a_long_run_the_minutes_are_those_of_every_step(tmp_path):
    """The bug: summed were the points that are kept, the extremes of which stand for nothing but themselves."""
    run = make_run(tmp_path / "run", steps=3)
    lines = [
        {"step": step, "learner/loss": 1.0, "throughput/step_s": 900.0 if step == 7001 else 2.0}
        for step in range(1, 20_001)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, minutes = curves.axes(read_run(run))["minutes"]
    assert (steps[-1], minutes[-1]) == (20_000, pytest.approx((19_999 * 2 + 900) / 60, rel=1e-3))


@pytest.mark.slow
def test_the_page_asks_the_network_for_nothing(tmp_path):
    page, _ = report(make_run(tmp_path / "run"))
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"|@import|url\(', page) == []
    assert "@@" not in page


def test_rollouts_come_with_text_and_both_probabilities(tmp_path):
    run = make_run(tmp_path / "run", logged_steps=[1, 10], student=make_student(tmp_path / "student"))
    sample = rollouts.sample(read_run(run), 100)
    assert (len(sample.rollouts), sample.logged, sample.note) == (10, 10, "")
    assert set(sample.vocab) == {*"1234", "+", "=", "<eos>"} and set(sample.vocab) <= set(CHARACTERS)
    by_id = {rollout["id"]: rollout for rollout in sample.rollouts}
    wrong = by_id["10-wrong"]
    assert [sample.vocab[index] for index in wrong["ids"]] == [*"1+1=3", "<eos>"]
    assert (wrong["prompt"].replace(" ", ""), wrong["ok"], wrong["cut"], wrong["v"]) == ("1+1=", 0, 0, [3, 4])
    assert wrong["T"] == [-10, -10, -10, -10, -300, -10]
    assert wrong["S"] == [-50] * 6 and wrong["R"] == [-25] * 6
    assert (wrong["of"], wrong["answer"]) == ("1+1", "2")
    (place,) = wrong["alt"]  # where the teacher doubts, and nowhere else
    assert place == 4 and [(sample.vocab[id], p) for id, p in wrong["alt"][4]] == [("2", -10), ("4", -200)]
    assert by_id["1-never"]["T"][4] is None  # probability 0, which JSON cannot say
    assert (by_id["1-loop"]["cut"], by_id["1-loop"]["rep"]) == (1, 1)
    assert (by_id["1-golden"]["src"], by_id["1-golden"]["T"], by_id["1-golden"]["S"]) == ("golden", None, None)


def test_what_ended_a_rollout_is_told_apart(tmp_path):
    run, (_, _, _, loop, _) = make_run(tmp_path / "run"), make_rollouts(1)
    reasons = ("length", "repetition", "horizon")
    write_rollouts(run, 1, [loop | {"rollout_id": reason, "finish_reason": reason} for reason in reasons])
    found = {
        rollout["end"]: (rollout["cut"], rollout["ok"]) for rollout in rollouts.sample(read_run(run), 100).rollouts
    }
    assert found == {"length": (1, 0), "repetition": (1, 0), "horizon": (2, 2)}  # which nobody has judged


def test_a_sample_has_the_truncated_ones_of_every_step(tmp_path):
    run = make_run(tmp_path / "run")
    for step in range(1, 41):
        right, wrong, _, loop, golden = make_rollouts(step)
        write_rollouts(run, step, [right, wrong] * 10 + [loop] + [golden] * 10)
    sample = rollouts.sample(read_run(run), 96)
    shown = [rollout["step"] for rollout in sample.rollouts if rollout["cut"]]
    assert len(shown) == rollouts.MAX_STEPS and shown[0] == 1 and shown[-1] == 40
    assert len(sample.rollouts) == 96 and sum(rollout["src"] == "golden" for rollout in sample.rollouts) == 24
    assert sample.logged == 40 * 31 and "24 of 40 logged steps" in sample.note


def test_a_prompt_that_comes_again_is_shown_at_every_step_that_has_it(tmp_path):
    run = make_run(tmp_path / "run")
    for step in range(1, 6):
        others = [row | {"prompt_id": f"{step}-{n}"} for n in range(9) for row in make_rollouts(step)[:1]]
        write_rollouts(run, step, [*others, make_rollouts(step)[1]])
    sample = rollouts.sample(read_run(run), 10)
    assert [rollout["step"] for rollout in sample.rollouts if rollout["of"] == "1+1"] == [1, 2, 3, 4, 5]


def test_the_last_steps_of_a_long_run_are_all_shown(tmp_path):
    run = make_run(tmp_path / "run", logged_steps=range(1, 101))
    steps = sorted({rollout["step"] for rollout in rollouts.sample(read_run(run), 96).rollouts})
    assert (len(steps), steps[0], steps[-4:]) == (rollouts.MAX_STEPS, 1, [97, 98, 99, 100])


def test_long_responses_lose_their_middle(tmp_path):
    run = make_run(tmp_path / "run", student=make_student(tmp_path / "student"))
    row = make_rollouts(1)[3]
    long = {
        name: value * 100 if isinstance(value, list) and name != "prompt_tokens" else value
        for name, value in row.items()
    }
    write_rollouts(run, 1, [long])
    (shown,) = rollouts.sample(read_run(run), 10).rollouts
    assert (shown["n"], shown["gap"], len(shown["ids"]), len(shown["T"])) == (2400, [300, 1800], 600, 600)


def test_without_tokenizer_or_rollouts_there_is_still_a_page_that_says_so(tmp_path):
    ids = rollouts.sample(read_run(make_run(tmp_path / "ids", logged_steps=[1])), 10)
    assert "token ids stand for text" in ids.note and f"{CHARACTERS.index('1')} " in ids.vocab
    page, data = report(make_run(tmp_path / "bare", finished=False))
    assert "No rollouts were logged" in page and "Unfinished: bare (step 20 of 20)." in page
    assert data["runs"][0]["rollouts"] == []


def test_a_damaged_rollout_file_is_named_and_left_out(tmp_path):
    run = make_run(tmp_path / "run", logged_steps=[1])
    (run / "rollouts" / "step-000002.parquet").write_bytes(b"PAR1 but no more")
    sample = rollouts.sample(read_run(run), 10)
    assert len(sample.rollouts) == 5 and "step-000002.parquet cannot be read" in sample.note


def test_made_up_rollouts_have_columns_that_real_ones_have():
    added = {"prompt", "answer", "teacher_logprobs", "reference_logprobs", "teacher_top_ids", "teacher_top_logprobs"}
    assert set(make_rollouts(1)[0]) - added <= set(ROLLOUT_SCHEMA.names)  # test_recorder.py has what is added


def test_default_outputs(tmp_path):
    run = make_run(tmp_path / "study" / "a")
    assert default_output([run]) == run / "report.html"
    assert default_output([run, tmp_path / "study" / "b" / "c"]) == tmp_path / "study" / "report.html"
    write_report([run], run / "report.html")
    assert (run / "report.html").stat().st_size < 2.5e6
    assert not list(run.glob(".*"))


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["report", *map(str, arguments)])
    return (caught.value.code, *capsys.readouterr())


def test_the_command_says_where_the_page_is_and_how_large(tmp_path, capsys):
    make_run(tmp_path / "a")
    code, out, err = call(capsys, tmp_path / "a", "--output", tmp_path / "new" / "page.html")
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"wrote {tmp_path}/new/page\.html \(\d\.\d MB\)\n", out)


@pytest.mark.parametrize("name", ["nothing", ""])
def test_the_command_refuses_what_holds_no_runs_in_one_line(tmp_path, capsys, name):
    code, out, err = call(capsys, tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"opd-ray: {tmp_path}")


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report([make_run(tmp_path / "run")], tmp_path / "file" / "report.html")

"""The report in headless Chromium: charts are drawn, controls do what they say, nothing is fetched, nothing runs.

Needs Playwright's Chromium (``playwright install chromium``) or one on the PATH; skipped with that reason elsewhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from made_up_runs import EVIL, STUDY_ARMS, make_rollouts, make_run, make_student, make_study, write_trace
from opd_ray.report import ReferenceLine, write_report
from opd_ray.report.rollouts import Signals
from tiny_checkpoints import CHARACTERS

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
pytestmark = pytest.mark.timeout(120)

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_EVENTS = (
    {"step": 32, "signal": "truncated_token_share", "value": 0.3, "threshold": 0.25, "level": "act", "action": EVIL},
    {"step": 45, "signal": "truncation_rate", "value": 0.7, "threshold": 0.5, "level": "stop", "action": "stopped"},
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        on_path = next(filter(None, map(shutil.which, _NAMES)), None)
        own = playwright.chromium.executable_path
        if not on_path and not Path(own).exists():
            pytest.skip("no Chromium: none on the PATH, and `playwright install chromium` was not run")
        # Chromium refuses its sandbox to root, which is who CI containers run as.
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=None if Path(own).exists() else on_path, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of two seeds; one arm inflates, and its rollouts hold a token that would be a script."""
    root = tmp_path_factory.mktemp("study")
    student = make_student(root / "student", [EVIL if token == "3" else token for token in CHARACTERS])
    for seed in (1, 2):
        common = {"seed": seed, "steps": 60, "student": student, "logged_steps": [1, 30, 60]}
        make_run(root / f"stable{seed}", name="stable", accuracy=(0.3, 0.9), **common)
        make_run(root / f"plain{seed}", name="plain", accuracy=(0.3, 0.1), inflates_at=40, events=_EVENTS, **common)
    write_trace(root / "stable1")
    line = ReferenceLine(0.06, "the teacher itself")
    write_report([root], root / "report.html", reference_lines={"rollouts/truncation_rate": line})
    return root / "report.html"


@pytest.fixture(scope="module")
def study_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen arms of three seeds; the guard of one rolls one of them back."""
    root = tmp_path_factory.mktemp("arms")
    make_study(root, range(3), logged_steps=[1], steps=40)
    write_report([root], root / "report.html", order=list(STUDY_ARMS))
    return root / "report.html"


@pytest.fixture(scope="module")
def seen_page(browser: Any, report: Path) -> Iterator[Any]:
    """One for all tests that only look at it, or leave it as it was."""
    yield from opened(browser, report)


@pytest.fixture(scope="module")
def seen_study(browser: Any, study_report: Path) -> Iterator[Any]:
    """One for all tests that only look at it, or leave it as it was."""
    yield from opened(browser, study_report)


@pytest.fixture
def viewer(seen_page: Any) -> Iterator[Any]:
    """One for all that choose in the viewer; nothing is chosen before and after."""
    yield seen_page
    seen_page.evaluate(
        """new Promise((done) => {
          addEventListener("hashchange", () => done(), { once: true });
          location.hash = "rollouts?of=nothing"; // another than before in any case
        })"""
    )
    seen_page.locator("#only").click()
    for picked, usual in (("arm", "stable"), ("seed", "1"), ("scale", "+2 nats")):
        seen_page.locator(f"#pick-{picked}").select_option(label=usual)


def until(page: Any, condition: str) -> None:
    """Playwright's own wait_for_function evaluates strings in the page, which the report's policy refuses."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never came true: {condition}")


def opened(browser: Any, report: Path, width: int = 1366) -> Iterator[Any]:
    """The opened page; at the end it must have complained of nothing and fetched nothing."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("window.hacked") is None
    page.close()


def chart(page: Any, title: str) -> Any:
    return page.locator("figure", has=page.locator("b", has_text=title)).first


def lines(page: Any, title: str) -> int:
    return chart(page, title).locator(".scatterlayer .trace path.js-line").count()


def cards(page: Any) -> list[str]:
    return page.locator(".rollout header").all_inner_texts()


def test_every_open_chart_is_drawn_and_nothing_is_wider_than_the_page(seen_page):
    charts = seen_page.locator("div.group .plot")
    assert charts.count() >= 12
    for index in range(charts.count()):
        assert charts.nth(index).locator(".scatterlayer .trace").count() > 0
    assert seen_page.evaluate("document.documentElement.scrollWidth") <= 1366


def test_a_chart_has_each_seed_a_mean_a_band_and_the_guards_events(seen_page):
    accuracy = chart(seen_page, "Accuracy")
    assert lines(seen_page, "Accuracy") == 2 * (2 + 1) + 2  # seeds and mean of each arm, and the bands' outlines
    assert accuracy.locator(".scatterlayer .fills path.js-fill, .scatterlayer path.js-fill").count() == 2
    # Held-out points before and after for each arm, and two events on the line of each of two runs.
    assert accuracy.locator(".scatterlayer .points path").count() == 2 * 2 + 2 * 2
    keys = chart(seen_page, "Truncation").locator(".key").all_inner_texts()
    assert keys == ["the teacher itself 0.06", "guard warns at 0.1", "guard acts at 0.25"]
    assert chart(seen_page, "Truncation").locator(".shapelayer path").count() == 3
    assert seen_page.locator(".marks b").all_inner_texts() == ["◇", "┃", "★", "✖", "┄"]


def test_curves_are_drawn_over_tokens_and_minutes_as_well(seen_page):
    title = chart(seen_page, "Accuracy").locator(".xtitle")
    ends = []
    for axis in ("tokens", "minutes", "steps"):
        seen_page.locator("#axis").select_option(axis)
        for _ in range(200):
            if title.text_content().startswith(axis):
                break
            seen_page.wait_for_timeout(25)
        line = "document.querySelectorAll('.plot')[0].data.filter((t) => /lines/.test(t.mode) && t.name).at(-1)"
        ends.append(seen_page.evaluate(f"{line}.x.at(-1)"))
    assert ends == [60_000, 3, 60]


def test_an_arm_is_hidden_in_every_chart_by_its_button(seen_page):
    button = seen_page.locator("#legend button", has_text="plain")
    drawn = lines(seen_page, "Accuracy"), lines(seen_page, "Length")
    button.click()
    until(seen_page, "!document.querySelectorAll('.plot')[2].data.some((trace) => /plain/.test(trace.name))")
    assert button.get_attribute("aria-pressed") == "false"
    assert lines(seen_page, "Accuracy") * 2 == drawn[0] and lines(seen_page, "Length") * 2 == drawn[1]
    button.click()
    until(seen_page, "document.querySelectorAll('.plot')[2].data.some((trace) => /plain/.test(trace.name))")
    assert (lines(seen_page, "Accuracy"), lines(seen_page, "Length")) == drawn


@pytest.mark.parametrize("width", [1366, 400])
def test_a_trace_is_shown_as_lanes(seen_page, browser, report, width):
    for page in [seen_page] if width == 1366 else opened(browser, report, width):
        lanes = page.locator("#lanes figure")
        assert lanes.count() == 1 and lanes.locator("b").first.inner_text() == "seed 1"
        assert lanes.locator(".key").all_inner_texts() == ["generate", "wait", "train", "broadcast"]
        drawn = page.evaluate(
            "document.querySelector('#lanes .plot').data.map((trace) => [trace.name, trace.x.length])"
        )
        assert dict(drawn) == {"generate": 120, "wait": 120, "train": 120, "broadcast": 240}
        names = lanes.locator(".annotation-text").all_text_contents()
        assert " ".join(names[0].split()).startswith("driver train 50 %, wait 40 %")
        assert [name.split()[0] for name in names[:2]] == ["driver", "student-generator-0"] and len(names) == 4
        assert page.evaluate("document.querySelector('#lanes .plot').layout.xaxis.range[0]") > 0, (
            "the newest come first"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("figure b", has_text="Idle").count() == 1, "the other runs have no trace"


def test_the_other_charts_are_drawn_once_they_are_opened(seen_page):
    seen_page.locator("details.group summary").click()
    until(seen_page, "[...document.querySelectorAll('details.group .plot')].every((plot) => plot.data)")


def test_pointing_at_a_chart_names_the_step_and_the_arms(seen_page):
    plot = chart(seen_page, "Accuracy").locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    seen_page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 90)
    hover = plot.locator(".hoverlayer .legend")
    hover.wait_for()
    assert "step" in hover.text_content() and "stable" in hover.text_content()


def test_filters_change_the_rollouts_that_are_shown(viewer):
    viewer.locator("#pick-arm").select_option(label="plain")
    assert viewer.locator("#pick-seed option").all_inner_texts() == ["1", "2"]
    viewer.locator("#pick-seed").select_option(label="2")
    assert len(cards(viewer)) == 15
    viewer.locator("#pick-cut").select_option("1")
    assert [("truncated" in text, "repetitive" in text) for text in cards(viewer)] == [(True, True)] * 3
    viewer.locator("#pick-step").select_option("30")
    assert len(cards(viewer)) == 1 and "step 30" in cards(viewer)[0]
    assert "1 of 15 rollouts" in viewer.locator("#viewer-count").inner_text()
    viewer.locator("#pick-cut").select_option("")
    viewer.locator("#pick-src").select_option("golden")
    assert "not scored by the teacher" in cards(viewer)[0]
    viewer.locator("#pick-src").select_option("student")
    viewer.locator("#pick-rep").select_option("0")
    viewer.locator("#pick-ok").select_option("0")
    assert len(cards(viewer)) == 2 and all("wrong" in text for text in cards(viewer))


def test_the_newest_come_first_and_are_searched_sorted_and_followed_by_a_link(viewer):
    assert [text.split()[1] for text in cards(viewer)[:5]] == ["60"] * 5 and "step 1 " not in cards(viewer)[0]
    assert viewer.locator(".expected").first.inner_text() == "expected 2"
    viewer.locator("#pick-sort").select_option("lowest A")
    assert "mean A" in cards(viewer)[0] and "not scored" in cards(viewer)[-1]
    means = [text.split("mean A")[1].split()[0] for text in cards(viewer) if "mean A" in text]
    values = [float(mean.replace("−", "-")) for mean in means]
    assert values == sorted(values)
    viewer.locator("#search").fill("1+1=4 1+1")
    assert len(cards(viewer)) == 3 and viewer.locator("#viewer-count").inner_text().startswith("3 of 15")
    viewer.get_by_role("button", name="this prompt at 3 steps").first.click()
    assert [text.split()[1] for text in cards(viewer)] == ["1", "30", "60"]
    shared = viewer.url
    assert "search=1%2B1%3D4" in shared and "of=1%2B1" in shared
    viewer.locator("#only").click()
    viewer.locator("#search").fill("")
    assert len(cards(viewer)) == 15 and "of=" not in viewer.url
    viewer.locator(".rollout a").nth(3).click()
    until(viewer, "document.querySelectorAll('.rollout').length === 1")
    assert "id=" in viewer.url
    viewer.goto(shared)  # a fragment alone: the page stays
    until(viewer, "document.querySelectorAll('.rollout').length === 3")
    assert viewer.locator("#search").input_value() == "1+1=4 1+1"
    assert viewer.evaluate("document.getElementById('rollouts').getBoundingClientRect().top") < 300


def test_pointing_at_a_token_tells_both_probabilities_and_the_advantage(seen_page):
    token = seen_page.locator(".rollout", has_text="wrong").first.locator(".t").nth(4)
    assert token.inner_text() == EVIL  # shown, not run
    token.hover()
    tip = seen_page.locator("#tip")
    assert tip.is_visible()
    assert "token 5 of 6" in tip.inner_text()
    rows = tip.locator("tr").all_inner_texts()
    values = [row.split("\t")[-1].strip() for row in rows]
    assert values == ["0.050", "0.607", "0.779", "−2.50 nats", "0.905", "0.135"]
    assert rows[2].startswith("reference") and [row.split()[1] for row in rows[4:]] == ['"2"', '"4"']
    seen_page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_a_token_that_the_teacher_rules_out_is_coloured_fully(viewer):
    token = viewer.locator(".rollout", has_text="1+1=4").first.locator(".t").nth(4)
    assert token.evaluate("(token) => token.style.getPropertyValue('--much')") == "90%"
    viewer.locator("#pick-scale").select_option("8")
    assert viewer.locator("#scale-low").inner_text() == "−8"
    token.hover()
    assert "−∞" in viewer.locator("#tip").inner_text()


def test_tokens_can_be_read_with_the_keyboard_alone(seen_page):
    strip = seen_page.locator(".rollout .tokens").first
    strip.focus()
    for _ in range(3):
        seen_page.keyboard.press("ArrowRight")
    assert "token 3 of" in seen_page.locator("#tip").inner_text()
    seen_page.keyboard.press("End")
    assert '"<eos>"' in seen_page.locator("#tip").inner_text()
    seen_page.keyboard.press("Escape")
    assert seen_page.locator("#tip").is_hidden()


def pressed(page: Any) -> list[bool]:
    return [button.get_attribute("aria-pressed") == "true" for button in page.locator("#legend button").all()]


def drawn_arms(page: Any) -> set[str]:
    names = page.evaluate("document.querySelector('div.group .plot').data.map((trace) => trace.name)")
    return {name for name in names if name in STUDY_ARMS}


def test_no_two_arms_look_alike_in_the_legend(seen_study):
    looks = seen_study.evaluate(
        """[...document.querySelectorAll('#legend button')].map((button) =>
          getComputedStyle(button.querySelector('.swatch'), '::before').backgroundColor + button.dataset.mark)"""
    )
    assert len(set(looks)) == 14
    assert [look.endswith("circle") for look in looks] == [False] * 8 + [True] * 6


def column(page: Any, number: int) -> list[str]:
    return page.locator(f"#arm-table tbody tr > :nth-child({number + 1})").all_inner_texts()


def test_the_table_of_many_arms_fits_and_is_sorted_by_its_heads(seen_study):
    table = seen_study.locator("#arm-table")
    assert table.bounding_box()["width"] <= 1366 - 2 * 28
    assert column(seen_study, 0) == list(STUDY_ARMS)
    head = table.get_by_role("button", name="sampled accuracy after")
    head.click()
    values = [text.split()[0] for text in column(seen_study, 1)]
    assert values == sorted(values, reverse=True) and column(seen_study, 0)[-1] == "OPD, full vocabulary"
    head.click()
    assert [text.split()[0] for text in column(seen_study, 1)] == values[::-1]
    assert table.locator("th[aria-sort=ascending]").inner_text() == "sampled accuracy after"
    head.click()
    assert column(seen_study, 0) == list(STUDY_ARMS)


def test_rows_without_a_value_are_sorted_last_either_way(seen_study):
    head = seen_study.locator("#arm-table").get_by_role("button", name="truncation passes ½ at step")
    index = seen_study.locator("#arm-table thead button").all_inner_texts().index("truncation passes ½ at step")
    for _ in range(2):
        head.click()
        assert column(seen_study, index)[-1] == "never" and column(seen_study, index)[0] != "never"
    head.click()  # as it was


def test_the_golden_sets_sizes_are_the_ticks_of_their_chart(seen_study):
    plot = seen_study.locator("#golden-plot")
    assert plot.locator(".xtick").all_text_contents() == ["32", "128", "512"]
    assert plot.locator(".scatterlayer path.js-line").count() == 2
    assert plot.locator(".scatterlayer .points path").count() == 2 * (3 * 3 + 3)


def test_what_was_rolled_back_is_drawn_beside_the_curve_and_marked(seen_study):
    found = seen_study.evaluate(
        """[...document.querySelectorAll('div.group .plot')[1].data].filter((trace) => /guard, /.test(trace.name))
          .map(({ name, mode, line, marker }) => [name, mode, line?.dash, marker?.symbol])"""
    )
    assert ["OPD + guard, abandoned", "lines", "dot", None] in found
    assert ["OPD + guard, guard", "markers", None, ["triangle-left"]] in found


def test_the_page_of_many_arms_is_no_wider_than_a_phone(seen_study):
    seen_study.set_viewport_size({"width": 390, "height": 800})
    until(seen_study, "document.documentElement.scrollWidth <= 390")
    seen_study.set_viewport_size({"width": 1366, "height": 900})


def test_one_seed_of_another_arm_stays_chosen(seen_study):
    seen_study.locator("#pick-seed").select_option(label="2")
    seen_study.locator("#pick-arm").select_option(label="SFT, 512 golden")
    assert seen_study.locator("#pick-seed option:checked").inner_text() == "2"


def test_many_arms_begin_with_the_first_of_the_study_and_the_others_are_a_click_away(seen_study):
    """The last of those that share the page: others are shown afterwards."""
    assert seen_study.locator("#legend button").all_inner_texts() == list(STUDY_ARMS)
    assert pressed(seen_study) == [True] * 7 + [False] * 7
    assert drawn_arms(seen_study) == set(list(STUDY_ARMS)[:7])
    seen_study.get_by_role("button", name="Show all 14").click()
    until(seen_study, "[...document.querySelectorAll('div.group .plot')].at(-1).data.length > 14")
    assert drawn_arms(seen_study) == set(STUDY_ARMS) and all(pressed(seen_study))
    seen_study.get_by_role("button", name="The first 7 only").click()
    assert pressed(seen_study) == [True] * 7 + [False] * 7
    seen_study.locator("#legend button", has_text="SFT, 32 golden").dblclick()
    until(seen_study, "document.querySelector('div.group .plot').data.some((trace) => /^SFT, 32/.test(trace.name))")
    assert sum(pressed(seen_study)) == 1 and drawn_arms(seen_study) == {"SFT, 32 golden"}


def test_dark_and_light_are_both_drawn(seen_page):
    shades = []
    for scheme in ("light", "dark"):
        seen_page.locator("#theme").click()
        until(seen_page, f"document.documentElement.dataset.theme === '{scheme}'")
        shades.append(seen_page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(shades)) == 2
    seen_page.locator("#theme").click()  # as it was


def test_zooming_one_chart_zooms_all(seen_page):
    """The last of those that share the page: it stays zoomed."""
    plot = chart(seen_page, "Accuracy").locator(".plot")
    plot.scroll_into_view_if_needed()
    box, mouse = plot.bounding_box(), seen_page.mouse
    ranges = "[...document.querySelectorAll('div.group .plot')].map((plot) => plot.layout.xaxis.range.join())"
    mouse.move(box["x"] + 150, box["y"] + 80)
    mouse.down()
    mouse.move(box["x"] + 250, box["y"] + 85, steps=4)
    mouse.up()
    until(seen_page, f"new Set({ranges}).size === 1 && !{ranges}[0].startsWith('-')")


def test_one_unfinished_run_without_rollouts_is_still_a_page(browser, tmp_path):
    write_report([make_run(tmp_path / "run", finished=False, steps=3)], tmp_path / "report.html")
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    assert lines(page, "Accuracy") == 1
    most = page.evaluate(
        "[...document.querySelectorAll('.plot')].slice(0, 5).map((plot) => plot.layout.yaxis.range[1])"
    )
    assert [round(each, 2) for each in most[1::2]] == [
        0.27,
        0.16,
    ]  # nothing repeats, and the axis ends at what the guard acts on
    assert errors == []
    page.close()


def test_no_script_but_the_report_s_own_runs_and_nothing_is_sent(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.evaluate(
        """() => {
            window.refused = new Set();
            document.addEventListener("securitypolicyviolation", (event) => refused.add(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.head.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='window.hacked = 1'>");
            fetch("http://127.0.0.1:9/").catch(() => {});
        }"""
    )
    until(page, "refused.size === 3")
    assert set(page.evaluate("[...refused]")) == {"script-src-elem", "script-src-attr", "connect-src"}
    assert page.evaluate("window.hacked") is None
    page.close()


def test_a_replayed_step_is_coloured_by_what_is_chosen_and_says_all_of_it(browser: Any, tmp_path: Path) -> None:
    """Under the configured loss the third token of 1+1=2 is pushed down, under another one up."""
    run = make_run(tmp_path / "run", logged_steps=[1, 2], student=make_student(tmp_path / "student"))
    lengths = {row["rollout_id"]: len(row["response_tokens"]) for row in make_rollouts(2)}
    pushes = {
        name: {rollout: [0.0, 0.0, push] + [0.0] * (length - 3) for rollout, length in lengths.items()}
        for name, push in (("push, as configured", -1.25), ("push, jsd", 0.5))
    }
    write_report([run], tmp_path / "replay.html", signals=Signals(2, pushes))
    for page in opened(browser, tmp_path / "replay.html"):
        assert page.locator("#viewer-count").inner_text().startswith("5 of 5 rollouts (of step 2 alone)")
        token = page.locator("article", has_text="expected 2").first.locator(".t").nth(2)
        tints = []
        for label in ("push, as configured", "push, jsd"):
            page.locator("#pick-signal").select_option(label=label)
            tints.append(token.evaluate("token => token.style.getPropertyValue('--tint')"))
        assert tints == ["var(--minus)", "var(--plus)"]
        token.hover()
        said = page.locator("#tip").inner_text()
        assert "push, as configured\t−1.25" in said and "push, jsd\t+0.50" in said

"""`opd-ray init`: a recipe as a file whose comments agree with the fields, written where nothing is lost by it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from opd_ray import config as configs
from opd_ray import recipes
from opd_ray.__main__ import main
from opd_ray.config.commented import commented

RECIPES = list(recipes.purposes())
OWN = "student: {path: s}\nteacher: {path: t}\ndata: {prompts: p, golden: g, evaluation: e}\n"


@pytest.fixture
def init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `opd-ray init` in an empty directory; returns exit code and what was said."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(["init", *arguments])
        said = capsys.readouterr()
        return caught.value.code, said.out + said.err

    return call


def all_set(text: str) -> str:
    """A written file after every # before a field was taken away."""
    return re.sub(r"^#((?:  )*\w+:)", r"\1", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_is_the_recipe(name: str, init: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert init(name) == (0, f"wrote {name}.yaml; edit it, then: opd-ray train --config {name}.yaml\n")
    recipe = Path(recipes.__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8")
    expected = configs.from_dict(yaml.safe_load(recipe.replace("opd_ray/recipes/", "")))
    assert configs.load(tmp_path / f"{name}.yaml") == expected
    comes_with_it = set(re.findall(r"opd_ray/recipes/([\w.]+)", recipe))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.yaml"} | comes_with_it


@pytest.mark.parametrize("name", RECIPES)
def test_all_that_a_recipe_says_is_kept(name: str) -> None:
    """Values as they are written, and what stands behind them: of a paper's recipe, where each is from."""
    recipe = Path(recipes.__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8")
    written = commented(recipe, "From a recipe.")
    assert [line for line in re.findall(r"#.*", recipe) if line not in written] == []


def test_every_field_is_there_under_its_sentence_with_its_default() -> None:
    """A file that sets every field to what it says is one that sets none."""
    text = commented(OWN, "From nowhere.")
    everything = yaml.safe_load(all_set(text))
    assert configs.from_dict(everything) == configs.from_dict(yaml.safe_load(OWN))
    docs = list(configs.describe())
    assert [doc.name for doc in docs] == [name for name, _ in fields(everything, {doc.name for doc in docs})]
    words = re.sub(r"\s+#\s+", " ", text)
    assert [doc.name for doc in docs if " ".join(doc.doc.split()) not in words] == []


def fields(raw: dict, known: set[str], prefix: str = ""):
    for name, value in raw.items():
        if prefix + name in known:
            yield prefix + name, value
        else:
            yield from fields(value, known, f"{prefix}{name}.")


def test_a_block_is_kept_with_its_comments() -> None:
    given = OWN + "more_teachers:\n  short:  # the first\n    path: u  # paper\n\n  # behind\nseed: 3  # ours\n"
    text = commented(given, "From here.")
    assert "more_teachers:\n  short:  # the first\n    path: u  # paper\n" in text
    assert "\nseed: 3  # ours\n" in text
    assert configs.from_dict(yaml.safe_load(text)) == configs.from_dict(yaml.safe_load(given))


def test_without_a_recipe_all_are_listed_with_a_line_each(init: Callable[..., tuple[int, str]]) -> None:
    code, said = init()
    lines = said.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == RECIPES
    assert all(line.endswith(".") and len(line) > 40 for line in lines)
    assert list(Path.cwd().iterdir()) == []


def test_nothing_is_written_over_unless_asked_for(init: Callable[..., tuple[int, str]]) -> None:
    Path("gkd.yaml").write_text("mine\n")
    said = "opd-ray: init: gkd.yaml is there already; give another --out, or --force to write over it\n"
    assert init("gkd") == (2, said)
    assert Path("gkd.yaml").read_text() == "mine\n"
    assert init("gkd", "--force")[0] == 0
    assert configs.load(Path("gkd.yaml")).name == "GKD"
    Path("solved_prompts.jsonl").write_text("mine\n")
    assert init("sdpo")[0] == 2
    assert not Path("sdpo.yaml").exists()


def test_recipes_share_their_data_file(init: Callable[..., tuple[int, str]]) -> None:
    Path("conf").mkdir()
    assert (init("sdpo", "--out", "conf/a.yaml")[0], init("opsd", "--out", "conf/b.yaml")[0]) == (0, 0)
    assert Path(configs.load(Path("conf/b.yaml")).data.prompts).is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gdk"], "no recipe 'gdk'; did you mean 'gkd'?"),
        (["gkd", "--out", "no/where.yaml"], "no/where.yaml: No such file or directory; give --out a file"),
    ],
)
def test_what_cannot_be_written_is_told_in_a_line(
    init: Callable[..., tuple[int, str]], arguments: list[str], said: str
) -> None:
    code, line = init(*arguments)
    assert code == 2 and said in line and line.count("\n") == 1

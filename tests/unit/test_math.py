"""The math task: what a teacher that is shown the solution reads."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from checkpoints import CHARACTERS, make_checkpoint
from opd_ray.tasks import get_task

ROW = {"prompt": "1+1=", "answer": "2"}
LETTERS = (*CHARACTERS, "<user>", *sorted(set("cdefghijklmnopqrstuvwxyzHNT:,.{} \n")))


def tokenizer(path: Path, chat_template: str | None) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_checkpoint(path, tokens=LETTERS, chat_template=chat_template))


def test_a_privileged_prompt_holds_problem_and_solution_in_the_same_turn(tmp_path: Path) -> None:
    chat = tokenizer(tmp_path, "<user>{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}")
    task = get_task("math")
    plain, shown = task.format_prompt(ROW, chat), task.format_privileged_prompt(ROW, "it is {2}", chat)
    assert plain == chat.encode("<user>1+1==")
    assert (shown[0], shown[-1]) == (plain[0], plain[-1])
    text = chat.decode(shown)
    assert text.index("1+1=") < text.index("reference solution") < text.index("it is {2}") < text.index("own words")


def test_a_base_model_reads_it_as_plain_text(tmp_path: Path) -> None:
    base = tokenizer(tmp_path, None)
    shown = base.decode(get_task("math").format_privileged_prompt(ROW, "2", base))
    assert shown.startswith("1+1=")
    assert "<user>" not in shown


def test_a_row_without_an_answer_has_no_right_response() -> None:
    assert not get_task("math").verify("it is 2", {"prompt": "1+1=", "answer": ""})
    assert get_task("math").verify("it is $2$", ROW)

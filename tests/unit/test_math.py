"""The math task: what a teacher that is shown the solution reads, and what its verifier makes of answers."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from opd_ray.data.rendering import Renderer
from opd_ray.generate.generator import GeneratorSettings, StudentGenerator
from opd_ray.messages import PromptGroup, SamplingSettings
from opd_ray.tasks import get_task
from opd_ray.tasks.math import MathTask
from opd_ray.watch.metrics import rollout_metrics
from tiny_checkpoints import CHARACTERS, make_checkpoint
from uniform_tokens import UniformTokens

ROW = {"prompt": "1+1=", "answer": "2"}
LETTERS = (*CHARACTERS, "<user>", *sorted(set("cdefghijklmnopqrstuvwxyzHNT:,.{} \n")))


def renderer(path: Path, chat_template: str | None) -> Renderer:
    return Renderer(get_task("math"), str(make_checkpoint(path, tokens=LETTERS, chat_template=chat_template)))


def test_a_privileged_prompt_holds_problem_and_solution_in_the_same_turn(tmp_path: Path) -> None:
    chat = renderer(tmp_path, "<user>{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}")
    plain, shown = chat.prompt(ROW), chat.prompt(ROW, "it is {2}")
    assert plain == chat.tokenizer.encode("<user>1+1==")
    assert (shown[0], shown[-1]) == (plain[0], plain[-1])
    text = chat.tokenizer.decode(shown)
    assert text.index("1+1=") < text.index("reference solution") < text.index("it is {2}") < text.index("own words")


def test_a_base_model_reads_it_as_plain_text(tmp_path: Path) -> None:
    base = renderer(tmp_path, None)
    shown = base.tokenizer.decode(base.prompt(ROW, "2"))
    assert shown.startswith("1+1=")
    assert "<user>" not in shown


def test_a_row_without_an_answer_has_no_right_response() -> None:
    assert not get_task("math").verify("it is 2", {"prompt": "1+1=", "answer": ""})
    assert get_task("math").verify("it is $2$", ROW)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"First \boxed{3}, then finally \boxed{4}", "4", True),
        (r"First \boxed{4}, then finally \boxed{3}", "4", False),
        (r"\boxed{3} or rather \boxed{\frac{1}{2}}, so \{0.5\}", "0.5", True),
        (r"\boxed{4} and cut: \boxed{3", "4", True),
        (r"\boxed{3}, \boxed{x \in \{1, 2\}}", r"\{1, 2\}", True),
    ],
)
def test_the_last_box_counts(response: str, answer: str, right: bool) -> None:
    """The bug: several boxes were read as one set, {3, 4}, which is no number."""
    assert get_task("math").verify(response, {"prompt": "?", "answer": answer}) is right


@pytest.mark.parametrize("answer", [r"\text{}", "$", r"\boxed{}"])
def test_an_answer_that_cannot_be_read_has_no_right_response(answer: str) -> None:
    assert not get_task("math").reads(answer)
    assert not get_task("math").verify("it is $2$", {"prompt": "1+1=", "answer": answer})


HOSTILE = (
    r"9^{9^{9^{9}}}",
    r"(10^{9})!",
    "{" * 3000 + "1" + "}" * 3000,
    r"\sum_{n=1}^{10^{12}} n",
    r"(x+y+z+w)^{300}",
    r"\sin(10^{10^{10}})",
    r"10^{10^{10}}",
    r"\prod_{n=1}^{10^{9}} n",
    r"2^{3^{4^{5}}}",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\int_0^1 e^{x^{x^{x}}} dx",
    "(" * 2000 + "1" + ")" * 2000,
    r"\sqrt{" * 500 + "2" + "}" * 500,
    r"\frac{1}{1+" * 300 + "1" + "}" * 300,
    "+".join(f"x^{i}" for i in range(5000)),
    r"\log(7^{7^{7^{7}}})",
    r"(1+\sqrt{2})^{100000}",
    r"\lim_{n \to \infty} (1+1/n)^{n^{n^n}}",
    r"\{" * 3000 + r"\}" * 3000,
    "1," * 5000 + "2",
)


class Boxes:
    """A tokenizer whose texts are the hostile answers, and a right one after them."""

    def batch_decode(self, tokens: Sequence[Any], skip_special_tokens: bool) -> list[str]:
        return [f"so \\boxed{{{answer}}}" for answer in (*HOSTILE, "4")]


class Stopping(UniformTokens):
    def _token(self, request: Any, position: int) -> int:
        return 7


@pytest.mark.slow
def test_a_generator_answers_its_heartbeat_while_twenty_hostile_answers_are_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bug: each of them kept the event loop, most with the GIL held, until the generator counted as lost."""
    monkeypatch.setattr(MathTask, "verify_limit_s", 0.5)

    async def scenario() -> None:
        settings = GeneratorSettings(MathTask(), "keep", (1000, 2.0))
        generator = StudentGenerator(make_engine=Stopping, load_tokenizer=Boxes, settings=settings)
        sampling = SamplingSettings(temperature=1.0, top_p=1.0, max_response_tokens=6, stop_token_ids=(7,))
        group = PromptGroup(0, "p0", (1, 2, 3), {"prompt": "2+2=", "answer": "4"}, len(HOSTILE) + 1, seed=0)
        asked = asyncio.create_task(generator.generate([group], sampling))
        pings = 0
        async with asyncio.timeout(60):
            while not asked.done():
                await asyncio.wait_for(generator.node(), 2)
                pings += 1
                await asyncio.wait([asked], timeout=0.1)
        metas, payload = await asked
        assert pings > 10
        assert [meta.correct for meta in metas] == payload["correct"].to_pylist() == [False] * len(HOSTILE) + [True]
        metrics = rollout_metrics(metas, version=0, budget=6)
        assert metrics["rollouts/verify_timeouts"] == sum(meta.no_verdict for meta in metas) >= 15
        generator._judge.close()

    asyncio.run(scenario())

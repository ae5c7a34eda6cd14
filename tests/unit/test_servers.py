"""Servers in a run: what preflight refuses and finds out, what is told of them, and where their key is not."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from driven_run import cast_of, drive, events, in_no_hurry
from fake_server import FakeServer, table
from fake_workers import FakeScorer
from opd_ray import config as configs
from opd_ray.doctor import checks
from opd_ray.doctor.checks import Doctor
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import InputError
from opd_ray.messages import ServerState
from opd_ray.placement import launch
from opd_ray.run import preflight
from opd_ray.run import servers as looking
from opd_ray.score.server import Server
from opd_ray.status.reasons import explain
from opd_ray.status.state import FILE, read
from tiny_checkpoints import CHARACTERS, configured, make_checkpoint, make_setting, refused

ONE, TWO = "http://one:8000", "http://two:8000"


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeServer]:
    """Two by their URLs; nobody is anywhere else."""
    there = {url: FakeServer(url) for url in (ONE, TWO)}
    for each in there.values():
        each.words = CHARACTERS

    def server(url: str, **options: Any) -> Server:
        def nobody(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("[Errno 111] Connection refused")

        return Server(url, transport=there[url].transport if url in there else httpx.MockTransport(nobody), **options)

    monkeypatch.setattr(looking, "Server", server)
    return there


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path) | {"teacher.url": f"[{ONE},{TWO}/v1]"}


def look(setting: dict[str, str], **changes: str) -> preflight.Preflight:
    return preflight.check_files(resolve(configured(setting, **changes)))


# ---- the configuration ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.url=one:8000"], "'one:8000' is no address of a server; expected http://HOST:PORT"),
        (["teacher.url=ftp://one"], "is no address of a server"),
        (["teacher.url=http://one:eight"], "is no address of a server"),
        (["teacher.url=http://one/v1?version=3"], "is no address of a server"),
        (["teacher.url=http://me@one"], "is no address of a server"),
        (["teacher.url=http://me:s3cret@one"], "teacher.url=http://one: the address carries a key"),
        (["teacher.url=http://one/v1?key=3"], "name the variable that holds it in url_key_env"),
        ([f"teacher.url=[{ONE},{ONE}/v1]"], f"names a server twice: {ONE}, {ONE}"),
        (["teacher.url_key_env=KEY"], "url_key_env=KEY is of servers, but there is no url"),
        ([f"teacher.url={ONE}", "teacher.engine=vllm"], "engine=vllm is of a model in this run"),
        ([f"teacher.url={ONE}", "teacher.gpus_per_actor=1"], "gpus_per_actor=1.0 is of a model in this run"),
        ([f"teacher.url={ONE}", "teacher.update=average"], "update=average changes the model in this run"),
        ([f"teacher.url={ONE}", "loss.student.support=full"], "needs teacher.engine=torch"),
        ([f"teacher.url={ONE}", "teacher.url_drift_nats=0"], "teacher.url_drift_nats"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        configs.load(None, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "s3cret" not in str(caught.value)


def test_a_student_of_ones_own_needs_no_teacher_path_with_servers() -> None:
    mine = ["student.path=/models/s", "data.prompts=p", "data.evaluation=e", "data.golden=null", "loss.golden.coef=0"]
    mine += ["buffer.golden_per_prompt=0", "guard.max_golden_per_prompt=0"]
    config = resolve(configs.load(None, [*mine, f"teacher.url={ONE}"]))
    assert config.teacher.path == "/models/s"  # whose tokenizer it is
    with pytest.raises(InputError, match="teacher.path is the embedded one"):
        configs.load(None, [*mine, f"teacher.url={ONE}", "buffer.teacher_per_prompt=1", "loss.teacher.coef=1"])


def test_a_run_that_is_resumed_may_find_its_servers_elsewhere() -> None:
    here, there = (configs.load(None, [f"teacher.url={url}"]) for url in (ONE, TWO))
    assert list(configs.differences(here, there, configs.RUN)) == []
    assert [name for name, _, _ in configs.differences(here, there, configs.ROOMS)] == ["teacher.url"]


# ---- preflight ----


def test_good_servers_give_what_the_check_goes_by(setting: dict[str, str], servers: dict[str, FakeServer]) -> None:
    facts = look(setting)
    baseline = facts.servers["teacher"]
    assert baseline.models == {ONE: "m", TWO: "m"}
    assert baseline.vocab_size == len(CHARACTERS) and not baseline.chosen
    assert baseline.probe.tolist() == [CHARACTERS.index(each) for each in "1+1=12+1="]
    expected = table(0)[baseline.probe[:-1], baseline.probe[1:]]
    for answer in baseline.answers.values():
        np.testing.assert_allclose(answer, expected, atol=1e-5)


def test_no_weights_are_needed_beside_a_server(
    setting: dict[str, str], servers: dict[str, FakeServer], tmp_path: Path
) -> None:
    (tmp_path / "teacher" / "model.safetensors").unlink()
    look(setting)
    assert "has no weights" in refused(lambda: look(setting, teacher__url="null"))


def test_the_context_of_a_server_has_room_for_one_more_token(
    setting: dict[str, str], servers: dict[str, FakeServer]
) -> None:
    servers[TWO].max_model_len = 26
    assert look(setting).max_context_tokens == 25
    servers[TWO].max_model_len = 25
    message = refused(lambda: look(setting))
    assert f"its 5 prompt tokens + rollout.max_response_tokens=20 are 25, more than the context of 24 of {TWO}" in (
        message.replace("teacher.url=", "")
    )


def test_servers_with_another_tokenizer_are_asked_in_their_own_tokens(
    setting: dict[str, str], servers: dict[str, FakeServer], tmp_path: Path
) -> None:
    words = (*CHARACTERS[:3], *reversed(CHARACTERS[3:]))
    make_checkpoint(tmp_path / "teacher", tokens=words)
    for each in servers.values():
        each.words, each.endings = words, (2, 1)
    spans = {"loss__student__divergence": "k1", "loss__advantage__policy": "behaviour"}
    facts = look(setting, **spans)
    assert facts.servers["teacher"].probe.tolist() == [words.index(each) for each in "1+1=12+1="]
    assert facts.translations["teacher"].own_stop_token_ids == (1, 2) and facts.eos_token_ids == (1,)
    servers[TWO].max_model_len = 25  # the bug: prompts were cut, and nothing of the responses was scored
    assert f"are 25, more than the context of 24 of teacher.url={TWO}" in refused(lambda: look(setting, **spans))
    servers[TWO].max_model_len, servers[TWO].words = 64, CHARACTERS
    assert "serve a model of that tokenizer" in refused(lambda: look(setting, **spans))


def test_servers_that_choose_are_asked_to(setting: dict[str, str], servers: dict[str, FakeServer]) -> None:
    message = refused(lambda: look(setting, loss__student__support="student_top_k"))
    assert f"teacher.url={ONE}: /inference/v1/generate answers 403 (Scale-out endpoints are disabled.)" in message
    assert "a support of student_top_k needs vLLM servers on CUDA that were started with --enable-scale-out" in message
    for each in servers.values():
        each.chooses = True
    assert look(setting, loss__student__support="student_top_k").servers["teacher"].chosen
    servers[TWO].max_logprobs = 3
    message = refused(lambda: look(setting, loss__student__support="student_top_k"))
    assert "greater than max allowed: 3); a support of student_top_k" in message and "--max-logprobs 18" in message


@pytest.mark.parametrize(
    "answer",
    [
        (404, {"detail": "Not Found"}),
        (403, {"error": {"message": "Scale-out endpoints are disabled."}}),
        (400, {"error": {"message": "prompt_logprob_token_ids requires the V2 model runner"}}),
        (200, {"choices": []}),  # of before it knew of chosen tokens
    ],
)
def test_servers_that_do_not_choose_are_asked_for_alternatives(
    setting: dict[str, str], servers: dict[str, FakeServer], answer: tuple[int, Any]
) -> None:
    servers[ONE].chooses = True
    answering(*answer, "/inference")(servers)
    assert not look(setting).servers["teacher"].chosen


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, b"Internal Server Error"), "answers 500 (Internal Server Error); see its log"),
        ((401, {"error": "Unauthorized"}), "answers 401 (Unauthorized); see its log"),
        ((200, {"prompt_token_id_logprobs": "bm8="}), "gave no log-probs of chosen tokens ("),
    ],
)
def test_a_server_that_fails_at_choosing_is_refused_and_not_taken_for_one_that_cannot(
    setting: dict[str, str], servers: dict[str, FakeServer], answer: tuple[int, Any], message: str
) -> None:
    """The bug: a server that was down for a moment lost the run its exact P(stop)."""
    servers[ONE].chooses = True
    answering(*answer, "/inference")(servers)
    said = refused(lambda: look(setting))
    assert said.startswith(f"teacher.url={TWO}") and message in said


def test_chosen_tokens_are_asked_for_as_the_losses_will(
    setting: dict[str, str], servers: dict[str, FakeServer]
) -> None:
    for each in servers.values():
        each.chooses = True

    def asked(**changes: str) -> set[tuple[int, int | None]]:
        """Chosen tokens and alternatives."""
        servers[ONE].asked.clear()
        look(setting, **changes)
        bodies = [body["sampling_params"] for path, body in servers[ONE].asked if path == "/inference/v1/generate"]
        return {(np.shape(body["prompt_logprob_token_ids"])[1], body["prompt_logprobs"]) for body in bodies}

    assert asked() == {(2, len(CHARACTERS))}, "their own log-prob, P(stop) and the top-k"
    assert asked(loss__student__divergence="k1") == {(2, None)}, "for which no alternatives are needed"


def unreachable(there: dict[str, FakeServer]) -> None:
    del there[TWO]


def answering(status: int, answer: Any, path: str = "") -> Any:
    def change(there: dict[str, FakeServer]) -> None:
        there[TWO].fail = lambda asked: (status, answer) if path in asked else None

    return change


def setting_(**values: Any) -> Any:
    def change(there: dict[str, FakeServer]) -> None:
        vars(there[TWO]).update(values)

    return change


RENAMED = ("<pad>", "<end>", "<eos>", *CHARACTERS[3:])
SWAPPED = ("<pad>", "<eos>", "<end>", *"1023456789+-=ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unreachable, f"teacher.url={TWO}: cannot be reached ([Errno 111] Connection refused); start a vLLM server"),
        (
            setting_(key="k"),
            f"teacher.url={TWO}: /v1/models answers 401 (Unauthorized); name the variable with its key",
        ),
        (answering(503, {"detail": "loading"}), "/v1/models answers 503 (loading); start a vLLM server there"),
        (answering(200, b"<html>"), "its answer to /v1/models is no JSON"),
        (answering(200, {"hello": "there"}), "its /v1/models is no list of models; expected a vLLM server"),
        (answering(404, {"detail": "Not Found"}, "/tokenize"), "/tokenize answers 404 (Not Found); expected a vLLM"),
        (setting_(max_logprobs=15), "greater than max allowed: 15); start it with --max-logprobs 18, or ask for a"),
        (
            answering(200, {"choices": [{"text": "", "prompt_logprobs": None}]}, "completions"),
            "gives no prompt_logprobs (none); expected a vLLM server",
        ),
        (setting_(words=SWAPPED), "token 4 is '0' there but '1' in student.path="),
        (setting_(words=RENAMED), "token 1, which ends a response, is '<end>' there but '<eos>' in student.path="),
        (setting_(table=table(3)), f"differ from {ONE}, by "),
        (setting_(table=table(0) + 9), "gave no log-probs; start it with --logprobs-mode raw_logprobs"),
        (setting_(adapters=["a"], name="b"), None),
    ],
)
def test_a_server_that_will_not_do_is_refused_in_one_line(
    setting: dict[str, str], servers: dict[str, FakeServer], change: Any, message: str | None
) -> None:
    change(servers)
    if message is None:
        assert look(setting).servers["teacher"].models[TWO] == "b"
        return
    said = refused(lambda: look(setting))
    assert said.startswith(f"teacher.url={TWO}") and message in said


def scattering(fake: FakeServer, by: float) -> None:
    """Each of its answers is another."""
    seeds = itertools.count()

    def fail(path: str) -> None:
        fake.table = table(0) + np.random.default_rng(next(seeds)).normal(size=fake.table.shape) * by

    fake.fail = fail


@pytest.mark.parametrize(
    ("by", "overrides", "least", "most"),
    [
        (0.0, {}, 0.005, 0.005),
        (0.001, {}, 0.006, 0.03),  # as of bfloat16, though float32 was configured
        (0.01, {}, 0.05, 0.05),
        (0.0, {"teacher__dtype": "bfloat16"}, 0.05, 0.05),
        (0.0, {"teacher__url_drift_nats": "0.3"}, 0.3, 0.3),
    ],
)
def test_what_servers_may_differ_by_follows_from_their_scatter_and_precision(
    setting: dict[str, str],
    servers: dict[str, FakeServer],
    by: float,
    overrides: dict[str, str],
    least: float,
    most: float,
) -> None:
    for each in servers.values():
        scattering(each, by)
    assert least <= look(setting, **overrides).servers["teacher"].allowed <= most


def test_a_server_that_differs_from_itself_is_refused(setting: dict[str, str], servers: dict[str, FakeServer]) -> None:
    scattering(servers[TWO], 0.3)
    message = refused(lambda: look(setting))
    assert f"teacher.url={TWO}: its log-probs of 9 tokens differ from itself, asked again, by" in message


def test_without_a_path_the_servers_say_what_ends_a_response(
    setting: dict[str, str], servers: dict[str, FakeServer]
) -> None:
    """The bug that METHOD warns of: a teacher with another EOS contradicts every end that the student writes."""
    for each in servers.values():
        each.endings = (2,)
    alone = setting | {"teacher.path": "embedded"}
    assert look(alone).eos_token_ids == (1, 2)
    assert look(alone, teacher__eos_token_ids="[1]").eos_token_ids == (1,)
    assert look(setting).eos_token_ids == (1,)  # the path's tokenizer and configuration say so


def test_several_models_at_a_server_need_a_name(setting: dict[str, str], servers: dict[str, FakeServer]) -> None:
    models = (200, {"data": [{"id": "big"}, {"id": "small", "max_model_len": 64}]})
    for each in servers.values():
        each.fail = lambda path: models if path == "/v1/models" else None
    assert f"teacher.url={ONE}: serves big, small; name one of them" in refused(lambda: look(setting))
    assert "serves big, small, not smal; did you mean 'small'?" in refused(
        lambda: look(setting, teacher__url_model="smal")
    )
    assert look(setting, teacher__url_model="small").servers["teacher"].models == {ONE: "small", TWO: "small"}


def test_the_doctor_asks_the_servers(
    setting: dict[str, str], servers: dict[str, FakeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "Server", looking.Server)
    servers[TWO].key = "k"
    one, two = Doctor(configured(setting), tmp_path)._teacher()
    assert str(one) == f"ok teacher: {ONE} serves m"
    assert two.text == f"{TWO}: /v1/models answers 401 (Unauthorized)" and "teacher.url_key_env" in two.mend


# ---- the key ----


def test_the_key_is_in_memory_alone(
    setting: dict[str, str], servers: dict[str, FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in servers.values():
        each.key = "s3cret"
    asked = partial(look, setting, teacher__url_key_env="TEACHER_KEY")
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    assert "teacher.url_key_env=TEACHER_KEY: there is no such environment variable" in refused(asked)
    monkeypatch.setenv("TEACHER_KEY", "wrong")
    assert "answers 401 (Unauthorized); see the key in TEACHER_KEY" in refused(asked)
    monkeypatch.setenv("TEACHER_KEY", "s3cret")
    facts = asked()
    config = configured(setting, teacher__url_key_env="TEACHER_KEY")
    started: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(launch, "_spawning", lambda *args, **options: started.append((args, options)))
    monkeypatch.setattr(launch, "Pool", lambda *_, **__: None)
    launch._scorers("teacher", config, 64, facts.servers["teacher"])
    (args, options) = started[0]
    assert "s3cret" not in repr((args, options, config, facts, configs.to_yaml(config)))
    assert b"s3cret" in pickle.dumps(args[2].keywords["make_engine"])  # and so it reaches the actor


# ---- what is told while a run goes on ----


def state(name: Any, why: str = "", url: str = ONE) -> ServerState:
    return ServerState(url, name, 12.0, why, 0.7)


def test_what_becomes_of_servers_is_told_once(tmp_path: Path) -> None:
    """Whatever one actor has put out is out, also when an actor that comes later has yet to find out."""
    drifted = state("out", f"{ONE} answers as another model", ONE)
    course = [
        (state("in use"), state("in use", url=TWO)),
        (drifted, state("resting", f"{TWO}: cannot be reached", TWO)),
        (drifted, state("in use", url=TWO)),
        (state("in use"), state("in use", "differs", TWO)),
    ]
    told = iter(course)

    class Scorer(FakeScorer):
        def servers(self) -> tuple[ServerState, ...]:
            return next(told, course[-1])

    def prepare(cast: Any) -> None:
        in_no_hurry(cast)
        cast.scorer = type("Scorer", (Scorer,), {"takes_s": 1.0})

    drive(tmp_path, cast_of(prepare, teacher={"url": [ONE, TWO]}))
    said = [event for event in events(tmp_path) if event["kind"].startswith("server")]
    assert [(event["kind"], event["url"], event["room"]) for event in said] == [
        ("server_out", ONE, "teacher"),
        ("server_rests", TWO, "teacher"),
        ("server_back", TWO, "teacher"),
        ("servers_differ", TWO, "teacher"),
    ]
    assert said[0]["text"] == f"teacher: {ONE} answers as another model; it is not asked any more"
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert (last["servers/teacher_in_use"], last["servers/teacher_distance"]) == (1.0, 0.7)


def test_a_run_whose_servers_are_gone_says_that_it_waits_for_them(tmp_path: Path) -> None:
    seen: list[str] = []

    class Waits(FakeScorer):
        states = (state("resting", f"{ONE}: cannot be reached (Connection refused)"),)

        async def score(self, rollouts: Any, request: Any) -> Any:
            await asyncio.sleep(30)
            seen.append(explain(read(tmp_path / FILE)))
            return await super().score(rollouts, request)

    drive(tmp_path, cast_of(lambda cast: setattr(cast, "scorer", Waits), teacher={"url": ONE}))
    assert "oldest call in room teacher: teacher-scorer-0" in seen[0]
    assert f"0 of 1 servers in use: {ONE}: cannot be reached (Connection refused) since 12 s" in seen[0]

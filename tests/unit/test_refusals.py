"""What a refusal costs: wrong input is told of without the imports that only training needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from opd_ray.config import Config, load
from opd_ray.data.rendering import Renderer
from opd_ray.embedded.prepare import TEACHER_DIR
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import InputError
from opd_ray.run import resuming
from opd_ray.tasks import get_task

_RUN = """
import json, os, sys
from opd_ray.__main__ import main
for arguments in json.loads(sys.argv[1]):
    with open("said", "w+b") as said:  # whatever is said by whom: also by the process that looks at the files
        os.dup2(said.fileno(), 2)
        try:
            main(arguments)
        except SystemExit as end:
            sys.stderr.flush()
            said.seek(0)
            print(json.dumps([end.code, sorted({"torch", "transformers", "vllm"} & sys.modules.keys()),
                              said.read().decode()]), flush=True)
"""
_GOLDLESS = ["data.golden=null", "loss.golden.coef=0", "buffer.golden_per_prompt=0", "guard.max_golden_per_prompt=0"]
REFUSED = [
    (["train", "foo.bar=1"], "unknown field"),
    (["train", "--run-dir", "new", "data.prompts=/nonexistent", *_GOLDLESS], "/nonexistent"),
    (["train", "data.prompts=bad.jsonl", "data.evaluation=good.jsonl", "student.path=/nonexistent",
      "teacher.path=/nonexistent", *_GOLDLESS], "bad.jsonl"),
    (["train", "data.prompts=other.jsonl", "data.evaluation=good.jsonl", *_GOLDLESS,
      "student.path=/nonexistent", "teacher.path=TEACHER"], "student.path=/nonexistent"),
    (["train", "data.prompts=other.jsonl", "data.evaluation=good.jsonl", *_GOLDLESS,
      "student.path=TEACHER", "teacher.path=/nonexistent"], "teacher.path=/nonexistent"),
    (["train", "data.prompts=long.jsonl", "data.evaluation=good.jsonl", *_GOLDLESS,
      "student.path=TEACHER", "teacher.path=TEACHER"], "its 803 prompt tokens"),
    (["train", "data.prompts=other.jsonl", "data.evaluation=good.jsonl", *_GOLDLESS,
      "student.path=TEACHER", "teacher.path=TEACHER", "student.lora.targets=[q_porj]"], "did you mean 'q_proj'?"),
    (["train", "data.prompts=org/no-such-data:train", "data.evaluation=good.jsonl", *_GOLDLESS,
      "student.path=TEACHER", "teacher.path=TEACHER"], "org/no-such-data:train: the "),
    (["train", "data.prompts=reasoning_gym:gdc", "data.evaluation=good.jsonl", *_GOLDLESS,
      "student.path=TEACHER", "teacher.path=TEACHER"], "did you mean 'gcd'?"),
    (["train", "data.prompts=other.jsonl", "data.evaluation=good.jsonl", "data.task=no_task:Mine", *_GOLDLESS,
      "student.path=TEACHER", "teacher.path=TEACHER"], "there is no module 'no_task'"),
    (["evaluate", "/nonexistent", "data.evaluation=good.jsonl"], "CHECKPOINT=/nonexistent"),
    (["preflight", "--run-dir", "new", "--resume"], "no run to resume"),
]  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """[exit code, heavy modules, what was said] for each of REFUSED, one after the other in one process."""
    here = tmp_path_factory.mktemp("refused")
    (here / "bad.jsonl").write_text('{"prompt": \n')
    (here / "good.jsonl").write_text('{"prompt": "^1+1+1=", "answer": "3"}\n')
    (here / "other.jsonl").write_text('{"prompt": "^1+1+2=", "answer": "4"}\n')
    (here / "long.jsonl").write_text(json.dumps({"prompt": f"^{'1+' * 400}1=", "answer": "3"}))
    cases = [[each.replace("TEACHER", str(TEACHER_DIR)) for each in arguments] for arguments, _ in REFUSED]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _RUN, json.dumps(cases)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(REFUSED)), ids=[said for _, said in REFUSED])
def test_a_refusal_needs_no_torch(answers, case):
    """The bug: torch and transformers were imported for every command, and a mistyped path took 14 s of CPU."""
    assert len(answers) == len(REFUSED)
    code, heavy, stderr = answers[case]
    assert (code, heavy) == (2, []), stderr
    assert REFUSED[case][1] in stderr and len(stderr.splitlines()) == 1


_IDS = """
import sys
from opd_ray.data.rendering import Renderer
from opd_ray.run import preflight
from opd_ray.tasks import get_task
preflight._hide_torch()
renderer = Renderer(get_task("math"), sys.argv[1])
print(type(renderer.tokenizer).__name__, renderer.prompt({"prompt": sys.argv[2]}))
"""


@pytest.mark.slow
def test_tokens_are_the_same_without_torch(tmp_path):
    """The checks run in a process that hides torch; a run trains on what they have made there."""
    text = "What is 12 × 34? Let's see:\n\tit's 408"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([*alphabet, "1", "12", "<|im_end|>"]) if token},
        merges=[],
        eos_token="<|im_end|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}",
    ).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    renderer = Renderer(get_task("math"), str(tmp_path))
    expected = renderer.prompt({"prompt": text})
    done = subprocess.run([sys.executable, "-c", _IDS, str(tmp_path), text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{type(renderer.tokenizer).__name__} {expected}" and len(expected) > 20
    assert done.stderr == ""


_KILLED = """
import os, signal, sys
from opd_ray.__main__ import main
from opd_ray.data import dataset
dataset.Dataset.__init__ = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
main(["preflight", "rollout.engine=torch"])
"""


@pytest.mark.slow
def test_a_check_that_is_killed_is_told_in_one_line():
    """The bug: files too large for the memory ended in the traceback of a broken process pool."""
    resolve(load())  # who must build the embedded models first has imported torch, and checks without a fork
    done = subprocess.run([sys.executable, "-c", _KILLED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("opd-ray: the process that looked at data and checkpoints was killed")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("directory", ["runs/first", "runs"])
def test_results_are_not_written_into_the_copy_that_a_job_runs_in(tmp_path, monkeypatch, directory):
    """The bug: a relative --run-dir, and the default one, were gone with the job, which said that it had succeeded."""
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(InputError, match="after it, results and all; give an absolute path"):
        resuming.check_run_dir(Path(directory), Config(), resume=False)
    resuming.check_run_dir(tmp_path / directory, Config(), resume=False)

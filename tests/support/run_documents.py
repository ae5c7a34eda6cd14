"""Runs the commands of a document in bash, block by block in one HOME that is empty at the start.

Every program is a stand-in that notes how it was called, so that nothing is started or sent anywhere. What was noted is
then held against what the real program takes: Ray's and our own command lines, manifests, the template, the extras. A
block that counts on something an earlier one did not make (the token file, say) fails as it would for a newcomer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import yaml

import documented_commands
from documented_commands import ROOT, blocks, spans

_OURS = ("opd-ray", "python", "make")
_THEIRS = ("ray", "pip", "kubectl", "helm", "docker", "aws", "gcloud", "hf", "cluster/gcp/account")
_SYSTEM = ("bash", "cat", "cp", "echo", "grep", "mkdir", "rm", "sed")
_FIRST = re.compile(rf"(\w+=\S+ )*({'|'.join(map(re.escape, (*_OURS, *_THEIRS, 'export', 'source')))})( |$)")
_STAND_IN = r"""#!/bin/bash
name=${0##*/}
token=; [[ -s $HOME/.ray/auth_token || ${RAY_AUTH_TOKEN:-} ]] && token=yes
printf '%s\x1f' "$name" "${RAY_AUTH_MODE:-}" "$token" "$@" >> "$NOTED"; printf '\x1e' >> "$NOTED"
case "$name $*" in
    "ray get-auth-token --generate") mkdir -p ~/.ray; echo 0123 > ~/.ray/auth_token; cat ~/.ray/auth_token ;;
    "pip wheel"*) mkdir -p dist ;;
    "kubectl get "*"-o name") echo pod/some-pod ;;
    "kubectl apply -f -") cat > /dev/null ;;
esac
"""


@dataclass(frozen=True)
class Call:
    """How a program was called."""

    program: str
    auth_mode: str
    has_token: bool
    words: list[str]

    def __str__(self) -> str:
        return " ".join([self.program, *self.words])


def failures(text: str, directory: Path) -> list[str]:
    """What of a document's commands would not work; ``directory`` is empty, and is where they run."""
    home, work, programs = (directory / name for name in ("home", "checkout", "bin"))
    for each in (home, work, programs):
        each.mkdir()
    for name in _SYSTEM:
        (programs / name).symlink_to(shutil.which(name) or name)
    (programs / "stand-in").write_text(_STAND_IN)
    (programs / "stand-in").chmod(0o755)
    for name in {*_OURS, *_THEIRS} - {"cluster/gcp/account"}:
        (programs / name).symlink_to("stand-in")
    for path in ROOT.iterdir():
        if not path.name.startswith(".venv") and path.name not in ("dist", "runs"):
            (work / path.name).symlink_to(path)
    (work / ".venv/bin").mkdir(parents=True)
    (work / ".venv/bin/activate").touch()
    noted = directory / "noted"
    noted.touch()
    environment = {"HOME": str(home), "PATH": str(programs), "NOTED": str(noted)}
    found = []
    for block in _of_commands(text):
        before = noted.stat().st_size
        done = subprocess.run(
            ["bash", "-euc", block], cwd=work, env=environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            found.append(f"{done.stderr.strip() or done.returncode}: {block!r}")
        calls = noted.read_text()[before:].split("\x1e")[:-1]
        for call in (_read(each) for each in calls):
            found += [f"{problem}: {str(call)!r}" for problem in _problems(call)]
    return found


def _of_commands(text: str) -> list[str]:
    """Blocks that are typed, not shown, and commands within sentences that say more than a program's name."""
    typed = [block for block in blocks(text, "") if _FIRST.match(block)]
    said = [span for span in spans(text) if _FIRST.match(span) and len(span.split()) > 3]
    return typed + [span for span in said if span.split()[0] not in _OURS]  # those are documented_commands'


def _read(call: str) -> Call:
    program, auth_mode, token, *words = call.split("\x1f")[:-1]
    return Call(program, auth_mode, bool(token), words)


def _problems(call: Call) -> Iterator[str]:
    if call.program in _OURS:
        yield from documented_commands.problems(f"```\n{_ours(call)}\n```\n")
    elif call.program == "ray":
        yield from _of_ray(call)
    elif call.program in ("kubectl", "docker", "aws"):
        yield from _of_files(call)
    elif call.program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for asked in re.findall(r"^\.\[(.+)\]$", "\n".join(call.words), re.MULTILINE):
            yield from (f"no extra {extra}" for extra in asked.split(",") if extra not in extras)


def _ours(call: Call) -> str:
    return " ".join([call.program, *(f"'{word}'" if re.search(r"[\s\"]", word) else word for word in call.words)])


def _of_ray(call: Call) -> Iterator[str]:
    cli = _ray()
    if call.auth_mode == "token" and not call.has_token and call.words[0] != "get-auth-token":
        yield "there is no token (ray get-auth-token --generate makes it)"
    words, entrypoint = call.words, ["--"]
    if "--" in words:
        words, entrypoint = words[: words.index("--")], words[words.index("--") :]
        yield from documented_commands.problems(f"```\n{_ours(Call(entrypoint[1], '', False, entrypoint[2:]))}\n```\n")
    command: click.Command = cli
    try:
        while isinstance(command, click.Group):
            if words[0] not in command.commands:
                yield f"no command {words[0]}"
                return
            command, words = command.commands[words[0]], words[1:]
        command.make_context("ray", [*words, *entrypoint] if entrypoint[1:] else list(words))
    except click.exceptions.Exit:
        return
    except click.ClickException as error:
        yield error.format_message()


@cache
def _ray() -> click.Group:
    """Ray's command line without that of Serve, which takes seconds to import."""
    serve = "ray.serve.scripts"
    there = sys.modules.get(serve)
    sys.modules[serve] = None  # type: ignore[assignment]
    try:
        from ray.scripts.scripts import cli
    finally:
        sys.modules.pop(serve) if there is None else sys.modules.update({serve: there})
    return cli


def _of_files(call: Call) -> Iterator[str]:
    """The files that a call names are there, and so is what it asks of them."""
    for option, file in zip(call.words, call.words[1:], strict=False):
        if option in ("-f", "--template-file") and file != "-" and not (ROOT / file).is_file():
            yield f"there is no {file}"
    if call.words[:2] == ["cloudformation", "deploy"]:
        text = re.sub(r"!\w+ ", "", (ROOT / "cluster/aws/account.yaml").read_text())
        known = yaml.safe_load(text)["Parameters"]
        given = {word.partition("=")[0] for word in call.words if "=" in word}
        yield from (f"no parameter {name}" for name in sorted(given - known.keys()))
        yield from (f"needs {name}" for name in known if "Default" not in known[name] and name not in given)
    manifests = "".join(path.read_text() for path in (ROOT / "cluster").glob("kuberay-*.yaml"))
    secrets = re.findall(r"secretName: (\S+)|secretKeyRef: \{name: ([\w-]+)", manifests)
    if call.words[:3] == ["create", "secret", "generic"] and call.words[3] not in {
        each for pair in secrets for each in pair
    }:
        yield f"no manifest takes a secret {call.words[3]}"
    if call.words[0] in ("delete", "get") and len(call.words) == 3 and f"name: {call.words[2]}\n" not in manifests:
        yield f"no manifest makes {call.words[2]}"

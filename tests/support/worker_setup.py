"""What Ray runs before each worker, to give it its runtime environment; Ray's own imports all of Ray for it.

    ray_constants.SETUP_WORKER_FILENAME = worker_setup.__file__      before a node is started

Like it, it sets variables and puts the environment's Python before the worker's command; prefixes of commands, other
languages and containers are refused.
"""

from __future__ import annotations

import json
import os
import shlex
import sys

_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="


def main() -> None:
    given = dict.fromkeys((_CONTEXT, _LANGUAGE), "")
    command = []
    for word in sys.argv[1:]:
        option = next((each for each in given if word.startswith(each)), None)
        if option:
            given[option] = word.removeprefix(option)
        else:
            command.append(word)
    context = json.loads(given[_CONTEXT] or "{}")
    assert given[_LANGUAGE] in ("", "PYTHON") and not context.get("command_prefix"), (given, context)
    os.environ |= {name: os.path.expandvars(value) for name, value in context.get("env_vars", {}).items()}
    python = shlex.split(context.get("py_executable") or sys.executable)
    os.execv(python[0], [*python, *command])


if __name__ == "__main__":
    main()

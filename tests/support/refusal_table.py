"""What each kind of wrong input of test_wrong_input.py comes to in a process of its own, as a user meets it.

    python tests/support/refusal_table.py

A table in Markdown: kind, exit code, seconds of CPU of `opd-ray preflight` and of all that it started, what it said.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TESTS = Path(__file__).parents[1]
_SHOWN = 110
"""Characters of a message."""
_MOST_S = 120


def kinds() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Name, argument and files."""
    sys.path += [str(_TESTS / "support"), str(_TESTS / "unit")]
    import test_wrong_input as given

    for name, (argument, _) in given.OVERRIDES.items():
        if "\0" not in argument and "\ud800" not in argument:  # no system hands such an argument over
            yield f"option: {name}", argument, {}
    for name, (data, _) in given.CONFIGURATIONS.items():
        yield f"configuration: {name}", "--config=ROOT/run.yaml", {"run.yaml": data}
    for name, (file, data, _) in given.DATA.items():
        yield f"{file}: {name}", "", {file: data}


def main() -> None:
    from tiny_checkpoints import make_setting

    found = []
    print("| kind | exit code | CPU s | said |\n|---|---|---|---|")
    for name, argument, changed in kinds():
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            setting = make_setting(root)
            for file, data in changed.items():
                (root / file).write_bytes(data)
            argument = argument.replace("ROOT", directory)
            options = [argument] if argument.startswith("--") else []
            options += [] if argument.startswith("--run-dir") else ["--run-dir=run"]
            overrides = [f"{field}={value}" for field, value in setting.items()]
            overrides += [argument] if argument and not argument.startswith("--") else []
            before = _cpu_s()
            done = subprocess.run(
                [sys.executable, "-m", "opd_ray", "preflight", *options, "--", *overrides],
                cwd=root,
                capture_output=True,
                text=True,
                timeout=_MOST_S,
            )
            found.append((done.returncode, _cpu_s() - before, done.stderr.count("\n")))
        said = done.stderr.strip().replace(directory, "").replace("|", "\\|")
        said = said if len(said) <= _SHOWN else f"{said[:_SHOWN]} ..."
        print(f"| {name} | {done.returncode} | {found[-1][1]:.1f} | {said} |", flush=True)
    seconds = sorted(cpu_s for _, cpu_s, _ in found)
    codes, lines = ({each[at] for each in found} for at in (0, 2))
    print(f"\n{len(found)} kinds, exit codes {codes}, lines of each {lines}")
    print(f"CPU s: median {seconds[len(seconds) // 2]:.1f}, most {seconds[-1]:.1f}")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()

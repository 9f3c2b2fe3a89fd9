"""Programs in processes of their own, without the three seconds in which each imports torch and transformers.

They are forked from one process that has imported both, and nothing else: a program that forgets to import the package
does not find it.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

SECONDS = 300
SAID = ("out", "err")


def run(*argv: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python *argv` does: a script or `-m` and a module, with arguments; without a hub and without input."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(*argv, into=Path(folder), cwd=cwd, **environment)
        process.join(SECONDS)
        late = process.exitcode is None
        process.kill()
        process.join()
        out, err = (Path(folder, name).read_text("utf-8") for name in SAID)
    assert not late, f"{argv} still runs after {SECONDS} s\n{out}{err}"
    return subprocess.CompletedProcess(argv, process.exitcode, out, err)


def start(*argv: str, into: Path, cwd: Path | None = None, **environment: str) -> multiprocessing.process.BaseProcess:
    """Begins it. What it says stands in the files `out` and `err` of a folder, which are empty until then."""
    for name in SAID:
        (into / name).touch()
    process = context().Process(target=_program, args=(argv, into, cwd, environment))
    process.start()
    return process


@cache
def context() -> multiprocessing.context.ForkServerContext:
    """How the process that has imported both is asked for another one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.pipelines"])
    with patch.dict(os.environ, HF_HUB_OFFLINE="1"):  # huggingface_hub reads it when it is imported
        forkserver.ensure_running()
    return context


def _program(argv: tuple[str, ...], into: Path, cwd: Path | None, environment: dict[str, str]) -> None:
    for descriptor, name in enumerate(SAID, 1):
        os.dup2(os.open(into / name, os.O_WRONLY), descriptor)
    if cwd is not None:
        os.chdir(cwd)
    os.environ.update(environment)
    module = argv[0] == "-m"
    sys.argv = list(argv[module:])
    if module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")

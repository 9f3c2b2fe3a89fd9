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


def run(*argv: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python *argv` does: a script or `-m` and a module, with arguments; without a hub and without input."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("out", "err")]
        process = _context().Process(target=_program, args=(argv, cwd, environment, said))
        process.start()
        process.join(SECONDS)
        late = process.exitcode is None
        process.kill()
        process.join()
        out, err = (path.read_text("utf-8") for path in said)
    assert not late, f"{argv} still runs after {SECONDS} s\n{out}{err}"
    return subprocess.CompletedProcess(argv, process.exitcode, out, err)


@cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.pipelines"])
    with patch.dict(os.environ, HF_HUB_OFFLINE="1"):  # huggingface_hub reads it when it is imported
        forkserver.ensure_running()
    return context


def _program(argv: tuple[str, ...], cwd: Path | None, environment: dict[str, str], said: list[Path]) -> None:
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    if cwd is not None:
        os.chdir(cwd)
    os.environ.update(environment)
    module = argv[0] == "-m"
    sys.argv = list(argv[module:])
    if module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")

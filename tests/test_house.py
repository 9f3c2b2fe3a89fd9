"""The house rules: who imports whom, who may touch transformers, and that the import changes nothing else."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import hf_llmopt

PACKAGE = Path(hf_llmopt.__file__).parent

# A room imports from the layers above it in this list, and from its own layer without cycles.
LAYERS = (
    {"errors", "config", "stats", "walk", "sealed"},
    {"kernels"},
    {"kv_cache", "attention", "quantization", "fusion", "adapters"},
    {"prompt_cache", "speculative"},
    {"engine"},
    {"generation"},
    {"batching"},
    {"hooks"},
    {"__init__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FRONT = {"serving", "cli", "bench", "demo", "__main__"}  # they import what they like; nobody inside imports them
TOP_ONLY = "hf_llmopt.speculative.mixin"  # needs the engine from below; imported by `__init__` alone
NO_TORCH = ("hf_llmopt.engine.policy", "hf_llmopt.engine.scheduler", "hf_llmopt.kv_cache.pool")
# Packages that are loaded only when asked for, and the files that may import them at module level.
OPTIONAL = {
    "fastapi": "hf_llmopt.serving",
    "llguidance": "hf_llmopt.serving",
    "matplotlib": "hf_llmopt.bench",
    "prometheus_client": "hf_llmopt.serving",
    "ray": "hf_llmopt.serving.ray",
    "triton": "hf_llmopt.kernels.triton",
    "uvicorn": "hf_llmopt.serving",
}


# -------------------------------------------------------------------------------------------------- reading the source


class Import(NamedTuple):
    """One imported name: `module` is what is loaded, `name` what is taken from it (empty for `import module`)."""

    module: str
    name: str
    line: int
    top: bool  # runs when the file is imported


def sources() -> dict[str, str]:
    """The package's source by module name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("hf_llmopt", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path.read_text("utf-8")
    return found


def is_package(module: str) -> bool:
    return module == "hf_llmopt.__init__" or (PACKAGE / "/".join(module.split(".")[1:]) / "__init__.py").is_file()


@cache  # several rules ask for those of the whole package
def imports(module: str, source: str) -> tuple[Import, ...]:
    """Every import of a module, wherever it stands; relative ones made absolute."""
    tree = ast.parse(source)
    inner = {id(node) for outer in ast.walk(tree) if is_lazy(outer) for node in ast.walk(outer)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, "", node.lineno, id(node) not in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.removesuffix(".__init__").split(".")
                keep = len(parts) - node.level + is_package(module)
                base = ".".join(parts[:keep] + ([base] if base else []))
            found += [Import(base, alias.name, node.lineno, id(node) not in inner) for alias in node.names]
    return tuple(found)


def is_lazy(node: ast.AST) -> bool:
    """Whether what stands inside runs later than the import, or never."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def room(module: str) -> str:
    """`hf_llmopt.engine.runner` stands in `engine`."""
    return module.split(".")[1] if "." in module else "__init__"


def inside(found: Import) -> str | None:
    """The module of ours that an import loads, or None."""
    if found.module.split(".")[0] != "hf_llmopt":
        return None
    if found.module == "hf_llmopt":
        known = found.name in LEVEL or found.name in FRONT
        return f"hf_llmopt.{found.name}" if known else "hf_llmopt.__init__"
    if f"{found.module}.{found.name}" == TOP_ONLY:
        return TOP_ONLY
    return found.module


def rule_breaks(modules: dict[str, str]) -> list[str]:
    """What breaks the import rule, and cycles between rooms."""
    breaks, edges = [], set()
    for module, source in modules.items():
        here = room(module)
        if here not in LEVEL and here not in FRONT:
            breaks.append(f"{module}: the room {here!r} has no place in the import rule")
            continue
        for found in imports(module, source):
            target = inside(found)
            if target is None:
                continue
            there = room(target)
            where = f"{module}:{found.line} imports {target}"
            if target == TOP_ONLY:
                if here != "__init__":
                    breaks.append(f"{where}: only __init__ may")
            elif here in FRONT or here == there or (module == TOP_ONLY and LEVEL.get(there, 99) < LEVEL["hooks"]):
                pass
            elif there in FRONT:
                breaks.append(f"{where}: nobody inside may")
            elif there not in LEVEL or LEVEL[there] > LEVEL[here]:
                breaks.append(f"{where}: it stands above {here}")
            else:
                edges.add((here, there))
    return breaks + [f"{a} and {b} import each other" for a, b in sorted(edges) if a < b and reaches(edges, b, a)]


def reaches(edges: set[tuple[str, str]], start: str, goal: str) -> bool:
    """Whether `goal` can be reached from `start` and `start` from `goal`: both stand on one cycle."""

    def reached(origin: str) -> set[str]:
        seen, todo = set(), [origin]
        while todo:
            node = todo.pop()
            new = {b for a, b in edges if a == node} - seen
            seen |= new
            todo += new
        return seen

    return goal in reached(start) and start in reached(goal)


def writes_to_transformers(source: str) -> Iterator[int]:
    """Lines that assign to, delete or set an attribute or an item of something imported from transformers."""
    tree = ast.parse(source)
    names: set[str] = set()

    def stands_on_transformers(node: ast.expr) -> bool:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        return isinstance(node, ast.Name) and node.id in names

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or "transformers" for a in node.names if a.name.split(".")[0] == "transformers"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            names |= {a.asname or a.name for a in node.names}
    for node in ast.walk(
        tree
    ):  # other names for the same things: `entry = TABLE[key]`, `for owner, name in ((A, "b"),)`
        if isinstance(node, ast.Assign) and stands_on_transformers(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.For) and isinstance(node.iter, (ast.Tuple, ast.List)):
            listed = {n.id for n in ast.walk(node.iter) if isinstance(n, ast.Name)}
            names |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name) and listed & names}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if stands_on_transformers(node.value):
                yield node.lineno
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("setattr", "delattr")
            and stands_on_transformers(node.args[0])
        ):
            yield node.lineno


# ----------------------------------------------------------------------------------------------------------- the rules


def test_import_rule() -> None:
    assert rule_breaks(sources()) == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("hf_llmopt.kv_cache.paged", "from hf_llmopt.engine.runner import Runner", "above kv_cache"),
        ("hf_llmopt.kv_cache.paged", "def f():\n    from ..engine import runner", "above kv_cache"),
        ("hf_llmopt.engine.engine", "from hf_llmopt import demo", "nobody inside"),
        ("hf_llmopt.engine.engine", "from hf_llmopt import optimize", "above engine"),
        ("hf_llmopt.engine.engine", "from hf_llmopt.speculative import mixin", "only __init__"),
        ("hf_llmopt.helpers", "", "no place"),
    ],
)
def test_import_rule_finds(module: str, source: str, says: str) -> None:
    (found,) = rule_breaks({module: source})
    assert says in found


def test_import_rule_finds_cycles() -> None:
    found = rule_breaks(
        {
            "hf_llmopt.attention.interface": "from hf_llmopt.kv_cache import paged",
            "hf_llmopt.kv_cache.paged": "from hf_llmopt.attention import inputs",
        }
    )
    assert found == ["attention and kv_cache import each other"]


def test_import_rule_allows() -> None:
    allowed = {
        "hf_llmopt.config": "from hf_llmopt.errors import ConfigError",
        "hf_llmopt.engine.engine": "from ..kv_cache.pool import Pool\nfrom . import scheduler",
        "hf_llmopt.speculative.mixin": "from hf_llmopt.engine import engine",
        "hf_llmopt.cli.main": "from hf_llmopt import bench, demo, optimize",
        "hf_llmopt.__init__": "from hf_llmopt.speculative.mixin import Mixin\nfrom .hooks import install",
    }
    assert rule_breaks(allowed) == []


@pytest.mark.parametrize("module", NO_TORCH)
def test_without_torch(module: str) -> None:
    found = {found.module.split(".")[0] for found in imports(module, sources()[module])}
    assert not found & {"torch", "transformers", "numpy"}


def test_only_hooks_writes_to_transformers() -> None:
    modules = sources()
    assert list(writes_to_transformers(modules.pop("hf_llmopt.hooks"))), "the check sees the hooks' own assignments"
    found = [f"{module}:{line}" for module, source in modules.items() for line in writes_to_transformers(source)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import transformers as t\nt.GenerationMixin.generate = None",
        "from transformers import GenerationMixin as G\nsetattr(G, 'generate', None)",
        "from transformers.pipelines import SUPPORTED_TASKS as S\nS['text-generation']['impl'] = None",
        "def f():\n    from transformers import PreTrainedModel\n    del PreTrainedModel.generate",
        "from transformers import GenerationMixin as G\nfor a, b in ((G, 'generate'),):\n    setattr(a, b, None)",
        "from transformers.pipelines import SUPPORTED_TASKS as S\ntask = S['text-generation']\ntask['impl'] = None",
    ],
)
def test_writes_are_found(line: str) -> None:
    assert list(writes_to_transformers(line))


def test_optional_packages_are_imported_where_they_are_needed() -> None:
    found = [
        f"{module}:{found.line} imports {found.module}"
        for module, source in sources().items()
        for found in imports(module, source)
        if found.top and not module.startswith(OPTIONAL.get(found.module.split(".")[0], ""))
    ]
    assert found == []


BROUGHT = {"triton", "llama_cpp"}  # by torch, and by llama-cpp-python


def test_imports_are_declared() -> None:
    def named(requirement: str) -> str:
        return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("-", "_")

    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [r for extra, needs in project["optional-dependencies"].items() if extra != "dev" for r in needs]
    # What transformers itself requires (numpy, tokenizers, ...) needs no line of its own.
    brought = [r for r in importlib.metadata.requires("transformers") or [] if "extra ==" not in r]
    declared = {named(r) for r in [*project["dependencies"], *extras, *brought]}
    used = {
        found.module.split(".")[0]: f"{module}:{found.line}"
        for module, source in sources().items()
        for found in imports(module, source)
    }
    used = {name: where for name, where in used.items() if name not in sys.stdlib_module_names}
    assert {n: w for n, w in used.items() if n not in declared | {"hf_llmopt", *BROUGHT}} == {}


def test_no_print() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, source in sources().items()
        if room(module) != "cli" and module not in COMMANDS
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []


COMMANDS = {"hf_llmopt.demo.train"}  # modules run with `python -m`


# ---------------------------------------------------------------------------------------------------- the public names


def public_members() -> Iterator[tuple[str, object]]:
    for name in hf_llmopt.__all__:
        member = getattr(hf_llmopt, name)
        if isinstance(member, (str, ModuleType)):
            continue
        yield name, member
        if inspect.isclass(member) and not issubclass(member, BaseException):
            for inner, value in vars(member).items():
                described = callable(value) or isinstance(value, (property, classmethod, staticmethod))
                if described and not inner.startswith("_"):
                    yield f"{name}.{inner}", value


def test_public_names() -> None:
    names = hf_llmopt.__all__
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(hf_llmopt, name)] == []
    assert {"Engine", "LLMOptConfig", "install", "optimize", "uninstall"} <= set(names)


def test_public_names_have_docstrings() -> None:
    def documented(member: object) -> bool:
        doc = (vars(member) if inspect.isclass(member) else {}).get("__doc__") or getattr(member, "__doc__", None)
        generated = inspect.isclass(member) and (doc or "").startswith(f"{member.__name__}(")  # by @dataclass
        return bool(doc) and not generated

    assert [name for name, member in public_members() if not documented(member)] == []


def test_modules_have_docstrings() -> None:
    assert [module for module, source in sources().items() if not ast.get_docstring(ast.parse(source))] == []


def test_version_is_a_literal() -> None:
    """setup.cfg reads it from the source, without importing torch."""
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', sources()["hf_llmopt.__init__"], re.MULTILINE)
    assert version == hf_llmopt.__version__


# ------------------------------------------------------------------------------------------------- what import changes

# Run in a fresh interpreter. `world()` is what a process owns and an import may spoil. `originals()` maps a path such
# as "GenerationMixin.generate" to the object that stands there, for every transformers module, class and table loaded.
PRELUDE = """
import json, logging, os, random, signal, socket, sys, threading, warnings
import numpy, torch, transformers
import transformers.cache_utils, transformers.generation.utils, transformers.masking_utils
import transformers.modeling_utils, transformers.pipelines, transformers.pipelines.text_generation
import transformers.quantizers.auto
transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.LlamaForCausalLM


def world():
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.Logger.manager.loggerDict))]
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "sys.path": list(sys.path),
        "import hooks": [repr(f) for f in sys.meta_path + sys.path_hooks],
        "excepthook": repr(sys.excepthook),
        "recursion limit": sys.getrecursionlimit(),
        "warning filters": [repr(f) for f in warnings.filters],
        "signal handlers": [repr(signal.getsignal(s)) for s in sorted(signal.valid_signals())],
        "socket timeout": socket.getdefaulttimeout(),
        "threads": sorted(t.name for t in threading.enumerate()),
        "log handlers": [(logger.name, repr(logger.handlers)) for logger in loggers if logger.handlers],
        "log levels": [(logger.name, logger.level) for logger in loggers if logger.level],
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic],
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "sdpa kernels": [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()],
        "grad mode": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "cuda initialised": torch.cuda.is_initialized(),
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": repr(numpy.random.get_state()),
        "random state": repr(random.getstate()),
        "optional packages": sorted(set(sys.modules) & OPTIONAL),
    }


def originals():
    found = {}

    def table(path, value, depth):
        if isinstance(value, dict) and depth:
            for key, inner in list(dict.items(value)):  # not value.items(): the lazy tables would import every model
                found[f"{path}[{key!r}]"] = inner
                table(f"{path}[{key!r}]", inner, depth - 1)

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "transformers":
            continue
        for key, value in list(vars(module).items()):
            if key.startswith("__"):
                continue
            found[f"{name}:{key}"] = value
            table(f"{name}:{key}", value, 2)
            if isinstance(value, type) and value.__module__ == name:
                for inner, member in list(vars(value).items()):
                    found[f"{value.__name__}.{inner}"] = member
                    table(f"{value.__name__}.{inner}", member, 1)
    return found


def replaced(before):
    now = originals()
    return sorted(path for path, value in before.items() if now.get(path) is not value)


def added_to(before, *classes):
    return sorted(p for p in originals() if p.split(".")[0].split("[")[0] in classes and p not in before)
"""

# All that `install` replaces. The text-generation entry of the pipelines' table holds the pipeline class.
HOOKS = {
    "PreTrainedModel.from_pretrained",
    "PreTrainedConfig.from_dict",
    "GenerationMixin.generate",
    "GenerationMixin._sample",
    "GenerationMixin._assisted_decoding",
    "GenerationMixin._beam_search",
    "transformers.modeling_utils:get_hf_quantizer",
}
PIPELINE_ENTRY = re.compile(r":SUPPORTED_TASKS\['text-generation'\]\['impl'\]$")
# Attention functions and the handle are added under our own name, which replaces nothing.
OWN_NAMES = re.compile(r"\.llmopt$|\['llmopt'\]$")


def in_fresh_process(body: str, **environment: str) -> dict:
    """Runs the prelude and `body`, which leaves its findings in `answer`; returns them."""
    script = f"OPTIONAL = {set(OPTIONAL)!r}\n{PRELUDE}\n{body}\nprint(json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def life() -> dict:
    """What one process sees: import, a second install, uninstall, a second uninstall, install again."""
    return in_fresh_process("""
before_world, before = world(), originals()
import hf_llmopt
after_world = world()
answer = {"world": {k: [before_world[k], v] for k, v in after_world.items() if before_world[k] != v}}
answer["installed"] = replaced(before)
answer["added"] = added_to(before, "PreTrainedModel", "GenerationMixin")
once = originals()
hf_llmopt.install()
answer["second install"] = replaced(once)
hf_llmopt.uninstall()
answer["uninstalled"] = replaced(before)
answer["left"] = added_to(before, "PreTrainedModel", "GenerationMixin")
hf_llmopt.uninstall()
answer["second uninstall"] = replaced(before)
hf_llmopt.install()
answer["installed again"] = replaced(before)
""")


def test_import_changes_nothing_but_the_hooks(life: dict) -> None:
    assert life["world"] == {}
    replaced = set(life["installed"])
    assert replaced >= HOOKS
    assert [path for path in replaced - HOOKS if not PIPELINE_ENTRY.search(path)] == []
    assert [path for path in life["added"] if not OWN_NAMES.search(path)] == []


def test_install_twice_is_once(life: dict) -> None:
    assert life["second install"] == []


def test_uninstall_puts_the_same_objects_back(life: dict) -> None:
    assert life["uninstalled"] == []
    assert life["left"] == []
    assert life["second uninstall"] == []
    assert life["installed again"] == life["installed"]


def test_import_without_installing() -> None:
    seen = in_fresh_process(
        """
before = originals()
import hf_llmopt
answer = {"replaced": replaced(before), "added": added_to(before, "PreTrainedModel", "GenerationMixin")}
hf_llmopt.install()
answer["installed"] = replaced(before)
""",
        HF_LLMOPT_INSTALL="0",
    )
    assert seen["replaced"] == []
    assert seen["added"] == []
    assert set(seen["installed"]) >= HOOKS

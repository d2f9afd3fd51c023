"""What the layout promises: who may import whom, how long things may get, and what nobody may do."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("launcher", "train")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60
LONGER = {
    "launcher/contract.py": 400,  # all that crosses the border between processes stays in one place
    "launcher/supervise/supervisor.py": 320,  # the only loop: all that can happen, side by side
}

# Of the launcher, the worker uses what both sides have to agree on, and nothing else.
SHARED = {
    "command_line.options",
    "command_line.stdout",
    "contract",
    "diagnosis.memory_signs",
    "diagnosis.stack_signal",
    "diagnosis.traceback_text",
    "digest",
    "environment_numbers",
    "heartbeat",
    "interfaces",
    "liveness",
    "lock",
    "manifest",
    "run_dir",
    "secret_names",
    "temporary",
    "view",
    "who_started",
}

# Parts of train/ (a folder, or a module beside the folders) and the other parts that each may import.
TRAIN_IMPORTS: dict[str, set[str]] = {
    "config": set(),
    "accelerate_settings": {"config"},
    "without_compiler": set(),
    "environment": {"data", "without_compiler"},
    "caller": {"data", "without_compiler"},
    "cause": set(),
    "elastic_error": set(),
    "leave": {"cause", "elastic_error", "program"},
    "post_mortem": {"cause", "leave"},
    "failure": {"data", "elastic_error", "leave", "post_mortem", "progress"},
    "as_main": set(),
    "sources": set(),
    "doctor": set(),
    "recipe": set(),
    "supervised": {"recipe"},
    "direct": set(),
    "parallel": {"direct", "recipe", "without_compiler"},
    "data": {"cause", "parallel"},
    "observe": {"parallel", "recipe"},
    "compilation": {"parallel"},
    "called": {"config", "parts", "recipe"},
    "checks": {"data", "parallel", "parts", "recipe"},
    "parts": {"recipe", "state_metrics"},
    "scaling": {"direct"},
    "schedule": set(),
    "state": {"observe", "parallel", "recipe", "scaling"},
    "program": {"config"},
    "replay": {"config"},
    "state_metrics": {"parallel"},
    "evaluate": {"data", "observe", "parallel", "recipe", "state_metrics"},
    "last_start": {"config", "sources", "state"},
    "micro_batches": {"data", "last_start", "parallel"},
    "moving_average": {"state"},
    "shard_pass": {"finite", "observe", "parallel", "recipe"},
    "step": {"data", "finite", "micro_batches", "observe", "parallel", "recipe", "scaling", "schedule", "shard_pass"},
    "signals": set(),
    "finite": {"data", "finite_gradients", "parallel", "recipe"},
    "finite_gradients": set(),
    "fused": set(),
    "preemption": {"loop", "parallel"},
    "progress": {"leave", "micro_batches", "observe", "parallel"},
    "loop": {"config", "data", "evaluate", "observe", "parallel", "recipe", "schedule", "state", "step"},
}
PURE = {"data.order", "parallel.shards"}  # integers in, integers out: import no other part, so every part may use them
COMPOSERS = {
    "announce",
    "assemble",
    "entry",
    "finish",
    "fork_server",
    "joined",
    "own_loop",
    "prepared",
    "rewind",
    "start",
}  # connect the parts and may import all of them

FORBIDDEN_CALLS = {"eval", "exec", "os.popen", "os.system", "torch.load", "torch.save"}
VAGUE_NAMES = {"common", "core", "helper", "helpers", "manager", "misc", "util", "utils"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names; `from a import b` gives a.b, which is the module b of a where there is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    inside = path.relative_to(ROOT / "train")
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


everywhere = pytest.mark.parametrize("path", MODULES, ids=name_of)
in_launcher = pytest.mark.parametrize("path", [p for p in MODULES if p.is_relative_to(ROOT / "launcher")], ids=name_of)
in_train = pytest.mark.parametrize("path", [p for p in MODULES if p.is_relative_to(ROOT / "train")], ids=name_of)


@in_launcher
def test_launcher_imports_neither_torch_nor_the_worker(path):
    forbidden = ("torch", "numpy", "accelerate", "safetensors", "samestep.train")
    found = [name for name in imports(tree_of(path)) if f"{name}.".startswith(tuple(f"{f}." for f in forbidden))]
    assert found == []


def test_launcher_brings_no_torch_into_its_process():
    code = (
        "import json, sys, samestep.launcher.cli, samestep.launcher.generations; print(json.dumps(sorted(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert {"torch", "numpy", "accelerate", "samestep.train"} & set(json.loads(shown.stdout)) == set()


def test_torch_begins_to_be_imported_before_what_supervises_is():
    code = "import json, sys, samestep.launcher.launch; print(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.removeprefix("samestep.launcher.") for name in json.loads(shown.stdout)}
    assert "supervise.starter" in loaded
    later = {"generations", "supervise.supervisor", "supervise.hang_watch", "diagnosis.diagnose", "cluster.head"}
    assert later & loaded == set()


@in_train
def test_worker_uses_of_the_launcher_what_both_sides_agree_on(path):
    prefix = "samestep.launcher."
    used = {name.removeprefix(prefix) for name in imports(tree_of(path)) if name.startswith(prefix)}
    assert {name for name in used if not any(f"{name}.".startswith(f"{shared}.") for shared in SHARED)} == set()


@in_train
def test_imports_inside_train_go_one_way(path):
    here = part_of(path)
    if here in COMPOSERS or here == "__init__":
        return
    names = [name.split(".") for name in imports(tree_of(path))]
    used = {parts[2] for parts in names if parts[:2] == ["samestep", "train"] and ".".join(parts[2:4]) not in PURE}
    assert here in TRAIN_IMPORTS, f"say in TRAIN_IMPORTS what {here} may import"
    assert used - {here} <= TRAIN_IMPORTS[here]


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_modules_import_no_other_part(module):
    path = (ROOT / "train").joinpath(*module.split(".")).with_suffix(".py")
    assert [name for name in imports(tree_of(path)) if name.startswith("samestep.train")] == []


def test_allowed_imports_have_no_cycle():
    left = dict(TRAIN_IMPORTS)
    while free := [part for part, needs in left.items() if not needs & left.keys()]:
        for part in free:
            del left[part]
    assert left == {}


@in_launcher
def test_a_mistake_of_the_user_is_told_with_a_hint(path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    bare = [ast.unparse(call) for call in calls if dotted(call.func) == "UsageError" and len(call.args) < 2]
    assert bare == []


@everywhere
def test_nothing_runs_code_from_data_or_goes_through_a_shell(path):
    tree = tree_of(path)
    assert not {name.split(".")[0] for name in imports(tree)} & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert {dotted(call.func) for call in calls} & FORBIDDEN_CALLS == set()
    assert [call.lineno for call in calls for word in call.keywords if word.arg == "shell"] == []


@everywhere
def test_files_and_functions_fit_on_a_few_screens(path):
    tree = tree_of(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: n for f in functions if (n := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION_LINES}
    assert long == {}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(name_of(path), MAX_FILE_LINES)


@everywhere
def test_no_module_has_a_vague_name(path):
    assert {*path.relative_to(ROOT).parts[:-1], path.stem} & VAGUE_NAMES == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_real(package):
    module = importlib.import_module(f"samestep.{package}")
    names = getattr(module, "__all__", [])
    assert list(names) == sorted(names)
    assert [name for name in names if not hasattr(module, name)] == []


def test_every_package_folder_is_installed():
    listed = set(re.findall(r'"samestep\.([a-z_.]+)",', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES if path.name == "__init__.py"}
    assert listed == found


def test_files_name_no_machine_and_no_package_registry():
    # Taken apart, so that this file does not find itself.
    homes = r"(?<![\w.$}~-])/(?:" + "|".join(["ho" + "me", "wo" + "rk", "us" + "ers", "roo" + "t"]) + r")/(?!me/)\w+"
    hosts = "|".join(["pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch", "anaconda" + r"\.org"])
    pattern = re.compile(f"{homes}|{hosts}", re.IGNORECASE)
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode(errors="replace")
        found += [f"{name_of(path)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []

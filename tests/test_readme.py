"""README.md says what is: links, tables, tree, commands. `python tests/test_readme.py` rewrites what is generated."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from samestep.launcher import cli, contract
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.command_line import options
from samestep.launcher.config import LaunchConfig
from samestep.train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# Folders whose files need no line each, and files without a docstring.
ABOUT = {
    "scripts/demo": "from nothing to a trained network",
    "scripts/test": "installs, checks and tests",
    "scripts/check": "what CI checks: format, lint, types, spelling, tests",
    "scripts/install": "makes .venv with the tested versions",
    "scripts/install-system": "what the slow tests take from Debian: a Slurm, MPIs, an image builder",
    "scripts/recipes/": "examples, each under 60 lines",
    "docker/": "the demo's job as an image, also with CUDA, and compose for two nodes",
    "tests/launcher/": "the launcher, with real ranks that need no torch",
    "tests/train/": "the worker, file by file",
    "tests/end_to_end/": "a file a promise",
    "tests/cluster/": "real MPIs, a real Slurm, machines in network namespaces (slow)",
    "tests/gpu/": "one GPU, shared by all ranks of a run (skipped where there is none)",
    "tests/peers/": "other people's code as the judge",
}
TOUR = {  # where a stranger begins to read; each folder holds more
    *(f"launcher/{name}.py" for name in ("cli", "contract", "diagnose", "launch", "plan")),
    *(f"train/{name}.py" for name in ("config", "entry", "loop", "recipe", "step")),
    "benchmarks/table.py",
}
SKIPPED_COMMANDS = {"torchrun", "accelerate", "python", "cd", "git", "export"}


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def options_table(config_type: type, prefix: str) -> str:
    rows = [
        f"| `{flag}` | {f'`{default}`' if default else ''} | {cell(text)} |"
        for flag, _, default, text in options.table(config_type, prefix)
    ]
    return "\n".join(["| Flag | Default | Meaning [unit] |", "|---|---|---|", *rows])


def exit_table() -> str:
    meanings = {
        meaning: [c for c, said in contract.EXIT_MEANING.items() if said == meaning]
        for meaning in contract.EXIT_MEANING.values()
    }
    rows = [
        f"| {', '.join(str(int(code)) for code in codes)} | {cell(meaning)} |" for meaning, codes in meanings.items()
    ]
    return "\n".join(["| Code | Meaning |", "|---|---|", *rows])


def first_words(path: Path) -> str:
    """The beginning of a module's docstring: up to its first stop, but at least a few words."""
    line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    stops = [match.start() for match in re.finditer(r"[.:] |\.$", line) if match.start() > 20]
    return line[: stops[0]] if stops else line


def tree() -> str:
    modules = [
        path
        for folder in ("benchmarks", "launcher", "train", "scripts")
        for path in [*sorted((ROOT / folder).glob("*.py")), *sorted((ROOT / folder).glob("*/*.py"))]
        # a folder inside says in its __init__.py what its modules are about; a recipe has no such folder
        if (path.name == "__init__.py") == (path.parent.parent != ROOT and folder in ("launcher", "train"))
        and not (path.parent.parent == ROOT and path.name.startswith("__"))
    ]
    about = {}
    for path in modules:
        name = path.relative_to(ROOT).as_posix()
        if name.count("/") > 1 and (path.parent / "__init__.py").exists():  # a folder of modules is one line
            path, name = path.parent / "__init__.py", name.rpartition("/")[0] + "/"
        if path.stat().st_size:
            about[name] = first_words(path)
    assert all(about.values()), "every module says in its first line what it is"
    about = {name: words for name, words in about.items() if name.endswith("/") or name in TOUR}
    folders = sorted({name.rpartition("/")[0].partition("/")[0] for name in (*about, *ABOUT)})
    lines = []
    for folder in folders:
        names = sorted(name for name in (*about, *ABOUT) if name.startswith(f"{folder}/"))
        if len(names) == 1:
            lines.append(f"{names[0]:<29} {(about | ABOUT)[names[0]]}")
            continue
        lines += [
            f"{folder}/",
            *(
                f"  {name.removeprefix(folder + '/').removesuffix('__init__.py'):<27} {(about | ABOUT)[name]}"
                for name in names
            ),
        ]
    return "\n".join(["```", *lines, "```"])


GENERATED = {
    "options of a recipe": lambda: options_table(TrainConfig, "SAMESTEP_"),
    "options of the launcher": lambda: options_table(LaunchConfig, "PET_"),
    "exit codes": exit_table,
    "tree": tree,
}


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: generated -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)


def text() -> str:
    return README.read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(), re.DOTALL | re.MULTILINE)


def commands() -> Iterator[list[str]]:
    for lines in code_blocks("sh"):
        yield from (shlex.split(line, comments=True) for line in lines.splitlines() if line.strip())


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name):
    found = block(name).search(text())
    assert found, f"README.md has no part {name!r}"
    assert found[2] == GENERATED[name](), "python tests/test_readme.py brings it up to date"


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text(), re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text()):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / target.partition("#")[0]).exists(), target


def test_commands_exist():
    flags = {flag for config in (TrainConfig, LaunchConfig, KubernetesConfig) for flag, *_ in options.table(config)}
    for words in commands():
        program = words[0]
        if program.startswith("./"):
            assert os.access(ROOT / program, os.X_OK), program
        elif program == "samestep":
            assert words[1] in cli.commands(), words
        else:
            assert program in SKIPPED_COMMANDS, words
        for word in words:
            if word.endswith(".py") and "/" in word:
                assert (ROOT / word).is_file(), word
            if word.startswith("--") and program in {"samestep", "python"}:
                assert word.partition("=")[0] in flags, word


def test_tests_that_prove_a_promise_exist():
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text()):
        assert (ROOT / path).is_file(), path
        if name:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_recipe_on_the_page_trains(tmp_path):
    (recipe,) = code_blocks("python")
    (tmp_path / "recipe.py").write_text(recipe, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    words = [sys.executable, "recipe.py", "--max-steps", "2", "--run-dir", "run"]
    ended = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"digest [0-9a-f]{64}", ended.stdout)


def test_page_is_short_enough_to_read():
    assert len(text().splitlines()) < 400


def write() -> None:
    """Bring the generated parts up to date."""
    page = text()
    for name, generate in GENERATED.items():
        before, _, rest = page.partition(f"<!-- {name}: generated -->\n")
        after = rest.partition("\n<!-- end -->")[2]
        page = f"{before}<!-- {name}: generated -->\n{generate()}\n<!-- end -->{after}"
    README.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write()

"""Submission through a kubectl of our own, which notes what it is told as the real one would be."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from samestep.launcher.cluster.submit import submit

IMAGE = "registry.example/samestep:0.1.0"
WORDS = ["kubernetes", "--image", IMAGE, "--nodes", "2", "--namespace", "team", "r.py"]
KUBECTL = """\
#!/bin/sh
echo "$@" >>"$SEEN/words"
case "$*" in
  *" get secret "*) cat "$SEEN/secret" 2>/dev/null ;;
  *" apply "*) cat >"$SEEN/stdin"; echo applied ;;
esac
[ ! -e "$SEEN/refuses" ] || { echo 'Forbidden: not you' >&2; exit 1; }
"""


@pytest.fixture
def cluster(tmp_path: Path):
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path, {"PATH": f"{tmp_path}:/usr/bin:/bin", "SEEN": str(tmp_path)}


def test_objects_and_a_fresh_token_go_through_standard_input(cluster):
    folder, environ = cluster
    said: list[str] = []
    assert submit(WORDS, environ, said.append) == 0
    assert said == ["applied"]
    items = json.loads((folder / "stdin").read_text())["items"]
    assert items[0]["kind"] == "Secret"
    token = items[0]["stringData"]["token"]
    assert len(bytes.fromhex(token)) == 32
    assert token not in (folder / "words").read_text()
    assert all("--namespace team" in line for line in (folder / "words").read_text().splitlines())


def test_a_token_that_is_there_is_kept(cluster):
    folder, environ = cluster
    (folder / "secret").write_text("secret/r-token\n")
    assert submit(WORDS, environ, lambda line: None) == 0
    assert "Secret" not in {item["kind"] for item in json.loads((folder / "stdin").read_text())["items"]}


def test_a_refusal_is_shown_as_the_cluster_says_it(cluster, capsys):
    folder, environ = cluster
    (folder / "refuses").touch()
    assert submit(WORDS, environ, lambda line: None) == 1
    assert "error: Forbidden: not you" in capsys.readouterr().err


def test_without_kubectl_nothing_happens_and_the_way_is_shown(samestep):
    ended = samestep("submit", *WORDS, env={"PATH": str(samestep.cwd)})
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: kubectl is expected to be on the PATH")
    assert "hint: --dry-run prints the manifests" in ended.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "followed by one of kubernetes"),
        (["kubern"], "did you mean kubernetes?"),
        (["kubernetes", "--image", IMAGE], "a recipe is expected, by its path in the image"),
        (["kubernetes", "--nodse", "2", "r.py"], "did you mean --nodes?"),
        (["kubernetes", "--kind", "cronjob", "--image", IMAGE, "r.py"], "cronjob"),
    ],
)
def test_mistakes_are_named_with_a_hint(words, expected, samestep):
    ended = samestep("submit", *words)
    assert (ended.code, ended.stdout) == (2, "")
    assert expected in ended.stderr
    assert len(ended.stderr.splitlines()) <= 2

"""Images and compose: linted, checked against compose's schema, and the CPU image really built and trained in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DOCKERFILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cuda"]
COMPOSE = ROOT / "docker" / "compose.yaml"
PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT")


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, continued lines joined."""
    joined = path.read_text().replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def services() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_run_without_root_and_say_how_they_are(path):
    found = instructions(path)
    base = dict(found)["ARG"] if found[0][0] != "ARG" else found[0][1]
    name, _, tag = base.partition("=")[2].rpartition(":")
    assert name
    assert any(character.isdigit() for character in tag)
    assert [rest for word, rest in found if word == "USER"] == ["1000:1000"]
    assert found.index(("USER", "1000:1000")) > max(i for i, (word, _) in enumerate(found) if word in ("RUN", "COPY"))
    assert {"HEALTHCHECK", "VOLUME", "CMD"} <= {word for word, _ in found}
    assert not [rest for word, rest in found if word == "ENV" and any(setting in rest for setting in PIP)]


def test_nodes_of_compose_differ_in_their_rank_alone():
    nodes = services()
    assert len(nodes) == 2
    environments = [node["environment"] for node in nodes.values()]
    assert [env["PET_NODE_RANK"] for env in environments] == ["0", "1"]
    first, second = ({k: v for k, v in node.items() if k not in ("environment", "hostname")} for node in nodes.values())
    assert first == second
    assert {env["PET_MASTER_ADDR"] for env in environments} == {nodes["node-0"]["hostname"]}
    assert environments[0]["PET_NNODES"] == str(len(nodes))
    assert all(env["SAMESTEP_TOKEN"].startswith("${SAMESTEP_TOKEN:?") for env in environments)


def test_nodes_of_compose_get_longer_than_their_ranks():
    for node in services().values():
        ranks = node["command"][node["command"].index("--grace-seconds") + 1]
        assert float(node["stop_grace_period"].rstrip("s")) > float(ranks)
        assert (node["cap_drop"], node["user"]) == (["ALL"], "1000:1000")


@pytest.mark.parametrize(("age", "limit", "code"), [(5, "60", 0), (600, "60", 1), (None, "60", 1)])
def test_a_container_is_healthy_as_long_as_its_run_says_something(age, limit, code, tmp_path):
    if age is not None:
        (tmp_path / "digits").mkdir()
        events = tmp_path / "digits" / "events.jsonl"
        events.touch()
        os.utime(events, (time.time() - age,) * 2)
    words = [sys.executable, str(ROOT / "docker" / "healthcheck.py"), str(tmp_path)]
    ended = subprocess.run(words, env={"SAMESTEP_HEALTH_SECONDS": limit}, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stdout + ended.stderr


def tool(name: str) -> str:
    if not (BIN / name).is_file():
        pytest.skip(f"{name} is missing: scripts/install recipes,dev,cluster")
    return str(BIN / name)


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_linter_finds_nothing(path, tmp_path):
    ended = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")
    broken = tmp_path / path.name
    broken.write_text(path.read_text().replace("ARG BASE=", "ARG OTHER=").replace("${BASE}", "python"))
    assert subprocess.run([tool("hadolint"), str(broken)], capture_output=True, check=False).returncode != 0


@pytest.mark.slow
def test_compose_fits_its_schema(tmp_path):
    words = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    ended = subprocess.run([*words, str(COMPOSE)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    broken = tmp_path / "compose.yaml"
    broken.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace_time"))
    assert subprocess.run([*words, str(broken)], capture_output=True, check=False).returncode != 0


@dataclass
class Buildah:
    """Builds in a storage of its own, without a Docker engine."""

    folder: Path

    def __call__(self, *words: str, seconds: float = 300, check: bool = True) -> subprocess.CompletedProcess[str]:
        own = ["--root", str(self.folder / "root"), "--runroot", str(self.folder / "run"), "--storage-driver", "vfs"]
        environ = os.environ | {"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder)}
        ended = subprocess.run(
            ["buildah", *own, *words], env=environ, capture_output=True, text=True, check=False, timeout=seconds
        )
        assert not check or ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
        return ended


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """With the image `base`: Debian with Python, made from Debian's packages."""
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"needs root and Debian's packages {' '.join(missing) or 'only'}: apt-get install buildah debootstrap"
        )
    folder = tmp_path_factory.mktemp("buildah")
    made = Buildah(folder)
    include = "--include=python3,python3-venv,ca-certificates"
    words = ["debootstrap", "--variant=minbase", include, "bookworm", str(folder / "rootfs")]
    subprocess.run(words, check=True, capture_output=True, timeout=600)
    tar = folder / "rootfs.tar"  # adding the folder itself would lose its links, such as /bin -> usr/bin
    subprocess.run(["tar", "-C", str(folder / "rootfs"), "-cf", str(tar), "."], check=True, timeout=300)
    container = made("from", "scratch").stdout.strip()
    made("add", "--quiet", container, str(tar), "/")
    made("commit", "--quiet", "--rm", container, "localhost/base")
    yield made
    shutil.rmtree(folder, ignore_errors=True)


def pip_settings() -> list[str]:
    """This machine's own settings of pip as build arguments, and the folders that they name as volumes."""
    words, folders = [], {"/etc/ssl/certs", "/usr/share/ca-certificates"}
    for name in PIP:
        value = os.environ.get(name)
        if value:
            words += ["--build-arg", f"{name}={value}"]
            folders |= {part for part in value.split() if Path(part).is_dir()}
    return words + [word for folder in sorted(folders) for word in ("--volume", f"{folder}:{folder}:ro")]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
def test_the_image_is_built_and_trains_the_digits(buildah, tmp_path, digits_digest):
    words = ["bud", "--quiet", "--format", "docker", "--network", "host", "--build-arg", "BASE=localhost/base"]
    words += [*pip_settings(), "--file", "docker/Dockerfile", "--tag", "localhost/samestep", str(ROOT)]
    buildah(*words, seconds=1500)

    described = json.loads(buildah("inspect", "--type", "image", "localhost/samestep").stdout)
    config = described["Docker"]["config"]
    assert (config["User"], list(config["Volumes"])) == ("1000:1000", ["/opt/samestep/runs"])
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "python", "docker/healthcheck.py"]
    assert not [line for line in config["Env"] if line.startswith(PIP)]

    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, 1000, 1000)
    container = buildah("from", "localhost/samestep").stdout.strip()
    volume = ("--volume", f"{runs}:/opt/samestep/runs")
    ended = buildah("run", *volume, container, "--", *config["Cmd"], "--epochs", "1", "--shards", "4")
    events = [json.loads(line) for line in (runs / "digits_cnn" / "events.jsonl").read_text().splitlines()]
    assert [event["digest"] for event in events if event["event"] == "run_finished"] == [digits_digest], ended.stderr
    assert {path.stat().st_uid for path in runs.rglob("*")} == {1000}
    healthy = buildah("run", *volume, container, "--", *config["Healthcheck"]["Test"][1:])
    assert "last sign of the run" in healthy.stdout

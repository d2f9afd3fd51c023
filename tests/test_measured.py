"""Benchmarks put their figures where they belong, and touch nothing else."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import blocks  # noqa: E402 (a folder of programs, no package)
import table  # noqa: E402


def test_every_part_has_its_place_in_the_results():
    for part in [*table.PARTS, "engines"]:
        assert blocks.read(ROOT / "benchmarks" / "results.md", part).strip()
    assert blocks.read(ROOT / "README.md", "engines").strip()


def test_a_part_is_written_in_its_place_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one: measured -->\nold\n<!-- end -->\nb\n<!-- two: measured -->\nkept \\1\n<!-- end -->\n")
    blocks.write(page, "one", "new \\1\n")
    assert blocks.read(page, "one") == "new \\1\n"
    assert blocks.read(page, "two") == "kept \\1\n"
    assert page.read_text().startswith("a\n<!-- one: measured -->\nnew \\1\n<!-- end -->\nb\n")


def test_a_page_without_the_place_is_said(tmp_path):
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"page\.md is expected to have a line"):
        blocks.write(tmp_path / "page.md", "one", "new\n")

"""What users combine samestep with, each real: the bits are the same on any number of ranks and after a stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parent / "recipes"
FLAGS = ("--run-dir", "run", "--shards", "4", "--global-batch-size", "24", "--epochs", "3", "--device", "cpu")
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def trained(rank_server, tmp_path):
    """Train a recipe of this folder; it must end well."""

    def run(name, *flags, ranks=1, cwd="", **environ):
        where = tmp_path / (cwd or f"ranks-{ranks}")
        ended = rank_server(where, RECIPES / f"{name}.py", *FLAGS, *flags, ranks=ranks, env=environ, seconds=120)
        assert ended.codes == [0] * ranks, ended.stderrs
        return ended

    return run


def same_on_any_ranks_and_after_a_stop(trained, name, **environ):
    alone = trained(name, **environ)
    assert trained(name, ranks=2, **environ).bits == alone.bits
    trained(name, "--max-steps", "5", ranks=3, cwd="stopped", **environ)
    assert trained(name, cwd="stopped", **environ).bits == alone.bits
    return alone


def test_torchmetrics_states_give_the_same_numbers_on_any_ranks(trained):
    import torch
    from torchmetrics import MeanSquaredError, PearsonCorrCoef
    from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

    ended = same_on_any_ranks_and_after_a_stop(trained, "torchmetrics_states")
    found = ended.events("eval")[-1]["metrics"]
    weights = ended.weights
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(150, 5, generator=generator)
    y = ((x.sum(1) > 0.3).long() + (x[:, 0] > 1).long())[:77]
    hidden = torch.tanh(torch.nn.functional.linear(x[:77], weights["0.weight"], weights["0.bias"]))
    output = torch.nn.functional.linear(hidden, weights["2.weight"], weights["2.bias"])
    accuracy = MulticlassAccuracy(3, average="micro")
    assert found["accuracy"] == float(accuracy(output, y)), "integer states are exact"
    assert found["wrong"] == float((output.argmax(1) != y).sum())
    assert found["mse"] == pytest.approx(float(MeanSquaredError()(output[:, 0], y.float())), rel=1e-5)
    assert found["pearson"] == pytest.approx(float(PearsonCorrCoef()(output[:, 1], y.float())), rel=1e-4)
    assert found["auroc"] == pytest.approx(float(BinaryAUROC()(output[:, 2].sigmoid(), (y > 1).long())), rel=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "interval"),
    [
        ("one_cycle", "step"),
        ("cosine_restarts", "epoch"),
        ("sequential", "step"),
        ("cyclic_momentum", "step"),
        ("plateau", "step"),
    ],
)
def test_a_scheduler_goes_on_after_a_stop_as_if_there_had_been_none(trained, scheduler, interval):
    same_on_any_ranks_and_after_a_stop(trained, "schedulers", SCHEDULER=scheduler, INTERVAL=interval)


@pytest.mark.slow
def test_a_transformers_model_with_tied_weights_keeps_its_bits(trained):
    pytest.importorskip("transformers")
    same_on_any_ranks_and_after_a_stop(trained, "tiny_transformer")


@pytest.mark.slow
def test_a_dataset_with_a_random_transform_keeps_its_bits_with_workers_too(trained):
    pytest.importorskip("datasets")
    alone = same_on_any_ranks_and_after_a_stop(trained, "hub_dataset")
    assert trained("hub_dataset", "--num-workers", "2", cwd="workers").bits == alone.bits


@pytest.mark.slow
def test_a_notebook_trains_and_shows_its_result(trained, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    source = (RECIPES / "schedulers.py").read_text().replace('if __name__ == "__main__":\n    train(build)\n', "")
    flags = [flag for flag in FLAGS if flag not in ("--run-dir", "run")]
    cells = [
        "import os; os.environ['SCHEDULER'] = 'one_cycle'",
        source,
        f"result = train(build, argv={[*flags, '--run-dir', 'first']!r}); print('digest', result.digest)",
        f"again = train(build, argv={[*flags, '--run-dir', 'second']!r}); print('again', again.digest)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    digest = trained("schedulers", SCHEDULER="one_cycle").digest
    assert f"digest {digest}" in said
    assert f"again {digest}" in said
    assert sys.executable  # the kernel is this interpreter's: ipykernel is installed beside it


def test_a_folder_with_its_own_train_and_launcher_hides_nothing_of_ours(tmp_path):
    recipe = (RECIPES / "schedulers.py").read_text().replace("from torch import nn\n", "import train as own\n", 1)
    recipe = recipe.replace("import torch\n", "import torch\nfrom torch import nn\nimport launcher as theirs\n", 1)
    recipe = recipe.replace("    train(build)\n", "    print(own.NAME, theirs.NAME)\n    train(build)\n")
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").write_text("NAME = 'their launcher'\n")
    (tmp_path / "train.py").write_text("NAME = 'their train'\n")
    (tmp_path / "mine.py").write_text(recipe)
    argv = [sys.executable, "-m", "samestep.launcher", "run", "--nproc-per-node", "2", "mine.py", *FLAGS]
    environ = os.environ | {"SCHEDULER": "one_cycle"}
    ended = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "their train their launcher" in ended.stdout

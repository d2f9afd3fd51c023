"""What users combine samestep with, each real: the bits are the same on any number of ranks and after a stop."""

from __future__ import annotations

import os
import shutil
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


@pytest.mark.slow
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
        pytest.param("cosine_restarts", "epoch", marks=pytest.mark.slow),
        pytest.param("sequential", "step", marks=pytest.mark.slow),
        pytest.param("milestones", "step", marks=pytest.mark.slow),
        pytest.param("cyclic_momentum", "step", marks=pytest.mark.slow),
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


@pytest.fixture
def executed(tmp_path):
    """Run a notebook of these cells after those that define the recipe; the outputs of each of them."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")

    def run(*cells):
        source = (RECIPES / "schedulers.py").read_text().replace('if __name__ == "__main__":\n    train(build)\n', "")
        own = ["import os; os.environ['SCHEDULER'] = 'one_cycle'", source]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (*own, *cells)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
        nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return [cell["outputs"] for cell in notebook.cells[len(own) :]]

    return run


def in_notebook(run_dir, *flags, then=""):
    argv = [*(flag for flag in FLAGS if flag not in ("--run-dir", "run")), "--run-dir", run_dir, *flags]
    return f"result = train(build, argv={argv!r}); {then}"


@pytest.mark.slow
def test_a_notebook_trains_time_after_time_in_the_same_bits(trained, executed):
    first, second = executed(*(in_notebook(name, then="print(result.digest)") for name in ("first", "second")))
    digest = trained("schedulers", SCHEDULER="one_cycle").digest
    for outputs in (first, second):
        assert "".join(out.get("text", "") for out in outputs).splitlines()[-1] == digest


@pytest.mark.slow
def test_a_notebook_has_one_display_that_ends_as_the_run_did_and_whole_lines_beside_it(trained, executed):
    whole, stopped = executed(
        in_notebook("whole", "--log-every", "1"), in_notebook("stopped", "--max-steps", "5", "--check", "never")
    )
    digest = trained("schedulers", SCHEDULER="one_cycle").digest
    for outputs, steps in ((whole, 12), (stopped, 5)):
        assert [out.output_type for out in outputs].count("display_data") == 1
        assert {out.output_type for out in outputs} == {"display_data", "stream"}
        (shown,) = [out.data["text/plain"] for out in outputs if out.output_type == "display_data"]
        said = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
        assert "\r" not in said + shown, "nothing is drawn over"
        assert "\x1b" not in said + shown, "no colours of a terminal"
        assert f"step {steps}/" in shown
        assert shown.splitlines()[-1].startswith("done, digest ")
        assert max(map(len, shown.splitlines())) <= 100
        starts = ("Epoch [", "  time: ", "Finished Training: ", "Evaluation after ", "fused")
        assert all(line.startswith(starts) for line in said.splitlines()), said
    assert f"done, digest {digest}" in next(
        out.data["text/plain"] for out in whole if out.output_type == "display_data"
    )


@pytest.mark.slow
def test_what_a_notebook_redirects_is_plain_lines_in_the_file(executed):
    redirected = "import contextlib\nwith open('said', 'w') as file, contextlib.redirect_stdout(file):\n    "
    outputs, read = executed(redirected + in_notebook("run"), "print(open('said').read())")
    assert [out for out in outputs if out.output_type == "display_data"] == []
    assert "Finished Training: " in read[0].text


@pytest.fixture
def kernel(tmp_path):
    """A kernel that a program of another name has started, as on Colab."""
    manager = pytest.importorskip("jupyter_client.manager")
    launcher = pytest.importorskip("ipykernel_launcher")
    shutil.copy(launcher.__file__, tmp_path / "colab_kernel_launcher.py")
    started = manager.KernelManager()
    started._kernel_spec = manager.kernelspec.KernelSpec(
        argv=[sys.executable, "-m", "colab_kernel_launcher", "-f", "{connection_file}"], language="python"
    )
    started.start_kernel(cwd=str(tmp_path))
    client = started.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield started, client
    client.stop_channels()
    started.shutdown_kernel(now=True)


@pytest.mark.slow
def test_a_cell_that_is_interrupted_is_shown_so_and_can_be_run_again(kernel):
    manager, client = kernel

    def run(code, interrupt_at=None):
        sent, said, shown = client.execute(code), "", ""
        while True:
            message = client.get_iopub_msg(timeout=60)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != sent:
                continue
            said += content.get("text", "") + content.get("ename", "")
            if interrupt_at is not None and interrupt_at in said:
                interrupt_at = manager.interrupt_kernel()  # None
            if kind in ("display_data", "update_display_data"):
                shown = content["data"]["text/plain"]
            if kind == "status" and content["execution_state"] == "idle":
                return said, shown

    run("import os, threading; os.environ['SCHEDULER'] = 'one_cycle'; waits = threading.Event()")
    run((RECIPES / "schedulers.py").read_text().replace("    train(build)\n", "    pass\n"))
    run("""
def stuck(model, batch):
    print("in a step", flush=True)
    waits.wait(60)
    return nn.functional.mse_loss(model(batch[0]), batch[1])
""")
    said, shown = run(
        "import dataclasses; train(lambda config: dataclasses.replace(build(config), loss=stuck))", "in a"
    )
    assert said.endswith("in a step\nKeyboardInterrupt"), said
    assert shown.splitlines()[-1] == "not running"
    said, shown = run("waits.set(); print(train(build).run_dir)")
    assert said.splitlines()[-1] == "runs/notebook", said
    assert shown.splitlines()[-1].startswith("done, digest ")


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

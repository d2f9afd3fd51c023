"""The digest, computed a second time from safetensors' own reader and hashlib."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from samestep.launcher.contract import ExitCode, UsageError
from samestep.launcher.digest import clean_name, file_digest, path_digest

WORDS = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def second_opinion(tensors: dict[str, Tensor]) -> str:
    def plain(name: str) -> str:
        parts = [part for part in name.split(".")[:-1] if part not in ("module", "_orig_mod")]
        return ".".join([*parts, name.split(".")[-1]])

    whole = b""
    for name, tensor in sorted((plain(name), tensor) for name, tensor in tensors.items()):
        shape = ",".join(str(size) for size in tensor.shape)
        whole += b"\0".join([name.encode(), WORDS[tensor.dtype].encode(), shape.encode(), b""])
        whole += tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(whole).hexdigest()


def some_tensors(prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{prefix}layer.{word}": (10 * torch.randn(3, 5, generator=generator)).to(kind) for kind, word in WORDS.items()
    }
    return tensors | {
        f"{prefix}scalar": torch.tensor(0.5),
        f"{prefix}empty": torch.empty(0, 3),
        f"{prefix}Ä": torch.ones(1),
    }


def test_digest_equals_an_independent_implementation(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "a.safetensors")
    assert file_digest(tmp_path / "a.safetensors") == second_opinion(load_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_wrappers_of_ddp_and_compile_do_not_count(tmp_path: Path, prefix: str) -> None:
    save_file(some_tensors(), tmp_path / "plain.safetensors")
    save_file(some_tensors(prefix), tmp_path / "wrapped.safetensors", metadata={"format": "pt"})
    assert file_digest(tmp_path / "plain.safetensors") == file_digest(tmp_path / "wrapped.safetensors")


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("module.a.weight", "a.weight"),
        ("a.module.weight", "a.weight"),
        ("a._orig_mod.module.weight", "a.weight"),
        ("submodule.weight", "submodule.weight"),
        ("module", "module"),
        ("modules.0", "modules.0"),
    ],
)
def test_only_whole_wrapper_names_are_removed(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


def test_the_order_in_the_file_does_not_count(tmp_path: Path) -> None:
    """Written by hand, since the library sorts."""
    digests = set()
    for names in (["a", "b"], ["b", "a"]):
        data, header = b"", {}
        for name in names:
            part = name.encode() * 4
            header[name] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
            data += part
        text = json.dumps(header).encode()
        (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + data)
        digests.add(file_digest(tmp_path / "x"))
    assert len(digests) == 1


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape", "more", "sign of zero"])
def test_every_difference_changes_it(tmp_path: Path, change: str) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    changed = {
        "value": tensors | {"b": torch.tensor([1.0, 1.0, 1.0, 1.0000001])},
        "name": {"a": tensors["a"], "c": tensors["b"]},
        "dtype": tensors | {"a": torch.zeros(2, 3, dtype=torch.int32)},
        "shape": tensors | {"a": torch.zeros(3, 2)},
        "more": tensors | {"c": torch.empty(0)},
        "sign of zero": tensors | {"a": -torch.zeros(2, 3)},
    }[change]
    save_file(tensors, tmp_path / "a")
    save_file(changed, tmp_path / "b")
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_any_damaged_file_is_a_usage_error_or_another_digest(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int64)}, path)
    raw, good = bytearray(path.read_bytes()), file_digest(path)
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    path.write_bytes(raw)
    try:
        digest = path_digest(path)
    except UsageError:
        return
    try:
        content = {name: str(tensor.tolist()) for name, tensor in load_file(path).items()}  # tells 0.0 from -0.0
    except SafetensorError:
        content = {}
    unchanged = content == {"a": "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]", "b": "[1, 1]"}
    assert (digest == good) == unchanged


@pytest.mark.parametrize(
    "header", ["[]", "7", '"text"', "null", '{"a": 3}', '{"a": {}}', '{"a": {"dtype": "F32", "shape": 3}}']
)
def test_a_header_of_another_form_is_a_usage_error(tmp_path: Path, header: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(UsageError):
        path_digest(path)


@pytest.mark.parametrize("offsets", [[-4, 0], [8, 4], [0, 12]])
def test_offsets_that_do_not_hold_the_tensor_are_a_usage_error(tmp_path: Path, offsets: list[int]) -> None:
    path = tmp_path / "odd.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UsageError):
        path_digest(path)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")  # noqa: TID251 (what is refused)
    with pytest.raises(UsageError, match="not a safetensors file"):
        path_digest(tmp_path / "model.pt")


def test_a_missing_path_and_an_empty_folder_are_usage_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UsageError) as raised:
            path_digest(path)
        assert raised.value.exit_code == ExitCode.USAGE
        assert raised.value.hint

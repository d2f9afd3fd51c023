"""The trained weights as one plain safetensors file that `load_state_dict(load_file(path), strict=True)` takes."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from samestep.launcher.digest import ALIASES, clean_name
from samestep.train.state.codec import unshared
from samestep.train.state.files import sync, write_tensors


def export_weights(model: nn.Module, path: Path) -> None:
    """Write all tensors of `model.state_dict()` under clean names, tied ones under each of their names.

    The header's metadata says which names stand for another one's tensor, so the digest is that of the checkpoint.

    Raises:
        OSError: it can't be written; one that is there stays.
    """
    named = {clean_name(name): tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    _, aliases = unshared(named)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    tensors |= {name: tensors[name].clone() for name in aliases}
    temporary = path.with_suffix(".tmp")
    try:
        write_tensors(tensors, temporary, {ALIASES: json.dumps(aliases, sort_keys=True)})
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)

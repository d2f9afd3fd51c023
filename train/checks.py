"""What is wrong with a recipe before its first step, as sentences."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from samestep.launcher.contract import UsageError
from samestep.train.data.fingerprint import Look, content, look_at
from samestep.train.data.map_style import require_map_style
from samestep.train.data.rng import streams_restored
from samestep.train.data.sampler import ShardSamples
from samestep.train.data.shard_dataset import ShardDataset, makes_batches
from samestep.train.parallel.shards import smallest_shard
from samestep.train.parts import check_parts
from samestep.train.recipe import Components


def check_components(components: object) -> Components:
    """Judge what `build` returned.

    Raises:
        UsageError: it is no Components, a dataset is unusable, nothing can be learned, or the optimizer holds other
            parameters than the model's or needs more than their gradients.
    """
    if not isinstance(components, Components):
        raise UsageError(
            f"build is expected to return Components, but returned {type(components).__name__}",
            "return Components(model=…, loss=…, optimizer=…, train_data=…)",
        )
    if not isinstance(components.model, nn.Module):
        raise UsageError(
            f"Components.model is expected to be a torch.nn.Module, but is {type(components.model).__name__}"
        )
    if any(isinstance(module, DistributedDataParallel) for module in components.model.modules()):
        raise UsageError(
            "Components.model is expected to be the model itself, but holds a DistributedDataParallel",
            "leave DDP(…) out: samestep wraps the model where there are several ranks",
        )
    check_parts(components)
    require_map_style(components.train_data, "train_data")
    if components.eval_data is not None:
        require_map_style(components.eval_data, "eval_data")
    if components.scheduler_interval not in ("step", "epoch"):
        raise UsageError(
            f"scheduler_interval of Components is expected to be 'step' or 'epoch', but is "
            f"{components.scheduler_interval!r}",
            'a step is a global batch: "step" calls scheduler.step() after each optimizer step',
        )
    check_materialised(components.model)
    _check_parameters(components.model, components.optimizer)
    _check_update(components.optimizer)
    return components


def without_use(components: Components) -> list[str]:
    """Sentences about parts that nothing will ask for."""
    if components.eval_data is None and components.metrics:
        return [f"metrics are not computed, as there is no eval_data: {', '.join(components.metrics)}"]
    return []


def check_materialised(model: nn.Module) -> None:
    """Refuse tensors without shape or values.

    Raises:
        UsageError: names the first one.
    """
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise UsageError(
            f"the model is expected to have its shapes when build returns it, but {lazy[0]}"
            + (f" and {len(lazy) - 1} more have" if len(lazy) > 1 else " has")
            + " none yet",
            "run one batch through the model in build, before the optimizer is made: its lazy layers then know them",
        )
    if empty := [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise UsageError(
            f"the model is expected to have its values when build returns it, but {empty[0]} is on the meta device"
            + (f", as are {len(empty) - 1} more" if len(empty) > 1 else ""),
            "make it outside of torch.device('meta'), or call model.to_empty(device='cpu') and initialise it, before "
            "the optimizer is made",
        )


def _check_update(optimizer: Optimizer) -> None:
    """By the class: a scheduler wraps the method of the object."""
    takes = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    needed = [p.name for p in takes if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if needed:
        raise UsageError(
            f"the optimizer is expected to update from gradients alone, but {type(optimizer).__name__}.step needs "
            f"{' and '.join(needed)}",
            "take one that does not run the loss again, such as torch.optim.Adam or SGD",
        )


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UsageError(
            "the model is expected to have a trainable parameter, but has none",
            "build layers in __init__, and check requires_grad",
        )
    known = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [tuple(p.shape) for p in held if id(p) not in known]
    if strangers:
        raise UsageError(
            f"the optimizer is expected to hold parameters of the model, but {len(strangers)} of {len(held)} are not, "
            f"the first of shape {strangers[0]}",
            "make the optimizer from model.parameters(), after the last change of the model",
        )
    if not set(trainable) & {id(p) for p in held}:
        raise UsageError(
            "the optimizer is expected to hold a trainable parameter of the model, but holds none",
            "make the optimizer from model.parameters()",
        )


def check_among_ranks(model: nn.Module, shards: int, world_size: int) -> None:
    """Refuse what only one rank with one shard can do: hooks that only plain backward calls, and some layers.

    Raises:
        UsageError: a parameter has a hook that would never be called or change the sums on one rank alone, or a layer
            would wait for other ranks in forward, though ranks run their shards one after the other, or change weights.
    """
    if shards == 1 and world_size == 1:
        return
    _check_synchronised(model, shards)
    _check_embeddings(model, shards)
    hooked = [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks]
    if hooked:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise UsageError(
            f"parameters are expected to have no hook of register_post_accumulate_grad_hook with {shards} shards on "
            f"{ranks}, where gradients are summed outside of backward, but {hooked[0]} has one"
            + (f", as have {len(hooked) - 1} more" if len(hooked) > 1 else ""),
            "clip with --clip-grad-norm, change gradients in the optimizer's register_step_pre_hook, or those of each "
            "shard in Tensor.register_hook",
        )


def _check_embeddings(model: nn.Module, shards: int) -> None:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    found = [n for n, module in model.named_modules() if isinstance(module, kinds) and module.max_norm is not None]
    if found:
        raise UsageError(
            f"embeddings are expected to have no max_norm with {shards} shards, but {found[0] or 'the model'} has one"
            + (f", as have {len(found) - 1} more" if len(found) > 1 else "")
            + ": forward then changes weights, and each rank sees other rows",
            "bound the norm in the optimizer's register_step_post_hook or in a parametrization, or train on one rank "
            "with --shards 1",
        )


def _check_synchronised(model: nn.Module, shards: int) -> None:
    found = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if found:
        raise UsageError(
            f"the model is expected to have no SyncBatchNorm with {shards} shards, but has one at {found[0]!r}: ranks "
            "run different numbers of shards, so it would wait for others for ever, or see another batch on each",
            "leave convert_sync_batchnorm out: each shard has statistics of its own, and running statistics are those "
            "of all; a layer such as GroupNorm has none of the batch",
        )


def check_data_repeats(components: Components, seed: int, seen: Look) -> None:
    """Read a few samples, and make a batch, again; `seen` is how the samples were the first time.

    Raises:
        UsageError: see below.
    """
    check_samples_repeat(components.train_data, seed, seen)
    check_batch_repeats(components.train_data, seed, components.collate_fn)


def check_samples_repeat(dataset: Any, seed: int, seen: Look) -> None:
    """Read a few samples again; `seen` is how they were the first time.

    Raises:
        UsageError: a sample has other content now, or random numbers of the first time in it.
    """
    now, kind = look_at(dataset, seed), type(dataset).__name__
    if now.fingerprint != seen.fingerprint:
        raise UsageError(
            f"a sample of train_data is expected to be the same each time it is read, but {kind} gave another one",
            "__getitem__(index) has to depend on index alone, and to draw from torch's, numpy's or Python's global "
            "random numbers, which are seeded for each sample; --check never goes on without this look",
        )
    if any(first and not again for first, again in zip(seen.drawn, now.drawn, strict=True)):
        raise UsageError(
            f"a sample of train_data is expected to draw random numbers each time it is read, but {kind} drew some the "
            "first time only: what it keeps of them depends on which rank read the sample first, and in which epoch",
            "keep what was read or decoded, and draw after that; --check never goes on without this look",
        )


def check_batch_repeats(dataset: Any, seed: int, collate_fn: Any = None) -> None:
    """Make a batch of few samples twice, where a function of the recipe makes it.

    Raises:
        UsageError: it has other content the second time.
    """
    if collate_fn is None and not makes_batches(dataset):
        return
    collate = collate_fn and (lambda items: collate_fn(copy.deepcopy(items)))  # it may take the dataset's own apart
    shards, samples = ShardDataset(dataset, seed, collate), ShardSamples(range(min(2, len(dataset))))
    try:
        first, again = (content(shards[samples]) for _ in range(2))
    except Exception:  # noqa: BLE001 (batches of another size may do; one that can't be made is told by its step)
        return
    if first != again:
        by = "collate_fn"
        if makes_batches(dataset) and (collate is None or _repeats(dataset, seed, collate, samples)):
            by = "__getitems__"
        raise UsageError(
            f"a batch of the same samples is expected to be the same each time it is made, but {by} gave another one",
            "what it keeps from batch to batch, a generator of its own too, depends on ranks and loader workers: let "
            "the batch depend on its samples alone, and draw from torch's, numpy's or Python's global random numbers, "
            "which are seeded for each batch; --check never goes on without this look",
        )


def _repeats(dataset: Any, seed: int, collate: Callable[[Any], Any], samples: ShardSamples) -> bool:
    """Whether the items of one batch, fetched once, come out alike when they are collated twice."""
    seen: list[bytes] = []

    def twice(items: Any) -> Any:
        for _ in range(2):
            with streams_restored():
                seen.append(content(collate(items)))

    ShardDataset(dataset, seed, twice)[samples]
    return seen[0] == seen[1]


def check_shard_size(
    model: nn.Module, samples: int, global_batch_size: int, shards: int, micro_batches: int = 1
) -> None:
    """Refuse shards, or parts, of one sample under a BatchNorm over plain features, where one sample has no variance.

    Layers that see more than one value a channel and sample (images, sequences) are fine, so their input decides: a
    hook looks at the first forward of each and then goes.

    Raises:
        UsageError: from the first forward.
    """
    smallest = smallest_shard(samples, global_batch_size, shards)
    if smallest >= 2 * micro_batches:
        return

    def judge(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        handle = handles.pop(module, None)
        if handle is None:  # a copy, as of a moving average
            return
        handle.remove()
        if inputs[0].shape[2:].numel() == 1 and module.training:
            tail = samples % global_batch_size
            whole = micro_batches == 1
            unit = "shard" if whole else "micro-batch"
            cut = f"{shards} shards" if whole else f"{shards} shards of {micro_batches} micro-batches"
            raise UsageError(
                f"{type(module).__name__} is expected to get at least 2 samples a {unit}, but with {samples} samples, "
                f"--global-batch-size {global_batch_size} and {cut} "
                f"{'the last batch of ' + str(tail) + ' samples' if tail else 'a batch'} leaves a {unit} with 1",
                "choose another --global-batch-size or fewer --shards, or use GroupNorm or LayerNorm",
            )

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles: dict[nn.Module, RemovableHandle] = {module: module.register_forward_pre_hook(judge) for module in norms}

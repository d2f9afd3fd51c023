"""Where parameters lie in flat buffers, against what DDP itself does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from samestep.train.parallel.exchange import TreeExchange
from samestep.train.parallel.group import SoloGroup
from samestep.train.parallel.layout import flat, like, numbers, views
from samestep.train.parallel.reduction import GradientReducer
from samestep.train.parallel.shards import StepPlan

FORMS: dict[str, Tensor] = {
    "rows": torch.randn(3, 4),
    "scalar": torch.randn(()),
    "none": torch.randn(0, 3),
    "turned": torch.randn(5, 4).t(),
    "channels last": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "one channel": torch.randn(4, 1, 3, 3).to(memory_format=torch.channels_last),
    "any stride of one": torch.randn(4).as_strided((1, 4, 1), (7, 1, 9)),
    "three turned": torch.randn(2, 3, 4).permute(2, 0, 1),
    "gaps": torch.randn(4, 6)[:, ::2],
    "complex": torch.randn(2, 3, dtype=torch.complex64),
    "complex turned": torch.randn(2, 3, dtype=torch.complex64).t(),
}


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
def test_what_is_laid_out_is_found_again(is_complex: bool, contiguous: bool) -> None:
    parameters = [form for form in FORMS.values() if form.is_complex() == is_complex]  # as in DDP's buckets
    gradients = [torch.randn_like(p) for p in parameters]
    gradients = [g.contiguous() for g in gradients] if contiguous else gradients
    buffer = flat(gradients, parameters)
    assert buffer.shape == (sum(map(numbers, parameters)),)
    for view, gradient in zip(views(buffer, parameters), gradients, strict=True):
        assert torch.equal(view, gradient)
        assert view.numel() == 0 or view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "name", ["rows", "turned", "channels last", "one channel", "any stride of one", "three turned"]
)
def test_elements_lie_as_in_the_parameters_own_memory(name: str) -> None:
    parameter = FORMS[name]
    memory = parameter.as_strided((parameter.numel(),), (1,))
    assert torch.equal(flat([parameter], [parameter]), memory)
    assert torch.equal(flat([parameter.contiguous()], [parameter]), memory)
    turned = like(parameter.contiguous(), parameter)
    assert torch.equal(turned, parameter)
    assert torch.equal(turned.as_strided((parameter.numel(),), (1,)), memory)


def test_sums_over_shards_on_one_rank_lie_as_their_parameter_does() -> None:
    """As after plain backward and in DDP's buckets: a norm over them adds up in the order of their memory."""
    model = nn.ParameterList([FORMS["channels last"].clone()])
    reducer = GradientReducer(model, SoloGroup(), TreeExchange(0, 1, 2), 2, None)
    plan = StepPlan(0, 0, 0, 4, 2)
    reducer.begin(plan)
    for shard in (0, 1):
        (part,) = plan.parts(shard)
        reducer.backward(part, (model[0] * torch.randn(4, 3, 2, 2)).sum(), torch.ones(()), lambda: None)
    (gradient,) = reducer.finish()
    assert gradient.stride() == model[0].stride()


@pytest.mark.parametrize("name", ["turned", "channels last", "gaps", "complex turned"])
def test_a_gradient_gets_the_strides_that_plain_backward_gives_it(name: str) -> None:
    """Whatever those are that autograd makes it with; a norm adds up in the order of memory."""
    parameter = nn.Parameter(FORMS[name])
    made = torch.randn(FORMS[name].shape[::-1], dtype=parameter.dtype).permute(*reversed(range(parameter.dim())))
    (parameter * made).abs().sum().backward()
    assert parameter.grad is not None
    ours = like(torch.empty_like(made).copy_(parameter.grad), parameter)
    assert ours.stride() == parameter.grad.stride()
    assert torch.equal(ours, parameter.grad)

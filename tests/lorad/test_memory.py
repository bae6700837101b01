"""What autograd keeps, and how often the product is computed."""

import pytest
import torch
from lorad_toys import adapted, inputs, rotated_layer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wadi.lorad import LoRaDConfig

SIDE = 48
W_BYTES = SIDE * SIDE * 4


def bytes_kept(function, known):
    """Bytes of the distinct storages autograd keeps for ``function``'s result, without those of ``known`` tensors."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(size for address, size in kept.items() if address not in {t.untyped_storage().data_ptr() for t in known})


CASES = [
    pytest.param(torch.float32, None, 1.0, id="fp32"),
    pytest.param(torch.bfloat16, None, 0.5, id="bf16"),
    pytest.param(torch.float32, torch.bfloat16, 0.5, id="autocast"),
]


@pytest.mark.parametrize("x_grad", [False, True], ids=["first", "inner"])
@pytest.mark.parametrize(("dtype", "autocast", "of_W"), CASES)
def test_one_rotated_weight_is_kept_or_nothing_of_its_size(dtype, autocast, of_W, x_grad):
    x = inputs(5, SIDE).to(dtype).requires_grad_(x_grad)
    for recompute, limit in ((False, of_W), (True, 0.0)):
        layer = rotated_layer(SIDE, SIDE, r=2, recompute=recompute).to(dtype)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            kept = bytes_kept(lambda layer=layer: layer(x), [x, *layer.parameters()])
        activations = x.numel() * 4  # autocast keeps its copy of x, as for a linear layer
        assert limit * W_BYTES <= kept <= limit * W_BYTES + activations


def test_one_adapter_that_recomputes_is_enough():
    """The rotated weight is that of all active adapters, and it is kept for none or for all."""
    model = adapted(nn.Sequential(nn.Linear(SIDE, SIDE)), target_modules=["0"], recompute=True)
    model.add_adapter("other", LoRaDConfig(target_modules=["0"], r=2, recompute=False))
    model.base_model.set_adapter(["default", "other"])
    x = inputs(5, SIDE).requires_grad_()
    assert bytes_kept(lambda: model(x), [x, *model.parameters()]) == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_a_convolution_keeps_as_little(recompute):
    conv = nn.Conv2d(8, 16, 3)
    model = adapted(nn.Sequential(conv), target_modules=["0"], recompute=recompute)
    x = inputs(1, 8, 5, 5).requires_grad_()
    kept = bytes_kept(lambda: model(x), [x, *model.parameters()])
    assert kept == (0 if recompute else conv.weight.numel() * 4)


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_kept_without_gradients(recompute):
    layer = rotated_layer(SIDE, SIDE, recompute=recompute)
    with torch.no_grad():
        assert bytes_kept(lambda: layer(inputs(5, SIDE)), []) == 0
    layer.requires_grad_(False)
    assert bytes_kept(lambda: layer(inputs(5, SIDE)), []) == 0


class Products(TorchDispatchMode):
    """Counts matrix products whose result is the layer's output."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_product = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
        self.count += is_product and tuple(out.shape) == self.shape
        return out


@pytest.mark.parametrize("recompute", [False, True])
def test_the_layers_own_product_is_computed_once(recompute):
    layer, x = rotated_layer(12, 10, recompute=recompute), inputs(7, 10).requires_grad_()
    with Products((7, 12)) as products:
        layer(x).square().sum().backward()
    assert products.count == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_the_cost_is_a_trainable_layer_and_the_angles(recompute):
    o, i, r, n = 12, 10, 3, 7
    layer, x = rotated_layer(o, i, r=r, recompute=recompute), inputs(n, i).requires_grad_()
    with FlopCounterMode(display=False) as flops:
        layer(x).square().sum().backward()
    angles = 2 * o * r * (i // 2)  # one product A B; as much for each of dA and dB, and once more to recompute
    assert flops.get_total_flops() == 3 * 2 * n * i * o + (4 if recompute else 3) * angles

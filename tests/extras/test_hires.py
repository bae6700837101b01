"""Re-dilation applies a layer on a coarser grid, changes the chosen layers only, and leaves no trace."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from backbones import small_pipelines
from raising import raises_naming
from wadi import roles
from wadi.backbones import from_pipeline
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.extras.high_resolution.blocks import ALL, lowest_resolution_blocks
from wadi.extras.high_resolution.dispersion import disperse, dispersion_matrix
from wadi.extras.high_resolution.positions import interpolated_positions, resized_table
from wadi.extras.high_resolution.redilation import redilated, redilated_conv
from wadi.extras.high_resolution.resize import check_resolution, default_factor, enlarged, set_resolution, tiled_decoding
from wadi.lorad import LoRaDConfig
from wadi.pipelines.generate import generate_images


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pipeline = tiny.stable_diffusion(
        tmp_path_factory.mktemp("parts"),
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return small_pipelines.readied(pipeline)


@pytest.fixture
def unet(pipeline):
    return pipeline.unet


def conv(stride=1, padding=1, kernel=3, seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(3, 5, kernel, stride, padding).double().requires_grad_(False)


def field(height, width, seed=1):
    return torch.randn(2, 3, height, width, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def smooth(height, width):
    """Low frequencies on a unit square, sampled at ``height x width``."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    waves = [torch.cos(math.pi * (a * y + b * x) + a) for a, b in ((1, 0), (0.5, 1.5), (1, 2))]
    return torch.stack(waves)[None].double()


def output_of(unet, side=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, 4, side, side, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([500]), text, return_dict=False)[0]


# --- the convolution ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("down", "across"), [(2, 2), (3, 3), (2, 4), (1, 3)])
def test_a_whole_factor_is_the_layer_on_each_sub_grid(down, across):
    layer, x = conv(), field(4 * down, 4 * across)
    y = redilated_conv(x, layer, (down, across))
    for i in range(down):
        for j in range(across):
            assert torch.allclose(y[..., i::down, j::across], layer(x[..., i::down, j::across]), atol=1e-12)


@pytest.mark.parametrize("dilation", [(2, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize(("down", "across"), [(2, 2), (1, 3)])
def test_the_factor_multiplies_a_layers_own_dilation(dilation, down, across):
    """Compared with the plain convolution on each sub-grid, and as a whole."""
    layer, x = conv(padding=dilation), field(8 * down, 8 * across)
    layer.dilation = dilation
    y = redilated_conv(x, layer, (down, across))
    for i in range(down):
        for j in range(across):
            wanted = F.conv2d(x[..., i::down, j::across], layer.weight, layer.bias, 1, dilation, dilation)
            assert torch.allclose(y[..., i::down, j::across], wanted, atol=1e-12)
    further = (dilation[0] * down, dilation[1] * across)
    assert torch.allclose(y, F.conv2d(x, layer.weight, layer.bias, 1, further, further), atol=1e-12)
    assert redilated_conv(x, layer, (1.5 * down, 1.0 * across)).shape == layer(x).shape


@pytest.mark.parametrize("factor", [(1.5, 1.5), (2.5, 1.25), (2.0, 3.5), (4.0, 1.0)])
def test_a_fractional_factor_gives_on_an_enlarged_field_the_enlarged_output(factor):
    layer = conv()
    h, w = 32, 32
    big = smooth(round(h * factor[0]), round(w * factor[1]))
    wanted = F.interpolate(layer(smooth(h, w)), size=big.shape[2:], mode="bilinear")
    inside = (..., slice(8, -8), slice(8, -8))
    error = (redilated_conv(big, layer, factor) - wanted)[inside].abs().max()
    plain = (layer(big) - wanted)[inside].abs().max()
    assert error < 0.01 * wanted.abs().max()
    assert error < 0.15 * plain


@pytest.mark.parametrize("factor", [(1.0, 1.0), (2.0, 2.0), (1.5, 2.5)])
@pytest.mark.parametrize("layer", [conv(), conv(2), conv(2, 0), conv(1, 2, 5)], ids=str)
def test_shapes_are_those_of_the_layer(layer, factor):
    x = field(12, 17)
    assert redilated_conv(x, layer, factor).shape == layer(x).shape
    if factor == (1.0, 1.0):
        assert torch.equal(redilated_conv(x, layer, factor), layer(x))


def test_a_factor_near_a_whole_one_gives_nearly_the_same():
    layer, x = conv(), smooth(24, 24)
    assert torch.allclose(redilated_conv(x, layer, (1.98, 1.98)), redilated_conv(x, layer, (2.0, 2.0)), atol=0.05)


# --- dispersion ---------------------------------------------------------------------------------------------------------------


def test_dispersion_solves_its_least_squares():
    """No other matrix does better on random features, far from their border; both parts of the loss count."""
    R, eta = dispersion_matrix(3, 5, 2, 0.3), 0.3
    x, layer = field(16, 16), conv()
    up = lambda h: F.interpolate(h, scale_factor=2, mode="bilinear")  # noqa: E731

    def loss(matrix):
        W = torch.einsum("mn,oin->oim", matrix, layer.weight.flatten(2)).unflatten(2, (5, 5))
        structure = F.conv2d(up(x), W, padding=2) - up(F.conv2d(x, layer.weight, padding=1))
        pixels = F.conv2d(x, W, padding=2) - F.conv2d(x, layer.weight, padding=1)
        return (structure[..., 6:-6, 6:-6] ** 2).sum() + eta**2 * (pixels[..., 3:-3, 3:-3] ** 2).sum()

    best = loss(R)
    generator = torch.Generator().manual_seed(0)
    padded = torch.zeros(5, 5, 3, 3, dtype=torch.double)
    for i in range(3):
        for j in range(3):
            padded[1 + i, 1 + j, i, j] = 1
    assert best < 0.5 * loss(padded.view(25, 9))  # the kernel as it was
    worse = [loss(R + 0.05 * torch.randn(25, 9, generator=generator, dtype=torch.double)) for _ in range(20)]
    assert best < min(worse)


def test_dispersion_keeps_symmetries_and_with_all_weight_on_pixels_the_kernel():
    R = dispersion_matrix().view(5, 5, 3, 3)
    assert torch.allclose(R, R.flip(0, 2), atol=1e-10)
    assert torch.allclose(R, R.permute(1, 0, 3, 2), atol=1e-10)
    kernel = torch.randn(2, 2, 3, 3, dtype=torch.double)
    assert torch.allclose(disperse(kernel, dispersion_matrix(eta=1e6)).double(), F.pad(kernel, (1, 1, 1, 1)), atol=1e-4)
    assert 0.9 < float(dispersion_matrix().sum(0).mean()) < 1.1  # the output for a constant field stays about the same
    for bad in ((4, 5), (3, 6), (5, 5), (5, 3)):
        with raises_naming(*bad):
            dispersion_matrix(*bad)


def test_any_odd_kernel_is_dispersed():
    assert disperse(torch.rand(3, 2, 5, 5), dispersion_matrix(5, 9)).shape == (3, 2, 9, 9)


def test_dispersed_kernels_need_a_factor_of_two_and_do_the_rest_by_dilation(unet):
    plain = output_of(unet)
    with raises_naming(1.5), redilated(unet, 1.5, disperse=True):
        pass
    with raises_naming(1.0), redilated(unet, 1, disperse=True):
        pass
    with redilated(unet, 2, disperse=True):
        two = output_of(unet)
    with redilated(unet, 4, disperse=True):
        four = output_of(unet)
    with redilated(unet, 2):
        dilated = output_of(unet)
    pairs = [(plain, two), (two, four), (two, dilated)]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert torch.equal(output_of(unet), plain)


def test_dilation_gives_the_rest_of_a_factor_on_each_axis(unet):
    layer, x = unet.mid_block.resnets[0].conv1, torch.randn(1, 32, 8, 8)
    W = disperse(layer.weight.detach(), dispersion_matrix())
    with torch.no_grad():
        wanted = redilated_conv(x, layer, (1.0, 2.0), W)
        with redilated(unet, (2, 4), "mid_block", disperse=True):
            assert torch.equal(layer(x), wanted)


# --- the context --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disperse", [False, True])
@pytest.mark.parametrize("factor", [2, 2.5, (2, 3.5)], ids=str)
def test_it_changes_the_networks_output_and_restores_it_bit_for_bit(unet, factor, disperse):
    before, state = output_of(unet), {k: v.clone() for k, v in unet.state_dict().items()}
    with redilated(unet, factor, disperse=disperse) as names:
        assert names
        assert not torch.allclose(output_of(unet), before, atol=1e-4)
    assert torch.equal(output_of(unet), before)
    assert state.keys() == unet.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())
    assert not any("forward" in vars(module) for module in unet.modules())


def test_errors_inside_and_on_entry_restore_the_network(unet):
    before = output_of(unet)
    with pytest.raises(ZeroDivisionError), redilated(unet, 2, "all"):
        raise ZeroDivisionError
    with raises_naming("mid_block"), redilated(unet, 2, "mid_block"):
        with redilated(unet, 2, "all"):
            pass
    assert torch.equal(output_of(unet), before)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_a_factor_of_one_is_the_network_itself(unet):
    before = output_of(unet)
    with redilated(unet, 1, "all") as names:
        assert names == []
        assert torch.equal(output_of(unet), before)


def test_blocks_are_chosen(unet):
    assert lowest_resolution_blocks(unet) == ["down_blocks.2", "mid_block", "up_blocks.0"]
    with redilated(unet, 2) as names:
        assert {name.split(".resnets")[0].split(".upsamplers")[0] for name in names} == set(lowest_resolution_blocks(unet))
    with redilated(unet, 2, ["mid_block", "down_blocks.0"]) as names:
        assert all(name.startswith(("mid_block.", "down_blocks.0.")) for name in names)
        assert any(name.startswith("down_blocks.0.downsamplers") for name in names)
    with redilated(unet, 2, "all") as names:
        kernels = [name for name, m in unet.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
        assert sorted(names) == sorted(name for name in kernels if name.startswith(ALL))
        assert not {"conv_in", "conv_out"} & set(names)
    with redilated(unet, 2, {"mid_block": 2, "up_blocks": 1, "up_blocks.0": 1.5}) as names:
        assert {name.split(".")[0] for name in names} == {"mid_block", "up_blocks"}
        assert all(name.startswith(("mid_block.", "up_blocks.0.")) for name in names)
    with redilated(unet, 2, {"mid_block": 2}):
        by_map = output_of(unet)
    with redilated(unet, 2, "mid_block"):
        assert torch.equal(output_of(unet), by_map)
    with redilated(unet, 2, {"mid_block": 1.5}):
        assert not torch.equal(output_of(unet), by_map)


@pytest.mark.parametrize("bad", [0.5, 0, -2, math.nan, math.inf, (2, 0.9), (1, 2, 3)], ids=str)
def test_factors_out_of_range(unet, bad):
    with raises_naming(bad), redilated(unet, bad):
        pass


def test_blocks_that_do_not_exist_and_networks_without_convolutions(unet):
    with raises_naming("up_blocks.7", "up_blocks.0"), redilated(unet, 2, ["up_blocks.7"]):
        pass
    with raises_naming("Linear"), redilated(nn.Linear(2, 2), 2):
        pass


@pytest.mark.parametrize("factor", [2, 1.5])
@pytest.mark.parametrize("disperse", [False, True])
def test_an_attached_lora_is_redilated_with_its_layer(tmp_path, factor, disperse):
    """The output is the same merged or not: ``A`` is re-dilated along with the kernel it adds to."""
    if disperse and factor < 2:
        pytest.skip("not offered")
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    unet = small_pipelines.readied(tiny.stable_diffusion(tmp_path)).unet
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*resnets\.0\.conv[12]", init_lora_weights=False), unet)
    with redilated(unet, factor, "all", disperse) as names:
        assert any("lora_A" in name for name in names)
        attached = output_of(unet)
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    with redilated(unet, factor, "all", disperse):
        assert torch.allclose(output_of(unet), attached, atol=1e-4)


def test_an_unmerged_lorad_convolution_is_rejected(tmp_path):
    """It uses its layer's weight and not the layer's forward, so re-dilation would silently ignore it."""
    unet = small_pipelines.readied(tiny.stable_diffusion(tmp_path)).unet
    roles.attach(unet, "student", LoRaDConfig(r=2, target_modules=r".*resnets\.0\.conv1"))
    with raises_naming("resnets.0.conv1"), redilated(unet, 2, "all"):
        pass
    roles.fuse(unet, "student")
    with redilated(unet, 2, "all") as names:
        assert names


# --- images -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(32, 32), (32, 56), (16, 24)], ids=str)
def test_images_have_the_requested_size(pipeline, wanted):
    native = from_pipeline(pipeline).resolution
    try:
        check_resolution(pipeline, wanted)
        set_resolution(pipeline, wanted)
        assert from_pipeline(pipeline).resolution == wanted
        plain = generate_images(pipeline, ["apple"], [3]).images[0]
        with enlarged(pipeline, native, wanted):
            picture = generate_images(pipeline, ["apple"], [3]).images[0]
        assert picture.size == plain.size == (wanted[1], wanted[0])
        assert (picture.tobytes() == plain.tobytes()) == (default_factor(native, wanted) == 1)
    finally:
        set_resolution(pipeline, native)


def test_the_factor_is_that_of_the_side_that_grows_less():
    assert default_factor((512, 512), (1024, 1792)) == 2
    assert default_factor((64, 64), (224, 128)) == 2
    assert default_factor((512, 512), (512, 1024)) == 1
    assert default_factor((512, 512), (256, 384)) == 1
    assert default_factor((512, 512), (768, 768)) == 1.5


@pytest.mark.parametrize("bad", [(12, 16), (16, 20), (0, 16), (-16, 16), (4, 4), (1000, 1001)], ids=str)
def test_sizes_that_the_model_cannot_generate(pipeline, bad):
    with raises_naming(f"{bad[1]}x{bad[0]}", 8):
        check_resolution(pipeline, bad)


def test_tiles_are_switched_on_and_off_again(pipeline):
    vae = pipeline.vae
    assert vae.use_tiling is False
    with tiled_decoding(vae):
        assert vae.use_tiling
    with tiled_decoding(vae, False):
        assert not vae.use_tiling
    assert vae.use_tiling is False
    vae.enable_tiling()  # the caller enabled it, so it stays enabled
    with tiled_decoding(vae):
        assert vae.use_tiling
    assert vae.use_tiling
    vae.disable_tiling()
    with tiled_decoding(nn.Identity()):
        pass
    with pytest.raises(ZeroDivisionError), tiled_decoding(vae):
        raise ZeroDivisionError
    assert vae.use_tiling is False


def test_large_images_are_decoded_in_tiles(pipeline, monkeypatch):
    monkeypatch.setattr("wadi.extras.high_resolution.resize.TILED_ABOVE", 16 * 16)
    with enlarged(pipeline, (16, 16), (32, 32)):
        assert pipeline.vae.use_tiling
    with enlarged(pipeline, (16, 16), (32, 32), tiled=False):
        assert not pipeline.vae.use_tiling
    with enlarged(pipeline, (16, 16), (16, 16)):
        assert not pipeline.vae.use_tiling


# --- transformers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart-sigma", "sana", "chroma"])
def test_transformers_generate_at_other_sizes(name, tmp_path):
    pipeline = small_pipelines.make(name, tmp_path)
    native = (64, 64) if name == "sana" else (16, 16)
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 800)
    wanted = (2 * native[0], 3 * native[1])
    set_resolution(pipeline, wanted)
    plain = generate_images(pipeline, ["red"], [1]).images[0]
    with enlarged(pipeline, native, wanted):
        stretched = generate_images(pipeline, ["red"], [1]).images[0]
    assert stretched.size == plain.size == (wanted[1], wanted[0])
    assert (stretched.tobytes() != plain.tobytes()) == (name in ("sd3", "flux", "chroma"))
    with enlarged(pipeline, native, wanted, factor=1):
        assert generate_images(pipeline, ["red"], [1]).images[0].tobytes() == plain.tobytes()
    assert generate_images(pipeline, ["red"], [1]).images[0].tobytes() == plain.tobytes()
    for options in ({"factor": 2}, {"blocks": ["mid_block"]}, {"disperse": True}):
        with raises_naming(type(pipeline.transformer).__name__), enlarged(pipeline, native, wanted, **options):
            pass


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_rotary_positions_stay_in_their_range(name, tmp_path):
    network = small_pipelines.make(name, tmp_path).transformer
    ids = torch.tensor([[0, 6, 9], [0, 2, 3], [0, 0, 0]])
    with interpolated_positions(network, (4, 4), (8, 12)):
        rotary = network.pos_embed(ids)
    wanted = network.pos_embed(torch.tensor([[0, 3, 3], [0, 1, 1], [0, 0, 0]]))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(rotary, wanted, strict=True))
    assert "forward" not in vars(network.pos_embed)


def test_a_learnt_table_is_read_beyond_its_own_size(tmp_path):
    """Also where diffusers raises: an image with more tokens than the whole table has."""
    network = small_pipelines.make("sd3", tmp_path).transformer
    table = network.pos_embed.cropped_pos_embed(8, 8)
    assert torch.equal(resized_table(table, (4, 4), (4, 4)), table)
    x = torch.randn(1, 4, 48, 48)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        network.pos_embed(x)
    with interpolated_positions(network, (4, 4), (24, 24)):
        assert network.pos_embed(x).shape[1] == 24 * 24
    with raises_naming("Linear"), interpolated_positions(nn.Linear(2, 2), (4, 4), (8, 8)):
        pass

"""Edges, their agreement, and condition images of every mode."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from raising import raises_naming
from wadi.extras.control.agreement import edge_f1, sharpness
from wadi.extras.control.condition_images import as_rgb, fit_image
from wadi.extras.control.conditions import condition
from wadi.extras.control.edges import blur, canny, edge_map, gradient, scribble, soft_edges
from wadi.extras.control.estimators import depth, pose, skeleton
from wadi.io.images import read_image


def step(side=24, at=10, low=0.0, high=1.0):
    images = torch.full((1, 3, side, side), low)
    images[..., at:] = high
    return images


def scenes(count=4, side=32, seed=0):
    """Random rectangles in random colours."""
    draw = np.random.default_rng(seed)
    images = torch.zeros(count, 3, side, side)
    for image in images:
        for _ in range(4):
            y, x = draw.integers(0, side - 8, 2)
            h, w = draw.integers(5, 12, 2)
            image[:, y : y + h, x : x + w] = torch.tensor(draw.random(3), dtype=torch.float32)[:, None, None]
    return images


def test_a_step_is_one_line_one_pixel_wide():
    edges = edge_map(step())[0, 0]
    assert (edges.sum(1) == 1).all(), "one edge pixel in every row"
    column = edges[0].nonzero().item()
    assert column in (9, 10)
    assert edges[:, column].all()


def test_edges_turn_and_mirror_with_the_picture():
    images = scenes()
    assert edge_f1(edge_map(images.flip(-1)), edge_map(images).flip(-1)) > 0.99
    assert edge_f1(edge_map(images.transpose(-1, -2)), edge_map(images).transpose(-1, -2)) > 0.99


def test_colours_of_one_brightness_have_an_edge():
    images = torch.zeros(1, 3, 16, 16)
    images[:, 0, :, :8], images[:, 1, :, 8:] = 0.299 * 2, 0.299**2 * 2 / 0.587
    assert edge_map(images).any()


def test_flat_and_faint_images_have_no_edges():
    assert not edge_map(torch.full((1, 3, 16, 16), 0.4)).any()
    assert not edge_map(step(high=0.05)).any()
    assert edge_map(step(high=0.05), low=0.01, high=0.02).any()


def test_an_edge_is_one_pixel_wide_also_where_two_gradients_are_equal():
    images = torch.zeros(1, 3, 12, 12)
    images[..., 6:] = 1  # without blur the gradient is the same on both sides of the step
    assert edge_map(images, sigma=0).sum(-1).flatten().tolist() == [1] * 12


def test_weak_edges_count_where_they_join_strong_ones():
    low, high = 0.1, 0.4
    images = scenes(6, seed=3)
    weak, strong = edge_map(images, low, low), edge_map(images, high, high)
    both = edge_map(images, low, high)
    for w, s, joined in zip(weak[:, 0].numpy(), strong[:, 0].numpy(), both[:, 0].numpy(), strict=True):
        labels, _ = ndimage.label(w, structure=np.ones((3, 3)))
        kept = np.isin(labels, np.unique(labels[s & w])) & (labels > 0)
        assert (joined == kept).all()
    assert both.sum() < weak.sum(), "the test has isolated weak edges"
    assert both.sum() > strong.sum(), "and joined ones"


def test_thresholds_are_checked():
    for low, high in ((0.3, 0.2), (0, 0.2), (-1, 2)):
        with raises_naming(low, high):
            edge_map(step(), low, high)


def test_the_gradient_of_a_unit_step_is_one_and_soft_edges_lie_between_0_and_1():
    dx, dy = gradient(step(), sigma=0)
    assert dx.max() == pytest.approx(1.0)
    assert dy.abs().max() == 0
    soft = soft_edges(scenes().requires_grad_())
    assert 0 <= soft.min() <= soft.max() <= 1
    soft.mean().backward()


def test_a_blur_keeps_the_mean_and_the_size():
    images = scenes()
    out = blur(images, 1.3)
    assert out.shape == images.shape
    assert torch.equal(blur(images, 0), images)
    torch.testing.assert_close(blur(torch.full((1, 3, 9, 9), 0.3), 2.0), torch.full((1, 3, 9, 9), 0.3))


def test_agreement_forgives_one_pixel_and_no_more():
    edges = edge_map(step())
    assert edge_f1(edges, edges) == pytest.approx(1)
    assert edge_f1(edges, edges.roll(1, -1)) == pytest.approx(1)
    assert edge_f1(edges, edges.roll(2, -1)) == 0
    half = edges.clone()
    half[..., :12, :] = False  # precision 1, recall 13/24 (one row more is within a pixel)
    assert edge_f1(half, edges) == pytest.approx(2 * (13 / 24) / (1 + 13 / 24), abs=1e-6)
    assert edge_f1(torch.zeros_like(edges), edges) == 0


def test_a_blurred_picture_is_less_sharp():
    images = scenes()
    assert sharpness(images, images) == pytest.approx(1)
    assert sharpness(blur(images, 1.0), images) < 0.8


# --- modes and sizes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawing():
    return Image.fromarray((scenes(1)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_with_the_same_colours_give_the_same_image(mode, drawing, tmp_path):
    output = np.asarray(as_rgb(drawing.convert(mode))).astype(int)
    assert abs(output - np.asarray(drawing)).max() <= 4
    assert as_rgb(drawing.convert(mode)).mode == "RGB"


def test_palettes_grey_and_bits(drawing):
    palette = drawing.quantize(200)
    assert abs(np.asarray(as_rgb(palette)).astype(int) - np.asarray(drawing)).mean() < 4
    grey = drawing.convert("L")
    assert (np.asarray(as_rgb(grey))[..., 1] == np.asarray(grey)).all()
    assert set(np.unique(np.asarray(as_rgb(grey.convert("1"))))) <= {0, 255}


def test_missing_and_damaged_files(tmp_path):
    (tmp_path / "no.png").write_bytes(b"no picture")
    for path in (tmp_path / "no.png", tmp_path / "missing.png", tmp_path):
        with raises_naming(path.name):
            read_image(path, "Condition image")


def test_an_image_is_resized_if_its_aspect_ratio_fits(drawing):
    assert fit_image(drawing, (32, 32)) is drawing
    assert fit_image(drawing, (64, 64)).size == (64, 64)
    with raises_naming("32 x 32", "64 x 32"):
        fit_image(drawing, (32, 64))


# --- kinds ------------------------------------------------------------------------------------------------------------------


def test_canny_and_scribble_are_white_on_black(drawing):
    for condition_image in (canny(drawing), scribble(drawing)):
        assert condition_image.mode == "RGB"
        assert condition_image.size == drawing.size
        assert set(np.unique(np.asarray(condition_image))) == {0, 255}
    assert np.asarray(scribble(drawing)).mean() > np.asarray(canny(drawing)).mean(), "scribbles are thicker"


def test_condition_by_name(drawing, tmp_path):
    assert condition("canny", drawing).tobytes() == canny(drawing).tobytes()
    assert condition("none", drawing.convert("RGBA")).tobytes() == drawing.tobytes()
    with raises_naming("'hed'"):
        condition("hed", drawing)
    with raises_naming("canny", "some/model"):
        condition("canny", drawing, "some/model")
    with raises_naming(str(tmp_path / "missing")):
        condition("depth", drawing, str(tmp_path / "missing"))


def test_depth_by_a_network_of_transformers(drawing, tmp_path):
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=20, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(tmp_path)
    about = {"image_processor_type": "DPTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    wide = drawing.resize((48, 32))
    output = np.asarray(depth(wide, str(tmp_path)))
    assert output.shape == (32, 48, 3)
    assert (output.min(), output.max()) == (0, 255)
    # near is white
    from transformers import AutoImageProcessor

    inputs = AutoImageProcessor.from_pretrained(tmp_path)(images=wide, return_tensors="pt")
    with torch.no_grad():
        near = DPTForDepthEstimation.from_pretrained(tmp_path).eval()(**inputs).predicted_depth[None]
    near = torch.nn.functional.interpolate(near, size=(32, 48), mode="bicubic", align_corners=False).flatten()
    assert np.corrcoef(near, output[..., 0].flatten())[0, 1] > 0.99


def test_pose_by_a_network_of_transformers(drawing, tmp_path):
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        image_size=[32, 24], patch_size=[8, 8], hidden_size=16, num_hidden_layers=1, num_attention_heads=2, out_indices=[1]
    )
    config = VitPoseConfig(backbone_config=backbone, num_labels=17, use_simple_decoder=True)
    VitPoseForPoseEstimation(config).save_pretrained(tmp_path)
    about = {"image_processor_type": "VitPoseImageProcessor", "size": {"height": 32, "width": 24}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    assert pose(drawing, str(tmp_path)).size == drawing.size


def test_a_skeleton_has_its_limbs_and_a_neck():
    points = {5: (20.0, 10.0), 6: (10.0, 10.0), 0: (15.0, 4.0), 8: (6.0, 18.0)}
    output = np.asarray(skeleton(points, (32, 32))).astype(int)
    assert output[10, 15].sum() > 0, "the neck, between the shoulders"
    assert output[7, 15].sum() > 0, "neck to nose"
    assert output[14, 8].sum() > 0, "right shoulder to elbow"
    assert output[25:].sum() == 0, "no legs were output"
    assert np.asarray(skeleton({}, (8, 8))).sum() == 0


def test_poses_name_the_extra_they_need(drawing, monkeypatch):
    monkeypatch.setattr("wadi.io.installation.find_spec", lambda name: None)
    with raises_naming("wadi-onestep[control]"):
        pose(drawing, "some/model")

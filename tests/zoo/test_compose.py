"""A composition is the sprite over its background, wherever the pose lays it."""

import torch

from wadi.zoo.recipe.compose import COLOURS, SIDE, compose, random_pose


def pose_of(count=64, seed=0):
    return random_pose(count, torch.Generator().manual_seed(seed))


def disc(side=96):
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    inside = (x.square() + y.square() < 0.9).byte() * 255
    return torch.stack([inside, inside // 2, inside * 0, inside])


def test_a_transparent_sprite_shows_the_background_alone():
    pose = pose_of(8)
    pictures = compose(torch.zeros(8, 4, 96, 96, dtype=torch.uint8), pose)
    assert torch.equal(pictures, pose.rgb[:, :, None, None].expand(-1, -1, SIDE, SIDE))


def test_an_opaque_sprite_hides_the_background():
    pictures = compose(disc().expand(16, -1, -1, -1), pose_of(16))
    middle = pictures[:, :, SIDE // 2 - 4 : SIDE // 2 + 4, SIDE // 2 - 4 : SIDE // 2 + 4]
    expected = torch.tensor([255, 127, 0]) / 255
    assert (middle - expected[:, None, None]).abs().max() < 1e-5


def test_a_half_transparent_sprite_lets_half_of_the_background_through():
    """Its colours are premultiplied, so they are simply added."""
    sprite = torch.full((1, 4, 96, 96), 128, dtype=torch.uint8)
    pose = pose_of(1)
    middle = compose(sprite, pose)[0, :, SIDE // 2, SIDE // 2]
    half = 128 / 255
    assert torch.allclose(middle, half + (1 - half) * pose.rgb[0], atol=1e-5)


def test_sprites_stay_inside_the_picture_and_cover_55_to_92_percent_of_its_side():
    pose = pose_of(512)
    size = 1 / pose.theta[:, 1, 1]
    shift = torch.stack([-pose.theta[:, 0, 2] / pose.theta[:, 0, 0], -pose.theta[:, 1, 2] / pose.theta[:, 1, 1]], 1)
    assert 0.55 <= size.min() < 0.62
    assert 0.88 < size.max() <= 0.921
    assert (shift.abs() + size[:, None]).max() <= 1.0
    reach = shift.abs() / (0.6 * (0.96 - size))[:, None]  # the whole room that is left is used
    assert 0.95 < reach.amax(0).min() <= reach.max() <= 1.001


def test_half_are_mirrored_and_a_mirrored_pose_mirrors_the_image():
    pose = pose_of(512)
    assert 0.4 < (pose.theta[:, 0, 0] < 0).float().mean() < 0.6
    sprite = torch.randint(0, 128, (1, 4, 96, 96), generator=torch.Generator().manual_seed(1)).byte()
    one = pose_of(1)
    one.theta[:, :, 2] = 0
    straight = compose(sprite, one)
    one.theta[:, 0, 0] *= -1
    assert torch.allclose(compose(sprite, one), straight.flip(3), atol=1e-6)


def test_poses_can_be_larger_and_never_mirrored():
    pose = random_pose(512, torch.Generator().manual_seed(0), smallest=0.7, mirror=False)
    assert pose.theta[:, 0, 0].min() > 0
    assert 0.7 <= (1 / pose.theta[:, 1, 1]).min() < 0.75


def test_backgrounds_are_the_named_colours_with_a_little_jitter():
    pose = pose_of(2000)
    named = torch.tensor(list(COLOURS.values()))[pose.colour] / 255
    assert set(pose.colour.tolist()) == set(range(len(COLOURS)))
    assert 0.02 < (pose.rgb - named).abs().mean() < 0.04


def test_poses_depend_on_their_generator_alone():
    torch.manual_seed(1)
    first = pose_of(4)
    torch.manual_seed(2)
    assert torch.equal(first.theta, pose_of(4).theta)

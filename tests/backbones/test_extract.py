"""Angles from two checkpoints, and the authors' weights."""

import copy
import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from raising import raises_naming
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.convert import authors
from wadi.convert.angles_between import LayerChange, angles_between, best_factors, factors, measure_change
from wadi.convert.authors import import_authors
from wadi.convert.extract import Extraction, describe, extract
from wadi.errors import WadiError
from wadi.extras import steps
from wadi.lorad import LoRaDConfig
from wadi.lorad.rotation import rotate
from wadi.pipelines import load


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (4, 3, 3, 3)])
def test_the_angles_of_a_rotation_are_found_again(shape):
    W = torch.randn(shape, dtype=torch.float64)
    theta = (torch.rand(shape[0], math.prod(shape[1:]) // 2, dtype=torch.float64) - 0.5) * 6.2  # almost half a turn each way
    S = rotate(W, theta)
    torch.testing.assert_close(angles_between(W, S), theta)
    torch.testing.assert_close(angles_between(W, 3 * S), theta)  # lengths do not enter
    assert measure_change("", W, S, *factors(theta, 20)).rotation == pytest.approx(1)


def test_rank_keeps_what_it_can():
    theta = 0.1 * torch.randn(12, 3).double() @ torch.randn(3, 10).double()
    W = torch.randn(12, 20).double()
    S = rotate(W, theta)
    kept = [measure_change("", W, S, *factors(theta, rank)).kept for rank in (1, 2, 3, 30)]
    assert kept[0] < kept[1] < kept[2]
    assert kept[2:] == pytest.approx([1, 1], abs=1e-9)
    A, B = factors(theta, 30)  # more than there are singular values
    assert A.shape == (12, 30)
    torch.testing.assert_close(A @ B, theta.float())


def test_norm_and_rotation_are_told_apart():
    W = torch.randn(8, 10)
    longer = measure_change("", W, 1.1 * W, *factors(torch.zeros(8, 5), 2))
    assert longer.rotation == pytest.approx(0, abs=1e-9)
    assert longer.norm_change == pytest.approx(0.1, rel=1e-5)
    assert longer.direction_change == pytest.approx(0, abs=1e-9)
    assert longer.change == pytest.approx(0.1, rel=1e-5)
    turned = measure_change("", W, rotate(W, torch.full((8, 5), 0.2)), *factors(torch.full((8, 5), 0.2), 1))
    assert turned.norm_change == pytest.approx(0, abs=1e-6)
    assert turned.direction_change == pytest.approx(1 - math.cos(0.2), rel=1e-4)
    assert [turned.rotation, turned.kept] == pytest.approx([1, 1], abs=1e-5)
    same = measure_change("", W, W, *factors(torch.zeros(8, 5), 1))
    assert (same.change, same.rotation, same.kept) == (0, 1, 1)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_a_student_that_no_rotation_made_gets_angles_that_help(rank):
    """An unweighted decomposition writes angles that are worse than none here."""
    generator = torch.Generator().manual_seed(0)
    W, noise = (torch.randn(96, 160, generator=generator, dtype=torch.float64) for _ in range(2))
    low = torch.randn(96, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 160, generator=generator).double()
    S = W + 0.03 * noise + 0.1 * low * W.norm() / low.norm()
    plain = measure_change("", W, S, *factors(angles_between(W, S), rank))
    found = measure_change("", W, S, *best_factors(W, S, rank))
    assert found.kept > max(0, plain.kept) + 0.02
    assert found.kept <= found.rotation
    assert plain.kept < 0 or rank == 64
    change = S - W
    U, values, Vh = torch.linalg.svd(change)
    nearest = U[:, :rank] * values[:rank] @ Vh[:rank]
    assert found.lora == pytest.approx(1 - float((change - nearest).square().sum() / change.square().sum()))


def test_a_change_of_lengths_alone_gets_no_angles():
    W = torch.randn(8, 12)
    for S in (1.3 * W, W, torch.zeros_like(W)):
        A, B = best_factors(W, S, 3)
        assert float((A @ B).abs().max()) < 1e-6
        assert measure_change("", W, S, A, B).kept >= -1e-9 or not S.any()


def test_the_description_says_when_a_lora_keeps_more():
    def text(kept, lora):
        return describe(Extraction(4, (999,), [LayerChange("layer", 0.0, 0.0, 0.0, 0.1, 1.0, kept, lora)], []))

    assert "--to lora" in text(0.2, 0.9)
    assert "--to lora" not in text(0.9, 0.2)


@pytest.fixture(scope="module")
def students(folder_of, tmp_path_factory):
    """``(teacher, one-step pipeline students by LoRaD of rank 3, its adapter)`` of two families, the first at t = 700."""
    students = {}
    for name in ("sd1", "sana"):
        teacher, folder = folder_of(name), tmp_path_factory.mktemp(name)
        backbone = from_pipeline(load_pipeline(teacher))
        torch.manual_seed(3)
        roles.attach(backbone.network, "student", LoRaDConfig(r=3, target_modules=backbone.student_targets))
        with torch.no_grad():
            for parameter in roles.parameters(backbone.network, "student").values():
                parameter.normal_(std=0.3)
        timestep = 700 if name == "sd1" else backbone.process.last_timestep
        roles.save(backbone.network, "student", folder / "adapter", extra={"timestep": timestep, "teacher": str(teacher)})
        load.load(adapter=folder / "adapter").save_pretrained(folder / "pipeline")
        students[name] = teacher, folder / "pipeline", folder / "adapter", timestep
    return students


@pytest.mark.parametrize("name", ["sd1", "sana"])
def test_what_lorad_made_is_found_again(students, name, tmp_path, capsys):
    teacher, pipeline, adapter, timestep = students[name]
    out = tmp_path / "found"
    assert main(["extract", str(teacher), str(pipeline), "--rank", "3", "--out", str(out)]) == 0
    assert "rank 3 keeps 100.0%" in capsys.readouterr().out
    found, expected = (roles.read(path)[1] for path in (out, adapter))
    assert found.keys() == expected.keys()
    for key in expected:
        if key.endswith("_A"):
            other = key[:-1] + "B"
            torch.testing.assert_close(found[key] @ found[other], expected[key] @ expected[other], rtol=0, atol=2e-5)
    about = json.loads((out / "wadi.json").read_text())
    assert about["timesteps"] == [timestep]
    report = json.loads((out / "extraction.json").read_text())
    assert report["outside"] == []
    again = load.load(adapter=out)
    network, original = from_pipeline(again).network, from_pipeline(load_pipeline(pipeline)).network
    for key, tensor in original.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], tensor, rtol=0, atol=1e-5)


def test_a_file_of_weights_will_do_and_what_has_no_angles_is_named(students, tmp_path):
    teacher, pipeline, _, _ = students["sd1"]
    tensors = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    tensors["conv_in.bias"] += 1
    save_file({f"module.{key}": value for key, value in tensors.items()}, tmp_path / "student.safetensors")
    found = extract(str(teacher), str(tmp_path / "student.safetensors"), 2, tmp_path / "out", timestep=800)
    assert found.outside == ["conv_in.bias"]
    assert found.timesteps == (800,)
    assert 0.3 < found.kept < 0.999
    assert found.rotation == pytest.approx(1, abs=1e-6)


def test_a_student_of_another_architecture_is_an_error(folder_of, tmp_path):
    with raises_naming("84 unknown (first: add_embedding", "of another shape"):
        extract(str(folder_of("sd1")), str(folder_of("sdxl")), 2, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_one_line(folder_of, tmp_path):
    (tmp_path / "student.safetensors").write_bytes(b"no tensors")
    with raises_naming("student.safetensors"):
        extract(str(folder_of("sd1")), str(tmp_path / "student.safetensors"), 2, tmp_path / "out")


# --- the authors' weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def released(folder_of, tmp_path):
    """A state dict like the released ones: every weight another than the base's."""
    base = folder_of("pixart-sigma")
    network = copy.deepcopy(load_pipeline(base).transformer)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(network.state_dict(), tmp_path / "rotated_transformer.safetensors")
    return tmp_path / "rotated_transformer.safetensors", base, network


def test_the_authors_weights_run_at_their_constant(released, tmp_path):
    file, base, network = released
    assert main(["import-authors", str(file), "--base", str(base), "--out", str(tmp_path / "out")]) == 0
    pipeline = load_pipeline(tmp_path / "out")
    recorded = {}

    def look(module, args, kwargs, output):
        recorded.update(x_t=args[0], t=kwargs["timestep"], eps=output[0][:, :4])

    pipeline.transformer.register_forward_hook(look, with_kwargs=True)
    call = from_pipeline(pipeline).call
    drawn = pipeline(
        "red apple", generator=torch.Generator().manual_seed(1), num_inference_steps=1, output_type="latent", **call
    )
    assert recorded["t"].tolist() == [999]
    expected = (recorded["x_t"] - math.sqrt(1 - 0.0047) * recorded["eps"]) / math.sqrt(0.0047)
    torch.testing.assert_close(drawn.images, expected, rtol=1e-4, atol=1e-4)
    for key, tensor in network.state_dict().items():
        assert torch.equal(pipeline.transformer.state_dict()[key], tensor)


@pytest.mark.parametrize("name", ["sd1", "pixart-sigma"])
def test_between_steps_the_bases_schedule_holds(name, folder_of, tmp_path):
    """From an image, and with more steps, noise is the base's at every timestep but the last, which has the constant."""
    base = load_pipeline(folder_of(name))
    network = base.unet if name == "sd1" else base.transformer
    save_file(network.state_dict(), tmp_path / "rotated.safetensors")
    assert (
        main(
            [
                "import-authors",
                str(tmp_path / "rotated.safetensors"),
                "--base",
                str(folder_of(name)),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    scheduler, own = load_pipeline(tmp_path / "out").scheduler, base.scheduler.alphas_cumprod
    assert float(scheduler.alphas_cumprod[999]) == pytest.approx(0.0047, rel=1e-5)
    torch.testing.assert_close(scheduler.alphas_cumprod[:999], own[:999])
    found = steps.schedule(scheduler, 1, 0.8)
    assert found.alpha == pytest.approx(float(own[799].sqrt()), rel=1e-5)
    assert found.sigma == pytest.approx(float((1 - own[799]).sqrt()), rel=1e-5)
    four = steps.schedule(scheduler, 4)
    four.scheduler.set_timesteps(4)
    assert four.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(four.scheduler.alphas_cumprod[[749, 499, 249]], own[[749, 499, 249]])
    picture = tmp_path / "start.png"
    Image.new("RGB", (16, 16), "red").save(picture)
    argv = ["generate", "red apple", "--run", str(tmp_path / "out"), "--device", "cpu", "--init", str(picture)]
    assert main([*argv, "--strength", "0.8", "--out", str(tmp_path / "x.png")]) == 0
    assert len(Image.open(tmp_path / "x.png").getcolors()) > 1


@pytest.mark.parametrize("flags", [["--steps", "4"], ["--init", "START"], ["--init", "START", "--steps", "2"]])
def test_a_schedule_of_one_step_alone_is_refused_for_others(flags, folder_of, tmp_path, capsys):
    """As this package wrote it before: all noise in the last beta. One step is fine; nothing else has noise there."""
    from diffusers import DDIMScheduler

    pipeline = load_pipeline(folder_of("sd1"))
    pipeline.scheduler = DDIMScheduler(
        trained_betas=[0.0] * 999 + [1 - 0.0047], timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    pipeline.save_pretrained(tmp_path / "old")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "start.png")
    flags = [str(tmp_path / "start.png") if word == "START" else word for word in flags]
    argv = ["generate", "red apple", "--run", str(tmp_path / "old"), "--device", "cpu", "--out", str(tmp_path / "x.png")]
    capsys.readouterr()
    assert main([*argv, *flags]) == 2
    assert "no noise at timestep" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    assert main(argv) == 0


def test_a_base_of_another_length_is_an_error(folder_of):
    from diffusers import DDIMScheduler

    with pytest.raises(WadiError, match="500"):
        authors.released_scheduler(DDIMScheduler(num_train_timesteps=500))


def test_what_does_not_fit_the_base_is_one_line(released, folder_of, tmp_path):
    file, base, network = released
    out = tmp_path / "out"
    with raises_naming(file, "208 missing (first: conv_in.bias)"):
        import_authors(file, str(folder_of("sd1")), out)
    with raises_naming("velocity"):
        import_authors(file, str(folder_of("sd3")), out)
    unmerged = {**network.state_dict(), "proj_out.theta_a": torch.zeros(2, 2)}
    save_file(unmerged, tmp_path / "unmerged.safetensors")
    with raises_naming("unmerged.safetensors", "theta_a"):
        import_authors(tmp_path / "unmerged.safetensors", str(base), out)
    with raises_naming("nothing.safetensors"):
        import_authors(tmp_path / "nothing.safetensors", str(base), out)
    assert not out.exists()


# --- laws of the extraction, by independent formulas ------------------------------------------------------------------------


def test_both_factors_have_the_same_share_of_each_singular_value():
    theta = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    A, B = factors(theta, 5)
    values = torch.linalg.svdvals(theta).sqrt().float()
    torch.testing.assert_close(A.norm(dim=0), values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B.norm(dim=1), values, rtol=1e-5, atol=1e-6)


def test_a_layers_changes_are_means_over_rows_whatever_their_length():
    """Rows ten times longer count as much as the others; all but ``change`` is written again row by row."""
    W = torch.tensor([[3.0, 4.0, 0.0, 0.0], [30.0, 40.0, 0.0, 0.0]])
    S = torch.tensor([[4.0, -3.0, 0.0, 0.0], [60.0, 80.0, 0.0, 0.0]])  # a quarter turn; twice as long
    A, B = factors(angles_between(W, S), 2)
    found = measure_change("layer", W, S, A, B)
    assert found.norm_change == pytest.approx((0 + 1) / 2)
    assert found.direction_change == pytest.approx((1 + 0) / 2)
    assert found.angle_rms == pytest.approx(math.sqrt((math.pi / 2) ** 2 / 4))
    assert found.change == pytest.approx(math.sqrt((50 + 2500) / (25 + 2500)))
    assert found.rotation == pytest.approx(50 / 2550)
    assert found.kept == pytest.approx(50 / 2550, rel=1e-5)


def test_shares_of_the_whole_are_weighted_by_the_squared_change_of_each_layer():
    def layer(change, rotation, kept):
        return LayerChange("layer", 0.0, 0.0, 0.0, change, rotation, kept)

    found = Extraction(4, 999, [layer(0.1, 1.0, 0.5), layer(0.3, 0.2, 0.1)], [])
    assert found.rotation == pytest.approx((0.01 * 1.0 + 0.09 * 0.2) / 0.1)
    assert found.kept == pytest.approx((0.01 * 0.5 + 0.09 * 0.1) / 0.1)
    assert Extraction(4, 999, [layer(0.0, 1.0, 1.0)], []).kept == 1


@pytest.mark.parametrize(("sigma", "timestep"), [(0.7, 700), (1.0, 1000)])
def test_the_timestep_of_a_flow_student_is_where_its_sigmas_begin(folder_of, tmp_path, sigma, timestep):
    teacher = folder_of("sd3")
    student = shutil.copytree(teacher, tmp_path / "student")
    config = student / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sigma_max": sigma}))
    assert extract(str(teacher), str(student), 2, tmp_path / "out").timesteps == (timestep,)
    assert extract(str(teacher), str(teacher), 2, tmp_path / "plain").timesteps == (1000,)
    file = student / "transformer" / "diffusion_pytorch_model.safetensors"
    assert extract(str(teacher), str(file), 2, tmp_path / "file").timesteps == (1000,)


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_weights_that_are_not_finite_are_named(folder_of, tmp_path, whose):
    folders = {name: shutil.copytree(folder_of("sd1"), tmp_path / name) for name in ("teacher", "student")}
    file = folders[whose] / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(WadiError, match=f"{whose}.*{name}"):
        extract(*map(str, folders.values()), 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()

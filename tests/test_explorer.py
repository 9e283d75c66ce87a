"""The explorer without a browser: exported graphs, the grid, and the live widget's callbacks."""

import asyncio
import io

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import data
from companion import gallery
from companion.experiment import Experiment
from companion.explorer import weights
from companion.explorer.live import Explorer, images
from companion.explorer.page import (
    SCALES,
    SHIFTS,
    beside_the_front_page,
    grid,
    measure,
    normals,
    page,
    solve_with,
    tips,
    write_explorer,
)
from companion.files import write_json
from companion.records import data_of
from companion.training import model_path
from flowlib import Blur, Denoising, Glow, GlowProx, Inpainting, UNetProx, UnfoldedPGD, psnr, save_checkpoint
from flowlib.export import export_onnx
from flowlib.images import to_tensor
from flowlib.precision import set_compute_dtype
from tests.test_flow import randomize

KEPT_RECORDS = gallery.kept_records  # which a fixture hides
OPERATORS = {"denoising": Denoising(0.2), "inpainting": Inpainting(19), "deblurring": Blur(5.0)}


def small_solver(num_folds=2, **options):
    """Flows whose couplings do something, unlike fresh ones, but whose values stay those of images."""
    torch.manual_seed(0)
    flows = [Glow(num_levels=2, num_steps=2, hidden_channels=32, **options) for _ in range(num_folds)]
    for k, flow in enumerate(flows):
        flow.initialize(to_tensor(data.draw_faces(range(16))))
        randomize(flow, seed=k, scale=0.02)
    return UnfoldedPGD([GlowProx(flow) for flow in flows], flows[0].mode(64).detach(), shrinkage=0.05).eval()


@pytest.mark.parametrize("num_folds", [1, 3])
@pytest.mark.parametrize("task", OPERATORS)
def test_an_exported_solver_answers_as_pytorch_does(task, num_folds, tmp_path):
    solver, operator = small_solver(num_folds), OPERATORS[task]
    export_onnx(solver, operator, tmp_path / "solver.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "solver.onnx")
    given = {
        "denoising": {},
        "inpainting": {"mask": Inpainting(19).mask.expand(num_folds, 1, -1, -1)},
        "deblurring": {"blur": Blur(5.0).matrix(64, torch.zeros(1))},
    }[task]
    for seed, (scale, shift) in enumerate([(1.0, 0.0), (0.4, 0.1), (1.5, -0.03)]):
        y = measure(operator, to_tensor(data.draw_faces(range(seed, seed + 1))), seed)
        mu, lam = solver.step_size.detach() * scale, solver.shrinkage.detach() + shift
        inputs = {"y": y, "step_size": mu, "shrinkage": lam} | given
        images, norms = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            _, folds = solve_with(solver, mu, lam, y, operator, return_folds=True)
        expected = torch.cat([fold.x for fold in folds])
        assert np.abs(images - expected.numpy()).max() < 1e-3
        expected_norms = torch.cat([fold.latent_norm_tilde for fold in folds])
        torch.testing.assert_close(torch.from_numpy(norms), expected_norms, rtol=1e-3, atol=0)


def test_an_exported_solver_does_not_look_at_blocked_pixels(tmp_path):
    export_onnx(small_solver(), Inpainting(19), tmp_path / "solver.onnx")
    session, mask = onnxruntime.InferenceSession(tmp_path / "solver.onnx"), Inpainting(19).mask
    y = to_tensor(data.draw_faces(range(1)))
    inputs = {"mask": mask.expand(2, 1, -1, -1).numpy(), "step_size": np.float32([0.5, 0.5])}
    inputs |= {"shrinkage": np.float32([0.1, 0.1])}
    first, second = (
        session.run(None, inputs | {"y": torch.where(mask.bool(), y, blocked).numpy()})[0]
        for blocked in (0.0, torch.nan)
    )
    assert np.array_equal(first, second)


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(ValueError, match="only solvers with a flow"):
        export_onnx(UnfoldedPGD([UNetProx(2)], torch.zeros(1, 3, 64, 64)), Denoising(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="'sigmoid'"):
        export_onnx(small_solver(scale="sigmoid"), Denoising(), tmp_path / "a.onnx")
    flows = [Glow(num_levels=2, num_steps=steps, hidden_channels=4) for steps in (1, 2)]
    with pytest.raises(ValueError, match="all of one size"):
        unequal = UnfoldedPGD([GlowProx(flow) for flow in flows], torch.zeros(1, 3, 8, 8))
        export_onnx(unequal, Denoising(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="a Denoising, an Inpainting or a Blur, not 'inpainting'"):
        export_onnx(small_solver(), "inpainting", tmp_path / "a.onnx")
    glow = flows[0]
    oblong = UnfoldedPGD([GlowProx(glow)], torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match=r"for square images, not \(8, 12\)"):
        export_onnx(oblong, Blur(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
    solver = small_solver()
    export_onnx(solver, Denoising(), tmp_path / "a.onnx")
    set_compute_dtype(solver, torch.bfloat16)  # of a training on the way; the file is float32 either way
    export_onnx(solver, Denoising(), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("scale", ["tanh", "sigmoid"])
def test_rounding_first_of_all_leaves_the_solver_as_it_is(scale, monkeypatch):
    """ActNorms and scales go into the convolutions; steps as fine as they can be change next to nothing."""
    monkeypatch.setattr(weights, "SHARE", 1e-12)
    solver, operator = small_solver(scale=scale), Inpainting(19)
    y = operator.A(to_tensor(data.draw_faces(range(2))))
    ours, steps = weights.rounded(solver, operator, y, error=0.01)
    assert len(steps) == 2 * 3  # levels and convolutions of a coupling net
    with torch.no_grad():
        torch.testing.assert_close(ours(y, operator), solver(y, operator), rtol=0, atol=1e-3)


def test_rounding_costs_what_it_may(monkeypatch):
    """Coarser steps are made where the answer's error is larger, and errors stay near the share allowed."""
    solver, operator = small_solver(), Inpainting(19)
    y = operator.A(to_tensor(data.draw_faces(range(2))))
    with torch.no_grad():
        x_hat = solver(y, operator)
        for error in (1e-4, 1e-2):
            ours, steps = weights.rounded(solver, operator, y, error)
            for group, step in zip(weights.convolutions(ours), steps):
                for w in group:
                    torch.testing.assert_close(w / step, (w / step).round(), rtol=1e-6, atol=1e-3)
            added = (ours(y, operator) - x_hat).square().mean().item()
            assert 0.01 < added / (weights.SHARE * error) < 10


def test_what_is_packed_is_the_same_file_again(tmp_path):
    solver, operator, path = small_solver(3), Denoising(0.2), tmp_path / "solver.onnx"
    y = measure(operator, to_tensor(data.draw_faces(range(1))), 0)
    ours, steps = weights.rounded(solver, operator, y, error=0.01)
    export_onnx(ours, Denoising(), path)
    packed = weights.pack(path, steps)
    assert len(packed) < path.stat().st_size / 2
    path.write_bytes(weights.unpack(packed))
    inputs = {"y": y, "step_size": ours.step_size, "shrinkage": ours.shrinkage}
    inputs = {name: value.detach().numpy() for name, value in inputs.items()}
    images, _ = onnxruntime.InferenceSession(path).run(None, inputs)
    with torch.no_grad():
        assert np.abs(images[-1:] - ours(y, operator).numpy()).max() < 5e-4


def test_tips_say_what_happens():
    solver, x = small_solver(), to_tensor(data.draw_faces(range(2)))
    text = tips(x, ["one", "two"], {"inpainting": ("glow", solver, {})})
    with torch.no_grad():
        y = Inpainting(19).A(x[:1])
        before = psnr(solver(y, Inpainting(19)), x[:1]).item()
        after = psnr(solve_with(solver, 0 * solver.step_size, solver.shrinkage, y, Inpainting(19)), x[:1])
        narrow = psnr(solver(Inpainting(12).A(x[:1]), Inpainting(12)), x[:1])
    assert f"Inpainting from {before:.2f} to {after.item():.2f} dB." in text
    assert f"Inpainting from {before:.2f} to {narrow.item():.2f} dB (the measurement" in text
    assert "Noise" not in text and "one" in text


def test_the_front_pages_other_numbers_are_explained(monkeypatch):
    kept, solver, x = small_solver(), small_solver(3), to_tensor(data.draw_faces(range(1)))
    monkeypatch.setattr(gallery, "solver", lambda record: kept)
    solvers = {task: ("glow", solver, {}, []) for task in ("inpainting", "denoising")}
    text, operator = beside_the_front_page(x, solvers), Inpainting(19)
    with torch.no_grad():
        there, here = (psnr(s(operator.A(x), operator), x).item() for s in (kept, solver))
    assert f"inpainting {there:.2f} dB there, {here:.2f} dB here" in text and "denoising 1" not in text


def test_normal_numbers():
    values = normals(3, (200_000,))
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert abs((values[1:] * values[:-1]).mean()) < 0.01
    assert abs((values * normals(4, (200_000,))).mean()) < 0.01
    assert torch.equal(values[:10], normals(3, (10,)))


def test_the_grid_holds_what_the_solver_says():
    solver, operator = small_solver(), Inpainting(19)
    x = to_tensor(data.draw_faces(range(1)))
    answers = grid(solver, operator, x)
    assert answers.shape == (len(SHIFTS), len(SCALES), 3, 64, 64)
    y = operator.A(x)
    with torch.no_grad():
        torch.testing.assert_close(answers[SHIFTS.index(0), SCALES.index(1)], solver(y, operator)[0])
        moved = solve_with(solver, solver.step_size * SCALES[2], solver.shrinkage + SHIFTS[3], y, operator)
        torch.testing.assert_close(answers[3, 2], moved[0])
        assert not torch.allclose(moved, solver(y, operator))  # and its own scalars stay


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A build with untrained solvers: two with flows, one with a U-Net."""
    experiment = Experiment("smoke", build=tmp_path_factory.mktemp("build"))
    data.prepare_synthetic(experiment.build / "data" / "synthetic", num_images=40)
    torch.manual_seed(0)
    unet = UnfoldedPGD([UNetProx(2).eval() for _ in range(2)], torch.zeros(1, 3, 64, 64))
    for name, solver in (
        ("inpainting-glow", small_solver()),
        ("denoising-glow", small_solver(3)),
        ("inpainting-unet", unet),
    ):
        run = experiment.runs()[name]
        save_checkpoint(model_path(experiment, run), solver)
        about = {
            "name": name,
            "kind": "solver",
            "experiment": experiment.names,
            "settings_hash": run.settings_hash,
            "method": run.method,
            "num_folds": solver.num_folds,
            "psnr": {"mean": 12.345, "values": [12.345] * 4},
            "training": {"images_seen": 1234},
        }
        write_json(experiment.directory(run) / "record.json", about | {"data": data_of(experiment)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "kept_records", lambda *_: {})  # which the page would show instead
        yield experiment


def test_files_of_the_page(experiment):
    write_explorer(experiment)
    folder = experiment.build / "explorer"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "denoising.bin",
        "denoising.jpeg",
        "inpainting.bin",
        "inpainting.jpeg",
        "originals.png",
    }
    assert all(path.stat().st_size < 1.5e6 for path in folder.glob("*.jpeg"))
    html = page(folder, "../_static/explorer")
    assert "../_static/explorer/inpainting.jpeg" in html and "<noscript>" in html
    with pytest.raises(FileNotFoundError, match="python -m companion explorer"):
        page(experiment.build, "x")


def test_sliders_move_the_solver(experiment):
    explorer = Explorer(experiment)
    explorer.task.value = "inpainting"
    assert explorer.method.label == "GLOW prox, of this build"
    x, operator = images(experiment)[:1], Inpainting(19)
    solver, before = explorer.solver, dict(explorer.psnr)
    explorer.scale.value = 0.5
    explorer.shift.value = 0.1
    with torch.no_grad():
        expected = solve_with(solver, solver.step_size * 0.5, solver.shrinkage + 0.1, operator.A(x), operator)
    assert explorer.psnr["fold 2"] == pytest.approx(psnr(expected, x).item(), abs=1e-3)
    assert f"{explorer.psnr['fold 2']:.2f} dB" in explorer.status.value
    explorer.sliders["μ"][1].value = 1.25  # one fold on its own
    assert explorer.psnr["fold 2"] != pytest.approx(psnr(expected, x).item(), abs=1e-3)
    explorer.reset.click()
    assert explorer.psnr == pytest.approx(before)
    explorer.setting.value = 30  # a larger hole
    assert explorer.psnr["measurement"] < before["measurement"]
    with torch.no_grad():  # the last fold alone is told
        expected = solver(Inpainting(30).A(x), [operator] * (solver.num_folds - 1) + [Inpainting(30)])
    assert explorer.psnr[f"fold {solver.num_folds}"] == pytest.approx(psnr(expected, x).item(), abs=1e-3)
    explorer.reset.click()
    assert explorer.setting.value == 19 and explorer.psnr == pytest.approx(before)


def test_task_method_image_and_noise_can_be_chosen(experiment):
    explorer = Explorer(experiment)
    assert explorer.task.value == "denoising" and len(explorer.panels.children) == 3 + 3
    shown = explorer.psnr["measurement"]
    explorer.seed.click()
    assert explorer.psnr["measurement"] != shown
    explorer.image.value = 2
    x = images(experiment)[1:2]
    y = measure(Denoising(0.2), x, 1 + len(explorer.images))
    assert explorer.psnr["measurement"] == pytest.approx(psnr(y, x).item(), abs=1e-3)
    explorer.task.value = "inpainting"
    assert explorer.setting.value == 19 and explorer.seed.layout.display == "none"
    explorer.method.label = "U-Net prox, of this build"
    assert "λ" not in explorer.sliders and explorer.shift.disabled
    explorer.scale.value = 0.5
    assert explorer.sliders["μ"][0].value == pytest.approx(0.25)


def upload(explorer, name, content):
    explorer.upload.value = ({"name": name, "content": content},)


def picture(index=7, kind="png"):
    file = io.BytesIO()
    Image.fromarray(data.draw_faces([index], size=64)[0]).resize((300, 200)).save(file, kind)
    return file.getvalue()


def test_the_faces_come_first_then_the_test_images(experiment):
    shown = images(experiment)
    torch.testing.assert_close(shown[:2], gallery.faces())
    torch.testing.assert_close(shown[2:], to_tensor(experiment.split("test")))


def test_without_a_build_the_kept_solvers_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "kept_records", KEPT_RECORDS)
    explorer = Explorer(Experiment("smoke", build=tmp_path))
    kept = {task: gallery.kept_records(task) for task in ("denoising", "inpainting", "deblurring")}
    assert list(explorer.task.options) == list(kept) and len(explorer.images) == 2
    for task, records in kept.items():
        explorer.task.value = task
        assert len(explorer.method.options) == len(records) > 0
        assert explorer.psnr[f"fold {records['glow']['num_folds']}"] > explorer.psnr["measurement"]


def test_an_own_photo_is_cropped(experiment):
    explorer = Explorer(experiment)
    assert explorer.crops.layout.display == "none"
    photo = np.zeros((100, 200, 3), np.uint8)
    photo[:, 150:] = 255
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "png")
    upload(explorer, "half.png", file.getvalue())
    assert explorer.crops.layout.display is None
    assert explorer.own.max() < -0.4  # the middle square ends at 150
    explorer.crop["zoom"].value, explorer.crop["left–right"].value = 2, 1
    assert explorer.own.min() > 0.4 and explorer.psnr["measurement"] > 10
    explorer.image.value = 1
    assert explorer.crops.layout.display == "none"


def test_own_images(experiment):
    explorer = Explorer(experiment)
    before = dict(explorer.psnr)
    upload(explorer, "notes.png", b"no image at all")
    assert "notes.png is not a readable image" in explorer.status.value
    assert explorer.psnr == before
    upload(explorer, "face.png", memoryview(picture()))
    assert explorer.own.shape == (1, 3, 64, 64) and explorer.psnr != before
    explorer.image.value = 2  # back to the test set
    assert explorer.own is None


def test_the_same_file_and_the_same_number_again(experiment):
    explorer = Explorer(experiment)
    of_test = dict(explorer.psnr)
    upload(explorer, "face.png", picture())
    of_own = dict(explorer.psnr)
    assert of_own != of_test and explorer.image.value == 0
    explorer.image.value = 1  # the number that was shown before
    assert explorer.psnr == of_test
    upload(explorer, "face.png", picture())
    assert explorer.psnr == of_own


def test_messages_name_the_file_and_nothing_else(experiment):
    explorer = Explorer(experiment)
    upload(explorer, "<b>face</b> & co.png", b"no image at all")
    assert "&lt;b&gt;face&lt;/b&gt; &amp; co.png is not a readable image" in explorer.status.value
    assert "BytesIO" not in explorer.status.value and "<b>face" not in explorer.status.value
    explorer.upload.value = ({"name": "face.heic", "problem": "is too large"},)
    assert "face.heic is too large" in explorer.status.value and explorer.own is None


def test_nothing_old_is_shown_where_a_model_is_gone(experiment):
    explorer = Explorer(experiment)
    explorer.task.value = "inpainting"
    path = model_path(experiment, experiment.runs()["inpainting-unet"])
    content = path.read_bytes()
    for damage in (lambda: path.write_bytes(content[:-9]), path.unlink):
        damage()
        explorer.method.label = "U-Net prox, of this build"
        assert explorer.panels.children == () and explorer.plot.value == b"" and explorer.psnr == {}
        assert path.name in explorer.status.value
        explorer.scale.value = 0.5
        explorer.image.value = 2
        assert explorer.panels.children == ()
        explorer.method.label = "GLOW prox, of this build"  # and on with another
        assert len(explorer.panels.children) == 2 + 3 and "PSNR" in explorer.status.value
    path.write_bytes(content)


def test_a_perfect_measurement_has_an_infinite_psnr(experiment):
    explorer = Explorer(experiment)
    explorer.task.value = "denoising"
    explorer.setting.value = 0
    assert "exact" in explorer.panels.children[0].children[1].value
    for slider in explorer.sliders["λ"]:
        slider.value = -5  # no slider reaches -1, where latents are divided by zero
        assert slider.value > -1


def test_a_moving_slider_does_not_pile_up_work(experiment, monkeypatch):
    explorer, count = Explorer(experiment, delay=0.05), []
    monkeypatch.setattr(explorer, "refresh", lambda: count.append(explorer.scale.value))

    async def move():
        for value in (0.9, 0.8, 0.7, 0.6):
            explorer.scale.value = value
        await asyncio.sleep(0.2)

    asyncio.run(move())
    assert count == [0.6]


def test_nothing_trained_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "kept_records", lambda *_: {})
    with pytest.raises(FileNotFoundError, match="nothing is trained"):
        Explorer(Experiment("smoke", build=tmp_path))

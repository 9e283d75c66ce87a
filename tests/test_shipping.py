"""Kept models are small, and give back what they were to the precision that is said."""

import copy
from types import SimpleNamespace

import pytest
import torch

from companion import gallery
from companion.paths import RESULTS
from companion.shipping import _pack, _unpack, counted_from, pack, sha256, unpack
from flowlib import Glow, GlowProx, UNetProx, UnfoldedPGD, load_checkpoint, save_checkpoint
from tests.test_flow import randomize

KEPT = RESULTS / "checkpoints"
FLOWS = sorted(KEPT.rglob("flow*.safetensors"))


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 3, 3), (1, 1)])
def test_integers_of_a_few_bits(shape, bits):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale, packed = _pack(value, bits)
    assert len(packed) == -(-value.numel() * bits // 8)
    error = (_unpack(scale, packed, bits, list(shape)) - value).abs().flatten(1).amax(1)
    assert (error <= 0.5001 * scale).all()  # half a step
    assert (_unpack(*_pack(torch.zeros(shape), bits), bits, list(shape)) == 0).all()


def test_a_solver_is_counted_from_its_flow(tmp_path):
    torch.manual_seed(0)
    flow = randomize(Glow(num_levels=2, num_steps=2, hidden_channels=32), scale=0.05)
    save_checkpoint(tmp_path / "flow", flow)
    pack(tmp_path / "flow", tmp_path / "kept-flow")
    folds = [GlowProx(randomize(copy.deepcopy(flow), seed=k, scale=0.001)) for k in range(3)]
    solver = UnfoldedPGD(folds, flow.mode(8))
    save_checkpoint(tmp_path / "solver", solver)
    pack(tmp_path / "solver", tmp_path / "kept", tmp_path / "kept-flow", name="x")
    pack(tmp_path / "solver", tmp_path / "kept-alone")
    sizes = [(tmp_path / name).stat().st_size for name in ("solver", "kept")]
    assert sizes[1] < 0.5 * sizes[0]

    def error(kept, *start):
        unpack(tmp_path / kept, tmp_path / "back", *start)
        back = load_checkpoint(tmp_path / "back").state_dict()
        return max((back[k].float() - v.float()).abs().max() for k, v in solver.state_dict().items())

    assert 0 < error("kept", tmp_path / "kept-flow") < 0.1 * error("kept-alone")
    pack(tmp_path / "solver", tmp_path / "kept-half", tmp_path / "kept-flow", bits=16)
    assert error("kept-half") < 1e-3  # needs no flow
    with pytest.raises(ValueError, match="differences to a flow: give that flow"):
        unpack(tmp_path / "kept", tmp_path / "back")
    save_checkpoint(tmp_path / "other", randomize(copy.deepcopy(flow), seed=7))
    pack(tmp_path / "other", tmp_path / "kept-other")
    for wrong in ("kept-other", "flow"):  # the same flow, but not as it was kept
        with pytest.raises(ValueError, match="kept holds differences to another flow than .*: fetch both"):
            unpack(tmp_path / "kept", tmp_path / "none", tmp_path / wrong)
    assert not (tmp_path / "none").exists()


def start_of(path):
    """The flow that a kept model is counted from."""
    digest = counted_from(path)
    return next((flow for flow in FLOWS if sha256(flow) == digest), None)


@pytest.mark.parametrize("name", [path.relative_to(KEPT).as_posix() for path in KEPT.rglob("*.safetensors")])
def test_every_kept_model_is_checked(tmp_path, name):
    """Also those kept before files held their own hash: whole, they are unpacked; with a flipped bit, or with
    another flow, refused."""
    start = start_of(KEPT / name)
    assert (start is None) == (counted_from(KEPT / name) is None)
    unpack(KEPT / name, tmp_path / "model", start)
    content = bytearray((KEPT / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(ValueError, match="flipped is damaged .*fetch it again"):
        unpack(tmp_path / "flipped", tmp_path / "none", start)
    if start:
        with pytest.raises(ValueError, match="another flow than .*: fetch both"):
            unpack(KEPT / name, tmp_path / "none", next(flow for flow in FLOWS if flow != start))
    assert not (tmp_path / "none").exists()


def test_others_are_kept_whole(tmp_path):
    solver = UnfoldedPGD([UNetProx(4)], torch.zeros(1, 3, 16, 16))
    save_checkpoint(tmp_path / "solver", solver, trained="long")
    pack(tmp_path / "solver", tmp_path / "kept")
    unpack(tmp_path / "kept", tmp_path / "back")
    back = load_checkpoint(tmp_path / "back").state_dict()
    for name, value in solver.state_dict().items():
        torch.testing.assert_close(back[name], value, atol=0.02, rtol=0.05)


@pytest.mark.parametrize(
    "kind, noisy, kept, expected",
    [
        ("flow", False, False, ["samples"]),
        ("flow", True, False, []),
        ("solver", False, False, ["faces"]),
        ("solver", False, True, []),
        ("denoiser", False, False, []),
        ("failed", False, False, []),
    ],
)
def test_published_models_that_are_not_kept_leave_a_picture(
    kind, noisy, kept, expected, tmp_path, monkeypatch
):
    path, found = tmp_path / "model", []
    if kept:
        path.touch()
    monkeypatch.setattr(gallery, "kept_place", lambda *_: (tmp_path / "record.json", path))
    monkeypatch.setattr(gallery, "is_finished", lambda *_: True)
    monkeypatch.setattr(gallery, "read", lambda _: [{"kind": kind}])
    monkeypatch.setattr(gallery, "load", lambda *_: None)
    monkeypatch.setattr(gallery, "keep_samples", lambda *_: found.append("samples"))
    monkeypatch.setattr(gallery, "keep_picture", lambda *_: found.append("faces"))
    gallery.publish_picture(None, SimpleNamespace(noisy=noisy))
    assert found == expected

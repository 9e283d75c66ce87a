"""Packing, splitting and drawing images: properties, and every error a user can meet."""

import io
import json
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from flowlib import images as image_tensors


def write_images(folder, count=3, size=(20, 30), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.png")
    return folder


def write_zip(path, folder, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"images/{file.name}")
        for name, content in extra:
            archive.writestr(name, content)
    return path


def files_in(out):
    return sorted(p.name for p in out.iterdir()) if out.exists() else []


# Packing


def test_folder_and_zip_give_the_same_pixels_and_a_manifest(tmp_path):
    folder = write_images(tmp_path / "faces")
    extra = [
        ("__MACOSX/images/._000.png", b"junk"),
        ("images/.hidden.png", b"junk"),
        ("images/notes.txt", b"hello"),
    ]
    archive = write_zip(tmp_path / "faces.zip", folder, extra)
    a = data.load(data.prepare(folder, tmp_path / "a", size=16))
    b = data.load(data.prepare(archive, tmp_path / "b", size=16, name="mine"))
    assert len(a) == len(b) == 3 and a.images.shape == (3, 16, 16, 3) and a.images.dtype == np.uint8
    assert np.array_equal(a.images, b.images)
    assert (a.name, b.name) == ("faces", "mine")
    assert a.manifest["pixels_sha256"] == b.manifest["pixels_sha256"]
    assert (b.manifest["source"], b.manifest["first_file"]) == ("faces.zip", "images/000.png")
    assert str(tmp_path) not in json.dumps([a.manifest, b.manifest])  # no absolute path
    assert files_in(tmp_path / "a") == ["images.npy", "manifest.json"]


def test_images_are_sorted_by_name_whatever_the_archive_order(tmp_path):
    folder = write_images(tmp_path / "faces")
    with zipfile.ZipFile(tmp_path / "back.zip", "w") as archive:
        for file in sorted(folder.iterdir(), reverse=True):
            archive.write(file, file.name)
    forwards = data.load(data.prepare(folder, tmp_path / "a", size=8))
    backwards = data.load(data.prepare(tmp_path / "back.zip", tmp_path / "b", size=8))
    assert np.array_equal(forwards.images, backwards.images)


def test_source_hash_of_a_folder_sees_names_and_contents(tmp_path):
    folder = write_images(tmp_path / "faces")
    before = data.load(data.prepare(folder, tmp_path / "out", size=8)).manifest["source_sha256"]
    (folder / "000.png").rename(folder / "0000.png")
    after = data.load(data.prepare(folder, tmp_path / "out", size=8)).manifest["source_sha256"]
    assert before != after


def test_celeba_crop_is_fractional_and_centred(tmp_path):
    """On a linear ramp, resizing the box [7.5, 81.5] x [17.5, 91.5] samples it at known places."""
    (tmp_path / "ramp").mkdir()
    x, y = np.meshgrid(np.arange(89), np.arange(109))
    Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "ramp" / "ramp.png")
    image = (
        data.load(data.prepare(tmp_path / "ramp", tmp_path / "out", crop="celeba")).images[0].astype(float)
    )
    centres = (np.arange(64) + 0.5) * 74 / 64  # of the output pixels, from the box's edge
    inner = slice(4, -4)  # the filter is cut off at the box's edge
    assert np.abs(image[:, :, 0] - 2 * (7.5 + centres - 0.5))[:, inner].max() <= 0.75
    assert np.abs(image[:, :, 1].T - 2 * (17.5 + centres - 0.5))[:, inner].max() <= 0.75
    # Rounding the box to whole pixels would shift the ramp by a whole grey level; on average ours is exact.
    assert abs(np.mean(image[:, inner, 0] - 2 * (7.5 + centres[inner] - 0.5))) < 0.2
    assert abs(np.mean(image[inner, :, 1].T - 2 * (17.5 + centres[inner] - 0.5))) < 0.2


def test_square_crop_keeps_the_centre(tmp_path):
    (tmp_path / "wide").mkdir()
    pixels = np.zeros((8, 20, 3), np.uint8)
    pixels[:, 6:14] = 200
    Image.fromarray(pixels).save(tmp_path / "wide" / "a.png")
    assert (data.load(data.prepare(tmp_path / "wide", tmp_path / "out", size=8)).images == 200).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    folder = write_images(tmp_path / "faces", mode=mode)
    assert data.load(data.prepare(folder, tmp_path / "out", size=16)).images.shape == (3, 16, 16, 3)


def test_transparent_pixels_are_white_and_16_bit_grey_keeps_its_range(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "0.png")
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(folder / "1.png")
    images = data.load(data.prepare(folder, tmp_path / "out", size=8)).images
    assert (images[0] == 255).all() and (images[1] == 128).all()


# Errors: each names the file and the fix, and leaves nothing behind


def bad_source(tmp_path, case):
    folder = write_images(tmp_path / "faces")
    if case == "corrupt":
        (folder / "001.png").write_bytes(b"not an image")
    elif case == "truncated":
        (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    elif case == "empty folder":
        (tmp_path / "none").mkdir()
        return tmp_path / "none"
    elif case == "empty zip":
        return write_zip(tmp_path / "a.zip", write_images(tmp_path / "none", 0))
    elif case == "no images":
        return write_zip(tmp_path / "a.zip", write_images(tmp_path / "none", 0), [("notes.txt", b"hello")])
    elif case == "not a zip":
        (tmp_path / "a.zip").write_bytes(b"PK but not really")
        return tmp_path / "a.zip"
    elif case == "parent member":
        return write_zip(tmp_path / "a.zip", folder, [("images/../../evil.png", b"x")])
    elif case == "absolute member":
        return write_zip(tmp_path / "a.zip", folder, [("/etc/evil.png", b"x")])
    elif case == "damaged member":
        archive = write_zip(tmp_path / "a.zip", folder)
        content = bytearray(archive.read_bytes())
        content[100:130] = bytes(30)
        archive.write_bytes(content)
        return archive
    return folder


@pytest.mark.parametrize(
    "case, message",
    [
        ("corrupt", r"001\.png in .*faces is not a readable image.*replace or remove it"),
        ("truncated", r"001\.png in .*faces is not a readable image.*replace or remove it"),
        ("empty folder", r"none holds no images"),
        ("empty zip", r"a\.zip holds no images"),
        ("no images", r"a\.zip holds no images \(avif/bmp/gif"),
        ("not a zip", r"a\.zip is neither a folder nor a zip"),
        ("parent member", r"a\.zip: member 'images/\.\./\.\./evil\.png' points outside"),
        ("absolute member", r"a\.zip: member '/etc/evil\.png' points outside"),
        ("damaged member", r"cannot read images/000\.png in .*a\.zip.*make the zip again"),
    ],
)
def test_bad_source_is_named_and_nothing_is_left(tmp_path, case, message):
    source, out = bad_source(tmp_path, case), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        data.prepare(source, out, size=8)
    assert files_in(out) == []


def test_a_failing_prepare_keeps_the_earlier_set(tmp_path):
    folder, out = write_images(tmp_path / "faces"), tmp_path / "out"
    before = data.load(data.prepare(folder, out, size=8))
    (folder / "002.png").write_bytes(b"")
    with pytest.raises(ValueError, match="002.png"):
        data.prepare(folder, out, size=8)
    assert data.load(out).manifest == before.manifest and files_in(out) == ["images.npy", "manifest.json"]


def test_missing_source_and_unknown_crop(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a folder or a .zip"):
        data.prepare(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown crop 'round': choose one of square, celeba"):
        data.prepare(write_images(tmp_path / "faces"), tmp_path / "out", crop="round")


def test_decompression_bomb(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "faces")
    for limit in (400, 100):  # 600 pixels: a warning of PIL's, then its error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="000.png in .* is too large to decode safely"):
            data.prepare(folder, tmp_path / "out")


# Loading


def packed(tmp_path):
    return data.prepare_synthetic(tmp_path / "data" / "synthetic", 4, size=16)


def test_load_is_memory_mapped(tmp_path):
    assert isinstance(data.load(packed(tmp_path)).images, np.memmap)


def test_truncated_or_foreign_files_are_named(tmp_path):
    out = packed(tmp_path)
    content = (out / "images.npy").read_bytes()
    for wrong in (content[:-10], content[:20], b"", b"foreign"):
        (out / "images.npy").write_bytes(wrong)
        with pytest.raises(
            ValueError, match=r"images\.npy is truncated.*again with: python -m companion prepare syn"
        ):
            data.load(out)
    for wrong in (np.zeros((3, 16, 16, 3), np.uint8), np.zeros((4, 16, 16, 3), np.float32)):
        np.save(out / "images.npy", wrong)
        with pytest.raises(
            ValueError, match=r"images\.npy holds .* where manifest\.json says .*prepare it again"
        ):
            data.load(out)
    for wrong in ("", "{}", "[1]", '{"name": '):
        (out / "manifest.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"manifest\.json is not a manifest.*prepare it again"):
            data.load(out)
    (out / "manifest.json").unlink()
    for folder, command in {
        "data/synthetic": f"python -m companion prepare synthetic --build {tmp_path}$",
        "my build/data/mine": "companion prepare PATH_TO_YOUR_IMAGES --name mine --build '.*my build'$",
        "packed": r"data.prepare\(PATH_TO_YOUR_IMAGES, '.*/packed'\)",
    }.items():
        with pytest.raises(FileNotFoundError, match="manifest.json does not exist; .* with: .*" + command):
            data.load(tmp_path / folder)


# Named sets


def test_named_sets_are_found_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWLIB_DATA", str(tmp_path))
    assert data.data_dir() == tmp_path
    for name in ("celeba", "anime"):
        with pytest.raises(
            FileNotFoundError, match=rf"{name}\*\.zip, {name}/.*data/README\.md.*FLOWLIB_DATA"
        ) as error:
            data.prepare_named(name, tmp_path / "out")
        assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="'nothing' is neither a known set"):
        data.prepare_named("nothing", tmp_path / "out")
    write_images(tmp_path / "celeba_hq")
    assert (
        data.load(data.prepare_named("celeba", tmp_path / "out")).manifest["crop"] == "square"
    )  # already cropped
    write_zip(tmp_path / "celeba-small.zip", tmp_path / "celeba_hq")
    found = data.load(data.prepare_named("celeba", tmp_path / "out")).manifest
    assert (found["name"], found["source"], found["crop"]) == ("celeba", "celeba-small.zip", "celeba")
    write_images(tmp_path / "anime")
    assert data.load(data.prepare_named("anime", tmp_path / "out")).manifest["crop"] == "square"
    assert len(data.load(data.prepare_named(str(tmp_path / "celeba_hq"), tmp_path / "out"))) == 3


def test_default_data_folder(monkeypatch):
    monkeypatch.delenv("FLOWLIB_DATA", raising=False)
    assert str(data.data_dir()) == "data"


def test_real_celeba(tmp_path, monkeypatch):
    found = sorted(data.data_dir().glob("celeba*.zip"))
    if not found:
        pytest.skip(f"no celeba*.zip in {data.data_dir()} (FLOWLIB_DATA)")
    with zipfile.ZipFile(found[0]) as archive, zipfile.ZipFile(tmp_path / "celeba.zip", "w") as first:
        for name in sorted(n for n in archive.namelist() if n.endswith(".jpg"))[:20]:
            first.writestr(name, archive.read(name))
    monkeypatch.setenv("FLOWLIB_DATA", str(tmp_path))
    faces = data.load(data.prepare_named("celeba", tmp_path / "out"))
    assert len(faces) == 20 and faces.images.std() > 30


# Synthetic faces


@pytest.mark.parametrize("style", ["natural", "ood"])
def test_a_face_depends_on_its_index_alone(style):
    together = data.draw_faces(range(20), style)
    alone = np.concatenate([data.draw_faces([i], style) for i in (17, 3, 11)])
    assert np.array_equal(alone, together[[17, 3, 11]])
    assert np.array_equal(data.draw_faces(range(5, 20), style), together[5:])


def test_faces_differ_by_index_seed_and_style():
    faces = {
        key: data.draw_faces(range(24), *key).astype(float)
        for key in [("natural", 0), ("natural", 1), ("ood", 0)]
    }
    everything = np.concatenate(list(faces.values())).reshape(72, -1)
    distance = np.sqrt(np.mean(np.square(everything[:, None] - everything[None]), -1))
    assert distance[~np.eye(72, dtype=bool)].min() > 15  # grey levels, root mean square: no two alike
    assert data.draw_faces([0], size=32).shape == (1, 32, 32, 3)
    assert data.draw_faces([]).shape == (0, 64, 64, 3)
    with pytest.raises(ValueError, match="unknown style 'cubist': choose one of natural, ood"):
        data.draw_faces([0], "cubist")


def test_synthetic_sets_have_the_manifest_of_real_ones(tmp_path):
    real = data.load(data.prepare(write_images(tmp_path / "faces"), tmp_path / "a", size=16)).manifest
    drawn = data.load(data.prepare_named("synthetic-ood", tmp_path / "b", num_images=3))
    assert real.keys() == drawn.manifest.keys()
    assert drawn.name == "synthetic-ood" and np.array_equal(drawn.images, data.draw_faces(range(3), "ood"))


# Splits


def test_splits_are_disjoint_seeded_and_nested():
    v1 = image_tensors.split_indices(10_000, 992, 200, 200, held_out=500)
    v2 = image_tensors.split_indices(10_000, 9_000, 500, 500)
    for split in (v1, v2):
        assert set(split) == {"pretrain", "train", "val", "test"}
        assert set(split["train"]) <= set(split["pretrain"])
        parts = np.concatenate([split["pretrain"], split["val"], split["test"]])
        assert len(set(parts.tolist())) == len(parts)
    assert [len(v1[k]) for k in ("pretrain", "train", "val", "test")] == [9_000, 992, 200, 200]
    assert set(v1["test"]) <= set(v2["test"]) and set(v1["val"]) <= set(v2["val"])
    assert np.array_equal(v1["pretrain"], v2["pretrain"])
    again, other = (
        image_tensors.split_indices(10_000, 9_000, 500, 500),
        image_tensors.split_indices(10_000, 9_000, 500, 500, seed=1),
    )
    assert all(np.array_equal(v2[k], again[k]) for k in v2)
    assert not np.array_equal(v2["test"], other["test"])


def test_split_errors():
    with pytest.raises(
        ValueError, match=r"100 images are there, 140 are needed \(100 train \+ 2 x 20.*prepare more"
    ):
        image_tensors.split_indices(100, 100, 10, 20)
    with pytest.raises(ValueError, match="held_out=5 cannot hold val=10 or test=20 images: enlarge"):
        image_tensors.split_indices(100, 10, 10, 20, held_out=5)


# Pixels and tensors


def test_tensor_round_trip():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 8, 16, 3)
    tensor = image_tensors.to_tensor(images)
    assert tensor.shape == (2, 3, 8, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -0.5 and tensor.max() == 0.5
    assert np.array_equal(image_tensors.to_uint8(tensor), images)
    assert np.array_equal(
        image_tensors.to_uint8(torch.tensor([[[[-9.0]], [[9.0]], [[0.0]]]])).ravel(), [0, 255, 128]
    )


def test_dequantized_pixels_stay_in_their_bins():
    images = np.arange(256, dtype=np.uint8).repeat(3 * 64).reshape(4, 64, 64, 3)
    x = image_tensors.dequantize(images, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and x.min() >= -0.5 and x.max() < 0.5
    bins = torch.floor((x.double() + 0.5) * 256).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(bins, images)
    assert torch.equal(x, image_tensors.dequantize(images, torch.Generator().manual_seed(0)))
    assert abs(((x + 0.5) * 256).double().mean() - (127.5 + 0.5)) < 0.01


# Reports from public trackers, each with the right behaviour (names and places, silent losses).


def png(colour=90, size=(12, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, colour, colour)).save(buffer, "png")
    return buffer.getvalue()


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, png(10 * i))
    return path


def test_a_zip_of_macos_and_windows_tar(tmp_path):
    source = zipped(tmp_path / "x.zip", "./img/b.png", "./img/a.png", ".", "./")
    found = data.load(data.prepare(source, tmp_path / "out", size=8))
    assert found.manifest["first_file"] == "img/a.png" and len(found) == 2


def test_a_colon_is_no_drive(tmp_path):
    assert (
        len(data.load(data.prepare(zipped(tmp_path / "x.zip", "12:30:05.png"), tmp_path / "out", size=8)))
        == 1
    )
    with pytest.raises(ValueError, match="points outside the archive"):
        data.prepare(zipped(tmp_path / "y.zip", "C:/a.png"), tmp_path / "out", size=8)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_twice_in_a_zip(tmp_path):
    with pytest.raises(ValueError, match="holds a.png twice"):
        data.prepare(zipped(tmp_path / "x.zip", "a.png", "./a.png"), tmp_path / "out", size=8)


def test_names_that_are_not_utf8_and_linked_folders(tmp_path):
    (tmp_path / "faces/sub").mkdir(parents=True)
    (Path(os.fsdecode(os.fsencode(tmp_path / "faces") + b"/caf\xe9.png"))).write_bytes(png())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes(png())
    (tmp_path / "faces/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "faces/sub/round").symlink_to(tmp_path / "faces")  # a loop
    found = data.load(data.prepare(tmp_path / "faces", tmp_path / "out", size=8))
    assert len(found) == 2 and found.manifest["last_file"] == "linked/a.png"


def test_what_pillow_opens_is_packed_and_the_rest_is_named(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("a.png", "b.tif", "c.gif", "d.jfif"):
        Image.new("RGB", (9, 9), "red").save(
            folder / name, {"jfif": "jpeg", "tif": "tiff"}.get(name[2:], name[2:])
        )
    for name in ("notes.txt", "more.txt", "raw.cr2"):
        (folder / name).write_text("no image")
    with pytest.warns(UserWarning, match="left out .* 1 .cr2, 2 .txt"):
        assert len(data.load(data.prepare(folder, tmp_path / "out", size=8))) == 4


def test_images_do_not_turn_white(tmp_path):
    grey = Image.fromarray(np.full((9, 9), 256 * 90, np.uint16))
    grey.save(tmp_path / "a.png", transparency=7)
    assert (data.decode((tmp_path / "a.png").read_bytes(), "a", size=8) == 90).all()
    unused = Image.fromarray(np.dstack([np.full((9, 9, 3), 90, np.uint8), np.zeros((9, 9, 1), np.uint8)]))
    unused.save(tmp_path / "b.bmp")
    assert (data.decode((tmp_path / "b.bmp").read_bytes(), "b", size=8) == 90).all()


@pytest.mark.parametrize(
    "dtype, low, high, expected",
    [
        (np.uint16, 0, 65535, (0, 255)),
        (np.int32, 0, 65535, (0, 255)),
        (np.float32, 0, 1, (0, 255)),
        (np.float32, 0, 0.5, (0, 128)),
        (np.uint16, 0, 4095, "from 0 to 4095: scale it"),
        (np.int32, 0, 255, "from 0 to 255: scale it"),
        (np.int32, -1, 9000, "from -1 to 9000: scale it"),
        (np.float32, 0, 255, "from 0.0 to 255.0: scale it"),
        (np.float32, -0.5, 0.5, "from -0.5 to 0.5: scale it"),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_range_or_is_refused(dtype, low, high, expected):
    grey = np.full((8, 8), low, dtype)
    grey[:, 4:] = high
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "tiff")
    if isinstance(expected, tuple):
        decoded = data.decode(file.getvalue(), "a.tif", size=8)
        assert (decoded[0, 0, 0], decoded[-1, -1, -1]) == expected
    else:
        with pytest.raises(ValueError, match=f"^a.tif is not a readable image .its grey goes {expected}"):
            data.decode(file.getvalue(), "a.tif", size=8)


def test_names_of_data_sets(tmp_path):
    for version in ("photos.v1", "photos.v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.png").write_bytes(png())
        assert data.prepare_into(str(tmp_path / version), tmp_path / "data").name == version
    for name in ("../../x", "a/b", ".", ".."):
        with pytest.raises(ValueError, match="is no name for a data set"):
            data.prepare_into(str(tmp_path / "photos.v1"), tmp_path / "data", name=name)


def test_sources_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "photo.png").write_bytes(png())
    for name in ("pipe", "photo.png"):
        with pytest.raises(ValueError, match=f"{name} is neither .*: give a folder or a .zip of images"):
            data.prepare(tmp_path / name, tmp_path / "out")
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as member:
        for _ in range(257):
            member.write(bytes(2**20))
    with pytest.raises(ValueError, match="unpacks to 257 MB"):
        data.prepare(bomb, tmp_path / "out")


@pytest.mark.parametrize("kind", ["pipe", "broken link", "folder"])
def test_what_is_no_file_in_a_folder_is_named(tmp_path, kind):
    folder = write_images(tmp_path / "faces")
    if kind == "pipe":
        os.mkfifo(folder / "z.png")
    elif kind == "broken link":
        (folder / "z.png").symlink_to(tmp_path / "nowhere")
    else:
        (folder / "z.png").mkdir()  # whatever it is called, a folder
        assert len(data.load(data.prepare(folder, tmp_path / "out", size=8))) == 3
        return
    with pytest.raises(ValueError, match=r"z\.png is no file \(a broken link, or a pipe\): remove it"):
        data.prepare(folder, tmp_path / "out", size=8)
    assert files_in(tmp_path / "out") == []


def test_what_a_killed_preparation_left_is_cleaned(tmp_path):
    out = tmp_path / "out"
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name in (f".preparing-{gone.pid}-abc", ".preparing-abc", f".preparing-{os.getppid()}-abc"):
        (out / name).mkdir(parents=True)
        (out / name / "images.npy").write_bytes(bytes(100))
    data.prepare_synthetic(out, 2, size=16)
    # Of one that still runs, nothing is taken away.
    assert files_in(out) == [f".preparing-{os.getppid()}-abc", "images.npy", "manifest.json"]


def test_names_can_be_shown(tmp_path):
    """Not UTF-8: marked in the manifest; refused as the name of a set, where they would break each page."""
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_images(source)
    (source / "000.png").rename(Path(os.fsdecode(os.fsencode(source) + b"/\xe9.png")))
    manifest = data.load(data.prepare(source, tmp_path / "out", size=8)).manifest
    assert manifest["name"] == manifest["source"] == "caf\ufffd" and manifest["last_file"] == "\ufffd.png"
    with pytest.raises(ValueError, match="is no name for a data set.*in UTF-8"):
        data.prepare_into(str(source), tmp_path / "data")
    assert data.prepare_into(str(source), tmp_path / "data", name="café").name == "café"
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:  # as old tools write it: no mark of UTF-8
        archive.writestr("caf_.png", png())
    content = (tmp_path / "old.zip").read_bytes().replace(b"caf_", b"caf\xe9")
    (tmp_path / "old.zip").write_bytes(content)
    assert len(data.load(data.prepare(tmp_path / "old.zip", tmp_path / "out", size=8))) == 1


def test_replaced_pixels_are_noticed(tmp_path):
    out = packed(tmp_path)
    images = np.load(out / "images.npy")
    images[1, 2, 3, 0] ^= 1
    np.save(out / "images.npy", images)
    with pytest.raises(ValueError, match=r"images\.npy is damaged: .* prepare it again"):
        data.load(out)

"""Metrics against plain numpy, protocols down to the pixel, and predictions for pictures of every kind."""
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import eval
from data import run_script
from eval import METRICS, depth_metrics, evaluate, flip_average, picture_row, sample_sheet, whole_picture_size, with_scale_bar, write_ply
from model import build_model

NEAREST = Image.Resampling.NEAREST


def reference(pred, target):
    """All metrics of the valid pixels of one image, or of many: 1-D arrays."""
    safe = np.maximum(pred, 1e-3)
    error, log, ratio = pred - target, np.log(safe) - np.log(target), np.maximum(safe / target, target / safe)
    return dict(rmse=np.sqrt(np.mean(error**2)), mae=np.mean(abs(error)), absrel=np.mean(abs(error) / target), sqrel=np.mean(error**2 / target),
                rmse_log=np.sqrt(np.mean(log**2)), log10=np.mean(abs(np.log10(safe) - np.log10(target))), silog=100 * np.std(log),
                d1=np.mean(ratio < 1.25), d2=np.mean(ratio < 1.25**2), d3=np.mean(ratio < 1.25**3),
                irmse=np.sqrt(np.mean((1 / safe - 1 / target)**2)))


def mean_of(results):
    results = list(results)
    return {name: np.mean([r[name] for r in results]) for name in METRICS}


def agree(result, expected, rel=1e-5):
    assert {name: result[name] for name in METRICS} == pytest.approx(expected, rel=rel, abs=1e-9)


def blobs(seed, height, width, channels=3):
    """A picture of soft random blobs, uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, channels)


def last_norm(model):
    """The batch norm before the answer: its weight spreads the metres, its bias is their mean."""
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)][-1]


def save_network(file, network, **changes):
    facts = dict(model="fastdepth-pruned", options={}, size=(64, 64), geometry="fastdepth", max_depth=10.0)
    torch.save(facts | changes | dict(weights=network.state_dict()), file)
    return str(file)


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """A checkpoint that answers 0 to over 10 m, and its network in eval mode."""
    torch.manual_seed(0)
    model = build_model("fastdepth-pruned")
    pictures = torch.stack([torch.from_numpy(blobs(seed, 64, 64)) for seed in range(8)]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        for _ in range(30):  # batch norm learns what to expect
            model(pictures)
        last_norm(model).weight *= 3
    return save_network(tmp_path_factory.mktemp("network") / "best.pt", model), model.eval()


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    """Three 480x640 frames with holes and with depth beyond 10 m: their folder, pictures and depths."""
    root, generator = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    pictures = [blobs(seed, 480, 640) for seed in range(3)]
    depths = [generator.uniform(0.5, 11, (480, 640)).astype(np.float32) for _ in range(3)]
    for k, (picture, depth) in enumerate(zip(pictures, depths)):
        depth[100 + 50 * k:, :100 * k] = 0  # every frame has another number of valid pixels
        write_frame(root, k, picture, depth)
    return root, pictures, depths


def write_frame(root, k, picture, depth):
    file = root / "val" / "scene" / f"{k}.h5"
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as h5:
        h5["rgb"], h5["depth"] = picture.transpose(2, 0, 1), depth.astype(np.float32)


def evaluated(model, root, tmp_path, *flags):
    """What `python eval.py` writes as JSON."""
    eval.main([model, "--data", str(root), "--device", "cpu", "--json", str(tmp_path / "result.json"), "--sheet", str(tmp_path / "sheet.png"), *flags])
    return json.loads((tmp_path / "result.json").read_text())


# ------------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------------


def test_every_metric_equals_plain_numpy_and_an_image_without_depth_is_nan():
    generator = np.random.default_rng(0)
    pred, target = generator.normal(3, 2, (3, 1, 9, 7)), generator.uniform(0.3, 6, (3, 1, 9, 7))
    pred[0, 0, 0, :3] = 0, -1, 1e-4  # a network may answer that: 1 mm for logarithms and inverses, and for nothing else
    mask = generator.random(target.shape) < 0.6
    mask[0, 0, 0, :3], mask[2] = True, False
    pred[~mask], target[~mask] = np.nan, np.inf
    result = depth_metrics(*map(torch.from_numpy, (pred, target, mask)))
    assert tuple(result) == METRICS and len(METRICS) == 11
    for i in (0, 1):
        agree({name: value[i].item() for name, value in result.items()}, reference(pred[i][mask[i]], target[i][mask[i]]))
    assert all(value.shape == (3,) and value[2].isnan() for value in result.values())


@pytest.mark.parametrize("power, expected", [(1, (0, 1, 1)), (2, (0, 0, 1)), (3, (0, 0, 0))])
def test_a_ratio_of_just_the_threshold_does_not_count(power, expected):
    target = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3)
    for pred, truth in ((target * 1.25**power, target), (target, target * 1.25**power)):
        result = depth_metrics(pred, truth, torch.ones_like(truth, dtype=torch.bool))
        assert tuple(result[name].item() for name in ("d1", "d2", "d3")) == expected


def samples():
    """Five small pictures with depth; one has no valid pixel, the others have different numbers of them."""
    generator = torch.Generator().manual_seed(0)
    images, depths = torch.rand(5, 3, 8, 12, generator=generator), 1 + 5 * torch.rand(5, 1, 8, 12, generator=generator)
    for i in range(5):
        depths[i, :, :2 * i] = 0
    return list(zip(images, depths, range(5)))


def grey_metres(image):
    return image.mean(1, keepdim=True) * 8


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_mean_is_over_images_unless_pooled_for_any_batch_size(batch_size, pooled):
    result, images = evaluate(grey_metres, torch.utils.data.DataLoader(samples(), batch_size), 4.0, pooled=pooled)
    pixels = [(grey_metres(image[None])[0][valid].numpy(), depth[valid].numpy()) for image, depth, _ in samples()
              if (valid := (depth > 0) & (depth <= 4)).any()]
    agree(result, reference(*map(np.concatenate, zip(*pixels))) if pooled else mean_of(reference(*p) for p in pixels))
    assert (result["images"], result["skipped"]) == (4, 1)


def test_the_table_by_depth_pools_the_pixels_of_each_range_and_an_edge_belongs_to_the_nearer():
    generator = torch.Generator().manual_seed(1)
    depths = 4.5 * torch.rand(3, 1, 8, 12, generator=generator) + 0.4
    depths[0, 0, 0, :5], depths[1, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 12.0, 0.0]), 7.0
    data = list(zip(torch.rand(3, 3, 8, 12, generator=generator), depths, range(3)))
    found = [evaluate(grey_metres, torch.utils.data.DataLoader(data, b), 10.0)[1]["ranges"] for b in (1, 3)]
    pred, truth = torch.cat([grey_metres(image[None]).ravel() for image, _, _ in data]).double().numpy(), depths.ravel().double().numpy()
    limits = [(0, 1), (1, 2), (2, 3), (3, 5), (5, 10)]  # 12 m is beyond max_depth, and 10 to 20 m does not occur
    for ranges in found:
        assert [(r["from"], r["to"]) for r in ranges] == limits
        for r, (near, far) in zip(ranges, limits):
            inside = (truth > near) & (truth <= far)
            expected = reference(pred[inside], truth[inside])
            assert {k: r[k] for k in ("rmse", "absrel", "d1")} == pytest.approx({k: expected[k] for k in ("rmse", "absrel", "d1")}, rel=1e-5)
            assert r["share"] == pytest.approx(inside.sum() / ((truth > 0) & (truth <= 10)).sum())


@pytest.mark.parametrize("answer", [0.0, -2.0])
def test_metrics_and_pictures_survive_a_network_that_answers_0_or_less(answer, tmp_path):
    def nothing(image):
        return torch.full((len(image), 1, 8, 12), answer)

    result, detail = evaluate(nothing, torch.utils.data.DataLoader(samples(), 2), 4.0)
    assert all(math.isfinite(result[name]) for name in METRICS) and (result["d1"], result["d3"]) == (0, 0)
    assert all(math.isfinite(r[name]) for r in detail["ranges"] for name in r)
    sample_sheet(nothing, samples(), tmp_path / "sheet.png", 4.0)
    assert Image.open(tmp_path / "sheet.png").width > 4 * 12


def test_a_data_set_without_a_valid_pixel_is_an_error():
    with pytest.raises(ValueError, match="valid"):
        evaluate(grey_metres, torch.utils.data.DataLoader(samples()), 0.5)


def test_a_smaller_prediction_is_enlarged_bilinearly_to_the_truth():
    small = np.random.default_rng(0).uniform(1, 5, (2, 3)).astype(np.float32)
    loader = torch.utils.data.DataLoader(samples()[:1])
    result, _ = evaluate(lambda image: torch.from_numpy(small)[None, None], loader)
    agree(result, reference(cv2.resize(small, (12, 8), interpolation=cv2.INTER_LINEAR).ravel(), samples()[0][1].numpy().ravel()))


def test_flip_average_is_the_mean_with_the_mirrored_prediction_of_the_mirror_image():
    ramp = torch.arange(4.0)
    image = torch.rand(2, 3, 5, 4)
    found = flip_average(lambda x: x[:, :1] + ramp)(image)  # depth follows the picture, the ramp does not
    torch.testing.assert_close(found, image[:, :1] + 1.5)


# ------------------------------------------------------------------------------------------------------------------
# Protocols
# ------------------------------------------------------------------------------------------------------------------

#             rows       columns    clamp        max_depth  pooled
DEFINITION = {
    "fastdepth":  ((0, 224), (0, 224), None, np.inf, False),
    "eigen":      ((45, 471), (41, 601), (1e-3, 10), 10, False),
    "densedepth": ((20, 460), (24, 616), (0.1, 10), 10, True)}


@pytest.mark.parametrize("protocol, flags, flip", [("fastdepth", "", False), ("eigen", "", False), ("eigen", "--flip", True),
                                                   ("densedepth", "--batch-size 2", True), ("densedepth", "--no-flip", False)])
def test_a_protocol_is_what_its_definition_says(protocol, flags, flip, network, frames, tmp_path):
    (file, model), (root, pictures, depths) = network, frames
    rows, cols, clamp, max_depth, pooled = DEFINITION[protocol]
    pixels = []
    for picture, depth in zip(pictures, depths):
        image, truth = Image.fromarray(picture), Image.fromarray(depth)
        if protocol == "fastdepth":
            image, truth = (x.resize((333, 250), NEAREST).crop((14, 11, 318, 239)).resize((224, 224), NEAREST) for x in (image, truth))
        else:
            image = image.resize((64, 64), NEAREST)  # 64 of the 228 rows of the crop are 70 of all 250: 64, to a multiple of 32
        x, truth = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255, np.array(truth)
        with torch.no_grad():
            pred = (model(x) + model(x.flip(-1)).flip(-1)) / 2 if flip else model(x)
        pred = cv2.resize(pred[0, 0].numpy(), truth.shape[::-1], interpolation=cv2.INTER_LINEAR)
        pred, truth = (x[slice(*rows), slice(*cols)] for x in (pred if clamp is None else pred.clip(*clamp), truth))
        valid = (truth > 0) & (truth <= max_depth)
        pixels.append((pred[valid].astype(float), truth[valid].astype(float)))
    expected = reference(*map(np.concatenate, zip(*pixels))) if pooled else mean_of(reference(*p) for p in pixels)
    result = evaluated(file, root, tmp_path, "--protocol", protocol, *flags.split())
    agree(result, expected, rel=1e-4)
    assert (result["images"], result["skipped"]) == (3, 0)


def test_the_numbers_are_written_though_the_pictures_cannot_be(network, frames, tmp_path):
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(OSError):
        evaluated(network[0], frames[0], tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["rmse"] > 0


@pytest.mark.parametrize("protocol", ["eigen", "densedepth"])
def test_a_protocol_looks_at_its_crop_and_not_a_pixel_further(protocol, tmp_path):
    (top, bottom), (left, right), *_ = DEFINITION[protocol]
    model = build_model("fastdepth-pruned")
    torch.nn.init.zeros_(last_norm(model).weight), torch.nn.init.constant_(last_norm(model).bias, 2)  # answers 2 m, whatever it sees
    file = save_network(tmp_path / "two.pt", model)
    depth = np.full((480, 640), 9)
    depth[top:bottom, left:right] = 2
    write_frame(tmp_path / "data", 0, blobs(0, 480, 640), depth)
    assert evaluated(file, tmp_path / "data", tmp_path, "--protocol", protocol)["rmse"] == 0
    depth[top, left] = depth[bottom - 1, right - 1] = 9
    write_frame(tmp_path / "data", 0, blobs(0, 480, 640), depth)
    rmse = math.sqrt(2 * 7**2 / ((bottom - top) * (right - left)))
    assert evaluated(file, tmp_path / "data", tmp_path, "--protocol", protocol)["rmse"] == pytest.approx(rmse)


@pytest.mark.parametrize("height, width, whole, expected", [
    (480, 640, (256, 256), (256, 256)),
    (960, 1280, (256, 256), (256, 256)),  # more pixels, the same view
    (640, 480, (256, 256), (352, 192)),  # the camera on its side: 640 * 256 / 480 and 480 * 256 / 640, to a multiple of 32
    (480, 640, (480, 640), (480, 640)),
    (640, 480, (480, 640), (640, 480)),
    (320, 640, (256, 256), (160, 256)),  # less high, the same width
    (1, 1, (256, 256), (352, 256)),
    (1, 1000, (256, 256), (32, 256)),
])
def test_a_whole_picture_is_shown_at_the_scale_of_training(height, width, whole, expected):
    assert whole_picture_size(height, width, whole) == expected


# ------------------------------------------------------------------------------------------------------------------
# Predictions
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, geometry, fixed, expected", [
    ((224, 224), "fastdepth", False, (256, 256)),  # 224 * 250 / 228 and 224 * 333 / 304, to a multiple of 32
    ((480, 640), "full", False, (480, 640)),
    ((224, 224), "fastdepth", True, (224, 224)),  # an .onnx file of one size
])
def test_a_whole_frame_is_shown_at_the_scale_of_training(size, geometry, fixed, expected):
    assert eval.frame_size(dict(size=size, geometry=geometry, fixed=fixed)) == expected


def predicted(network, out, *flags):
    """The depth that `python eval.py --images` writes: name -> (H, W) metres."""
    eval.main([network[0], "--device", "cpu", "--out", str(out), *map(str, flags)])
    return {file.stem: np.load(file) for file in sorted(out.glob("*.npy"))}


@pytest.mark.parametrize("height, width, flags, size", [
    (300, 400, (), (64, 64)), (400, 300, (), (96, 64)), (300, 400, ("--size", 64, 96), (64, 96))])
def test_a_prediction_is_the_network_at_its_scale_enlarged_to_the_picture(height, width, flags, size, network, tmp_path):
    picture = Image.fromarray(blobs(9, height, width))
    picture.save(tmp_path / "photo.png")
    image = torch.from_numpy(np.array(picture.resize(size[::-1], NEAREST))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = cv2.resize(network[1](image)[0, 0].numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
    found = predicted(network, tmp_path / "depth", "--images", tmp_path / "photo.png", *flags)["photo"]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.ptp(found) > 0.5


@pytest.mark.parametrize("height, width", [(1, 1), (60, 80), (80, 60), (7, 300), (300, 7)])
def test_every_file_of_a_prediction_has_the_size_of_the_picture(height, width, network, tmp_path):
    Image.fromarray(blobs(1, height, width)).save(tmp_path / "photo.jpg")
    depth = predicted(network, tmp_path / "depth", "--images", tmp_path / "photo.jpg")["photo"]
    millimetres, colour = (np.array(Image.open(tmp_path / "depth" / name)) for name in ("photo.png", "photo_colour.png"))
    assert depth.shape == millimetres.shape == (height, width) and depth.dtype == np.float32 and millimetres.dtype == np.uint16
    assert abs(millimetres / 1000 - depth).max() <= 0.0005 + 1e-6
    assert colour.shape[0] >= height and colour.shape[1] > width
    sheet = np.array(Image.open(tmp_path / "depth" / "photo_sheet.png"))  # the picture, and beside it the colours of its depth
    np.testing.assert_array_equal(sheet[:height, :width], np.array(Image.open(tmp_path / "photo.jpg")))
    np.testing.assert_array_equal(sheet[:, -colour.shape[1]:], colour)


def test_a_picture_gives_the_same_depth_however_it_is_stored(network, tmp_path):
    colour, grey = Image.fromarray(blobs(2, 48, 64)), Image.fromarray(blobs(2, 48, 64, 1)[..., 0])
    turned, hidden = Image.Exif(), colour.convert("RGBA")
    turned[0x0112] = 6  # EXIF orientation: turn by 90 degrees clockwise to look at it
    hidden.putpixel((0, 0), (1, 2, 3, 0))
    white = colour.copy()
    white.putpixel((0, 0), (255, 255, 255))
    folder = tmp_path / "photos"
    folder.mkdir()
    colour.save(folder / "colour.png")
    colour.convert("RGBA").save(folder / "colour_opaque.PNG")
    colour.transpose(Image.Transpose.ROTATE_90).save(folder / "colour_turned.png", exif=turned)
    hidden.save(folder / "white_hidden.png")  # what transparent pixels hide is not looked at
    white.save(folder / "white.png")
    grey.save(folder / "grey.png")
    grey.convert("RGB").save(folder / "grey_rgb.png")
    grey.convert("LA").save(folder / "grey_alpha.png")
    Image.fromarray(np.array(grey).astype(np.uint16) * 257).save(folder / "grey_16bit.png")
    palette = colour.quantize(50)
    palette.save(folder / "palette.png")
    palette.convert("RGB").save(folder / "palette_rgb.png")
    (folder / "notes.txt").write_text("no picture")
    depth = predicted(network, tmp_path / "depth", "--images", folder)
    assert len(depth) == 11
    for name, found in depth.items():
        np.testing.assert_array_equal(found, depth[name.split("_")[0]], err_msg=name)


def test_the_published_crop_of_a_picture_gives_depth_of_that_crop_alone(network, tmp_path, capsys):
    picture = Image.fromarray(blobs(8, 480, 640))
    picture.save(tmp_path / "photo.png")
    seen = picture.resize((333, 250), NEAREST).crop((14, 11, 318, 239)).resize((64, 64), NEAREST)
    with torch.no_grad():
        expected = network[1](torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None] / 255)[0, 0].numpy()
    found = predicted(network, tmp_path / "depth", "--images", tmp_path / "photo.png", "--geometry", "fastdepth", "--ply", "--focal", 500)["photo"]
    assert "crop" in capsys.readouterr().out
    height, width = found.shape  # 228 of 250 rows of 480, 304 of 333 columns of 640
    assert abs(height - 438) <= 2 and abs(width - 584) <= 2
    np.testing.assert_allclose(found, cv2.resize(expected, (width, height), interpolation=cv2.INTER_LINEAR), atol=1e-3)
    shown = np.array(Image.open(tmp_path / "depth" / "photo_sheet.png"))[:height, :width]
    top, left = (480 - height) // 2, (640 - width) // 2  # to a pixel or two
    assert any((shown == np.array(picture)[y:y + height, x:x + width]).all() for y in range(top - 2, top + 3) for x in range(left - 2, left + 3))


def test_a_very_large_picture_is_written_at_a_fraction_with_the_same_points(network, tmp_path, monkeypatch, capsys):
    Image.fromarray(blobs(8, 60, 90).repeat(3, 0).repeat(3, 1)).save(tmp_path / "large.png")  # 180x270
    monkeypatch.setattr(eval, "LONGEST", 100)
    depth = predicted(network, tmp_path / "depth", "--images", tmp_path / "large.png", "--ply", "--focal", 150)["large"]
    assert depth.shape == (60, 90) and "written at 90x60" in capsys.readouterr().out
    points, _ = read_ply(tmp_path / "depth" / "large.ply")
    np.testing.assert_allclose(points[:, 0] / points[:, 2] * 50 + 45, np.nonzero(depth > 0)[1] + 0.5, rtol=1e-4)  # a third of 150 pixels


def test_images_are_files_folders_and_globs(network, tmp_path):
    for name in ("one/a.png", "two/b1.jpg", "two/b2.jpg", "two/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(blobs(3, 32, 32)).save(tmp_path / name)
    found = predicted(network, tmp_path / "depth", "--images", tmp_path / "one", tmp_path / "two" / "b*.jpg")
    assert sorted(found) == ["a", "b1", "b2"]


def read_ply(file):
    """The points (N, 3) and colours (N, 3) of a binary .ply file, as its header describes them."""
    header, _, body = Path(file).read_bytes().partition(b"end_header\n")
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    count, = (int(line.split()[2]) for line in lines if line.startswith("element vertex"))
    fields = [line.split()[1:] for line in lines if line.startswith("property")]
    rows = np.frombuffer(body, [(name, {"float": "<f4", "uchar": "u1"}[kind]) for kind, name in fields])
    assert len(rows) == count
    return (np.stack([rows[name] for name in names], -1) for names in (("x", "y", "z"), ("red", "green", "blue")))


def test_points_project_back_onto_their_pixels(tmp_path):
    depth, picture = np.random.default_rng(0).uniform(1, 5, (6, 8)).astype(np.float32), blobs(4, 6, 8)
    depth[2, 3] = 0  # not a point
    write_ply(tmp_path / "cloud.ply", depth, picture, 20.0)
    points, colours = read_ply(tmp_path / "cloud.ply")
    rows, cols = np.nonzero(depth)  # in reading order
    np.testing.assert_allclose(points[:, 0] / points[:, 2] * 20 + 4, cols + 0.5, rtol=1e-5)  # a pixel's centre lies at its index + 1/2
    np.testing.assert_allclose(points[:, 1] / points[:, 2] * 20 + 3, rows + 0.5, rtol=1e-5)
    np.testing.assert_array_equal(points[:, 2], depth[rows, cols])
    np.testing.assert_array_equal(colours, picture[rows, cols])


@pytest.mark.parametrize("flags, focal", [((), 0.81 * 80), (("--focal", 50), 50)])
def test_a_prediction_comes_as_points_too(flags, focal, network, tmp_path):
    Image.fromarray(blobs(5, 80, 60)).save(tmp_path / "photo.png")  # portrait: the angle of view is that of the longer side
    depth = predicted(network, tmp_path / "depth", "--images", tmp_path / "photo.png", "--ply", *flags)["photo"]
    points, _ = read_ply(tmp_path / "depth" / "photo.ply")
    assert len(points) == (depth > 0).sum()
    np.testing.assert_allclose(points[:, 0] / points[:, 2] * focal + 30, np.nonzero(depth > 0)[1] + 0.5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------


def brightness(picture):
    return np.asarray(picture, dtype=float).sum(-1)


def test_the_scale_bar_stands_beside_the_picture_from_near_and_bright_to_far_and_dark():
    depth = np.linspace(1, 5, 100 * 80).reshape(100, 80)
    sheet = brightness(with_scale_bar(depth))
    assert sheet.shape[0] == 100 and sheet.shape[1] > 80
    assert (np.diff(sheet[:, 40]) <= 0).all() and sheet[0, 40] > 500 > 100 > sheet[-1, 40]
    bars = [column for column in sheet.T[80:] if np.allclose(column[[0, -1]], sheet[[0, -1], 40], atol=20) and (np.diff(column) <= 0).all()]
    assert len(bars) > 5


def test_one_range_colours_truth_and_prediction_and_the_error_is_bright_where_it_is_large():
    truth = torch.full((1, 4, 6), 2.0)
    truth[:, :, 3:], truth[:, 0] = 4, 0
    pred = truth.clone()
    pred[0, 2, :3] = torch.tensor([2.0, 2.4, 3.5])
    image = torch.rand(3, 4, 6)
    shown, true, predicted, error = picture_row(image, truth, pred, 10.0)
    np.testing.assert_allclose(shown, image.permute(1, 2, 0) * 255, atol=0.51)
    assert (true[1] == predicted[1]).all() and brightness(true)[1, 0] > brightness(true)[1, 5]  # near is bright
    small, medium, large = brightness(error)[2, :3]
    assert small < 50 and small < medium < large and large > 600
    grey = true[0, 0]
    assert len(set(grey)) == 1 and (true[0] == grey).all() and (error[0] == grey).all()  # nothing is known there


def test_a_sample_sheet_shows_four_pictures_a_sample(tmp_path):
    def small(image):  # a prediction of another size than the truth, and one beyond all bounds
        return torch.full((len(image), 1, 4, 6), -1.0)

    sample_sheet(small, samples(), tmp_path / "sheet.png", 10.0, n=3)  # the last sample has no valid pixel
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width >= 4 * 12 and sheet.height >= 3 * 8 and sheet.height < 5 * 8 + 40


# ------------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------------


def test_the_command_exits_with_1_when_the_rmse_is_not_what_was_expected(network, frames, tmp_path):
    command = [sys.executable, eval.__file__, network[0], "--data", str(frames[0]), "--device", "cpu", "--json", str(tmp_path / "result.json"),
               "--sheet", str(tmp_path / "sheet.png")]
    result = subprocess.run([*command, "--expect-rmse", "0.001"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "") and "0.001" in result.stdout
    found = json.loads((tmp_path / "result.json").read_text())
    assert all(math.isfinite(found[name]) for name in METRICS)
    assert f"{found['rmse']:.4f}" in result.stdout and "fastdepth" in result.stdout
    eval.main(command[2:] + ["--expect-rmse", str(found["rmse"] + 1e-6)])  # returns


def test_csv_and_json_hold_every_image_and_the_worst_sheet_the_worst_first(network, tmp_path, monkeypatch):
    drawn, usual = [], eval.sample_sheet
    monkeypatch.setattr(eval, "sample_sheet", lambda *a, notes=None, **k: (drawn.append(notes), usual(*a, notes=notes, **k)))
    for k in range(4):
        write_frame(tmp_path / "data", k, blobs(k, 60, 80), np.full((60, 80), [2, 9, 5, 40][k]))  # 40 m: beyond max_depth, skipped
    folder = tmp_path / "new" / "folder"
    eval.main([network[0], "--data", str(tmp_path / "data"), "--device", "cpu", "--json", str(folder / "r.json"), "--csv", str(folder / "r.csv"),
               "--sheet", str(folder / "s.png")])
    rows = list(csv.DictReader((folder / "r.csv").open()))
    assert [Path(row["file"]).name for row in rows] == ["0.h5", "1.h5", "2.h5", "3.h5"] and tuple(rows[0])[1:] == METRICS
    found = json.loads((folder / "r.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    agree(found, mean_of({name: float(row[name]) for name in METRICS} for row in rows[:3]))
    assert found["per_image"][3]["rmse"] is None and (found["images"], found["skipped"]) == (3, 1)
    assert [r["share"] for r in found["ranges"]] == pytest.approx([1 / 3] * 3)
    errors = [float(row["rmse"]) for row in rows[:3]]
    assert list(drawn[1]) == sorted(range(3), key=lambda i: -errors[i])
    assert all(f"{i}.h5" in note and f"{errors[i]:.3f}" in note for i, note in drawn[1].items())
    assert Image.open(folder / "s-worst.png").height < Image.open(folder / "s.png").height


@pytest.mark.parametrize("flags, named", [
    ("MODEL", "--data"),
    ("MODEL --data FRAMES --images PHOTO", "--data"),
    ("NOWHERE.pt --data FRAMES", "NOWHERE.pt: no such file"),
    ("NOWHERE.onnx --data FRAMES", "NOWHERE.onnx: no such file"),
    ("TEXT.pt --data FRAMES", "TEXT.pt"),
    ("CUT.pt --data FRAMES", "CUT.pt"),
    ("OTHER.pt --data FRAMES", "OTHER.pt"),  # weights of another network
    ("TEXT.onnx --data FRAMES", "TEXT.onnx"),
    ("MODEL --data NOWHERE", "NOWHERE"),
    ("MODEL --data FRAMES --split test", "test"),
    ("MODEL --data FRAMES --split best", "best"),
    ("MODEL --data FRAMES --protocol nyu", "nyu"),
    ("MODEL --data SMALL --protocol eigen", "240x320"),
    ("MODEL --data SMALL --protocol densedepth", "240x320"),
    ("MODEL --data FRAMES --size 100 100", "100"),
    ("MODEL --data FRAMES --size 0 64", "--size: must be a multiple of 32, got 0"),
    ("MODEL --data FRAMES --batch-size 0", "batch"),
    ("MODEL --data FRAMES --device tpu9", "--device tpu9"),  # and not: the file is broken
    ("MODEL --images NOWHERE.jpg", "NOWHERE.jpg"),
    ("MODEL --images PHOTO NOWHERE*.jpg", "NOWHERE*.jpg"),
    ("MODEL --images EMPTY", "EMPTY"),
    ("MODEL --images TEXT.png", "TEXT.png"),
    ("MODEL --images PHOTO --size 100 100", "100"),
    ("MODEL --images PHOTO --focal -5 --ply", "--focal"),
    ("MODEL --images PHOTO COPY/photo.jpg", "photo"),  # photo.png twice
    ("MODEL --images PHOTO COPY/photo_colour.jpg", "photo_colour"),  # the depth of one is the colour picture of the other
    ("MODEL --images PHOTO --out .", "photo.png"),  # would overwrite the picture itself
])
def test_a_mistake_gets_one_line_and_exit_code_2(flags, named, network, frames, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("TEXT.pt", "TEXT.onnx", "TEXT.png"):
        Path(name).write_text("hello")
    Path("CUT.pt").write_bytes(Path(network[0]).read_bytes()[:100_000])
    save_network("OTHER.pt", network[1], model="fastdepth")
    Path("EMPTY").mkdir(), Path("COPY").mkdir()
    for name in ("photo.png", "COPY/photo.jpg", "COPY/photo_colour.jpg"):
        Image.fromarray(blobs(6, 32, 32)).save(name)
    write_frame(tmp_path / "SMALL", 0, blobs(7, 240, 320), np.full((240, 320), 2))
    photo = Path("photo.png").read_bytes()

    words = {"MODEL": network[0], "FRAMES": str(frames[0]), "PHOTO": "photo.png"}
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device", "cpu", *(words.get(word, word) for word in flags.split())])
    with pytest.raises(SystemExit) as stop:
        run_script(eval.main)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith("eval.py: error: ") and error.count("\n") == 1, error
    assert named in error and Path("photo.png").read_bytes() == photo
    assert not list(tmp_path.glob("*.npy"))

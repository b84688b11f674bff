"""Metrics against plain numpy, protocols down to the pixel, and the depth of images of every kind."""
import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import full_disk, save_hdf5
from PIL import Image
from torch.utils.data import DataLoader

import data
import eval
from eval import METRICS, depth_metrics, evaluate
from model import build_model
from test_data import pillow_fastdepth as crop


def reference(pred, target):
    """All metrics of the valid pixels of one image, or of many: 1-D arrays."""
    safe = np.maximum(pred, 1e-3)
    error, log = pred - target, np.log(safe) - np.log(target)
    ratio = np.maximum(safe / target, target / safe)
    return dict(
        rmse=np.sqrt(np.mean(error**2)), mae=np.mean(abs(error)),
        absrel=np.mean(abs(error) / target), sqrel=np.mean(error**2 / target),
        rmse_log=np.sqrt(np.mean(log**2)), log10=np.mean(abs(np.log10(safe) - np.log10(target))),
        silog=100 * np.std(log),
        d1=np.mean(ratio < 1.25), d2=np.mean(ratio < 1.25**2), d3=np.mean(ratio < 1.25**3),
        irmse=np.sqrt(np.mean((1 / safe - 1 / target)**2)))


def mean_of(results):
    return {name: np.mean([result[name] for result in results]) for name in METRICS}


def reference_over(images, pooled=False):
    """The same for a data set; an image is a pair: prediction and ground truth at its valid pixels."""
    if pooled:
        images = [[np.concatenate(pixels) for pixels in zip(*images)]]
    return mean_of([reference(*pixels) for pixels in images])


def agree(result, metrics, rel=1e-5):
    assert {name: result[name] for name in METRICS} == pytest.approx(metrics, rel=rel, abs=1e-9)


def blobs(seed, height, width):
    """An image of soft random blobs, uint8."""
    return upsample(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8), height, width)


def upsample(depth, height, width):
    return cv2.resize(depth, (width, height), interpolation=cv2.INTER_LINEAR)


def squeeze(image, height, width):
    """The pixel under each centre. (Where that is a border, Pillow's rounding decides.)"""
    rows, cols = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip((height, width), image.shape))
    return image[rows[:, None], cols]


def batch_of(images):
    """(H, W, 3) uint8 images as a network takes them."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def save_network(file, network, **changes):
    """A file as train.py writes it."""
    config = dict(model="fastdepth-pruned", options={}, size=(64, 64), geometry="fastdepth", max_depth=10.0,
                  frame=(480, 640))
    torch.save(dict(format=2, config=config | changes, weights=network.state_dict()), file)
    return str(file)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint that predicts 0 to over 10 m, and its network in eval mode."""
    torch.manual_seed(0)
    model = build_model("fastdepth-pruned")
    images = batch_of([blobs(seed, 64, 64) for seed in range(8)])
    with torch.no_grad():
        for _ in range(30):  # batch norm learns what to expect
            model(images)
        model.decoder.head.bn.weight *= 3  # spreads the metres
    return save_network(tmp_path_factory.mktemp("network") / "best.pt", model), model.eval()


@torch.no_grad()
def seen(model, image, flip=False):
    """What a network predicts of (H, W, 3) uint8: (h, w)."""
    pred = model(batch_of([image]))[0, 0].numpy()
    return (pred + seen(model, image[:, ::-1].copy())[:, ::-1]) / 2 if flip else pred


def write_frame(root, k, image, depth):
    save_hdf5(Path(root) / f"val/scene/{k}.h5", image, depth.astype(np.float32))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Two 480x640 frames with depth beyond 10 m, one of them with a hole: their folder, images and depths."""
    root = tmp_path_factory.mktemp("frames")
    images = [blobs(seed, 480, 640) for seed in range(2)]
    depths = np.random.default_rng(0).uniform(0.5, 11, (2, 480, 640)).astype(np.float32)
    depths[1, 150:, :100] = 0
    for k in range(2):
        write_frame(root, k, images[k], depths[k])
    return root, images, depths


def evaluated(model, root, tmp_path, *flags):
    """What `python eval.py` writes as JSON."""
    eval.main([model, "--data", str(root), "--device", "cpu", "--json", str(tmp_path / "result.json"),
               "--sheet", str(tmp_path / "sheet.png"), *flags])
    return json.loads((tmp_path / "result.json").read_text())


# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------


def test_a_ratio_of_just_the_threshold_does_not_count():
    one, far = torch.ones(3, 1, 1, 1), torch.tensor([1.25, 1.25**2, 1.25**3]).view(3, 1, 1, 1)
    for pred, target in ((far, one), (one, far)):
        result = depth_metrics(pred, target, target > 0)
        assert [result[d].tolist() for d in ("d1", "d2", "d3")] == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]


def samples():
    """Five small images with depth; one has no valid pixel, the others have different numbers of them."""
    images, depths = torch.rand(5, 3, 8, 12), 1 + 5 * torch.rand(5, 1, 8, 12)
    for i in range(5):
        depths[i, :, :2 * i] = 0
    return list(zip(images, depths, range(5)))


def grey_metres(image):
    """Of -1 to 6 m. (Logarithms and inverses take 1 mm below that.)"""
    return image.mean(1, keepdim=True) * 8 - 1.5


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_mean_is_over_images_unless_pooled_for_any_batch_size(batch_size, pooled):
    dataset = samples()
    result, detail = evaluate(grey_metres, DataLoader(dataset, batch_size), 4.0, pooled=pooled)
    pixels = [(grey_metres(image[None])[0][valid].numpy(), depth[valid].numpy())
              for image, depth, _ in dataset if (valid := (depth > 0) & (depth <= 4)).any()]
    agree(result, reference_over(pixels, pooled))
    assert (result["images"], result["skipped"]) == (4, 1)
    for i, p in enumerate(pixels):
        agree({name: values[i].item() for name, values in detail["images"].items()}, reference(*p))
    assert all(values[4].isnan() for values in detail["images"].values())


def test_the_table_by_distance_pools_the_pixels_of_each_range_and_a_limit_belongs_to_the_nearer():
    dataset = samples()
    dataset[0][1][0, 0, :8] = torch.tensor([0.5, 1, 2, 3, 5, 12, 45, 60])
    pred = torch.cat([grey_metres(image[None]).ravel() for image, _, _ in dataset]).double().numpy()
    truth = torch.cat([depth.ravel() for _, depth, _ in dataset]).double().numpy()
    ranges = evaluate(grey_metres, DataLoader(dataset, 2), max_depth=50.0)[1]["ranges"]
    limits = [(0, 1), (1, 2), (2, 3), (3, 5), (5, 10), (10, 20), (40, None)]  # those that occur
    assert [(r["from"], r["to"]) for r in ranges] == limits
    for r, (near, far) in zip(ranges, limits):
        inside = (truth > near) & (truth <= (far or 50))
        agree(r, reference(pred[inside], truth[inside]))
        assert r["share"] == pytest.approx(inside.sum() / ((truth > 0) & (truth <= 50)).sum())


def test_a_sheet_shows_frames_a_thousand_times_as_wide_as_high(tmp_path):
    flat = [(torch.rand(3, 2, 2000), torch.rand(1, 2, 2000), 0)]
    eval.sample_sheet(grey_metres, flat, tmp_path / "sheet.png", 4.0)
    assert Image.open(tmp_path / "sheet.png").height == 18 + 1


def test_evaluation_refuses_what_gives_no_number():
    with pytest.raises(data.UserError, match="no image has a valid pixel within 0.5 m"):
        evaluate(grey_metres, DataLoader(samples()), 0.5)
    for bad in (math.nan, math.inf):
        predict = lambda image: grey_metres(image).index_fill(3, torch.tensor(5), bad)
        with pytest.raises(data.UserError, match="best.pt: predicts NaN"):
            evaluate(predict, DataLoader(samples()), clamp=(1e-3, 10.0), name="best.pt")


@pytest.mark.parametrize("protocol", ["own", "fastdepth", "garg"])
def test_eval_says_what_is_odd_about_data_and_names_no_flag_that_it_lacks(protocol, network, tmp_path,
                                                                          monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.note.cache_clear()
    depth = np.full((96, 320), 27.0)
    depth[:40] = 5
    write_frame("kitti", 0, blobs(0, 96, 320), depth)
    eval.main([network[0], "--data", "kitti", "--device", "cpu", "--protocol", protocol, "--sheet", "s.png"])
    said = capsys.readouterr().err
    assert "half of the depth lies beyond 10 m (median 27.0 m): train with a larger --max-depth" in said
    assert ("37% of the width of 96x320 frames: --geometry full" in said) == (protocol == "own")
    assert set(re.findall(r"(?<!larger )--[a-z-]+", said)) <= {"--depth-scale", "--geometry", "--size"}


def test_the_mean_depth_baseline_is_each_pixels_mean_and_the_mean_of_all_where_nothing_was_measured():
    depths = np.random.default_rng(0).uniform(1, 6, (600, 2, 3)).astype(np.float32)
    depths[::2, 0, 0] = 0  # holes
    depths[:, 1, 2] = 0  # never measured
    depths[:, 0, 1] = 50  # beyond max_depth
    dataset = [(None, torch.from_numpy(depth)[None], i) for i, depth in enumerate(depths)]
    seen = np.ma.masked_outside(depths[np.linspace(0, 599, 512).astype(int)], 0.1, 10)
    expected = seen.mean(axis=0).filled(seen.mean())
    np.testing.assert_allclose(eval.mean_depth_baseline(dataset, 10.0), expected[None, None], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Protocols
# ------------------------------------------------------------------------------------------------------------

#             rows       columns    clamp        max_depth  pooled
DEFINITION = {
    "own":        ((0, None), (0, None), None, 10, False),
    "fastdepth":  ((0, None), (0, None), None, np.inf, False),
    "eigen":      ((45, 471), (41, 601), (1e-3, 10), 10, False),
    "densedepth": ((20, 460), (24, 616), (0.1, 10), 10, True)}


@pytest.mark.parametrize("protocol, flags, flip, size", [
    ("own", "--workers 1", False, (64, 64)), ("own", "--size 64 96", False, (64, 96)),
    ("fastdepth", "", False, (64, 64)),
    ("eigen", "", False, (64, 64)), ("eigen", "--size 96 96 --flip", True, (96, 96)),
    ("densedepth", "", True, (64, 64)), ("densedepth", "--no-flip", False, (64, 64))])
def test_a_protocol_is_what_its_definition_says(protocol, flags, flip, size, network, frames, tmp_path):
    """But for --size, the network sees the 64x64 of its own training, whatever the ground truth's."""
    (file, model), (root, images, depths) = network, frames
    rows, cols, clamp, max_depth, pooled = DEFINITION[protocol]
    pixels = []
    for image, truth in zip(images, depths):
        factor = math.sqrt(math.prod(size)) / 64
        if protocol in ("own", "fastdepth"):
            image, truth = crop(image, size), crop(truth, size if protocol == "own" else (224, 224))
        else:  # 64 of the 228 rows of the crop are 70 of all 250, which is 64 to a multiple of 32
            image, factor = squeeze(image, *size), factor * math.sqrt(228 / 250 * 304 / 333)
        pred = upsample(seen(model, image, flip) * factor, *truth.shape)
        pred = pred if clamp is None else pred.clip(*clamp)
        pred, truth = (x[slice(*rows), slice(*cols)] for x in (pred, truth))
        valid = (truth > 0) & (truth <= max_depth)
        pixels.append((pred[valid].astype(float), truth[valid].astype(float)))
    result = evaluated(file, root, tmp_path, "--protocol", protocol, *flags.split())
    agree(result, reference_over(pixels, pooled), rel=1e-4)
    assert (result["images"], result["skipped"], tuple(result["size"])) == (2, 0, size)


def test_protocol_garg_shows_frames_of_every_size_whole_and_scores_the_lower_part(network, tmp_path):
    file = save_network(tmp_path / "kitti.pt", network[1], size=(64, 192), geometry="full", max_depth=80.0,
                        frame=(375, 1242))
    pixels = []
    for k, (height, width, shown_h) in enumerate([(375, 1242, 64), (90, 306, 64), (75, 120, 128)]):
        image = blobs(k, height, width)
        depth = np.random.default_rng(k).uniform(1, 90, (height, width)).astype(np.float32)
        write_frame(tmp_path / "data", k, image, depth)
        # The focal length is 0.81 x the width: 192 columns show as much as in training, the rows not quite.
        factor = math.sqrt((width * shown_h / height) / (1242 * 64 / 375))
        pred = upsample(seen(network[1], squeeze(image, shown_h, 192)) * factor, height, width).clip(1e-3, 80)
        rows = slice(int(0.40810811 * height), int(0.99189189 * height))
        cols = slice(int(0.03594771 * width), int(0.96405229 * width))
        pred, depth = pred[rows, cols].astype(float), depth[rows, cols].astype(float)
        pixels.append((pred[depth <= 80], depth[depth <= 80]))
    result = evaluated(file, tmp_path / "data", tmp_path, "--protocol", "garg")
    agree(result, reference_over(pixels), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Depth of one's own images
# ------------------------------------------------------------------------------------------------------------


def predicted(file, out, *flags):
    """The depth that `python eval.py --images` writes: name -> (H, W) metres."""
    eval.main([file, "--device", "cpu", "--out", str(out), *map(str, flags)])
    return {file.stem: np.load(file) for file in sorted(Path(out).glob("*.npy"))}


@pytest.mark.parametrize("height, width, flags, size", [
    (480, 640, (), (64, 64)),  # exactly 70x70
    (640, 480, (), (96, 64)),  # 94x53: the camera on its side
    (270, 480, (), (64, 64)),  # 53x70: less high
    (480, 640, ("--focal", 400), (96, 96)),  # 91x91
    (960, 1280, ("--focal", 800), (96, 96)),
    (300, 400, ("--size", 64, 96, "--flip"), (64, 96))])
def test_an_image_is_shown_at_the_scale_of_training_and_its_depth_corrected(height, width, flags, size,
                                                                            network, tmp_path):
    image = blobs(9, height, width)
    Image.fromarray(image).save(tmp_path / "photo.png")
    focal = flags[1] if "--focal" in flags else 0.81 * max(height, width)
    trained_y, trained_x = 0.81 * 640 * 64 / (480 * 228 / 250), 0.81 * 640 * 64 / (640 * 304 / 333)
    factor = math.sqrt(focal * size[0] / height / trained_y * focal * size[1] / width / trained_x)
    shrunk = 0.81 * 640 / focal  # to the focal length of a frame of 640, antialiased
    if shrunk < 1:
        small = round(width * shrunk), round(height * shrunk)
        image = np.array(Image.fromarray(image).resize(small, Image.Resampling.BILINEAR))
    pred = seen(network[1], squeeze(image, *size), "--flip" in flags)
    found = predicted(network[0], tmp_path / "depth", "--images", tmp_path / "photo.png", *flags)["photo"]
    np.testing.assert_allclose(found, upsample(pred * factor, height, width), atol=2e-3)
    assert np.ptp(found) > 0.5


@pytest.mark.parametrize("height, width, frame, antialiased", [
    (1500, 2000, (480, 640), True), (480, 640, (480, 640), False), (1500, 2000, (1500, 2000), False)])
def test_a_large_image_is_antialiased_and_a_frame_is_sampled_as_in_training(height, width, frame, antialiased,
                                                                            tmp_path):
    board = ((np.arange(height)[:, None] + np.arange(width)) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    images = []

    def predict(image):
        images.append(image)
        return torch.ones(1, 1, 7, 9)

    config = dict(size=(224, 224), geometry="fastdepth", frame=frame, fixed=None)
    eval.predict_images(predict, config, [tmp_path / "board.png"], tmp_path / "out")
    assert images[0].shape == (1, 3, 256, 256)
    if antialiased:
        assert (images[0] - 0.5).abs().max() < 0.05
    else:
        assert images[0].unique().tolist() == [0, 1]
    longest = min(width, 1280)  # larger files would only take room
    assert np.load(tmp_path / "out" / "board.npy").shape == (longest * 3 // 4, longest)


@pytest.mark.parametrize("height, width", [(1, 1), (60, 80), (7, 300), (300, 7)])
def test_every_file_of_a_prediction_has_the_size_of_the_image(height, width, network, tmp_path):
    image = blobs(1, height, width)
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6  # turn by 90 degrees clockwise to look at it
    Image.fromarray(np.rot90(image)).save(tmp_path / "photo.png", exif=on_its_side)
    depth = predicted(network[0], tmp_path / "depth", "--images", tmp_path / "photo.png")["photo"]
    out = tmp_path / "depth"
    assert sorted(file.name for file in out.iterdir()) == ["photo.npy", "photo.png", "photo_depth.png"]
    millimetres, sheet = (np.array(Image.open(out / name)) for name in ("photo.png", "photo_depth.png"))
    assert depth.shape == millimetres.shape == (height, width)
    assert depth.dtype == np.float32 and millimetres.dtype == np.uint16
    assert abs(millimetres / 1000 - depth).max() <= 0.0005 + 1e-6
    near, far = np.quantile(depth, (0.01, 0.99))
    colours = data.colourise(depth, near, max(far, near + 0.1))
    np.testing.assert_array_equal(sheet[:, :width], image)
    np.testing.assert_array_equal(sheet[:, width + 4:2 * width + 4], colours)
    assert sheet.shape[1] > 2 * width + 30  # the bar


def test_millimetres_end_at_65_metres_and_at_0_and_where_depth_is_0_there_is_no_point(tmp_path):
    depth = np.array([[-1, 0, 1.2344, 65.5344, 70]], np.float32)
    eval.write_depth(tmp_path / "far", depth, np.zeros((1, 5, 3), np.uint8), focal=5)
    np.testing.assert_array_equal(list(read_ply(tmp_path / "far.ply"))[0][:, 2], depth[0, 2:])
    assert np.array(Image.open(tmp_path / "far.png")).tolist() == [[0, 0, 1234, 65534, 65534]]
    np.testing.assert_array_equal(np.load(tmp_path / "far.npy"), depth)


def test_geometry_fastdepth_gives_the_depth_of_the_crop_of_training_alone(network, tmp_path):
    image = blobs(8, 480, 640)
    Image.fromarray(image).save(tmp_path / "photo.png")
    flags = "--images", tmp_path / "photo.png", "--geometry", "fastdepth", "--ply"
    found = predicted(network[0], tmp_path / "depth", *flags)["photo"]
    assert found.shape == (438, 584)  # 228 of 250 rows of 480, 304 of 333 columns of 640
    np.testing.assert_allclose(found, upsample(seen(network[1], crop(image, (64, 64))), 438, 584), atol=1e-3)
    sheet = np.array(Image.open(tmp_path / "depth" / "photo_depth.png"))
    np.testing.assert_array_equal(sheet[:, :584], image[21:459, 28:612])
    points, _ = read_ply(tmp_path / "depth" / "photo.ply")
    assert abs(points[:, 0] / points[:, 2]).max() == pytest.approx(291.5 / (0.81 * 640), rel=1e-4)


def test_a_prediction_replaces_an_earlier_one_and_no_file_of_another_kind(network, tmp_path, refused):
    photo, mine = tmp_path / "photo.jpg", tmp_path / "photo.ply"
    Image.fromarray(blobs(8, 32, 32)).save(photo)
    mine.write_text("mine")
    argv = [network[0], "--out", str(tmp_path), "--images"]
    assert "its photo.ply would overwrite" in refused(eval, [*argv, photo, "--ply"])
    eval.main([*argv, str(photo)])  # without --ply, nothing is in the way
    assert mine.read_text() == "mine"
    (tmp_path / "photo.npy").unlink()  # as if it had been stopped
    eval.main([*argv, str(photo)])
    assert "its photo.png would overwrite" in refused(eval, [*argv, tmp_path / "photo.png"])
    Image.fromarray(blobs(9, 32, 32)).save(tmp_path / "photo_depth.png")  # such as ground truth
    assert "its photo.png would overwrite" in refused(eval, [*argv, photo])


def read_ply(file):
    """The points (N, 3) and colours (N, 3) of a binary .ply file, as its header describes them."""
    header, _, body = Path(file).read_bytes().partition(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex ")
    fields = re.findall(r"property (float|uchar) (\w+)\n", header.decode())
    rows = np.frombuffer(body, [(name, {"float": "<f4", "uchar": "u1"}[kind]) for kind, name in fields])
    assert len(rows) == int(header.split()[6])
    return (np.stack([rows[n] for n in names], -1) for names in (("x", "y", "z"), ("red", "green", "blue")))


@pytest.mark.parametrize("flags, focal, longest", [((), 0.81 * 80, 80), (("--focal", 50), 25, 40)])
def test_points_project_back_onto_their_pixels(flags, focal, longest, network, tmp_path, monkeypatch):
    image, photo = blobs(5, 80, 60), tmp_path / "photo.png"  # portrait: the longer side decides
    Image.fromarray(image).save(photo)
    monkeypatch.setattr(eval, "LONGEST", longest)  # at half the size, the focal length is half as many pixels
    depth = predicted(network[0], tmp_path / "depth", "--images", photo, "--ply", *flags)["photo"]
    assert depth.shape == (longest, longest * 3 // 4)
    points, colours = read_ply(tmp_path / "depth" / "photo.ply")
    rows, cols = np.nonzero(depth > 0)  # in reading order; a pixel's centre lies at its index + 1/2
    x, y = (points[:, i] / points[:, 2] * focal for i in (0, 1))
    np.testing.assert_allclose(x + depth.shape[1] / 2, cols + 0.5, rtol=1e-4)
    np.testing.assert_allclose(y + depth.shape[0] / 2, rows + 0.5, rtol=1e-4)
    np.testing.assert_array_equal(points[:, 2], depth[rows, cols])
    if longest == 80:
        np.testing.assert_array_equal(colours, image[rows, cols])


def test_images_are_files_folders_and_globs_and_hidden_ones_are_passed_over(tmp_path):
    for name in ("one/a.png", "one/._a.png", "one/b.JPG", "one/b.HEIC", "one/notes.txt", "one/d.HEIC",
                 "two/b1.jpg", "two/b2.jpg", "two/c.jpg", "two/d.jpg", "odd.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = eval.find_images([f"{tmp_path}/one", f"{tmp_path}/two/b*", f"{tmp_path}/odd.gif"])
    assert [file.name for file in found] == ["a.png", "b.JPG", "d.HEIC", "b1.jpg", "b2.jpg", "odd.gif"]
    found = eval.find_images([f"{tmp_path}/*/d*", f"{tmp_path}/two", f"{tmp_path}/two/d.jpg"])
    assert [file.name for file in found] == ["d.HEIC", "d.jpg", "b1.jpg", "b2.jpg", "c.jpg"]  # each once
    with pytest.raises(data.UserError, match=r"\*.bmp: no image"):
        eval.find_images([f"{tmp_path}/one", f"{tmp_path}/one/*.bmp"])


def test_one_bad_image_among_many_is_named_and_the_others_are_done(network, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        Image.fromarray(blobs(3, 32, 32)).save(folder / name)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:-200])
    (folder / "d.heic").write_bytes(b"an iPhone's")
    with pytest.raises(data.UserError, match="^2 of 4 images could not be read$"):
        predicted(network[0], tmp_path / "depth", "--images", folder)
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert "b.png" in first and "d.heic" in second and "convert" in second
    assert sorted(file.name for file in (tmp_path / "depth").glob("*.npy")) == ["a.npy", "c.npy"]
    assert "c.png: 32x32, focal length 26 pixels (assumed), seen at 96x64 (full); depth " in said.out
    assert said.out.count(" m, written at 32x32\n") == 2


# ------------------------------------------------------------------------------------------------------------
# What is written
# ------------------------------------------------------------------------------------------------------------


def test_a_sample_sheet_shows_image_ground_truth_prediction_and_error(tmp_path):
    truth = torch.full((1, 4, 6), 2.0)
    truth[:, :, 3:], truth[:, 0] = 4, 0
    pred = truth.clamp(min=2)
    pred[0, 2, :3] = torch.tensor([2.0, 2.4, 3.5])
    image, file = torch.rand(3, 4, 6), tmp_path / "new" / "sheet.png"
    eval.sample_sheet(lambda x: pred[None], [(image, truth, 0)] * 9, file, 10.0, n=3)
    sheet = np.array(Image.open(file), dtype=float)
    assert len(sheet) == 18 + 3 * 171 + 2 * 4 and sheet.shape[1] > 4 * 260  # labels, 3 rows, gaps of 4; bars
    middles = np.ix_(18 + np.arange(4) * 171 // 4 + 20, np.arange(6) * 256 // 6 + 20)
    shown, true, predicted, error = (sheet[:, x:][middles] for x in (0, 260, 520, 780))
    np.testing.assert_allclose(shown, image.permute(1, 2, 0) * 255, atol=0.51)
    assert (true[1] == predicted[1]).all()
    assert true[1, 0].sum() > 500 and true[1, 5].sum() < 50  # near is bright
    small, medium, large = error[2, :3].sum(-1)
    assert small < 50 and small < medium < large and large > 600
    assert len(np.unique(true[0])) == 1 and (error[0] == true[0]).all()  # grey: nothing is known there


@pytest.mark.parametrize("metres", [0.0, -2.0])
def test_a_sheet_survives_a_network_that_predicts_0_or_less(metres, tmp_path):
    eval.sample_sheet(lambda image: torch.full((1, 1, 8, 12), metres), samples(), tmp_path / "sheet.png", 4.0)
    not_measured = data.colourise(np.zeros((1, 1)), 1, 2)[0, 0]
    assert (np.array(Image.open(tmp_path / "sheet.png"))[100, 520 + 100] != not_measured).any()


def test_json_holds_every_counted_image_and_the_sheet_what_was_compared(network, tmp_path):
    for k, metres in enumerate((2, 9, 5, 40)):  # 40 m: skipped
        write_frame(tmp_path / "data", k, blobs(k, 60, 80), np.full((60, 80), metres))
    found = evaluated(network[0], tmp_path / "data", tmp_path / "new")
    rows = found["per_image"]
    assert [Path(row["file"]).name for row in rows] == ["0.h5", "1.h5", "2.h5"]
    agree(found, mean_of(rows))
    assert (found["images"], found["skipped"], found["geometry"]) == (3, 1, "fastdepth")
    assert [r["share"] for r in found["ranges"]] == pytest.approx([1 / 3] * 3)
    sheet = np.array(Image.open(tmp_path / "new" / "sheet.png"))
    assert len(sheet) == 18 + 4 * 256 + 12
    np.testing.assert_array_equal(sheet[20:274:4, 2:256:4], crop(blobs(0, 60, 80), (64, 64)))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder to work in, with a few files for --images and --data, most of them wrong."""
    monkeypatch.chdir(tmp_path)
    for name in ("TEXT.onnx", "TEXT.png"):
        Path(name).write_text("hello")
    damaged = build_model("fastdepth-pruned")
    torch.nn.init.constant_(next(damaged.parameters()), math.nan)
    save_network("NAN.pt", damaged)
    for name in ("photo.png", "photo.jpg", "photo_depth.jpg"):
        Image.fromarray(blobs(6, 60, 80)).save(name)
    write_frame("MIXED", 0, blobs(7, 480, 640), np.full((480, 640), 2))
    write_frame("MIXED", 1, blobs(7, 240, 320), np.full((240, 320), 2))
    return tmp_path


@pytest.mark.parametrize("flags, limit, named", [
    ("--images photo.png --out out", 15_000, "out/photo_depth.png"),
    ("--data FRAMES --json out/r.json --sheet out/sheet.png", 1_000, "out/r.json"),
    ("--data FRAMES --sheet out/sheet.png", 1_000, "out/sheet.png")])
def test_a_full_disk_is_named_and_leaves_no_half_file(flags, limit, named, network, frames, refused, desk):
    words = flags.replace("FRAMES", str(frames[0])).split()
    with full_disk(limit):
        assert refused(eval, [network[0], *words]).startswith(f"{named}: ")
    assert not list(Path("out").iterdir())


@pytest.mark.parametrize("flags, named", [
    ("MODEL", "--data"),
    ("MODEL --data FRAMES --images photo.png", "--data"),
    ("NOWHERE.onnx --data FRAMES", "NOWHERE.onnx: no such file"),
    ("NAN.pt --data FRAMES --json depth/r.json", "NAN.pt: predicts NaN"),
    ("NAN.pt --images photo.png", "NAN.pt: predicts NaN"),
    ("TEXT.onnx --data FRAMES", "TEXT.onnx: ONNX Runtime cannot read it"),
    ("MODEL --data FRAMES --split test", "test"),
    ("MODEL --data MIXED --protocol eigen", "1.h5: is 240x320"),
    ("MODEL --data MIXED --protocol densedepth", "1.h5: is 240x320"),
    ("MODEL --data FRAMES --protocol eigen --geometry fastdepth", "--geometry"),
    ("MODEL --data FRAMES --device cuda:99", "--device cuda:99"),
    ("MODEL --data FRAMES --workers 100000", "--workers: must be 0 to 256, got 100000"),
    ("MODEL --images NOWHERE.jpg", "NOWHERE.jpg"),
    ("MODEL --images photo.png --json x.json", "--json"),
    ("MODEL --data FRAMES --focal 300", "--focal"),
    ("MODEL --data FRAMES --json .", ".: is a folder or a device"),
    ("MODEL --images TEXT.png", "TEXT.png"),
    ("MODEL --images photo.png --focal 2.8", "--focal 2.8"),  # millimetres
    ("MODEL --images photo.png --focal 8000", "--focal 8000"),
    ("MODEL --images photo.png photo.jpg", "photo.jpg: its photo.png would overwrite"),
    ("MODEL --images photo.png photo_depth.jpg", "its photo_depth.png would overwrite"),
    ("MODEL --images photo.png --out .", "photo.png: its photo.png would overwrite")])
def test_a_mistake_gets_one_line_exit_code_2_and_no_file(flags, named, network, frames, refused, desk):
    before = {file: file.read_bytes() for file in desk.rglob("*") if file.is_file()}
    words = {"MODEL": network[0], "FRAMES": str(frames[0])}
    assert named in refused(eval, ["--out", "depth", *(words.get(word, word) for word in flags.split())])
    assert {file: file.read_bytes() for file in desk.rglob("*") if file.is_file()} == before

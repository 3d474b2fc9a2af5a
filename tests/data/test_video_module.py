"""Folders of video files that the tests write: windows, labels, resume, and files that cannot be used."""

import pickle
import warnings

import numpy as np
import pytest
import torch

from lightning_contrast.data import VideoFolderDataModule
from lightning_contrast.data.video_module import read_frames

av = pytest.importorskip("av")


def write(path, frames, *, size=32, keyframes=6, codec="mpeg4"):
    """Write a video whose frame t has the gray value 10 t."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 2 * size, size, "yuv420p"
        stream.gop_size = keyframes
        for t in range(frames):
            image = np.full((size, 2 * size, 3), 10 * t, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def places(clips):
    """Return the frame numbers ``(..., T)`` of clips ``(..., T, 3, H, W)``."""
    return (clips.double().mean((-3, -2, -1)) / 10).round().long()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            write(root / split / ("cats" if number % 2 else "dogs") / f"{number}.mp4", 24)
    return root


@pytest.mark.parametrize("start", range(0, 24 - 9, 3))
def test_a_window_is_exactly_that(folder, start):
    path = str(folder / "train" / "dogs" / "0.mp4")
    frames = read_frames(path, 5, 2, seed=start << 20)
    assert (frames.shape, frames.dtype) == ((5, 3, 32, 64), torch.uint8)
    assert places(frames).tolist() == [start + 2 * t for t in range(5)]


def test_without_a_seed_it_is_the_middle(folder):
    path = str(folder / "train" / "dogs" / "0.mp4")
    assert places(read_frames(path, 4, 1)).tolist() == [10, 11, 12, 13]
    assert places(read_frames(path, 24, 1)).tolist() == list(range(24))
    assert places(read_frames(path, 1, 1)).tolist() == [11]


def module(folder, **settings):
    settings = {"frames": 4, "stride": 2, "size": 16, "batch_size": 2, "num_workers": 0} | settings
    return VideoFolderDataModule(folder / "train", folder / "val", **settings)


@pytest.mark.slow
def test_batches(folder):
    data = module(folder, indices=True)
    data.setup()
    assert data.class_names == ("cats", "dogs")
    clips, labels, rows = next(iter(data.val_dataloader()))
    assert (clips.shape, clips.dtype) == ((2, 4, 3, 16, 16), torch.uint8)
    assert (labels.tolist(), rows.tolist()) == ([0, 1], [0, 1])
    assert places(clips).tolist() == [[8, 10, 12, 14]] * 2
    starts = set()
    loader = data.train_dataloader()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        starts |= {int(place[0]) for batch in loader for place in places(batch[0])}
    assert len(starts) > 4  # drawn for each file and epoch


def test_a_run_resumes_with_the_same_windows(folder):
    def batches(loader):
        return [batch[0] for batch in loader]

    whole = batches(module(folder).train_dataloader())
    stopped = module(folder).train_dataloader()
    next(iter(stopped))
    resumed = module(folder).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    rest = batches(resumed)
    assert len(rest) == len(whole) - 1
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[1:], strict=True))


def test_a_short_file_is_named_with_its_length(folder, tmp_path):
    for number in range(3):
        write(tmp_path / "train" / f"{number}.mp4", 6 if number == 1 else 24)
    short = str(tmp_path / "train" / "1.mp4")
    data = VideoFolderDataModule(tmp_path / "train", frames=4, stride=2, size=16, batch_size=1, num_workers=0)
    with pytest.raises(RuntimeError, match=rf"video {short}: `videos` must have at least 7 frames, got 6\. Lower"):
        list(data.train_dataloader())
    skipping = VideoFolderDataModule(
        tmp_path / "train", frames=4, stride=2, size=16, batch_size=1, num_workers=0, on_error="skip"
    )
    with pytest.warns(UserWarning, match="Cannot read the video"):
        assert len(list(skipping.train_dataloader())) == 3
    assert skipping.skipped == [short]


def test_damaged_files_and_arguments(folder, tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="`train_dir` must hold videos, or class folders with videos"):
        VideoFolderDataModule(tmp_path / "train").setup()
    (tmp_path / "train" / "a.mp4").write_bytes(b"no video")
    data = VideoFolderDataModule(tmp_path / "train", batch_size=1, num_workers=0)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=r"Cannot read the video .*a\.mp4"):
        list(data.train_dataloader())
    for name in ("frames", "stride", "size"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            module(folder, **{name: 0})


def test_spawned_workers_can_take_the_dataset(folder):
    data = module(folder)
    again = pickle.loads(pickle.dumps(data.train_dataloader().dataset))
    assert torch.equal(again[0][0], data.train_dataloader().dataset[0][0])


def test_whole_frames_are_refused(folder):
    with pytest.raises(ValueError, match=r"`resize` must be one of 'crop', 'center', 'squash', got 'whole'"):
        module(folder, resize="whole")

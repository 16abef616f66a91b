"""Free memory of the machine and of control groups, and the modes that follow from it."""

import os

import pytest
import torch
from PIL import Image

from mdistiller.data import DataConfig, ImageSet, load_data, make_loader, memory
from mdistiller.data.encoded import EncodedSet
from mdistiller.data.memory import free_host_memory, free_memory
from mdistiller.errors import DataError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def system(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return free_host_memory(tmp_path / "proc", tmp_path / "cgroup")


MACHINE = {"proc/meminfo": "MemTotal:  16 kB\nMemFree:  1 kB\nMemAvailable:  8 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8192),
        # Version 2; the cache of files counts as free.
        (
            {
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": "5000\n",
                "cgroup/memory.current": "3000\n",
                "cgroup/memory.stat": "anon 1\ninactive_file 500\n",
            },
            2500,
        ),
        ({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n", "cgroup/memory.current": "3\n"}, 8192),
        # The group around it has the limit.
        (
            {
                "proc/self/cgroup": "0::/jobs/one\n",
                "cgroup/jobs/one/memory.max": "max\n",
                "cgroup/jobs/one/memory.current": "10\n",
                "cgroup/jobs/memory.max": "4000\n",
                "cgroup/jobs/memory.current": "1000\n",
            },
            3000,
        ),
        # Version 1, whose path is not there in a container.
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n2:memory:/docker/abc\n",
                "cgroup/memory/memory.limit_in_bytes": "7000\n",
                "cgroup/memory/memory.usage_in_bytes": "6000\n",
                "cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            1200,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": "5000\n",
                "cgroup/memory.current": "9000\n",
            },
            0,
        ),
    ],
)
def test_free_memory_of_a_machine(tmp_path, files, expected):
    assert system(tmp_path, MACHINE | files) == expected


def test_free_memory_without_proc(tmp_path):
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert system(tmp_path, {}) == pytest.approx(pages, rel=0.2)


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 800)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 900))
    assert (free_memory(), free_memory(CPU), free_memory(GPU)) == (800, 800, 300)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (free_memory(), free_memory(GPU)) == (200, 300)


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        for name in "ab":
            for i in range(count):
                path = tmp_path / split / name / f"{i}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (12, 10)).save(path)
    return tmp_path


def config(root, **settings):
    return DataConfig(**{"kind": "folder", "root": root, "image_size": 8, "workers": 0, **settings})


DECODED = 4 * 8 * 8 * 3


@pytest.mark.parametrize(
    ("limit", "modes"),
    [
        (DECODED, (EncodedSet, ImageSet)),
        (DECODED - 1, (EncodedSet, EncodedSet)),
    ],
)
def test_memory_decides_between_modes_of_equal_bits(root, limit, modes):
    def types(splits):
        return type(splits.train), type(splits.test)

    assert types(load_data(config(root, memory_limit_gb=limit / 1e9))) == modes
    with pytest.MonkeyPatch.context() as patch:  # half of the free memory is the limit
        patch.setattr("mdistiller.data.load.free_memory", lambda device=None: 2 * limit)
        assert types(load_data(config(root))) == modes


def test_resident_images_look_at_the_device(root, monkeypatch):
    free = {None: 10**9, CPU: 10**9, GPU: 2 * DECODED}
    monkeypatch.setattr("mdistiller.data.load.free_memory", lambda device=None: free[device])
    assert isinstance(load_data(config(root), GPU).test, ImageSet)
    free[GPU] -= 2
    assert isinstance(load_data(config(root), GPU).test, EncodedSet)
    assert isinstance(load_data(config(root), CPU).test, ImageSet)


def test_an_empty_file_is_named_when_it_is_read(root):
    (root / "train" / "b" / "3.bmp").write_bytes(b"")
    train = load_data(config(root, memory="stream")).train
    with pytest.raises(DataError, match=r"image .*b/3\.bmp cannot be read: UnidentifiedImageError"):
        list(make_loader(train, 4, device="cpu", workers=0).epoch(0))


def test_a_missing_file_is_left_out(root):
    path = root / "train" / "b" / "3.bmp"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(DataError, match=r"image .*b/3\.bmp cannot be read: .*No such file"):
        list(make_loader(load_data(config(root)).train, 4, device="cpu", workers=0).epoch(0))
    with pytest.warns(UserWarning, match=r"left out: 1 of 12 images cannot be read: .*b/3\.bmp"):
        splits = load_data(config(root, on_error="skip"))
    assert (
        sum(len(batch.label) for batch in make_loader(splits.train, 4, device="cpu", workers=0).epoch(0))
        == 11
    )


def test_squares_that_cannot_be_read_are_left_out_alike_in_every_mode(root):
    """Processes of one run may keep images in different modes, and have to agree on their number."""
    for path in root.rglob("*.bmp"):
        Image.new("RGB", (8, 8)).save(path)
    bad = root / "train" / "b" / "3.bmp"
    bad.write_bytes(bad.read_bytes()[:-50])  # its header is whole
    for mode in ("resident", "stream"):
        with pytest.warns(UserWarning, match=r"left out: 1 of 12 images cannot be read: .*b/3\.bmp"):
            assert len(load_data(config(root, memory=mode, on_error="skip")).train) == 11

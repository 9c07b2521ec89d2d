"""Checkpoints: saved whole or not at all, the original's read, nothing in a file ever run."""

from __future__ import annotations

import os
import pickle
import random
import resource
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_quant import small_model

from distiller.checkpoint import load_checkpoint, save_checkpoint
from distiller.cli import InputError

WEIGHTS = small_model(0).state_dict()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "checkpoint.pth.tar"


def assert_same_tensors(found, expected) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def test_what_is_saved_loads_unchanged(path):
    model = small_model(1).train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([0, 1]), torch.tensor([2, 3])).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "metrics": {"HR@10": 0.5738, "best": True, "none": None, "text": "né"},
        "layers": [256, 256, 128],
        "random": torch.get_rng_state(),
    }
    save_checkpoint(path, content)
    loaded = load_checkpoint(path)
    assert_same_tensors(loaded["state_dict"], content["state_dict"])
    assert loaded.keys() == content.keys()
    for key in ("epoch", "metrics", "layers"):
        assert loaded[key] == content[key]
    assert torch.equal(loaded["random"], content["random"])
    again = torch.optim.Adam(model.parameters())
    again.load_state_dict(loaded["optimizer"])
    assert again.state_dict()["state"][0]["step"] == 1


def test_only_the_checkpoint_is_left_and_others_can_read_it(path):
    umask = os.umask(0o022)
    try:
        save_checkpoint(path, {"state_dict": WEIGHTS})
        save_checkpoint(path, {"state_dict": WEIGHTS, "epoch": 2})
    finally:
        os.umask(umask)
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644
    assert load_checkpoint(path)["epoch"] == 2


# --- the original's ---


def original_content() -> dict:
    model = small_model(2).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([0, 1]), torch.tensor([2, 3])).sum().backward()
    optimizer.step()
    return {
        "epoch": 7,
        "arch": "ncf",
        "state_dict": OrderedDict(model.state_dict()),
        "optimizer_state_dict": optimizer.state_dict(),
        "optimizer_type": torch.optim.Adam,
        "extras": {
            "best_hit_rate": np.float64(0.6352),
            "current_ndcg": np.float32(0.25),
            "best_epoch": np.int64(6),
        },
    }


@pytest.mark.parametrize("as_zip", [True, False])
def test_the_originals_checkpoints_load(as_zip, path):
    content = original_content()
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    check_original(load_checkpoint(path), content)


def check_original(loaded: dict, content: dict) -> None:
    assert list(loaded) == list(content)
    assert_same_tensors(loaded["state_dict"], content["state_dict"])
    assert (loaded["epoch"], loaded["arch"]) == (7, "ncf")
    assert loaded["optimizer_type"] is torch.optim.Adam
    assert loaded["extras"] == content["extras"]
    assert loaded["extras"]["best_hit_rate"] == 0.6352
    assert loaded["optimizer_state_dict"]["param_groups"] == content["optimizer_state_dict"]["param_groups"]


def test_the_originals_numpy_1_scalars_load(path):
    content = original_content()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    assert b"numpy._core.multiarray" in written
    path.write_bytes(written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    check_original(load_checkpoint(path), content)


# --- anything else ---


class Runs:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Custom:
    """Not a plain value."""

    loaded = 0

    def __setstate__(self, state):
        Custom.loaded += 1


def evil(marker: Path) -> dict[str, object]:
    return {
        "os.system": Runs(os.system, f"touch {marker}"),
        "open": Runs(open, str(marker), "w"),
        "eval": Runs(eval, f"open({str(marker)!r}, 'w')"),
        "touch": Runs(Path.touch, marker),
        "nested": [{"a": (Runs(os.system, f"touch {marker}"),)}],
    }


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("kind", ["os.system", "open", "eval", "touch", "nested"])
@pytest.mark.parametrize("place", ["extra", "state_dict"])
def test_code_is_refused_and_not_run(kind, as_zip, place, path, tmp_path):
    marker = tmp_path / "marker"
    content = {"state_dict": dict(WEIGHTS), "epoch": 1}
    (content["state_dict"] if place == "state_dict" else content)["extra"] = evil(marker)[kind]
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["os.system", "eval"])
def test_a_bare_pickle_is_refused_and_not_run(content, path, tmp_path):
    marker = tmp_path / "marker"
    path.write_bytes(pickle.dumps(evil(marker)[content]))
    with pytest.raises(InputError):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_class_of_anyones_is_refused_and_not_made(as_zip, path):
    custom = Custom()
    custom.value = 1
    torch.save({"state_dict": WEIGHTS, "extra": custom}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(InputError, match="Custom"):
        load_checkpoint(path)
    assert Custom.loaded == 0


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_whole_module_is_refused(as_zip, path):
    torch.save(small_model(3), path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(InputError, match="NeuMF"):
        load_checkpoint(path)


def test_numpy_arrays_are_refused(path):
    torch.save({"state_dict": WEIGHTS, "extra": np.arange(3)}, path)
    with pytest.raises(InputError):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 1},
        [1, 2],
        3,
        None,
        torch.ones(3),
        {"state_dict": None},
        {"state_dict": [torch.ones(2)]},
        {"state_dict": {"a": 3}},
        {"state_dict": {"a": torch.ones(2), "b": "text"}},
    ],
    ids=str,
)
def test_what_holds_no_weights_is_refused(content, path):
    torch.save(content, path)
    with pytest.raises(InputError, match="state_dict"):
        load_checkpoint(path)


def refused(path: Path) -> None:
    """Loading raises what the command line turns into one line."""
    with pytest.raises((InputError, OSError)) as caught:
        load_checkpoint(path)
    if isinstance(caught.value, InputError):
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    else:
        assert caught.value.filename is not None


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_file_cut_short_is_refused(as_zip, path):
    torch.save(original_content(), path, _use_new_zipfile_serialization=as_zip)
    whole = path.read_bytes()
    lengths = {0, 1, 2, 3, 4, 5, 8, 16, 30, 64, 100, len(whole) - 1, len(whole) - 22, len(whole) // 2}
    for length in sorted(lengths | set(range(0, len(whole), len(whole) // 60))):
        path.write_bytes(whole[:length])
        refused(path)


@pytest.mark.parametrize("as_zip", [True, False])
def test_damaged_bytes_are_refused_or_load_as_a_checkpoint(as_zip, path):
    torch.save(original_content(), path, _use_new_zipfile_serialization=as_zip)
    whole = path.read_bytes()
    draw = random.Random(1)
    for _ in range(120):
        damaged = bytearray(whole)
        start = draw.randrange(min(len(whole), 3000) - 8)
        damaged[start : start + draw.randint(1, 8)] = draw.randbytes(draw.randint(1, 8))
        path.write_bytes(damaged)
        try:
            assert "state_dict" in load_checkpoint(path)
        except InputError as error:
            assert "\n" not in str(error)
        except OSError as error:
            assert error.filename is not None


@pytest.mark.parametrize("length", [1, 10, 100, 5000])
def test_random_bytes_are_refused(length, path):
    draw = random.Random(length)
    for head in (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05"):
        path.write_bytes(head + draw.randbytes(length))
        refused(path)


def test_an_empty_file_a_directory_and_nothing_are_refused(path, tmp_path):
    path.write_bytes(b"")
    refused(path)
    refused(tmp_path)
    refused(tmp_path / "none.pth.tar")
    (tmp_path / "text").write_text("epoch,loss\n1,2\n")
    refused(tmp_path / "text")


# --- a save that fails ---


@contextmanager
def files_of_at_most(size: int):
    """As on a full disk: the process's files cannot grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


LARGER = {"state_dict": {"weight": torch.zeros(500_000)}, "epoch": 2}


def test_a_save_that_runs_out_of_space_leaves_the_old_file_and_nothing_else(path):
    save_checkpoint(path, {"state_dict": WEIGHTS, "epoch": 1})
    before = path.read_bytes()
    with files_of_at_most(100_000), pytest.raises((OSError, RuntimeError)):
        save_checkpoint(path, LARGER)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_save_that_runs_out_of_space_is_an_os_error_that_names_the_file(path):
    with files_of_at_most(100_000), pytest.raises(OSError) as caught:
        save_checkpoint(path, LARGER)
    assert str(caught.value.filename) == str(path)


def test_what_cannot_be_pickled_leaves_the_old_file_and_nothing_else(path):
    save_checkpoint(path, {"state_dict": WEIGHTS, "epoch": 1})
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(path, {"state_dict": WEIGHTS, "extra": lambda: None})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_that_is_not_there_is_an_os_error_that_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught:
        save_checkpoint(tmp_path / "none" / "best.pth.tar", {"state_dict": WEIGHTS})
    assert str(caught.value.filename) == str(tmp_path / "none" / "best.pth.tar")
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_a_directory_is_an_os_error_and_leaves_nothing(path):
    path.mkdir()
    with pytest.raises(OSError):
        save_checkpoint(path, {"state_dict": WEIGHTS})
    assert list(path.parent.iterdir()) == [path]
    assert not list(path.iterdir())


def test_an_interrupt_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    save_checkpoint(path, {"state_dict": WEIGHTS, "epoch": 1})
    before = path.read_bytes()

    def interrupted(content, target, *args, **kwargs):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"state_dict": WEIGHTS, "epoch": 2})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**13),
        torch.zeros(4, 1).expand(4, 3),
    ],
)
def test_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path, tensor):
    """Before memory is taken for it."""
    torch.save({"state_dict": {"weight": tensor}}, tmp_path / "x")
    with pytest.raises(InputError, match="of another size"):
        load_checkpoint(tmp_path / "x")

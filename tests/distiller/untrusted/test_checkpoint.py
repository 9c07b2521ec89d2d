"""Checkpoints: saved whole or not at all, the original's read, nothing in a file ever run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_files import evil, files_of_at_most
from helpers_quant import small_model

from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint, save_checkpoint
from distiller.untrusted.claims import check_claims

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


class Custom:
    """Not a plain value."""

    loaded = 0

    def __setstate__(self, state):
        Custom.loaded += 1


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


# --- archives that two readers could take for different ones ---


def archive_of(content: object) -> bytes:
    """As PyTorch writes it."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def members(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


def packed(entries: list[tuple[str | zipfile.ZipInfo, bytes]]) -> bytes:
    """An archive of Python's."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


SMALL = archive_of({"state_dict": {"a": torch.ones(3), "b": torch.zeros(2, 2)}, "epoch": 1})
OTHER = archive_of({"state_dict": {"other": torch.ones(3)}})


@pytest.mark.parametrize("numel", [0, 1, 63, 16_384, 1_000_000])
@pytest.mark.parametrize("count", [1, 70])
def test_archives_of_all_sizes_load(path, numel, count):
    state_dict = {f"weight.{i}": torch.full((numel // count,), float(i)) for i in range(count)}
    save_checkpoint(path, {"state_dict": state_dict})
    assert_same_tensors(load_checkpoint(path)["state_dict"], state_dict)
    torch.save({"state_dict": state_dict}, path)  # by the writer that takes a name
    assert_same_tensors(load_checkpoint(path)["state_dict"], state_dict)


def test_archive_written_by_another_zip_writer_loads(path):
    """Without zip64's records."""
    path.write_bytes(packed(list(members(SMALL).items())))
    assert load_checkpoint(path)["epoch"] == 1


@pytest.mark.parametrize(
    "name",
    [
        "archive/DATA.PKL",
        "archive/Data.pkl",
        "ARCHIVE/data.pkl",
        "archive\\data.pkl",
        "archive/data.pkl\0",
        "archive/data.pkl\n",
        "archive/dätä.pkl",
    ],
)
def test_second_pickle_under_nearly_the_same_name_is_refused(path, name):
    """PyTorch would read either."""
    pickled = members(OTHER)["archive/data.pkl"]
    entry = zipfile.ZipInfo("x")
    entry.filename = entry.orig_filename = name
    for entries in ([*members(SMALL).items(), (entry, pickled)], [(entry, pickled), *members(SMALL).items()]):
        path.write_bytes(packed(entries))
        with pytest.raises(InputError, match="no archive"):
            load_checkpoint(path)


def test_the_same_name_twice_is_refused(path):
    entries = list(members(SMALL).items())
    with pytest.warns(UserWarning, match="Duplicate"):
        path.write_bytes(packed([*entries, ("archive/data.pkl", members(OTHER)["archive/data.pkl"])]))
    with pytest.raises(InputError, match="no archive"):
        load_checkpoint(path)


def test_entry_that_has_another_name_beside_its_own_is_refused(path):
    """Newer versions of Python take the second one, PyTorch the first."""
    entries = list(members(SMALL).items())
    entry = zipfile.ZipInfo(entries[0][0])
    second = struct.pack("<BL", 1, zlib.crc32(entry.filename.encode())) + b"archive/other.pkl"
    entry.extra = struct.pack("<2H", 0x7075, len(second)) + second
    path.write_bytes(packed([(entry, entries[0][1]), *entries[1:]]))
    with pytest.raises(InputError, match="no archive"):
        load_checkpoint(path)


END, ENDS = 22, 22 + 20 + 56  # bytes of the record at an archive's end, and of those of zip64 with it


def rerecorded(archive: bytes, record: str, at: int, form: str, value: int) -> bytes:
    """An archive with another number in one of the records at its end."""
    start = {"end": END, "locator": END + 20, "end of zip64": ENDS}[record]
    changed = bytearray(archive)
    struct.pack_into(form, changed, len(archive) - start + at, value)
    return bytes(changed)


def with_two_directories(first: bytes, second: bytes) -> bytes:
    """Two archives, of which the records at the end name the first and stand behind the second."""
    joined = first[:-ENDS] + second
    (start,) = struct.unpack_from("<Q", first, len(first) - ENDS + 48)
    return rerecorded(joined, "end of zip64", 48, "<Q", start)


INEXACT = {
    "bytes before it": lambda whole: OTHER + whole,
    "bytes behind it": lambda whole: whole + b"PK",
    "a comment": lambda whole: rerecorded(whole, "end", 20, "<H", 4) + b"PK\5\6",
    "bytes before its end": lambda whole: whole[:-ENDS] + b"more" + whole[-ENDS:],
    "bytes between its records": lambda whole: whole[:-END] + b"more" + whole[-END:],
    "two directories": lambda whole: with_two_directories(OTHER, whole),
    "directory elsewhere": lambda whole: rerecorded(whole, "end of zip64", 48, "<Q", 64),
    "directory of another size": lambda whole: rerecorded(whole, "end of zip64", 40, "<Q", 64),
    "fewer entries than it has": lambda whole: rerecorded(whole, "end of zip64", 32, "<Q", 2),
    "record elsewhere": lambda whole: rerecorded(whole, "locator", 8, "<Q", 64),
    "no record": lambda whole: rerecorded(whole, "end of zip64", 0, "<L", 0),
}


@pytest.mark.parametrize("kind", INEXACT)
def test_archive_that_does_not_end_exactly_is_refused(path, kind):
    """Python looks for the directory where it ends, PyTorch where the records say."""
    path.write_bytes(INEXACT[kind](SMALL))
    with open(path, "rb") as file, pytest.raises((pickle.UnpicklingError, zipfile.BadZipFile)):
        check_claims(file)


# --- the older format's storages ---


def legacy(content: object, path: Path) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def test_storage_of_two_sizes_is_refused(path):
    """Only the first counts for PyTorch."""
    weight = torch.arange(300.0)
    whole = legacy({"state_dict": {"a": weight, "b": weight[:1]}}, path)
    count = pickle.BININT2 + struct.pack("<H", 300)
    path.write_bytes(whole.replace(count, pickle.BININT2 + struct.pack("<H", 65535), 1))
    with pytest.raises(InputError, match="two sizes"):
        load_checkpoint(path)


def test_storage_of_two_types_is_refused(path):
    """Though both are of as many bytes as the archive has."""
    state_dict = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float32)}
    entries = members(archive_of({"state_dict": state_dict}))
    entries["archive/data.pkl"] = entries["archive/data.pkl"].replace(b"\1\0\0\x001", b"\1\0\0\x000")
    path.write_bytes(packed(list(entries.items())))
    with pytest.raises(InputError, match="two sizes"):
        load_checkpoint(path)


@pytest.mark.parametrize("keys", [[], ["1"], [0], "0", {"0": 1}, [["0"]], "twice", "tuple"], ids=str)
def test_storages_that_are_not_those_listed_are_refused(path, keys):
    """PyTorch makes what is named, and reads what is listed."""
    whole = legacy({"state_dict": {"a": torch.ones(2)}}, path)
    start = whole.rindex(pickle.PROTO + b"\2")
    file = io.BytesIO(whole[start:])
    listed = pickle.load(file)
    keys = {"twice": listed * 2, "tuple": tuple(listed)}.get(keys, keys) if isinstance(keys, str) else keys
    path.write_bytes(whole[:start] + pickle.dumps(keys, protocol=2) + file.read())
    with pytest.raises(InputError, match="lists"):
        load_checkpoint(path)


def test_storage_without_its_bytes_is_refused(path):
    whole = legacy({"state_dict": {"a": torch.ones(200), "b": torch.ones(200)}}, path)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="another size"):
        load_checkpoint(path)


# --- what is shared ---


def shared(levels: int) -> object:
    """Two of the same in two of the same ...: ``2**levels`` values where they are gone through one by one."""
    value: object = {"a": 1.0}
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


@pytest.mark.parametrize("as_zip", [True, False])
def test_values_are_counted_wherever_they_are_shared(path, as_zip):
    """22 levels would be gone through four million times."""
    torch.save({"state_dict": WEIGHTS, "extra": shared(10)}, path, _use_new_zipfile_serialization=as_zip)
    assert load_checkpoint(path)["extra"] == shared(10)
    for extra in (shared(22), [shared(18)] * 8, (shared(18),) * 8):
        torch.save({"state_dict": WEIGHTS, "extra": extra}, path, _use_new_zipfile_serialization=as_zip)
        with pytest.raises(InputError, match="values"):
            load_checkpoint(path)


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def test_levels_are_counted_through_what_is_shared(path):
    """In whatever order it comes."""
    torch.save({"state_dict": WEIGHTS, "extra": nested(40)}, path)
    assert load_checkpoint(path)["extra"] == nested(40)
    steps = [nested(30)]
    for _ in range(3):
        value = steps[-1]
        for _ in range(15):
            value = [value]
        steps.append(value)
    for extra in (nested(60), nested(400), steps):
        torch.save({"state_dict": WEIGHTS, "extra": extra}, path)
        with pytest.raises(InputError, match="levels"):
            load_checkpoint(path)


def test_what_holds_itself_is_refused(path):
    loop: list = []
    loop += [loop, loop]
    torch.save({"state_dict": WEIGHTS, "extra": loop}, path)
    with pytest.raises(InputError, match="itself"):
        load_checkpoint(path)

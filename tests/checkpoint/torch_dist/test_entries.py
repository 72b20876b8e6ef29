"""Entries of `.distcp` files: torch is the judge of what is written, and writes what is read."""

import io
import os
import pickle
import zipfile
import zlib

import pytest
import torch

from mtrain.checkpoint.torch_dist.entries import find_values, frame_of


def written_by_torch(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def read(path, content: bytes, *, shape, dtype=torch.float32, start: int = 0) -> torch.Tensor:
    """The values that are found in an entry, with bytes around it."""
    path.write_bytes(bytes(start) + content + b"behind")
    with path.open("rb") as file:
        values = find_values(file.fileno(), start, len(content), shape=shape, dtype=dtype)
        data = bytearray(path.read_bytes()[values.start :])
    data = data[: len(data) // dtype.itemsize * dtype.itemsize]
    return torch.frombuffer(data, dtype=dtype).as_strided(shape, values.strides)


@pytest.mark.parametrize("shape", [(4, 8), (1, 1, 3, 5), (7,), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frame_makes_what_torch_would_have_written(shape, dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    data = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    frame = frame_of(shape, dtype)
    ours = frame.before + data + frame.after(zlib.crc32(data))
    archive, expected = (
        zipfile.ZipFile(io.BytesIO(content)) for content in (ours, written_by_torch(tensor))
    )
    assert archive.testzip() is None
    members = [info.filename for info in expected.infolist()]
    assert [info.filename for info in archive.infolist()] == members
    # That number has no meaning.
    for name in members:
        if not name.endswith("serialization_id"):
            assert archive.read(name) == expected.read(name), name
    assert torch.equal(torch.load(io.BytesIO(ours), weights_only=True), tensor)


TENSORS = {
    "contiguous": torch.arange(24.0).view(4, 6),
    "bfloat16": torch.arange(24.0).view(4, 6).bfloat16(),
    "float8": torch.arange(24.0).view(4, 6).to(torch.float8_e4m3fn),
    "int64": torch.arange(24).view(4, 6),
    "transposed": torch.arange(24.0).view(6, 4).t(),
    "part of a storage": torch.arange(100.0)[3:27].view(4, 6),
    "parameter": torch.nn.Parameter(torch.arange(24.0).view(4, 6)),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("start", [0, 1001])
def test_values_of_what_torch_writes_are_found(tmp_path, kind, start) -> None:
    tensor = TENSORS[kind]
    content = written_by_torch(tensor)
    found = read(tmp_path / "x", content, shape=(4, 6), dtype=tensor.dtype, start=start)
    assert torch.equal(found.float(), tensor.detach().float())


def test_values_without_checksums_are_found(tmp_path) -> None:
    was = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        content = written_by_torch(TENSORS["contiguous"])
    finally:
        torch.serialization.set_crc32_options(was)
    assert torch.equal(read(tmp_path / "x", content, shape=(4, 6)), TENSORS["contiguous"])


def rewritten(content: bytes, change, *, method=zipfile.ZIP_STORED) -> bytes:
    """An archive with other members, by Python's own writer."""
    source, buffer = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for info in source.infolist():
            data = change(info.filename, source.read(info))
            if data is not None:
                target.writestr(info.filename, data)
    return buffer.getvalue()


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args) -> None:
        self._call = (function, args)

    def __reduce__(self):
        return self._call


def replaced(ending: str, data: bytes | None):
    return lambda name, was: data if name.endswith(ending) else was


WHOLE = written_by_torch(TENSORS["contiguous"])
REFUSED = {
    "another shape": (written_by_torch(torch.ones(6, 4)), "expected is torch.float32"),
    "another dtype": (written_by_torch(torch.ones(4, 6).half()), "expected is torch.float32"),
    "a list": (written_by_torch([TENSORS["contiguous"]]), "it is no tensor"),
    "the old format": (
        written_by_torch(torch.ones(4, 6), _use_new_zipfile_serialization=False),
        "BadZipFile",
    ),
    "compressed": (
        rewritten(WHOLE, lambda _, data: data, method=zipfile.ZIP_DEFLATED),
        "is not stored as it is",
    ),
    "fewer values": (rewritten(WHOLE, replaced("/data/0", bytes(95))), "its values are cut off"),
    "no values": (rewritten(WHOLE, replaced("/data/0", None)), "KeyError"),
    "no description": (rewritten(WHOLE, replaced("/data.pkl", None)), "ValueError"),
    "a long description": (
        rewritten(WHOLE, replaced("/data.pkl", bytes(10**6))),
        "is too large for a description",
    ),
    "another byte order": (
        rewritten(WHOLE, replaced("/byteorder", b"big")),
        "its bytes are in another order",
    ),
    "cut short": (WHOLE[:-100], "BadZipFile"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_such_tensor_is_refused(tmp_path, kind) -> None:
    """T20."""
    content, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "x", content, shape=(4, 6))
    assert len(str(caught.value)) < 400


def test_nothing_that_it_names_is_called(tmp_path) -> None:
    """T25."""
    hostile = pickle.dumps(Call(os.mkdir, str(tmp_path / "made")))
    content = rewritten(WHOLE, replaced("/data.pkl", hostile))
    with pytest.raises(ValueError, match=r"it asks for 'posix.mkdir', which could run code"):
        read(tmp_path / "x", content, shape=(4, 6))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("first", "strides"), [(-1, (6, 1)), (1, (6, 1)), (0, (-6, 1)), (0, (7, 1)), (0, (6,))]
)
def test_a_place_outside_of_the_storage_is_refused(tmp_path, first, strides) -> None:
    """T25."""
    tensor = torch.arange(24.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor,
            "__reduce_ex__",
            lambda self, _: (
                torch._utils._rebuild_tensor_v2,
                (
                    torch.storage.TypedStorage(
                        wrap_storage=self.untyped_storage(), dtype=self.dtype, _internal=True
                    ),
                    first,
                    (4, 6),
                    strides,
                    False,
                    {},
                ),
            ),
        )
        content = written_by_torch(tensor)
    with pytest.raises(ValueError, match=r"no place in its storage|values are cut off"):
        read(tmp_path / "x", content, shape=(4, 6))

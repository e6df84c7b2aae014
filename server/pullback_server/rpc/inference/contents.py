"""The bytes of a ModelInferRequest, as a small message and one payload for each input.

Raw contents are taken as views and never pass through protobuf. Typed contents cost nothing more where the wire has
them as the elements' own bytes (FP32, FP64); varints become arrays block by block, without an object for each element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from pullback_wire import WireError, element_count, numpy_dtype
from pullback_wire.codec import bytes_view
from pullback_wire.dtypes import ITEM_SIZES
from pullback_wire.framing import MAX_DESCRIPTION, parse, walk
from pullback_wire.inference import DATATYPES
from pullback_wire.inference import open_inference_pb2 as pb

#: Numbers of fields: of a request; of an input; of its contents by datatype.
_INPUTS, _RAW, _CONTENTS = 5, 7, 5
_FIELDS = {
    "BOOL": 1, "INT8": 2, "INT16": 2, "INT32": 2, "INT64": 3, "UINT8": 4, "UINT16": 4, "UINT32": 4, "UINT64": 5,
    "FP32": 6, "FP64": 7,
}  # fmt: skip
_NAMES = {field.number: field.name for field in pb.InferTensorContents.DESCRIPTOR.fields}
#: What protobuf makes of a varint, before it is one of fewer bits.
_WIDE = {1: np.dtype(bool), 2: np.dtype("<i4"), 3: np.dtype("<i8"), 4: np.dtype("<u4"), 5: np.dtype("<u8")}
#: Fields of a request: fewer than ours may have, for each input, output and parameter costs more here.
_MOST_FIELDS = 1 << 14
#: With typed contents: inputs of one request, fields of one input, and of its contents (each a run of elements).
_MOST_INPUTS, _MOST_ABOUT, _MOST_RUNS = 1024, 128, 1024
#: Bytes of varints that become numbers at once: they take thirty times as much while they do.
_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Parts:
    """A request that was taken apart.

    header: everything but raw contents or, without those, but the inputs. raw: the former. inputs: the latter, None
    where there are raw contents. typed: bytes of these.
    """

    header: bytes
    raw: list[memoryview]
    inputs: list[memoryview] | None

    @property
    def typed(self) -> int:
        return sum(map(len, self.inputs or ()))


def take_apart(data: bytes) -> Parts:
    """Copies no contents. Raises WireError for what is no message, or too large but for its contents."""
    view, end = memoryview(data), len(data)
    raw: list[memoryview] = []
    inputs: list[memoryview] = []
    # With the inputs, and without.
    rest: list[memoryview] = []
    apart: list[memoryview] = []
    for number, start, body, at in walk(data, _MOST_FIELDS):
        if number == _RAW and body >= 0:
            if at > end:
                raise WireError(
                    f"raw_input_contents[{len(raw)}] claims {at - body} bytes, {end - body} are left",
                    "raw_input_contents",
                )
            raw.append(view[body:at])
            continue
        rest.append(view[start:at])
        if number == _INPUTS and body >= 0:
            inputs.append(view[body:at])
        else:
            apart.append(view[start:at])
    if raw:
        return Parts(_joined(rest), raw, None)
    return Parts(_joined(apart), raw, inputs)


def _joined(parts: Sequence[memoryview]) -> bytes:
    """Raises WireError where they are too large to be read on the event loop."""
    if (size := sum(map(len, parts))) > MAX_DESCRIPTION:
        raise WireError(f"besides contents the message has {size} bytes, at most {MAX_DESCRIPTION} are allowed")
    return b"".join(parts)


def read(parts: Parts, most: int) -> tuple[pb.ModelInferRequest, list[memoryview]]:
    """The request without contents, and those of each input. most: bytes that all of them may have.

    Raises WireError where they contradict the inputs' datatypes and shapes.
    """
    request = parse(pb.ModelInferRequest, parts.header)
    if parts.inputs is None:
        _check_raw(request, parts.raw)
        return request, parts.raw
    if len(parts.inputs) > _MOST_INPUTS:
        raise WireError(f"there are {len(parts.inputs)} inputs, at most {_MOST_INPUTS} are allowed", "inputs")
    payloads: list[memoryview] = []
    described = len(parts.header)
    for index, data in enumerate(parts.inputs):
        about, contents = _input(data, f"inputs[{index}]")
        if (described := described + len(about)) > MAX_DESCRIPTION:
            raise WireError(f"besides contents the message has more than {MAX_DESCRIPTION} bytes")
        tensor = parse(pb.ModelInferRequest.InferInputTensor, about)
        request.inputs.append(tensor)
        most -= _size(tensor, f"inputs[{index}]")
        if most < 0:
            raise WireError(f"inputs[{index}]: the inputs are larger than a message may be", f"inputs[{index}].shape")
        payloads.append(_elements(tensor, contents, f"inputs[{index}]"))
    return request, payloads


def _check_raw(request: pb.ModelInferRequest, raw: Sequence[memoryview]) -> None:
    for index, tensor in enumerate(request.inputs):
        field = f"inputs[{index}]"
        if tensor.HasField("contents"):
            raise WireError(f"{field}.contents must not be given together with raw_input_contents", f"{field}.contents")
        if index < len(raw) and len(raw[index]) != (size := _size(tensor, field)):
            raise WireError(
                f"{field} is {tensor.datatype} {list(tensor.shape)} and needs {size} bytes, "
                f"raw_input_contents[{index}] has {len(raw[index])}",
                f"raw_input_contents[{index}]",
            )
    if len(raw) != len(request.inputs):
        raise WireError(
            f"there are {len(request.inputs)} inputs and {len(raw)} raw_input_contents", "raw_input_contents"
        )


def _size(tensor: pb.ModelInferRequest.InferInputTensor, field: str) -> int:
    """Bytes that a tensor needs."""
    if "shared_memory_region" in tensor.parameters:
        raise WireError(f"{field} lies in shared memory, which this server does not offer", f"{field}.parameters")
    number = DATATYPES.get(tensor.datatype)
    if number is None:
        also = "; models here have no strings" if tensor.datatype == "BYTES" else ""
        raise WireError(
            f"{field}.datatype is {tensor.datatype!r}, expected one of {', '.join(DATATYPES)}{also}",
            f"{field}.datatype",
        )
    return element_count(tensor.shape, field) * ITEM_SIZES[number]


def _input(data: memoryview, field: str) -> tuple[bytes, memoryview]:
    """An input without its contents, and those."""
    about: list[memoryview] = []
    contents: list[memoryview] = []
    try:
        for number, start, body, at in walk(data, _MOST_ABOUT):
            if at > len(data):
                continue
            if number == _CONTENTS and body >= 0:
                contents.append(data[body:at])
            else:
                about.append(data[start:at])
    except WireError as error:
        raise WireError(f"{field}: {error}") from None
    # Messages behind one another are one message, as protobuf has it.
    return b"".join(about), contents[0] if len(contents) == 1 else memoryview(b"".join(contents))


def _elements(tensor: pb.ModelInferRequest.InferInputTensor, contents: memoryview, field: str) -> memoryview:
    """The bytes of a tensor's elements."""
    number = DATATYPES[tensor.datatype]
    count = element_count(tensor.shape, field)
    wanted = _FIELDS.get(tensor.datatype)
    if wanted is None:
        raise WireError(
            f"{field} is {tensor.datatype}, for which there are no typed contents: send raw_input_contents",
            f"{field}.contents",
        )
    field = f"{field}.contents.{_NAMES[wanted]}"
    runs = _runs(contents, wanted, tensor.datatype, field)
    dtype = numpy_dtype(number)
    if runs is None:
        array = _one_by_one(contents, wanted, field)
        found = len(array)
    elif wanted >= _FIELDS["FP32"]:
        data = runs[0] if len(runs) == 1 else memoryview(b"".join(runs))
        found, left = divmod(len(data), dtype.itemsize)
        if left:
            raise WireError(f"{field} ends inside an element", field)
        array = np.frombuffer(data, dtype)
    else:
        data = runs[0] if len(runs) == 1 else memoryview(b"".join(runs))
        raw = np.frombuffer(data, np.uint8)
        found = int(np.count_nonzero(raw < 0x80))
        if found == count:
            array = _varints(raw, found, _WIDE[wanted], field)
    if found != count:
        raise WireError(f"{field} has {found} elements, {tensor.datatype} {list(tensor.shape)} needs {count}", field)
    return bytes_view(_narrow(array, dtype, field))


def _runs(contents: memoryview, wanted: int, datatype: str, field: str) -> list[memoryview] | None:
    """Packed elements; None where some stand alone, which nobody writes and protobuf allows."""
    found: list[memoryview] = []
    for number, _, body, at in walk(contents, _MOST_RUNS):
        if at > len(contents):
            continue
        if number != wanted and number in _NAMES:
            raise WireError(f"{field} is where {datatype} belongs, there is {_NAMES[number]}", field)
        if number != wanted:
            continue
        if body < 0:
            return None
        found.append(contents[body:at])
    return found


def _one_by_one(contents: memoryview, wanted: int, field: str) -> np.ndarray:
    if len(contents) > MAX_DESCRIPTION:
        raise WireError(f"{field} is not packed and larger than {MAX_DESCRIPTION} bytes", field)
    try:
        message = pb.InferTensorContents.FromString(bytes(contents))
    except DecodeError as error:
        raise WireError(f"{field}: {error}", field) from None
    for one, _ in message.ListFields():
        if one.number != wanted:
            raise WireError(f"{field} and {one.name} are both there", field)
    dtype = _WIDE.get(wanted) or np.dtype("<f4" if wanted == _FIELDS["FP32"] else "<f8")
    return np.array(getattr(message, _NAMES[wanted]), dtype)


def _varints(data: np.ndarray, count: int, dtype: np.dtype, field: str) -> np.ndarray:
    """So many numbers, as protobuf reads them: bits that are too many fall away, and a truth value is what is not 0."""
    if data.size and data[-1] >= 0x80:
        raise WireError(f"{field} ends inside an element", field)
    if count == data.size:
        return data.astype(dtype)
    found = np.empty(count, dtype)
    at = done = 0
    while at < data.size:
        block = data[at : at + _BLOCK]
        ends = np.flatnonzero(block < 0x80)
        if not ends.size:
            raise WireError(f"{field}: a varint is longer than 10 bytes", field)
        starts = np.empty_like(ends)
        starts[0], starts[1:] = 0, ends[:-1] + 1
        lengths = ends - starts + 1
        longest = int(lengths.max())
        if longest > 10:
            raise WireError(f"{field}: a varint is longer than 10 bytes", field)
        values = (block[starts] & 0x7F).astype(np.uint64)
        for place in range(1, longest):
            more = np.flatnonzero(lengths > place)
            values[more] |= (block[starts[more] + place] & 0x7F).astype(np.uint64) << np.uint64(7 * place)
        found[done : done + ends.size] = values.astype(dtype)
        done += ends.size
        at += int(ends[-1]) + 1
    return found


def _narrow(array: np.ndarray, dtype: np.dtype, field: str) -> np.ndarray:
    """Elements in their own width. Raises WireError for one that has no room there."""
    if array.dtype == dtype:
        return array
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    wrong = np.flatnonzero((array < low) | (array > high))
    if wrong.size:
        raise WireError(
            f"{field}[{wrong[0]}] is {array[wrong[0]]}, {dtype.name} holds {low} to {high}", f"{field}[{wrong[0]}]"
        )
    return array.astype(dtype)

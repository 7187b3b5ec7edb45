"""Reading boxes: AMP's own format, in whatever pieces it arrives and whatever a box leads to."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.protocols.amp import AmpBox

from sharded_milter.ipc.boxes import Boxes


class Reader(Boxes):
    """Keeps the boxes that it is sent. A box may lead to more data, or to an error."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes: list[AmpBox] = []
        self.leads_to: dict[bytes, bytes] = {}
        self.transport = self
        self.lost = 0

    def ampBoxReceived(self, box: AmpBox) -> None:
        self.boxes.append(box)
        self.dataReceived(self.leads_to.pop(box[b"k"], b"") if b"k" in box else b"")
        if box.get(b"k") == b"error":
            raise ValueError

    def pauseProducing(self) -> None: ...

    def loseConnection(self) -> None:
        self.lost += 1

    @property
    def names(self) -> list[bytes]:
        return [box[b"k"] for box in self.boxes]


def boxes(*names: bytes) -> bytes:
    return b"".join(AmpBox({b"k": name}).serialize() for name in names)


KEYS = st.binary(min_size=1, max_size=255)
BOXES = st.lists(st.dictionaries(KEYS, st.binary(max_size=70), min_size=1, max_size=4), max_size=4)


@given(BOXES, st.lists(st.integers(0, 400)))
def test_boxes_are_read_as_amp_writes_them_in_whatever_pieces(
    boxes: list[dict[bytes, bytes]], cuts: list[int]
) -> None:
    data = b"".join(AmpBox(box).serialize() for box in boxes)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader = Reader()
    for start, end in pairwise(places):
        reader.dataReceived(data[start:end])
    assert reader.boxes == boxes
    assert not reader.lost


def test_every_single_byte_may_arrive_alone() -> None:
    reader = Reader()
    for byte in AmpBox({b"k": b"1", b"key": b"value"}).serialize() + boxes(b"2"):
        reader.dataReceived(bytes([byte]))
    assert reader.boxes == [{b"k": b"1", b"key": b"value"}, {b"k": b"2"}]


def test_the_longest_value_is_read() -> None:
    box = AmpBox({b"k": b"x" * 0xFFFF})
    reader = Reader()
    reader.dataReceived(box.serialize())
    assert reader.boxes == [box]


@pytest.mark.parametrize("data", [b"\x01\x00" + b"x" * 256, b"GET / HTTP/1.1\r\n"])
def test_who_sends_something_else_is_not_listened_to(data: bytes) -> None:
    reader = Reader()
    reader.dataReceived(boxes(b"1") + data + boxes(b"2"))
    assert (reader.names, reader.lost) == ([b"1"], 1)
    reader.dataReceived(boxes(b"3"))  # was on its way
    assert (reader.names, bool(reader.lost)) == ([b"1"], True)


@pytest.mark.parametrize("cut", range(0, 12, 3))
def test_what_is_read_while_a_box_is_handled_comes_behind_what_came_before(cut: int) -> None:
    reader, behind = Reader(), boxes(b"3", b"4")
    reader.leads_to[b"1"] = behind[:cut]
    reader.dataReceived(boxes(b"1", b"2"))
    reader.dataReceived(behind[cut:])
    assert reader.names == [b"1", b"2", b"3", b"4"]


def test_a_box_that_is_read_meanwhile_may_lead_to_more() -> None:
    reader = Reader()
    reader.leads_to |= {b"1": boxes(b"2"), b"2": boxes(b"3")}
    reader.dataReceived(boxes(b"1"))
    assert reader.names == [b"1", b"2", b"3"]


def test_a_box_that_leads_to_an_error_is_not_read_twice() -> None:
    reader = Reader()
    with pytest.raises(ValueError):  # noqa: PT011 - the reader's own
        reader.dataReceived(boxes(b"error", b"2"))
    reader.dataReceived(boxes(b"3"))
    assert reader.names == [b"error", b"2", b"3"]

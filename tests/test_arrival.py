from __future__ import annotations

import base64
import hashlib
import io

import pytest

from pipeline import errors
from pipeline.arrival import Arrival
from pipeline.storage import Crc32c, Stat


def arriving(found: Stat) -> tuple[Arrival, io.BytesIO, int]:
    file = io.BytesIO()
    arrival = Arrival("x", found, file, lambda _: None)
    return arrival, file, arrival.begin()


def checksums(data: bytes) -> dict[str, str]:
    crc32c = Crc32c()
    crc32c.update(data)
    return {"crc32c": crc32c.text(), "md5": base64.b64encode(hashlib.md5(data).digest()).decode()}


@pytest.mark.parametrize("known", [("crc32c",), ("md5",), ("crc32c", "md5")])
def test_a_changed_byte_is_noticed_by_whatever_checksum_is_known(known: tuple[str, ...]) -> None:
    sums = {kind: checksums(b"quote")[kind] for kind in known}
    arrival, file, number = arriving(Stat(5, "1", **sums))
    arrival.take(number, b"qu0te")
    with pytest.raises(errors.TransferError, match="wrong checksum"):
        arrival.check(number)
    assert file.getvalue() == b""
    arrival.take(number, b"quote")
    arrival.check(number)
    assert file.getvalue() == b"quote"


def test_what_broke_off_is_kept_and_what_is_too_long_starts_over() -> None:
    arrival, file, number = arriving(Stat(5, "1"))
    arrival.take(number, b"quo")
    with pytest.raises(errors.TransferError, match="broke off after 3 of 5 bytes"):
        arrival.check(number)
    assert file.getvalue() == b"quo"
    with pytest.raises(errors.TransferError, match="x sent more than its 5 bytes"):
        arrival.take(number, b"tes")
    assert file.getvalue() == b"" and arrival.size == 0


def test_bytes_of_a_try_that_was_left_behind_are_not_taken() -> None:
    file = io.BytesIO()
    arrival = Arrival("x", Stat(4, "1"), file, lambda _: None)
    left_behind = arrival.begin()
    arrival.take(left_behind, b"ab")
    going_on = arrival.begin()
    for act in (
        lambda: arrival.take(left_behind, b"cd"),
        lambda: arrival.restart(left_behind, Stat(9, "2")),
        lambda: arrival.check(left_behind),
    ):
        with pytest.raises(errors.TransferError, match="another try"):
            act()
    arrival.take(going_on, b"CD")
    arrival.check(going_on)
    assert file.getvalue() == b"abCD"

"""ggml's k-quants Q2_K, Q3_K and Q6_K as codes and scales, and as the bytes that a GGUF stores.

256 consecutive weights of a row are a block, 16 of them share a scale. Layout: `block_q2_K`, `block_q3_K` and
`block_q6_K` in llama.cpp's ggml-common.h; meaning: `dequantize_row_*` in its ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CheckFailed

TENSORS = ("codes", "scales", "mins", "d", "dmin")  # the fields of a KQuant
BLOCK = 256  # weights that share d
GROUP = 16  # weights that share a scale
GROUPS = BLOCK // GROUP


class KType(NamedTuple):
    """What a k-quant type can hold. The bounds are inclusive."""

    block_bytes: int
    max_code: int
    zero_code: int  # subtracted from every code; Q2_K subtracts a minimum of each group instead
    min_scale: int
    max_scale: int
    max_min: int  # 0: the type has no minima


KTYPES = {
    "Q2_K": KType(84, max_code=3, zero_code=0, min_scale=0, max_scale=15, max_min=15),
    "Q3_K": KType(110, max_code=7, zero_code=4, min_scale=-32, max_scale=31, max_min=0),
    "Q6_K": KType(210, max_code=63, zero_code=32, min_scale=-128, max_scale=127, max_min=0),
}


@dataclass(frozen=True)
class KQuant:
    """One matrix in a k-quant type, unpacked. R rows, C columns, C a multiple of 256; all on one device."""

    type: str  # a key of KTYPES
    codes: Tensor  # (R, C) uint8
    scales: Tensor  # (R, C/16) int16; Q3_K: the stored 6 bits minus 32
    mins: Tensor | None  # (R, C/16) int16, Q2_K only
    d: Tensor  # (R, C/256) float16
    dmin: Tensor | None  # (R, C/256) float16, Q2_K only

    def rows(self, chosen: Tensor) -> KQuant:
        """Those rows alone."""
        return self.mapped(lambda values: values[chosen])

    @classmethod
    def joined(cls, parts: Sequence[KQuant]) -> KQuant:
        """The rows of all parts, one after the other."""
        fields = {name: [getattr(part, name) for part in parts] for name in TENSORS}
        whole = {name: None if rows[0] is None else torch.cat(rows) for name, rows in fields.items()}
        return cls(parts[0].type, **whole)  # type: ignore[arg-type]  # only mins and dmin are ever None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> KQuant:
        """`change` done to every tensor."""
        fields = {name: getattr(self, name) for name in TENSORS}
        changed: dict[str, Any] = {name: change(values) for name, values in fields.items() if values is not None}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> KQuant:
        return self.mapped(lambda values: values.to(device))

    def dequantize(self) -> Tensor:
        """(R, C) float32, the very bits that ggml and gguf-py decode to.

        Q2_K: d * scale * code - dmin * min. Q3_K, Q6_K: d * scale * (code - zero_code). Every product is exact in
        float32 (23 bits at most), so only the subtraction rounds, and fused or not makes no difference.
        """
        codes = self.codes.reshape(len(self.codes), -1, GROUP).float()  # (R, C/16, 16)
        codes -= KTYPES[self.type].zero_code
        weights = per_group(self.d, self.scales) * codes
        if self.mins is not None and self.dmin is not None:
            weights = weights - per_group(self.dmin, self.mins)
        return weights.flatten(-2)


def per_group(d: Tensor, scales: Tensor) -> Tensor:
    """(R, C/256) float16 times (R, C/16) integers as (R, C/16, 1) float32."""
    by_block = d.float()[..., None] * scales.reshape(*d.shape, GROUPS).float()
    return by_block.reshape(*scales.shape, 1)


def pack(k: KQuant) -> np.ndarray:
    """(R, bytes a row) uint8 in ggml's layout.

    Raises `CheckFailed` for what the type cannot hold: a bit too many would silently change a neighbour.
    """
    check(k)
    codes = blocks_of(k.codes, BLOCK).astype(np.uint8, copy=False)  # (R, B, 256)
    scales = blocks_of(k.scales, GROUPS)  # (R, B, 16)
    d = halves_as_bytes(k.d)
    halves = (*codes.shape[:-1], 2, BLOCK // 2)  # ggml interleaves each half of a block on its own
    if k.mins is not None and k.dmin is not None:
        both = np.stack((scales, blocks_of(k.mins, GROUPS)), axis=-2).astype(np.uint8)
        fields = [interleave(both, 4), low_bits(codes.reshape(halves)), d, halves_as_bytes(k.dmin)]
    elif k.type == "Q3_K":
        high = interleave(codes.reshape(*codes.shape[:-1], 8, 32) >> 2, 1)
        fields = [high, low_bits(codes.reshape(halves) & 3), pack_scales_6bit(scales), d]
    else:
        nibbles = interleave((codes & 15).reshape(*halves[:-1], 2, 64), 4)
        signed = scales.astype(np.int8).view(np.uint8)
        fields = [nibbles, low_bits(codes.reshape(halves) >> 4), signed, d]
    blocks = np.concatenate([field.reshape(*codes.shape[:2], -1) for field in fields], axis=-1)
    return blocks.reshape(len(blocks), -1)


def unpack(data: np.ndarray, kind: str) -> KQuant:
    """`data` (R, bytes a row) uint8 in ggml's layout; the result is on the CPU and shares no memory with it."""
    if kind not in KTYPES or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] % KTYPES[kind].block_bytes:
        raise CheckFailed(
            f"found {kind} data of shape {data.shape} and type {data.dtype}; needed rows of bytes in whole blocks of "
            f"{', '.join(f'{name} ({ktype.block_bytes} bytes)' for name, ktype in KTYPES.items())}"
        )
    blocks = np.asarray(data).reshape(len(data), -1, KTYPES[kind].block_bytes)  # (R, B, bytes)
    mins = dmin = None
    if kind == "Q2_K":
        both, low, d, dmin = np.split(blocks, [16, 80, 82], axis=-1)
        codes = two_bits(low)
        scales, mins = np.moveaxis(separate(both, 4), -2, 0)
    elif kind == "Q3_K":
        high, low, packed, d = np.split(blocks, [32, 96, 108], axis=-1)
        codes = two_bits(low) | separate(high, 1).reshape(*blocks.shape[:2], BLOCK) << 2
        scales = unpack_scales_6bit(packed)
    else:
        nibbles, high, signed, d = np.split(blocks, [128, 192, 208], axis=-1)
        codes = two_bits(high) << 4
        codes |= separate(nibbles.reshape(*blocks.shape[:2], 2, 64), 4).reshape(codes.shape)
        scales = signed.view(np.int8)
    return KQuant(
        type=kind,
        codes=rows_of(codes, np.uint8),
        scales=rows_of(scales, np.int16),
        mins=None if mins is None else rows_of(mins, np.int16),
        d=bytes_as_halves(d),
        dmin=None if dmin is None else bytes_as_halves(dmin),
    )


def check(k: KQuant) -> None:
    if k.type not in KTYPES or k.codes.ndim != 2 or k.codes.shape[1] % BLOCK:
        raise CheckFailed(
            f"found {k.type} codes of shape {tuple(k.codes.shape)}; needed {', '.join(KTYPES)} and rows that are a "
            f"multiple of {BLOCK}"
        )
    ktype = KTYPES[k.type]
    rows, columns = k.codes.shape
    integers = {"codes": (k.codes, 1, 0, ktype.max_code), "scales": (k.scales, GROUP, ktype.min_scale, ktype.max_scale)}
    halves = {"d": k.d}
    if (k.mins is None or k.dmin is None) == bool(ktype.max_min) or (k.mins is None) != (k.dmin is None):
        raise CheckFailed(f"found {k.type} with mins {k.mins is not None}; needed both mins and dmin for Q2_K only")
    if k.mins is not None and k.dmin is not None:
        integers["mins"] = (k.mins, GROUP, 0, ktype.max_min)
        halves["dmin"] = k.dmin
    for name, (values, width, low, high) in integers.items():
        check_shape(k.type, name, values, (rows, columns // width))
        if values.is_floating_point() or int(values.min()) < low or int(values.max()) > high:
            raise CheckFailed(
                f"found {k.type} {name} of type {values.dtype} from {values.min()} to {values.max()}; needed integers "
                f"from {low} to {high}"
            )
    for name, half in halves.items():
        check_shape(k.type, name, half, (rows, columns // BLOCK))
        if half.dtype != torch.float16 or not bool(half.isfinite().all()):
            raise CheckFailed(
                f"found {k.type} {name} of type {half.dtype} with {int((~half.isfinite()).sum())} values that are not "
                "finite; needed finite float16: the matrix has weights too large for the type, or NaN"
            )


def check_shape(kind: str, name: str, values: Tensor, shape: tuple[int, int]) -> None:
    if values.shape != shape:
        raise CheckFailed(f"found {kind} {name} of shape {tuple(values.shape)}; needed {shape}")


def interleave(parts: np.ndarray, bits: int) -> np.ndarray:
    """(..., n, W) to (..., W): part i of each byte in its bits i*bits and up."""
    joined: np.ndarray = np.bitwise_or.reduce(parts << shifts(bits), axis=-2)
    return joined


def separate(data: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `interleave`: (..., W) to (..., 8/bits, W)."""
    parts: np.ndarray = (data[..., None, :] >> shifts(bits)) & np.uint8((1 << bits) - 1)
    return parts


def shifts(bits: int) -> np.ndarray:
    return np.arange(0, 8, bits, dtype=np.uint8)[:, None]


def low_bits(codes: np.ndarray) -> np.ndarray:
    """(R, B, 2, 128) of 2 bits to (R, B, 2, 32) bytes."""
    return interleave(codes.reshape(*codes.shape[:-1], 4, 32), 2)


def two_bits(data: np.ndarray) -> np.ndarray:
    """(R, B, 64) bytes to (R, B, 256) of 2 bits."""
    return separate(data.reshape(*data.shape[:-1], 2, 32), 2).reshape(*data.shape[:-1], BLOCK)


def pack_scales_6bit(scales: np.ndarray) -> np.ndarray:
    """(R, B, 16), -32..31, to (R, B, 12) bytes: eight with the low 4 bits, four with the high 2."""
    stored = (scales + 32).astype(np.uint8)
    low = interleave((stored & 15).reshape(*stored.shape[:-1], 2, 8), 4)
    high = interleave((stored >> 4).reshape(*stored.shape[:-1], 4, 4), 2)
    return np.concatenate((low, high), axis=-1)


def unpack_scales_6bit(data: np.ndarray) -> np.ndarray:
    shape = (*data.shape[:-1], GROUPS)
    stored = separate(data[..., :8], 4).reshape(shape) | separate(data[..., 8:], 2).reshape(shape) << 4
    scales: np.ndarray = stored.astype(np.int16) - 32
    return scales


def blocks_of(values: Tensor, per_block: int) -> np.ndarray:
    """(R, B * per_block) to (R, B, per_block)."""
    array: np.ndarray = values.detach().cpu().numpy()
    return array.reshape(len(array), -1, per_block)


def rows_of(blocks: np.ndarray, dtype: type[np.generic]) -> Tensor:
    """(R, B, W) to (R, B * W), copied: torch warns of memory it must not write."""
    return torch.from_numpy(blocks.reshape(len(blocks), -1).astype(dtype, order="C"))


def halves_as_bytes(halves: Tensor) -> np.ndarray:
    """(R, B) float16 to (R, B, 2) uint8."""
    array = np.ascontiguousarray(halves.detach().cpu().numpy())
    return array.view(np.uint8).reshape(*array.shape, 2)


def bytes_as_halves(data: np.ndarray) -> Tensor:
    return torch.from_numpy(data.copy().view(np.float16)[..., 0])

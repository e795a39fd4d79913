"""Lookup tables of a block mask: which key blocks a query block keeps, and back.

    table[i, 0 .. count[i]) = ascending j with mask[i, j]

Both directions come from one kernel that reads the mask along its rows or along its columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_kernels.primitives import on_device


@triton.jit
def _lookup_kernel(mask, table, count, stride_bh, stride_row, stride_entry, rows, entries, WIDTH: tl.constexpr):
    row, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = tl.arange(0, WIDTH)
    base = mask + i_bh * stride_bh + row.to(tl.int64) * stride_row
    kept = tl.load(base + entry.to(tl.int64) * stride_entry, mask=entry < entries, other=0).to(tl.int32)  # [WIDTH]
    place = tl.cumsum(kept, 0) - 1
    line = i_bh * rows + row
    tl.store(table + line * entries + place, entry, mask=kept != 0)
    tl.store(count + line, tl.sum(kept, 0))


def lookup(mask: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Table and counts of a block mask.

    Args:
        mask: (B, H, T_m, T_n) bool.
        transposed: list the query blocks of each key block instead.

    Returns:
        Table (B * H, T, entries) int32, of which only the first `count` entries of a line are written, and counts (B * H, T).
    """
    mask = mask.flatten(0, 1).view(torch.uint8)
    mask = mask.transpose(1, 2) if transposed else mask
    heads, rows, entries = mask.shape
    table = torch.empty(heads, rows, entries, dtype=torch.int32, device=mask.device)
    count = torch.empty(heads, rows, dtype=torch.int32, device=mask.device)
    width = triton.next_power_of_2(entries)
    with on_device(mask):
        _lookup_kernel[(rows, heads)](mask, table, count, *mask.stride(), rows, entries, WIDTH=width)
    return table, count

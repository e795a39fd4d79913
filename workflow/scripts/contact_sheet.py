"""Contact sheet: frames over time of every variant, for the same prompts, sampling seed and noise, from lossless videos."""

from pathlib import Path

import av
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sla2.errors import UserError, run_main
from sla2_eval import plot
from sla2_eval.palette import style
from sla2_eval.shown import Clip, on_contact_sheet
from sla2_eval.table_set import TableSet

CELL, GAP = 128, 4  # longest side of a frame, and the space between frames, in px


def strip(clip: Clip, count: int) -> tuple[np.ndarray, list[float]]:
    """`count` frames, evenly spread, side by side as (h, w, 3), and their times in seconds."""
    entry, path = clip.entry, clip.lossless
    indices = np.linspace(0, entry["frames"] - 1, count).round().astype(int)
    scale = CELL / max(entry["height"], entry["width"])
    size = (round(entry["width"] * scale), round(entry["height"] * scale))
    if not path.is_file():
        raise UserError(f"{path}: missing; run the generate step, or bring the lossless videos of these prompts")
    with av.open(str(path)) as container:
        wanted = set(indices.tolist())
        frames = {i: f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in wanted}
    sheet = np.full((size[1] + GAP, count * (size[0] + GAP), 3), 255, np.uint8)
    filter_ = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    for column, index in enumerate(indices):
        left = column * (size[0] + GAP)
        sheet[: size[1], left : left + size[0]] = np.asarray(Image.fromarray(frames[index]).resize(size, filter_))
    return sheet, [float(index) / entry["fps"] for index in indices]


def draw(tables: TableSet, videos: Path) -> Figure:
    shape = tables.study["contact"]
    rows = [on_contact_sheet(tables, videos / name) for name in tables.variants]
    blocks = []
    for clips in zip(*rows, strict=True):  # of one prompt
        strips = [strip(clip, shape["frames"]) for clip in clips]
        blocks.append((np.concatenate([sheet for sheet, _ in strips]), strips[0][1]))
    height, width = blocks[0][0].shape[:2]
    inches = 0.6 / (CELL + GAP)
    size = (2.4 + len(blocks) * width * inches, 0.7 + height * inches)
    figure, axes = plot.plt.subplots(1, len(blocks), figsize=size, sharey=True, squeeze=False)
    row = height / len(rows)
    for ax, clip, (sheet, times) in zip(axes.flat, rows[0], blocks, strict=True):
        ax.imshow(sheet, interpolation="antialiased", aspect="equal")
        ax.set_title(clip.entry["text"], fontsize=9)
        ax.set_xticks([(i + 0.5) * width / len(times) for i in range(len(times))], [f"{t:.1f}" for t in times])
        ax.set_yticks([(i + 0.5) * row for i in range(len(rows))], [style(name).label for name in tables.variants])
        ax.set_xlabel("time (s)")
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    return figure


def main() -> None:
    options = plot.parser(__doc__)
    options.add_argument("--videos", type=Path, required=True, help="results/S/generate")
    args = options.parse_args()
    tables = TableSet(args.tables)
    plot.save(draw(tables, args.videos), args.output, plot.title(__doc__, tables))


if __name__ == "__main__":
    run_main(main)

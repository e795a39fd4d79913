"""One colour, one marker and one name per variant, the same in every figure, table, page and notebook.

The rule reads the name of the row, `<attention>[-<sparsity>][-<ablation>]`, so a new row needs no entry here: a known word gets
its own colour and marker, lighter at lower sparsity; an unknown word gets one that depends on the word alone; `step<number>` at
the end says how long a row was fine-tuned and changes the name only. Colours are Paul Tol's "muted" and "bright" sets, told apart
with the common colour-vision deficiencies; markers differ as well.
"""

import re
import zlib
from dataclasses import dataclass

BLACK, GREY = "#000000", "#7f7f7f"
# Colour and marker by what comes after attention and sparsity; "" is the method itself.
WORDS = {
    "full": (BLACK, "*", "dense (fine-tuned)"),
    "base": (GREY, "P", "dense (untouched)"),
    "base-kernel": ("#a6a6a6", "d", "dense, another kernel"),
    "sla": ("#cc6677", "s", "SLA"),
    "sla-main": ("#882255", "D", "SLA, linear over all keys"),
    "sla2": ("#0055aa", "o", "SLA2"),
    "noquant": ("#66bbee", "v", "no quantisation"),
    "ptq": ("#aa4499", "^", "quantised after training"),
    "topk": ("#117733", "s", "heuristic router"),
    "sum": ("#999933", "X", "sum for α"),
    "proj": ("#44aa99", "D", "projection for α"),
    "random": ("#bb5500", "<", "random router"),
    "fp8": ("#332288", ">", "FP8"),
    "sparse": ("#ccbb44", "h", "sparse branch alone"),
    "linear": ("#ee7733", "p", "linear branch alone"),
    "distill": ("#ee3377", "d", "distilled"),
    "attention": ("#775533", "8", "attention layers learn"),
    "adapter": ("#5566cc", "H", "adapter learns"),
    "lr-half": ("#77bbbb", "v", "half the learning rate"),
    "lr-double": ("#225555", "^", "twice the learning rate"),
    "alpha-90": ("#997700", "<", "α from 0.9"),
}
SPARE_COLORS = ("#228833", "#009988", "#bb8800", "#9988cc", "#dd5577")
SPARE_MARKERS = ("h", "p", "d", "8", "H")


@dataclass(frozen=True)
class Style:
    """Colour as `#rrggbb`, matplotlib marker, and a name for people."""

    color: str
    marker: str
    label: str


def style(variant: str) -> Style:
    """Style of a row of the variants sheet, known or not."""
    method, steps = without_steps(variant)
    if steps:
        row = style(method)
        return Style(row.color, row.marker, f"{row.label}, {steps} steps")
    attention, percent, word = variant, None, None
    if match := re.fullmatch(r"(.+?)-(\d+(?:\.\d+)?)(?:-(.+))?", variant):
        attention, percent, word = match.groups()
    color, marker, name = WORDS.get(word or attention) or _spare(word or attention)
    if word and attention in WORDS:
        name = f"{WORDS[attention][2]}, {name}"
    if percent is None:
        return Style(color, marker, name)
    head, _, tail = name.partition(",")
    label = f"{head} {percent}%" + (f",{tail}" if tail else "")
    return Style(_lighter(color, min(0.6, max(0.0, 97 - float(percent)) / 20)), marker, label)


def without_steps(variant: str) -> tuple[str, str]:
    """Name of the row that `<row>-step<number>` is a point of the curve of, and the number; the name itself and "" for others."""
    match = re.fullmatch(r"(.+)-step(\d+)", variant)
    return (match[1], match[2]) if match else (variant, "")


def label(variant: str) -> str:
    """Name of a variant for people."""
    return style(variant).label


def _spare(word: str) -> tuple[str, str, str]:
    number = zlib.crc32(word.encode())
    return SPARE_COLORS[number % len(SPARE_COLORS)], SPARE_MARKERS[number // 7 % len(SPARE_MARKERS)], word


def _lighter(color: str, share: float) -> str:
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in channels)

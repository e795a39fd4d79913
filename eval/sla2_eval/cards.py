"""Cards of all metrics, read from the docstrings of what computes them: one page, and a check that none is missing.

    python -m sla2_eval.cards [results/S/tables/validity.csv] > cards.html

A docstring holds `Card: \\`name\\`, ..., kind.` and then its fields, each named by a word and a colon.
"""

import ast
import csv
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sla2_eval.metrics.catalogue import METRICS

FIELDS = ("Definition", "Formula", "Range", "Direction", "Source", "Weights", "UndefinedError", "Blind spots")
OPTIONAL = {"Weights": "none", "UndefinedError": "never"}
# Why the validity step, which damages single clips, does not measure a metric; by prefix.
NO_RESPONSE = {
    "attention.": "it is of a model's tensors, not of a video that could be damaged",
    "sparsity.": "it is of a model's tensors, not of a video that could be damaged",
    "floor.": "it compares the dense model with itself, not a video with a damaged one",
    "proxy.kid": "it is of a set of videos together, and the damage is to single clips",
    "guard.": "it is a rule on pixel values or size that none of the damages breaks; tested on frames made by hand",
    "vbench.": "the validity step has no published weights",
    "clip_score.": "the validity step has no published weights",
    "vbench_official.": "VBench runs in an environment of its own",
    "vision_reward": "it is another program",
}
KINDS = {"exact": "exact", "official": "official, needs published weights", "external": "external program"}
_FIELD = re.compile(rf"(?<![\w-])({'|'.join(FIELDS)}): ")


@dataclass
class Card:
    """What is known of one metric; `fields` by `FIELDS`, `measured` rows of `sla2_eval.response`, or why there are none."""

    metric: str
    kind: str
    fields: dict[str, str]
    measured: list[dict] = field(default_factory=list)
    unmeasured: str = "the validity step was not run"

    @property
    def unit(self) -> str:
        return METRICS[self.metric].unit

    @property
    def missing(self) -> list[str]:
        """Fields that a complete card has and this one lacks."""
        return [name for name in FIELDS if not self.fields.get(name)]


def read_cards() -> dict[str, Card]:
    """Cards by metric, in the order of the catalogue; a metric without one is absent. Nothing is imported but text."""
    found: dict[str, Card] = {}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for card in parse(ast.get_docstring(node) or ""):
                    if card.metric in found:
                        raise ValueError(f"{card.metric} has two cards, the second in {path.name}")
                    found[card.metric] = card
    return {name: found[name] for name in METRICS if name in found}


def parse(docstring: str) -> list[Card]:
    """Cards of a docstring, one for each metric that it names."""
    cards = []
    for text in docstring.split("Card: ")[1:]:
        text = re.split(r"\n\s*\n(?:Args|Raises|Returns):", text)[0]
        head, *body = re.split(r"(?=Definition: )", " ".join(text.split()), maxsplit=1)
        parts = _FIELD.split(" ".join(body))
        fields = OPTIONAL | dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))
        kind = next((label for word, label in KINDS.items() if head.rstrip(". ").endswith(word)), "own definition")
        cards += [Card(name, kind, fields) for name in re.findall(r"`([\w.]+)`", head)]
    return cards


def add_measured(cards: dict[str, Card], rows: list[dict], absent: dict[str, str]) -> None:
    """Put rows of step validity onto the cards of their metrics, and onto the others why they have none.

    Args:
        rows: of `sla2_eval.response`; one without a value has its reason.
        absent: reason by metric, of those that the study could not measure at all.
    """
    for row in rows:
        if row["metric"] in cards and row["distortion"]:
            cards[row["metric"]].measured.append(row)
    for name, card in cards.items():
        of_kind = next((why for start, why in NO_RESPONSE.items() if name.startswith(start)), None)
        card.unmeasured = of_kind or absent.get(name) or "the validity run of this study has no row of it"


def response(card: Card) -> dict[str, list[dict]]:
    """Measured rows by domain."""
    answer: dict[str, list[dict]] = {}
    for row in card.measured:
        answer.setdefault(row["domain"], []).append(row)
    return answer


def page(cards: dict[str, Card]) -> str:
    """HTML of all cards."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sla2_eval", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("cards.html").render(cards=cards, fields=FIELDS, response=response, metrics=METRICS)


def main() -> None:
    cards = read_cards()
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open(newline="", encoding="utf-8") as file:
            add_measured(cards, list(csv.DictReader(file)), {})
    print(page(cards))


if __name__ == "__main__":
    main()

"""What choosing a recipe per layer adds at the bytes of one recipe everywhere, on four pretrained networks.

`ocsquant.search` sees calibration data only; the score is that of other stories, sentences or text (subjects.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

import ocsquant
from benchmarks import networks
from benchmarks.accuracy.subjects import FEW_BITS, SUBJECTS, Row, Subject, run, shown
from ocsquant import Recipe

AGAINST, SHORT = ("W4 k-means", "W4 g64", "W5"), ("W4 k-means",)  # 4.3 to 5.5 bits


def rows_of(subject: Subject, short: bool) -> Iterator[Row]:
    def quantized(recipe: Recipe) -> nn.Module:
        model = copy.deepcopy(subject.model)
        return ocsquant.quantize(
            model, recipe, calibration=subject.calibration, simulate=True, filter_fn=networks.no_embedding
        )

    table = ocsquant.sensitivity(subject.model, subject.calibration, filter_fn=networks.no_embedding, simulate=True)
    for name in SHORT if short else AGAINST:
        bits = 8 * sum(options[name].bytes for options in table.options.values()) / sum(table.weights.values())
        everywhere = subject.score(quantized(table.candidates[name]))
        chosen = subject.score(quantized(ocsquant.search(subject.model, table, bits)))
        change = 100 * (chosen[1] / everywhere[1] - 1)
        yield Row(subject.name, f"{name} everywhere, {bits:.2f} bits", shown(everywhere))
        found = f"{shown(chosen)}: {change:+.0f} % loss"
        yield Row(subject.name, "search at the same bytes", found, "<= 0 %", change <= 0)


if __name__ == "__main__":
    columns = ["network", "recipe", "score", "bar", "met"]
    run(__doc__, "search", columns, rows_of, {name: SUBJECTS[name] for name in FEW_BITS})

"""The charts of a comparison's page: each answers one question, which is its title."""

from __future__ import annotations

from horovod_lm.report import cost, sameness
from horovod_lm.report.drawing import Chart, style
from horovod_lm.report.results import Comparison


def charts(comparison: Comparison) -> list[Chart]:
    """All charts that the runs have figures for, in the order of the page."""
    with style():
        found = [
            sameness.chart_of_losses(comparison),
            sameness.chart_of_differences(comparison),
            sameness.chart_of_seeds(comparison),
            sameness.chart_of_norms(comparison),
            sameness.chart_of_scales(comparison),
            *(sameness.chart_of_weights(comparison, which) for which in comparison.others),
            cost.chart_of_ratios(comparison),
            cost.chart_of_rounds(comparison),
            cost.chart_of_speeds(comparison),
            cost.chart_of_parts(comparison),
            cost.chart_of_kinds(comparison),
            cost.chart_of_memory(comparison),
        ]
    return [chart for chart in found if chart is not None]

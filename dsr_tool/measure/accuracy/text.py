"""The accuracy document as a table and sentences for a terminal."""

from __future__ import annotations

from dsr_tool.measure.accuracy.schema import AccuracyDocument
from dsr_tool.report.tables import plain_table, render

__all__ = ["accuracy_text"]


def accuracy_text(document: AccuracyDocument) -> str:
    """Returns the document as text: a column for each network, agreement, and what the intervals mean."""
    this, other = document["this"], document["against"]
    networks = [("this", this), *([("against", other)] if other else [])]
    titles = tuple(title for title, _ in networks)
    table = plain_table("", *titles, numbers=titles)
    for name, top, interval in (
        ("top-1", "top1_fraction", "top1_interval"),
        ("top-5", "top5_fraction", "top5_interval"),
    ):
        cells = [_share(network[top], network[interval]) for _, network in networks]  # type: ignore[literal-required]
        if any(cells):
            table.add_row(name, *cells)
    lines = [
        f"accuracy on {document['data']}: n = {document['pictures']:,}, classes by {document['labels']}",
        *(f"{title}: {network['path']} ({network['kind']}, {network['runtime']})" for title, network in networks),
        *([render(table)] if table.row_count else []),
    ]
    if document["agreement_fraction"] is not None:
        agreement = _share(document["agreement_fraction"], document["agreement_interval"])
        lines.append(
            f"agreement (equal top-1): {agreement}; mean KL(against || this) {document['kl_divergence_nats']:.4f} nats"
        )
    lines.append("in brackets: 95 % interval (Wilson) of the fraction on more pictures of the same kind")
    return "\n".join([*lines, *(f"note: {note}" for note in document["notes"])])


def _share(fraction: float | None, interval: tuple[float, float] | None) -> str:
    """Returns a fraction in percent with its interval; empty if it is not known."""
    if fraction is None or interval is None:
        return ""
    return f"{100 * fraction:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"

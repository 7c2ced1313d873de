"""A simulation as one page: figures and plots in a file that needs nothing else, for `shoal simulate`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from shoal.node.simulate.charts import Line, bars, lines, strips
from shoal.node.simulate.outcome import Outcome, Sample
from shoal.protocol.errors import StorageError

_BINS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_SMOOTH = 9  # samples in the mean that is drawn: few micro-batches end between two looks
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#2b2822;background:#fbf8f2;max-width:900px;margin:2em auto;
padding:0 1em}
h1{font-size:1.5em;margin-bottom:.1em}h2{font-size:1.1em;margin:2em 0 .3em}p{margin:.2em 0 .6em;color:#5d574c}
svg{width:100%;background:#fff;border:1px solid #e7dfd1}svg text{font:11px system-ui,sans-serif}
table{border-collapse:collapse;margin:1em 0}td{padding:.15em 1.2em .15em 0}
@media(prefers-color-scheme:dark){body{background:#1c1b19;color:#e8e2d6}p{color:#b5ad9e}}
"""


def write_report(outcome: Outcome, run_name: str, path: Path) -> None:
    """Write the page. Raises StorageError."""
    try:
        path.write_text(page(outcome, run_name), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"the report cannot be written to {path}: {error}") from error


def page(outcome: Outcome, run_name: str) -> str:
    """The page as HTML."""
    options = outcome.options
    title = f"{run_name}: {options.peers:,} peers, {options.duration_s / 3600:g} h, seed {options.seed}"
    sections = [
        ("Throughput", _throughput_text(outcome), _throughput(outcome)),
        ("Stage balance", _balance_text(outcome), _balance(outcome)),
        ("Peers", _peers_text(outcome), _peers(outcome)),
    ]
    if outcome.reroutes:
        about = "From the loss of a replica until another one had done its work, the stages behind included."
        sections.append(("Re-routing", about, _reroutes(outcome)))
    if outcome.bytes_by_use:
        sections.append(("Bytes", "Sent by all peers, at the size that the real run has.", _bytes(outcome)))
    body = "".join(f"<h2>{escape(name)}</h2><p>{escape(about)}</p>{plot}" for name, about, plot in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><p>{escape(options.told())}</p>"
        f"{_table(outcome)}{body}</body></html>\n"
    )


def _table(outcome: Outcome) -> str:
    figures = outcome.to_json()
    shown = (
        ("of the ideal assignment", f"{outcome.throughput_of_ideal:.1%}"),
        ("of what the slowest stage allowed", f"{outcome.throughput_of_placement:.1%}"),
        ("tokens a second", f"{figures['tokens_per_s']:,}"),
        ("micro-batches", f"{outcome.micro_batches:,}"),
        ("lost with a peer, at some stage", f"{outcome.lost:,}"),
        ("lost otherwise", f"{outcome.unexplained:,}"),
        ("counted twice", f"{outcome.duplicated:,}"),
        (
            "rounds of each stage",
            ", ".join(map(str, outcome.rounds)) if any(outcome.rounds) else "not simulated",
        ),
        ("states lost with a last replica", f"{len(outcome.setbacks):,}"),
        ("trace", outcome.trace),
    )
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in shown)
    return f"<table>{rows}</table>"


def _throughput_text(outcome: Outcome) -> str:
    return (
        "Micro-batches a second, against the best that any assignment of the peers alive could do and "
        f"against what the slowest stage allowed. Measured from {outcome.options.warmup_s:,.0f} s on."
    )


def _throughput(outcome: Outcome) -> str:
    samples = outcome.samples
    rates = smoothed([sample.rate for sample in samples])
    return lines(
        [
            Line("decided", [(sample.at_s, rate) for sample, rate in zip(samples, rates, strict=True)]),
            Line("ideal", [(sample.at_s, sample.ideal) for sample in samples]),
            Line("slowest stage", [(sample.at_s, min(sample.capacity)) for sample in samples]),
        ],
        "throughput over time",
    )


def _balance_text(outcome: Outcome) -> str:
    shares = sorted(outcome.bottlenecks().items(), key=lambda item: -item[1])[:4]
    told = ", ".join(f"stage {stage} {share:.0%} of the time" for stage, share in shares)
    return (
        "A row for each stage: dark where it could do much more than the slowest; the mark is at the "
        f"bottleneck ({told})."
    )


def _balance(outcome: Outcome) -> str:
    samples = outcome.samples
    most = [max(sample.capacity) or 1.0 for sample in samples]
    rows = [
        [sample.capacity[stage] / top for sample, top in zip(samples, most, strict=True)]
        for stage in range(outcome.stages)
    ]
    return strips(
        rows, outcome.options.end_s, [sample.bottleneck for sample in samples], "stage balance over time"
    )


def _peers_text(outcome: Outcome) -> str:
    return (
        f"{outcome.joins:,} joined, {outcome.kills:,} were lost without a word, {outcome.leaves:,} left in "
        f"order, {outcome.moves:,} moved to another stage. Shown: joined and gone since the beginning."
    )


def _peers(outcome: Outcome) -> str:
    ready = sorted(life.ready_s for life in outcome.lives if life.ready_s > 0.0)
    gone = sorted(life.gone_s for life in outcome.lives if life.gone_s < outcome.options.end_s)
    return lines(
        [Line("joined", _counted(ready, outcome.samples)), Line("gone", _counted(gone, outcome.samples))],
        "peers that joined and went",
    )


def _counted(times: Sequence[float], samples: Sequence[Sample]) -> list[tuple[float, float]]:
    return [(sample.at_s, float(sum(at_s <= sample.at_s for at_s in times))) for sample in samples]


def _reroutes(outcome: Outcome) -> str:
    counts = [0] * (len(_BINS_S) + 1)
    for _, took_s in outcome.reroutes:
        counts[sum(took_s > edge for edge in _BINS_S)] += 1
    names = [f"up to {edge:g} s" for edge in _BINS_S] + [f"over {_BINS_S[-1]:g} s"]
    rows = [(name, float(count), f"{count:,}") for name, count in zip(names, counts, strict=True)]
    return bars(rows, "re-route times")


def _bytes(outcome: Outcome) -> str:
    by_size = sorted(outcome.bytes_by_use.items(), key=lambda item: -item[1])
    return bars([(use, count, f"{count / 1e6:,.1f} MB") for use, count in by_size], "bytes by use")


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each and its neighbours."""
    half = _SMOOTH // 2
    windows = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]

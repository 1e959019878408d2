"""What the documentation says in figures: each block of Markdown from one result, wins and losses alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from rmc_kernels.bench.contestants import YARDSTICK
from rmc_kernels.bench.record import OURS, Figure, Spread, TimedCase
from rmc_kernels.bench.scaling import NAMES, Curve, curves
from rmc_kernels.bench.suite import SuiteResult
from rmc_kernels.bench.targets import TARGETS

NOTHING = "Not measured in this run."


def about(result: SuiteResult) -> str:
    """Where the figures are from, and how far to trust them."""
    machine, doubted = result.machine, [case for case in result.cases if case.contention]
    lines = [
        f"`{result.name}` suite of {machine['when'][:10]}: {machine['processor']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, Python {machine['python']}, rmc_kernels {machine['rmc_kernels']}; "
        f"load average before the run {_number(machine['load'])}."
    ]
    if "seconds" in machine:
        lines.append(f"The run took {machine['seconds']:.0f} s.")
    if doubted:
        lines.append(f"{len(doubted)} of {len(result.cases)} cases are in doubt; the reasons, and in how many cases:")
        reasons: dict[str, list[TimedCase]] = {}
        for case in doubted:
            for reason in case.contention:
                reasons.setdefault(reason.partition(":")[0], []).append(case)
        lines.append("; ".join(f"{reason} ({len(found)})" for reason, found in reasons.items()) + ".")
    else:
        lines.append("No case is in doubt.")
    return "\n".join(lines)


def one_thread(result: SuiteResult) -> str:
    """The speed table on one thread."""
    rows = []
    for case in _single(result):
        ours, eager, lstm = (_find(case, name) for name in (OURS, YARDSTICK, "lstm"))
        if case.case.threads > 1 or ours is None:
            continue
        speed_up, share, bound = case.speed_up(ours), ours.share_of_peak, ours.times_bound(case.case)
        rows.append(
            (
                f"{case.case.size}, {case.case.mode}",
                _per_step(case, eager),
                _per_step(case, ours),
                f"{1e6 * ours.best / case.case.steps:,.0f}",
                _ratio(speed_up),
                "" if share is None else f"{100 * share:.0f}",
                "" if bound is None else f"{bound:.1f}",
                _per_step(case, lstm),
                _megabytes(eager),
                _megabytes(ours),
            )
        )
    head = ("case", "eager µs/step", "`cpu` µs/step", "best", "x eager", "% of FMA peak", "x bound", "LSTM µs/step")
    return table((*head, "eager peak MB", "`cpu` peak MB"), rows)


def threads(result: SuiteResult) -> str:
    """What more threads bring."""
    rows = []
    for case in _single(result):
        several = [figure for figure in case.figures if figure.threads > 1 and figure.timed]
        ours = next((figure for figure in several if figure.contestant == OURS), None)
        if ours is None:
            continue
        eager = next((figure for figure in several if figure.contestant == YARDSTICK), None)
        rows.append(
            (
                f"{case.case.size}, {case.case.mode}",
                str(case.case.threads),
                "" if eager is None else _ratio(case.speed_up(eager)),
                _ratio(case.speed_up(ours)),
                _ratio(case.scaling(ours)),
            )
        )
    head = ("case", "threads", "eager on them, x eager", "`cpu` on them, x eager", "`cpu` on them, x itself on one")
    return table(head, rows)


def side_by_side(result: SuiteResult) -> str:
    """Other models beside the cell as sequences grow: time, FLOPs and memory of the longest, and slopes."""
    parts = []
    for setting, chosen in _settings(result, "T").items():
        steps = max(point.size for curve in chosen for point in curve.points)
        rows = []
        for curve in chosen:
            last = curve.points[-1]
            rows.append(
                (
                    curve.contestant,
                    _count(result, curve),
                    f"{1e6 * last.seconds.median / last.size:,.1f}",
                    f"{1e-6 * last.flops / last.size:,.2f}",
                    "" if last.peak_bytes is None else f"{1e-6 * last.peak_bytes:,.1f}",
                    *(_slopes(curve, quantity) for quantity in ("seconds", "flops", "peak_bytes")),
                )
            )
        head = (
            "model", "parameters", f"µs/step at T={steps}", "MFLOP/step", "peak MB",
            "slope of time", "of FLOPs", "of memory",
        )  # fmt: skip
        parts.append(f"{setting}, T to {steps}:\n\n{table(head, rows)}")
    return "\n\n".join(parts) or NOTHING


def slopes(result: SuiteResult) -> str:
    """How time and memory grow with each other size."""
    rows = []
    for axis in (axis for axis in NAMES if axis != "T"):
        for setting, chosen in _settings(result, axis).items():
            for curve in chosen:
                sizes = f"{axis} = {', '.join(str(point.size) for point in curve.points)}"
                growth = (_slopes(curve, quantity) for quantity in ("seconds", "flops", "peak_bytes"))
                rows.append((f"{sizes} ({setting})", curve.contestant, *growth))
    return table(("sizes", "model", "slope of time", "of FLOPs", "of memory"), rows)


def losses(result: SuiteResult) -> str:
    """Against everybody who took part: in how many cases the cell is slower, and by how much."""
    rivals: dict[str, list[float]] = {}
    for case in result.cases:
        for figure in case.figures:
            rival = not figure.contestant.startswith("rmc ") and figure.threads == case.case.threads
            ratio = case.times_ours(figure) if rival else None
            if ratio is not None:
                rivals.setdefault(figure.contestant, []).append(ratio)
    rows = []
    for name, ratios in rivals.items():
        lost = sum(ratio < 1 for ratio in ratios)
        rows.append(
            (
                name,
                str(len(ratios)),
                str(lost),
                f"{1 / min(ratios):.2f} x" if lost else "",
                f"{median(ratios):.2f}",
                f"{max(ratios):.2f} x" if max(ratios) > 1 else "",
            )
        )
    head = ("against", "cases", "`cpu` slower in", "at worst by", "median: their time over ours", "at best faster by")
    return table(head, rows)


def headline(result: SuiteResult) -> str:
    """The speed-ups on one thread, for the README: best first."""
    sizes: dict[str, dict[str, Spread]] = {}
    for case in _single(result):
        ours = _find(case, OURS)
        if ours is not None and case.case.threads == 1 and (speed_up := case.speed_up(ours)) is not None:
            name = f"batch {case.case.batch_size}, {case.case.mem_slots} slots, D = {case.case.mem_size}"
            sizes.setdefault(name, {})[case.case.mode] = speed_up
    order = sorted(sizes, key=lambda name: -max(spread.median for spread in sizes[name].values()))
    modes = ("forward", "forward+backward")
    rows = [(name, *(_ratio(sizes[name].get(mode), " x") for mode in modes)) for name in order]
    return table(("", "forward", "forward + backward"), rows)


def targets(result: SuiteResult) -> str:
    """The project's targets, met and missed."""
    cases, rows = {case.case: case for case in result.cases}, []
    for target in TARGETS:
        case = cases.get(target.case)
        ours = None if case is None else _find(case, OURS, target.case.threads)
        value = None if case is None or ours is None else target.measure.of(case, ours)
        if value is not None:
            shown = target.measure.shown.format
            aim = "" if target.aim is None else shown(target.aim)
            rows.append((target.case.name, shown(target.least), aim, shown(value), target.verdict(value)))
    return table(("case", "target", "aim", "this run", "which is"), rows)


#: Name in a marker -> what stands there.
BLOCKS: dict[str, Callable[[SuiteResult], str]] = {
    "about": about,
    "headline": headline,
    "one-thread": one_thread,
    "threads": threads,
    "side-by-side": side_by_side,
    "slopes": slopes,
    "losses": losses,
    "targets": targets,
}


def _single(result: SuiteResult) -> list[TimedCase]:
    """The cases of no curve."""
    found = curves(result.cases)
    return [case for case in result.cases if not any(curve.holds(case.case) for curve in found)]


def _settings(result: SuiteResult, axis: str) -> dict[str, list[Curve]]:
    found: dict[str, list[Curve]] = {}
    for curve in curves(result.cases):
        if curve.axis == axis:
            found.setdefault(curve.setting, []).append(curve)
    return found


def _find(case: TimedCase, contestant: str, threads: int = 1) -> Figure | None:
    """The contestant's figure on so many threads, if it was timed."""
    found = (f for f in case.figures if f.contestant == contestant and f.threads == threads and f.timed)
    return next(found, None)


def _count(result: SuiteResult, curve: Curve) -> str:
    counts = {f.parameters for case in result.cases if curve.holds(case.case) for f in case.figures
              if f.label == curve.contestant}  # fmt: skip
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _slopes(curve: Curve, quantity: str) -> str:
    """Fitted, and at the end."""
    fitted, last = curve.slope(quantity), curve.last_slope(quantity)
    return "" if fitted is None or last is None else f"{fitted:.2f} ({last:.2f})"


def _per_step(case: TimedCase, figure: Figure | None) -> str:
    return "" if figure is None else f"{1e6 * figure.spread.median / case.case.steps:,.0f}"


def _megabytes(figure: Figure | None) -> str:
    return "" if figure is None or figure.peak_bytes is None else f"{1e-6 * figure.peak_bytes:,.1f}"


def _ratio(spread: Spread | None, unit: str = "") -> str:
    return "" if spread is None else f"{spread.median:.2f}{unit}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table; its last `numbers` columns are flush right."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = "|---" * (len(head) - numbers) + "|---:" * numbers + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *lines]) if lines else NOTHING

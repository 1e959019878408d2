"""The report: one JSON for a device, to which every stage that was run adds its part, and the same as Markdown."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rmc_kernels.bench.gpu.device import Device
from rmc_kernels.bench.gpu.stages import STAGES, Result
from rmc_kernels.bench.models import GATES
from rmc_kernels.bench.record import Figure, TimedCase
from rmc_kernels.errors import in_short
from rmc_kernels.info import facts

SCHEMA = 2
HEADINGS = {
    "verify": "Parity with float64, by the criterion of docs/verification.md",
    "runtime": "Same bits, CUDA graphs, streams, devices",
    "forward": "Time and memory of the forward pass",
    "training": "Time and memory of forward and backward pass",
}
#: Variables that change what is computed with, or how.
ENVIRONMENT = (
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET", "TRITON_CACHE_DIR",
)  # fmt: skip
#: Findings of one kind that are written out.
SHOWN = 20


def path_of(device: Device, out: Path) -> Path:
    """The JSON of a device in a folder."""
    return out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.title.lower()).strip('-')}.json"


def add(device: Device, machine: Mapping[str, Any], stage: str, result: Result, out: Path) -> tuple[Path, Path]:
    """Put a stage's result into the report of its device, in place of an older one; the JSON and the Markdown."""
    path = path_of(device, out)
    data = _before(path)
    data |= {"title": device.title, "stood_in": list(device.stood_in)}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    data["stages"][stage] = {"when": now, **machine, **_plain(result.as_dict())}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".md")
    for file, text in ((path, json.dumps(data, indent=1, allow_nan=False) + "\n"), (written, markdown(data))):
        whole = file.with_name(f"{file.name}.new")  # a run that is killed leaves the old one
        whole.write_text(text, encoding="utf-8")
        whole.replace(file)
    return path, written


def is_report(text: str) -> bool:
    """Whether a text is the JSON of a report."""
    try:
        data = json.loads(text)
    except ValueError:
        return False
    return isinstance(data, dict) and data.get("schema") == SCHEMA and "stages" in data


def without_samples(text: str) -> str:
    """The JSON of a report with medians, quartiles and counts in place of the samples of its cases."""
    data = json.loads(text)
    for stage in data["stages"].values():
        stage["cases"] = [_plain(TimedCase.from_dict(case).without_samples().as_dict()) for case in stage["cases"]]
    return json.dumps(data, indent=1, allow_nan=False)


def _before(path: Path) -> dict[str, Any]:
    """The report so far; a new one where there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = {}
    return data if isinstance(data, dict) and data.get("schema") == SCHEMA else {"schema": SCHEMA, "stages": {}}


def _plain(value: Any) -> Any:
    """Without infinities and NaN, which JSON has none of: None in their place."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine(device: Device) -> dict[str, Any]:
    """With what and where, as plain data; in place of what cannot be told, why."""
    found = _asked(facts)
    return {
        "commit": _commit(),
        "versions": found.get("versions", found),
        "machine": found.get("machine", found),
        "device": _asked(device.facts),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _asked(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it says; a driver that fails is no reason to lose what a stage finds."""
    try:
        return ask()
    except Exception as error:
        return {"not told": in_short(error)}


def markdown(data: Mapping[str, Any]) -> str:
    """The report to read."""
    parts = [f"# {data['title']}\n"]
    if data["stood_in"]:
        lines = "\n".join(f"* {line}" for line in data["stood_in"])
        parts.append(f"**This is no report of a GPU.** Stood in for:\n\n{lines}\n")
    for stage in STAGES:
        parts.append(f"## {HEADINGS[stage]}\n")
        found = data["stages"].get(stage)
        parts.append(_stage(found) if found else "Not run.\n")
    return "\n".join(parts)


def _stage(found: Mapping[str, Any]) -> str:
    counts = Counter(finding["status"] for finding in found["findings"])
    verdict = "passed" if found["ok"] else "FAILED"
    lines = [
        f"**{verdict}** in {found['seconds']:.0f} s: {', '.join(f'{n} {status}' for status, n in counts.items())}. "
        f"{found['when']}, commit {found['commit'] or 'unknown'}.\n",
        _machine(found),
    ]
    for status in ("wrong", "error", "left out", "no yardstick", "not served"):
        lines += _listed(status, [each for each in found["findings"] if each["status"] == status])
    if found["cases"]:
        lines.append(_times([TimedCase.from_dict(case) for case in found["cases"]], found["device"]))
    return "\n".join(lines)


def _machine(found: Mapping[str, Any]) -> str:
    about = {
        **found["versions"],
        **{name: value for name, value in found["device"].items() if name != "nvidia_smi"},
        **found["environment"],
    }
    text = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    smi = found["device"].get("nvidia_smi")
    clocks = ", ".join(f"{name} {value}" for name, value in smi.items()) if smi else "nvidia-smi not there"
    return f"{text}. Before the run: {clocks}.\n"


def _listed(status: str, findings: Sequence[Mapping[str, str]]) -> list[str]:
    """Alike findings share a line."""
    alike = Counter((finding["name"], finding["detail"]) for finding in findings)
    lines = [f"* {status}{f' ({n} times)' if n > 1 else ''}: {name}: {detail}" for (name, detail), n in alike.items()]
    more = [f"* {status}: {len(lines) - SHOWN} more in the JSON"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more, ""] if lines else []


def _times(cases: Sequence[TimedCase], device: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = []
    for case in cases:
        for figure in case.figures:
            summary = case.summary(figure)
            if not summary:
                rows.append((case.case.name, figure.label, figure.status, "", "", "", figure.note))
                continue
            low, high = summary["us_per_step_quartiles"]
            times_eager = summary["speed_up"]
            rows.append(
                (
                    case.case.name,
                    figure.label,
                    f"{summary['us_per_step']:,.1f} ({low:,.1f} to {high:,.1f})",
                    "" if times_eager is None else f"{times_eager:.2f}",
                    "" if figure.peak_bytes is None else f"{figure.peak_bytes / 1e6:,.1f}",
                    "" if figure.severity is None else f"{100 * figure.severity:.0f} %",
                    _note(case, figure, device),
                )
            )
    clock = next((figure.clock for case in cases for figure in case.figures), "nothing")
    head = ("case", "contestant", "µs/step, median (quartiles)", "x eager", "peak MB", "of the parity limit", "note")
    lines = [head, ["---"] * len(head), *rows]
    return f"Timed by {clock}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _note(case: TimedCase, figure: Figure, device: Mapping[str, Any]) -> str:
    """What else a reader should know: of float32 in which arithmetic it was, which torch has two settings for."""
    setting = "cuDNN in float32" if figure.contestant in GATES else "products in float32"
    arithmetic = f"{setting}: {device[setting]}" if case.case.dtype == "float32" and setting in device else ""
    note = "" if figure.is_rmc and figure.severity is not None else figure.note
    return "; ".join(part for part in (note, arithmetic) if part)


def _commit() -> str | None:
    """Of the working tree, marked where that has changes; None outside of one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

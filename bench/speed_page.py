"""Writes docs/speed.md from the committed measurements: `python bench/speed_page.py`; --commands lists what makes them.

Nothing on the page is written by hand: each table stands under the command that made it, and where a peer is ahead of us
at the same precision, the page says so first.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vitrail.benchmark.alternation import ratio

ROOT = Path(__file__).parents[1]
BENCH = "PYTHONPATH=bench/peers peers/bin/vitrail bench"
BOTH = "--against timm,transformers"
ENGINES = "--engines auto,eager,openvino,onnx --precision fp32,bf16,int8"
FEWER = "--engines auto,eager,openvino --precision fp32,bf16,int8"
SHORT = "--precision bf16 --against timm,transformers --no-peaks"
EAGER = "--engines eager --precision fp32"
RUNS = {
    "speed-eager-b16": f"{BENCH} inference --model ViT-B/16 --batch 8 {EAGER} {BOTH} --seconds 60 --no-peaks",
    "speed-eager-s16": f"{BENCH} inference --model ViT-S/16 --batch 8 {EAGER} {BOTH} --seconds 45 --no-peaks",
    "speed-inference-b16": f"{BENCH} inference --model ViT-B/16 --batch 8 {ENGINES} {BOTH} --seconds 240",
    "speed-inference-s16": f"{BENCH} inference --model ViT-S/16 --batch 8 1 {FEWER} {BOTH} --seconds 90 --no-peaks",
    "speed-training-s16": f"{BENCH} training --model ViT-S/16 --batch 8 32 {SHORT} --seconds 120",
    "speed-training-ti4": f"{BENCH} training --model ViT-Ti/4 --size 32 --batch 64 {SHORT} --seconds 60",
}
"""results/NAME.json: the command that makes it, to be given --json and that name."""
CLAIMS = {
    "speed-data": f"{BENCH} data --data PHOTOS --packed PACKED --seconds 40 --against torchvision,timm "
    "--json results/speed-data.json",
    "start": "python bench/start.py",
    "streaming": "python bench/streaming.py --photos PHOTOS --memory",
    "streaming_memory": "python bench/streaming.py --photos PHOTOS --rounds 0",
    "merging": "python bench/merging.py dinov2s.pt imagenette-small",
    "loop_overhead": "python bench/loop_overhead.py",
    "inside": "python bench/inside.py",
}
"""results/NAME.json, or the newest NAME-DATE.json: the command that makes it. A line each, beside what was asked."""
OTHERS = {
    "growth": "python bench/growth.py --plot docs/pictures/growth.png",
    "gpu": "python bench/gpu.py",
}
BARS = {
    ("speed-inference-b16", 8): {"vitrail auto bf16": 2.4, "vitrail auto int8": 4.2},
    ("speed-inference-s16", 8): {"vitrail auto bf16": 2.3, "vitrail auto int8": 3.1},
    ("speed-inference-s16", 1): {"vitrail auto bf16": 2.2, "vitrail auto int8": 2.9},
}
"""What `auto` was to reach, times timm eager fp32."""
HEAD = """# Speed

Written by `python bench/speed_page.py` from the measurements in `results/`; nothing here is typed by hand.

How it is measured: all sides of a table take turns in one process on pinned cores; a number is the median over the rounds,
a ratio is of medians, its interval a 95 % bootstrap over whole rounds. The share is of what bare matrix products of that
precision reach in the same turns, by torch's library: another's may be faster, so that OpenVINO passes 100 %; and a model's
FLOPs are counted whole, though ours leave out of the last block what is not pooled. Memory is the peak of a process that
holds one side alone, without Python and its libraries. Peers run at their best sensible settings: timm with fused attention
as it chooses, transformers with sdpa, both in fp32, under bf16 autocast and with bf16 weights; "openvino by-hand" is
OpenVINO set up directly, its streams tuned.
Training crops are compared with torchvision's and timm's pipelines as rebuilt here with Pillow, without the calls around
each step, and with the libraries' own transforms ("itself"), in one process and through a data worker; timm's and ours end
at uint8, to be normalised on the device.
How to install them: [bench/peers](../bench/peers/README.md).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", action="store_true", help="print the commands that make the measurements")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed.md")
    settings = parser.parse_args()
    if settings.commands:
        print("\n".join([f"{command} --json results/{name}.json" for name, command in RUNS.items()]))
        print("\n".join([*CLAIMS.values(), *OTHERS.values()]))
        return 0
    found = {name: newest(settings.results, name) for name in (*RUNS, *CLAIMS, *OTHERS)}
    missing = [name for name, record in found.items() if record is None]
    text = page({name: record for name, record in found.items() if record is not None}, missing)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(text)
    print(f"written: {settings.out}{'; not measured: ' + ', '.join(missing) if missing else ''}")
    return 0


def newest(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of that name, or else the last of those that bear a date; None where there is none."""
    dated = sorted(folder.glob(f"{name}-????-??-??.json"))
    path = next((one for one in (folder / f"{name}.json", *dated[::-1]) if one.exists()), None)
    return None if path is None else json.loads(path.read_text())


def page(found: dict[str, dict[str, Any]], missing: list[str]) -> str:
    measured = {name: record for name, record in found.items() if name in RUNS}
    parts = [HEAD, *ahead(measured), *bars(measured)]
    for name, record in measured.items():
        heading = "Training" if "training" in name else "Inference"
        model = record["runs"][0]["what"]["model"]
        parts += [f"## {heading}: {model}\n", f"    {RUNS[name]} --json results/{name}.json\n", machine(record)]
        parts += [table(run) for run in record["runs"]]
    parts += claims({name: record for name, record in found.items() if name in CLAIMS})
    if "merging" in found:
        parts += merging(found["merging"])
    if "growth" in found:
        parts += growth(found["growth"])
    if "gpu" in found:
        parts += gpu(found["gpu"])
    if missing:
        parts += ["## Not measured yet\n", "".join(f"- {name}\n" for name in missing)]
    return "\n".join(parts)


def ahead(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Each peer's side that is faster than our fastest of the same precision, or than our eager one where it is PyTorch
    too, with what it is ahead by."""
    lines = []
    for record in measured.values():
        for run in record["runs"]:
            what = run["what"]
            for line in run["lines"]:
                ours = [
                    o for o in run["lines"] if o["side"].startswith("vitrail") and o["precision"] == line["precision"]
                ]
                if not ours or line["side"].startswith("vitrail"):
                    continue
                best = max(ours, key=lambda one: one["rate"])
                eager = [o for o in ours if " eager " in o["side"] and "openvino" not in line["side"]]
                for other in dict.fromkeys(one["side"] for one in (best, *eager) if one["rate"] < line["rate"]):
                    beaten = next(one for one in ours if one["side"] == other)
                    # Of the two themselves: rates drift together, and so their own intervals overlap too soon.
                    lead = ratio(beaten["seconds"], line["seconds"])
                    apart = "clearly" if lead.low > 1 else "within the noise of this run"
                    lines.append(
                        f"- {what['model']}, batch {what['batch']}, {line['precision']}: {line['side']} is "
                        f"{lead.value - 1:.1%} ahead of {other} ({apart}).\n"
                    )
    said = "".join(lines) or "Nowhere in these measurements, at the same precision.\n"
    return ["## Where a peer is ahead\n", said]


def bars(measured: dict[str, dict[str, Any]]) -> list[str]:
    """What was to be reached, what was, and how far `auto` is from the fastest engine set up by hand."""
    rows = ["| | asked | reached | 95 % | of the fastest by hand |", "|---|---|---|---|---|"]
    for (name, batch), wanted in BARS.items():
        runs = [run for run in measured.get(name, {"runs": []})["runs"] if run["what"]["batch"] == batch]
        for run in runs:
            sides = {line["side"]: line for line in run["lines"]}
            for side, least in wanted.items():
                if side in sides:
                    line, speed = sides[side], sides[side]["speedup"]
                    by_hand = sides.get(f"openvino by-hand {line['precision']}")
                    share = f"{line['rate'] / by_hand['rate']:.1%}" if by_hand else "-"
                    label = f"{run['what']['model']}, batch {batch}, {side}"
                    reached = f"{speed['value']:.2f}{'' if speed['value'] >= least else ' (below)'}"
                    rows.append(f"| {label} | {least} | {reached} | {speed['low']:.2f}-{speed['high']:.2f} | {share} |")
    return ["## The bars\n", "\n".join(rows) + "\n"] if len(rows) > 2 else []


def machine(record: dict[str, Any]) -> str:
    about = record["machine"]
    disturbed = [run for run in record["runs"] if not run["machine_use"]["idle"]]
    noise = f" **{len(disturbed)} of its runs were disturbed by other programs.**" if disturbed else ""
    return (
        f"{about['processor']}, {about['cores']} cores, torch {about['torch']}, {record['date']}, "
        f"commit {(record['commit'] or 'unknown')[:9]}.{noise}\n"
    )


def table(run: dict[str, Any]) -> str:
    what = run["what"]
    rates = ", ".join(f"{precision} {rate / 1e9:,.0f}" for precision, rate in run["matrix"].items())
    rows = [
        f"Batch {what['batch']}, {what['size']} pixels, {what['rounds']} rounds; matrix products in GFLOP/s: {rates}.\n",
        "| side | pictures/s | ratio | 95 % | of matrix rate | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for line in run["lines"]:
        speed = line["speedup"]
        name = f"**{line['side']}**" if line["side"].startswith("vitrail") else line["side"]
        chosen = f" ({line['chosen']})" if line["chosen"] else ""
        share = "-" if line["share"] is None else f"{line['share']:.0%}"
        peak = "-" if line["peak"] is None else f"{line['peak'] / 2**20:,.0f}"
        interval = f"{speed['low']:.2f}-{speed['high']:.2f}"
        rows.append(f"| {name}{chosen} | {line['rate']:.3g} | {speed['value']:.2f} | {interval} | {share} | {peak} |")
    return "\n".join(rows) + "\n"


def claims(found: dict[str, dict[str, Any]]) -> list[str]:
    """What is measured by scripts of its own, beside what was asked."""
    rows = ["| | asked | reached | 95 % | measured |", "|---|---|---|---|---|"]
    for name, record in found.items():
        for said, asked, reached in lines_of(name, record):
            middle = reached.get("value", reached.get("median"))
            held = middle >= asked if said.endswith("at least") else middle <= asked
            interval = f"{reached['low']:.2f}-{reached['high']:.2f}" if "low" in reached else "-"
            about = f"{record['date']}, {record['machine']['processor']}, commit {(record['commit'] or 'unknown')[:9]}"
            rows.append(f"| {said} | {asked:g} | {middle:.2f}{'' if held else ' (missed)'} | {interval} | {about} |")
    commands = "".join(f"    {CLAIMS[name]}\n" for name in found)
    return ["## What else was asked\n", commands, "\n".join(rows) + "\n"] if found else []


def lines_of(name: str, record: dict[str, Any]) -> list[tuple[str, float, dict[str, float]]]:
    """What is measured in words, what was asked of it, and what came out."""
    match name:
        case "speed-data":
            (here,) = record["runs"]
            sent = here.get("through a worker", {"ratios": {}})
            return [
                (f"crops per core-second{how}, {what}, at least", 4 if "packed" in what else 2, ratio)
                for how, found in (("", here), (" through a worker", sent))
                for what, ratio in found["ratios"].items()
            ]
        case "start":
            return [
                (
                    f"predict on one picture over import torch, load and forward, {model}, at most",
                    1.5,
                    one["wall"]["ratio"],
                )
                for model, one in record["models"].items()
            ]
        case "streaming":
            stream = record["busy"]["both"]["against_the_slower"]
            return [("predict's stream over the slower of decoding and model, at most", record["at_most"], stream)]
        case "streaming_memory":
            memory = {"value": record["memory"]["growth"]}
            return [("its memory, 10,000 pictures over 1,000, at most", record["at_most_memory"], memory)]
        case "merging":
            best = record["best"]
            what = f"int8 with R = {best['merge']} merged, a point lost at most, over int8, at least"
            return [(what, record["bar"]["times_faster"], best["times_faster"])]
        case "loop_overhead":
            return [("fit over a bare loop, at most", record["at_most"], record["ratio"])]
    return [("attention maps over an explicit forward pass, at most", record["most"], record["maps"]["ratio"])]


def merging(record: dict[str, Any]) -> list[str]:
    """The whole curve of accuracy against speed."""
    rows = [
        "| precision | `--merge` | words left | times unmerged | 95 % | finished head | lost | fitted head | lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in record["curve"]:
        faster = line["times_faster"]
        heads = []
        for head in ("kept", "fitted"):
            lost = line[head]["points_lost"]
            heads += [
                f"{line[head]['accuracy']:.2f} %",
                f"{lost['value']:+.2f} ({lost['low']:+.1f} to {lost['high']:+.1f})",
            ]
        speed = f"{faster['value']:.2f} | {faster['low']:.2f}-{faster['high']:.2f}"
        rows.append(
            f"| {line['precision']} | {line['merge']} | {line['tokens_at_the_end']} | {speed} | {' | '.join(heads)} |"
        )
    count = record["curve"][0]["kept"]["points_lost"]["count"]
    said = (
        f"{record['weights']} on {record['data']} at {record['size']} pixels, batch {record['batch']}, {count} pictures "
        "asked. A finished head was fitted to unmerged words, a fitted one to merged ones; points are lost against the "
        "same precision unmerged.\n"
    )
    command = f"    {CLAIMS['merging']} --rounds {record['rounds']} --threads {record['threads']}\n"
    return ["## Token merging\n", command, said, "\n".join(rows) + "\n"]


def growth(record: dict[str, Any]) -> list[str]:
    rows = ["| grows | at | seconds | formula | MiB | formula |", "|---|---|---|---|---|---|"]
    for name, points in record["series"].items():
        for point in points:
            times = f"{point['seconds']:.3f} | {point['seconds_formula']:.3f}"
            room = f"{point['bytes'] / 2**20:,.0f} | {point['bytes_formula'] / 2**20:,.0f}"
            rows.append(f"| {name} | {point['settings'][name]} | {times} | {room} |")
    said = (
        f"`vitrail bench training --plan` against real runs: {record['worst']:+.1%} at the worst of all points. The time's "
        "formula is FLOPs over the measured matrix rate, at the share that a series' first point reaches.\n"
    )
    picture = "![Time and memory of a training step](pictures/growth.png)\n"
    command = f"    {record['command']} --plot docs/pictures/growth.png\n"
    return ["## Growth\n", command, said, picture, "\n".join(rows) + "\n"]


def gpu(record: dict[str, Any]) -> list[str]:
    parts, rows = record["parts"], ["| | pictures/s | of the measured rate | of the nominal |", "|---|---|---|---|"]
    for name, part in parts.items():
        for side, line in part.get("sides", {}).items():
            nominal = line["utilisation_of_nominal"]
            shown = "-" if nominal is None else f"{nominal:.0%}"
            rate = f"{line['pictures_a_second']:,.0f} | {line['utilisation_of_measured']:.0%}"
            rows.append(f"| {name}, {side} | {rate} | {shown} |")
    said = []
    for name, part in parts.items():
        against = [f"{one} takes {found['value']:.2f} times as long" for one, found in part.get("ratios", {}).items()]
        if "goal" in part:
            against += [f"the goal is {part['goal']:.0%} of the measured rate"]
        if "done_of_counted" in part:
            against += [f"ours does {part['done_of_counted']:.1%} of the multiplications that are counted"]
        if "checked" in part:
            against += ["no step waits for the GPU" if part["checked"] else part["why"]]
        if "relative_error" in part:
            against += [f"{kind} {found['value']:.2f} times bf16" for kind, found in part["ratios_to_bf16"].items()]
            against += [f"{kind} {error:.1%} off" for kind, error in part["relative_error"].items()]
            against += [f"{kind} failed: {why}" for kind, why in part["missing"].items()]
        said += [f"- {name}: {', '.join(against)}.\n"] if against else []
    said += [f"- left out: {line}\n" for line in record["skipped"]]
    wrong = "".join([*said, *(f"- {name} failed: {lines[0]}\n" for name, lines in record["failed"].items())])
    about = f"{record['machine']['gpu']}, torch {record['machine']['torch']}, {record['date']}.\n"
    return ["## On a GPU\n", f"    {OTHERS['gpu']}\n", about, "\n".join(rows) + "\n", wrong]


if __name__ == "__main__":
    sys.exit(main())

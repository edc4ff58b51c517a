"""What users get: size, operations, speed, quality and time of three networks, side by side.

Every figure is taken from the data file of the benchmark that measured it. What was not measured
is missing. A form that was measured in two benchmarks, such as the speed with random values and the
quality with fitted ones, has the figures of both.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.datafiles import PageError, fits, read

Row = dict[str, Any]
NOTE = (
    "Bytes and FLOPs are those of the compressed layers ÷ dense float32; those of bfloat16 and "
    "int8 follow from their bits. Speed is the median ratio to dense float32 on two cores with two "
    "threads: one input is a sentence, an image or a token of the answer, many are 32 sentences or "
    "images or a prompt of 512 tokens. Minutes are CPU minutes of one thread, with calibration."
)
QUALITIES = ("1 − cosine", "loss")
#: Forms on the front page.
FRONT = [
    "dense float32", "dense bfloat16", "dense int8", "weights rounded to 8 bits",
    "GPTQ, 3.5 bits a weight", "DSF, 4.0 bits a weight",
    "GPTQ, 2.5 bits a weight, 35 of 210 layers", "DSF, 2.5 bits a weight, 35 of 210 layers",
    "DSF, 50 %, float32", "DSF, 30 %, float32", "DSF, 25 %, float32", "DSF, 20 %",
]  # fmt: skip


def networks(data: Path) -> dict[str, Any]:
    """Return the content of ``networks.json``."""
    find = _Finder(data)
    rows = [*_encoder(find), *_language_model(find), *_cnn(find)]
    columns = {
        "network": "{network}", "form": "{form}", "bytes": "{bytes:.2f}", "FLOPs": "{flops:.2f}",
        "speed, one input": "{one:.2f}", "speed, many": "{many:.2f}", "quality": _QUALITY,
        "calibrated on": "{calibration}", "CPU minutes": "{minutes:.1f}",
    }  # fmt: skip
    measured = {"note": NOTE, "sources": sorted(find.used)}
    tables: dict[str, Any] = {"what-users-get": {"set": "networks", "columns": columns}}
    front = {header: cell for header, cell in columns.items() if header != "calibrated on"}
    tables["front-page"] = {"set": "networks", "where": {"form": FRONT}, "columns": front}
    for name in dict.fromkeys(row["network"] for row in rows):
        own = {header: cell for header, cell in columns.items() if header != "network"}
        table = {"set": "networks", "where": {"network": name}, "columns": own}
        tables[name.replace(" ", "-").lower()] = table
    return {"sets": {"networks": {"measured": measured, "rows": rows}}, "tables": tables}


_QUALITY = ["cosine {cosine:.3f}", "perplexity × {perplexity:.2f}", "accuracy {accuracy:.1f} %"]


class _Finder:
    """Finds rows of the data files, and remembers where."""

    def __init__(self, data: Path):
        self.data = data
        self.used: set[str] = set()

    def __call__(self, file: str, group: str, **where: Any) -> Row:
        """Return the row that fits."""
        self.used.add(f"{file}.json: {group}")
        rows = read(self.data / f"{file}.json")["sets"].get(group, {}).get("rows", [])
        found = [row for row in rows if fits(row, where)]
        if len(found) != 1:
            raise PageError(f"docs/data/{file}.json: {len(found)} rows of '{group}' fit {where}.")
        return dict(found[0])

    def condition(self, file: str, group: str, name: str) -> Any:
        """Return one of the conditions of a measurement."""
        measured = read(self.data / f"{file}.json")["sets"].get(group, {}).get("measured", {})
        if name not in measured:
            raise PageError(f"docs/data/{file}.json: '{group}' does not say its {name}.")
        return measured[name]

    def speed(self, network: str, form: str) -> Row:
        """Return bytes and speed ÷ dense float32: of one input and of many, with two threads."""
        few, many = {"batch": 1}, {"batch": 32}
        if network == "smollm2":
            few, many = {"batch": 1, "phase": "decoding"}, {"batch": 1, "phase": "prompt"}
        rows = {
            name: self("generate", "forms", network=network, form=form, threads=2, **where)
            for name, where in (("one", few), ("many", many))
        }
        speeds = {name: row["speedup"] for name, row in rows.items()}
        return speeds | {"bytes": rows["one"].get("bytes")}


def _dense(find: _Finder, network: str, short: str) -> list[Row]:
    """Return the forms with all weights, whose sizes follow from their bits, and what they lose."""
    common = {"network": network, "flops": 1.0}
    rows = [
        common | {"form": "dense float32"} | find.speed(short, "dense 32 bits") | {"bytes": 1.0}
    ]
    rounded = "rounded 8 bits" + " and output" * (short == "smollm2")
    for form, timed, method in (
        ("dense bfloat16", "dense bfloat16", "bfloat16"),
        ("dense int8", "dense int8", "dynamic int8"),
        ("weights rounded to 8 bits", rounded, "RTN, all layers"),
    ):
        found = find("bits", "networks", network=network, method=method)
        rows.append(common | {"form": form} | find.speed(short, timed))
        rows[-1] |= {"bytes": found["stored"] / 32} | {n: found[n] for n in QUALITIES if n in found}
    return rows


def _encoder(find: _Finder) -> list[Row]:
    name = "sentence encoder"
    rows = _dense(find, name, "encoder")
    for method, bits in (("GPTQ", 4.0), ("GPTQ", 2.5), ("DSF", 4.0), ("DSF", 2.5)):
        rows.append(_at_bits(find, name, method, bits))
    for row in rows:
        row["cosine"] = 1 - row.pop("1 − cosine", 0.0)
    for density in (50, 25):
        form = f"{density / 100} 32 bits"
        fitted = find("encoder", "networks", density=density, method="DSF", form="full")
        rows.append({
            "network": name, "form": f"DSF, {density} %, float32",
            "flops": density / 100, **find.speed("encoder", form), "cosine": fitted["cosine"],
            "bytes": fitted["bytes"],
            "calibration": f"{fitted['sentences']:,} sentences",
        })  # fmt: skip
    trained = find("encoder", "networks", density=25, method="DSF", form="distilled")
    rows.append(rows[-1] | {
        "form": "DSF, 25 %, float32, distilled", "cosine": trained["cosine"],
        "bytes": trained["bytes"], "calibration": f"{trained['sentences']:,} sentences",
        "minutes": trained["minutes"],
    })  # fmt: skip
    rows.append({
        "network": name, "form": "DSF, 25 %, bfloat16", "flops": 0.25,
        **find.speed("encoder", "0.25 16 bits"),
    })  # fmt: skip
    few = find("calibration", "networks", network=name, density=50, samples=256)
    rows.append({
        "network": name, "form": "DSF, 50 %, float32, 25 sweeps", "flops": 0.5,
        "cosine": 1 - few["dsf"], "calibration": "256 sentences", "minutes": few["seconds"] / 60,
    })  # fmt: skip
    return rows


def _language_model(find: _Finder) -> list[Row]:
    name = "language model"
    rows = _dense(find, name, "smollm2")
    loss = find.condition("bits", "networks", "loss_dense")[name]
    for method in ("GPTQ", "DSF"):
        rows.append(_at_bits(find, name, method, 2.5))
        rows[-1]["form"] += ", 35 of 210 layers"
    for row in rows:
        row["perplexity"] = math.exp(row.pop("loss", loss) - loss)
    dense = find.condition("language-model", "published", "perplexity_dense")
    for density, source, suffix, text in (
        (50, "published", "", "4,096 tokens"),
        (30, "more-text", ", more text and feedback", "16,384 tokens"),
    ):
        method = "DSF" if source == "published" else "DSF, with feedback"
        fitted = find("language-model", source, method=method, density=density / 100)
        minutes = find("language-model", "layers", method=f"DSF, {density}%{suffix}")["minutes"]
        rows.append({
            "network": name, "form": f"DSF, {density} %, float32", "flops": density / 100,
            "perplexity": fitted["perplexity"] / dense, "calibration": text,
            "minutes": minutes * 210 / 100,
        })  # fmt: skip
        if density == 50:
            rows[-1] |= find.speed("smollm2", "0.5 32 bits")
        trained = find("language-model", "distilled", density=density / 100, step="trained")
        rows.append({
            "network": name, "form": f"DSF, {density} %, float32, distilled",
            "flops": density / 100, "perplexity": trained["perplexity"] / dense,
            "calibration": f"{trained['tokens']:,} tokens",
        })  # fmt: skip
    for density, bits in ((50, 16), (25, 32), (25, 16)):
        form = f"{density / 100} {bits} bits"
        rows.append({
            "network": name, "flops": density / 100, **find.speed("smollm2", form),
            "form": f"DSF, {density} %, {'float32' if bits == 32 else 'bfloat16'}",
        })  # fmt: skip
    return rows


def _cnn(find: _Finder) -> list[Row]:
    name = "ResNet-20"
    dense = find("cnn", "resnet20", method="dense")
    rows = []
    for method in ("dense", "magnitude", "DSF, calibrated"):
        for density in (100,) if method == "dense" else (20, 10):
            fitted = find("cnn", "resnet20", method=method, density=density)
            row = {
                "network": name, "bytes": fitted["bytes"] / dense["bytes"],
                "flops": fitted["mflops"] / dense["mflops"], "accuracy": fitted["accuracy"],
            }  # fmt: skip
            if method == "dense":
                speed = find.speed("resnet20", "dense 32 bits")
                rows.append(speed | row | {"form": "dense float32"})
                continue
            short = "DSF" if method.startswith("DSF") else method
            if short == "DSF":
                rows.append({**row, "form": f"DSF, {density} %", "calibration": "128 images"})
            row |= {"form": f"{short}, {density} %, fine-tuned", "accuracy": fitted["fine-tuned"]}
            rows.append(row)
    rows.append({
        "network": name, "form": "DSF, 25 %, float32", "flops": 0.25,
        **find.speed("resnet20", "0.25 32 bits"),
    })  # fmt: skip
    return rows


def _at_bits(find: _Finder, network: str, method: str, bits: float) -> Row:
    """Return a network whose layers take a number of bits a weight."""
    found = find("bits", "networks", network=network, method=method, bits=bits)
    samples = find.condition("bits", "networks", "samples")
    return {
        "network": network, "form": f"{method}, {found['stored']:.1f} bits a weight",
        "bytes": found["stored"] / 32, "flops": found["flops"],
        **{name: found[name] for name in QUALITIES if name in found},
        "calibration": f"{samples} samples", "minutes": found["seconds"] / 60,
    }  # fmt: skip

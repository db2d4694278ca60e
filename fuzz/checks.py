"""Whether what a command gave with exit code 0 is right: each check lists what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz import measuring, readers
from fuzz.ground import SIDES, Setup, gguf_name, weights

_EDITED = ("o_proj.weight", "down_proj.weight")


def check_run(setup: Setup, out: Path, *, measured: bool = True) -> Iterator[str]:
    """A new run: its prompts, its trials, its figures and its export.

    `measured`: whether its settings leave its figures what the judge knows how to measure.
    """
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    yield from _check_settings(setup, record)
    numbers = [trial["number"] for trial in record["trials"]]
    least = int(setup.expected.get("search.trials", setup.trials))
    if numbers != list(range(len(numbers))) or len(numbers) < least:
        yield f"trials {numbers} where {least} were asked for"
    if not measured:
        return
    yield from _check_prompts(setup, record)
    if not (out / "model").is_dir():
        return  # the settings asked for another format
    yield from _check_strangers(out / "model")
    own, after = (
        measuring.load_source(setup.model, measuring.own_template(setup.template)),
        out / "model",
    )
    edited = measuring.load(after)
    if setup.model.is_dir():
        yield from _check_copied(setup.model, after)
    chosen = next(t for t in record["trials"] if t["number"] == record["selected"])
    found = measuring.measure(setup, own, edited, record)
    figures = next(a for a in record["artifacts"] if a["format"] == "safetensors")["measured"]
    yield from _rate("baseline", record["baseline"]["behaviour_rate"], found.before, found.ties)
    yield from _rate("export", figures["behaviour_rate"], found.after, found.ties)
    yield from _drift("export", figures["drift"], found.drift, found.drift_ties)
    yield from _drift("chosen trial", chosen["scores"]["drift"], found.drift, found.drift_ties)


def _rate(name: str, score: dict[str, Any], value: float, ties: int) -> Iterator[str]:
    if abs(score["value"] - value) > ties / score["n"] + 1e-9:
        yield f"{name}: behaviour rate {score['value']:.3f}, and measured by itself {value:.3f}"


def _drift(name: str, score: dict[str, Any], value: float, ties: int) -> Iterator[str]:
    if not ties and not math.isclose(score["value"], value, rel_tol=0.03, abs_tol=2e-5):
        yield f"{name}: drift {score['value']:.6f}, and measured by itself {value:.6f}"


def _check_prompts(setup: Setup, record: dict[str, Any]) -> Iterator[str]:
    for side in SIDES:
        try:
            found = readers.parts(readers.prompts(setup.prompts[side]))
        except readers.Unreadable as error:
            yield f"{side} prompts were read from a file that holds none ({error})"
            continue
        for role, texts in zip((side, f"{side}_eval", f"{side}_holdout"), found, strict=True):
            known = record["prompts"].get(role)
            if (known or {}).get("sha256") != (readers.digest(texts) if texts else None):
                yield f"the {role} prompts are others than the file holds"


_PLACES = ("source", "markers_file", "files", "chat_template", "llama_cpp", "from_gguf")


def _check_settings(setup: Setup, record: dict[str, Any]) -> Iterator[str]:
    for key, value in setup.expected.items():
        found: Any = record["config"]
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not key.endswith(_PLACES) and value != "auto" and not _same(found, value):
            yield f"{key} was asked to be {value!r:.60} and is {found!r:.60}"


def _same(found: Any, value: Any) -> bool:
    """Whether a setting is what was given for it, where a text may stand for a number or a truth."""
    if not isinstance(value, str) or isinstance(found, str):
        return bool(found == value)
    words = {
        True: ("true", "yes", "on", "1", "y", "t"),
        False: ("false", "no", "off", "0", "n", "f"),
    }
    if isinstance(found, bool):
        return value.lower() in words[found]
    return isinstance(found, int | float) and float(found) == float(value)


def _check_copied(source: Path, export: Path) -> Iterator[str]:
    before, after = weights(source), weights(export)
    if before.keys() != after.keys():
        yield f"tensors lost or added: {sorted(before.keys() ^ after.keys())[:3]}"
    changed = [n for n in before if before[n] != after.get(n) and not n.endswith(_EDITED)]
    if changed:
        yield f"tensors changed that nobody edits: {changed[:3]}"


def _check_strangers(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield f"the export holds a link or a pipe, {path.name!r}"
        elif path.is_file() and b"a secret" in path.read_bytes()[:1000]:
            yield f"the export holds a file from outside the model's folder, {path.name!r}"


def check_inspect(model: Path, out: str) -> Iterator[str]:
    """`inspect --json`: sizes, against Transformers' own."""
    found, own = json.loads(out), measuring.load_source(model).model
    truth = {
        "layers": own.config.num_hidden_layers,
        "width": own.config.hidden_size,
        "parameters": sum(p.numel() for p in own.parameters()),
    }
    for key, value in truth.items():
        if found[key] != value:
            yield f"{key} is said to be {found[key]} and is {value}"


def check_evaluate(setup: Setup, edited: Path, out: str) -> Iterator[str]:
    """`evaluate --json` of two models."""
    said = json.loads(out)["search"]
    own, other = measuring.load(setup.model), measuring.load_source(edited)
    record: dict[str, Any] = {"config": {"prompts": {}}}
    found = measuring.measure(setup, own, other, record)
    yield from _rate("base", said["original"]["behaviour_rate"], found.before, found.ties)
    yield from _rate("edited", said["edited"]["behaviour_rate"], found.after, found.ties)
    yield from _drift("edited", said["edited"]["drift"], found.drift, found.drift_ties)


# -- what stands in a run folder -------------------------------------------------------------------


def facts(record: dict[str, Any]) -> dict[int, Any]:
    """A record's trials without their timing."""
    return {
        t["number"]: {key: t.get(key) for key in ("state", "params", "scores", "screened")}
        for t in record["trials"]
    }


def check_weights(truth: dict[str, Any], folder: Path, trial: int) -> Iterator[str]:
    """An export holds exactly the weights of the trial that it is said to be of."""
    known = truth["weights"].get(str(trial))
    if known is None:
        yield f"an export of trial {trial}, which never was"
    elif weights(folder) != known:
        yield f"the export holds other weights than trial {trial}"


def check_export(truth: dict[str, Any], run: Path, to: Path, asked: int | None) -> Iterator[str]:
    """`export`: the weights of the trial asked for, or of the one that it says to be selected."""
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    trial = record["selected"] if asked is None else asked
    yield from check_weights(truth, to, trial)
    if record["artifacts"][-1]["trial"] != trial:
        yield f"the record says that the export is of trial {record['artifacts'][-1]['trial']}"


def check_patched(source: Path, edited: Path, to: Path) -> Iterator[str]:
    """`export --from-gguf`: the source's own bytes, but for the edited tensors, which are the export's."""
    import numpy as np
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    (file,) = to.glob("*.gguf")
    before, after = ({t.name: t for t in GGUFReader(path).tensors} for path in (source, file))
    if before.keys() != after.keys():
        yield f"tensors lost or added: {sorted(before.keys() ^ after.keys())[:3]}"
    known = {gguf_name(n): t for n, t in load_file(edited / "model.safetensors").items()}
    for name in before.keys() & after.keys():
        if not name.endswith(("attn_output.weight", "ffn_down.weight")):
            if before[name].data.tobytes() != after[name].data.tobytes():
                yield f"{name} has changed, which nobody edits"
        elif not np.allclose(after[name].data, known[name], rtol=1e-3, atol=1e-5):
            yield f"{name} is not what the edit makes of it"


def check_rebuilt(truth: dict[str, Any], run: Path, to: Path) -> Iterator[str]:
    """`reproduce`: the weights of the selected trial, from the record alone."""
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    yield from check_weights(truth, to / "model", record["selected"])


def check_resume(truth: dict[str, Any], run: Path) -> Iterator[str]:
    """`resume`: the same trials, and those that are new besides; the weights of the selected one."""
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    known, found = facts(truth["record"]), facts(record)
    changed = [n for n in known if n in found and found[n] != known[n]]
    if changed:
        yield f"trials {changed} are others than they were"
    if not known.keys() <= found.keys():
        yield f"trials {sorted(known.keys() - found.keys())} are lost"
    if (run / "model").is_dir() and record["selected"] in known:
        yield from check_weights(truth, run / "model", record["selected"])
    same = ("baseline", "holdout_baseline", "prompts", "objectives")
    if [record[k] for k in same] != [truth["record"][k] for k in same]:
        yield "figures of the original, prompts or objectives are others than they were"


def check_front(truth: dict[str, Any], out: str) -> Iterator[str]:
    """`front --json`: trials as they were measured."""
    said, known = json.loads(out), facts(truth["record"])
    for trial in said["front"]:
        same = known.get(trial["number"])
        if same is None or {k: trial.get(k) for k in same} != same:
            yield f"trial {trial['number']} on the front is other than it was measured"
    numbers = [t["number"] for t in said["front"]]
    if numbers != truth["record"]["front"]:
        yield f"the front is {numbers}, and was {truth['record']['front']}"


def check_geometry(truth: dict[str, Any], out: str) -> Iterator[str]:
    """`geometry --json`: the same numbers as of the undamaged run."""
    known, said = truth["geometry"], json.loads(out)["layers"]
    same = len(known) == len(said) and all(
        a.keys() == b.keys()
        and all(math.isclose(a[k], b[k], rel_tol=1e-3, abs_tol=1e-4) for k in a)
        for a, b in zip(known, said, strict=True)
    )
    if not same:
        yield "the geometry is other than that of the undamaged run"


def check_page(run: Path) -> Iterator[str]:
    """`report`: a whole page, in which no text of the record is taken for markup."""
    text = (run / "report.html").read_text(encoding="utf-8")
    if "</html>" not in text:
        yield "the page has no end"
    if "<script>alert(1)" in text:
        yield "text of the record is markup in the page"

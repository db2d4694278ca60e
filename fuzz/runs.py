"""Damaged run folders: record, journal, settings, and what was captured of the model."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from fuzz import checks
from fuzz.case import Case, Place
from fuzz.formats import change_gguf, change_safetensors
from fuzz.ground import METHODS, TRIALS
from fuzz.harmless import commented, extended, named, reedited, respaced, torn
from fuzz.mutations import change_bytes, change_json, change_lines, change_toml
from fuzz.values import odd, shown, to_json, to_toml

_OF_A_RECORD = "export resume front front geometry report report reproduce".split()


def _command(place: Place, run: Path, method: str, names: Sequence[str]) -> Case:
    """One of these commands on a run folder, judged by what is true of the run."""
    truth, name = place.ground.truth(method), place.draw.choice(names)
    if name == "export":
        to = place.folder / "to"
        asked = place.draw.choice([None, None, *range(TRIALS)])
        arguments = ["export", str(run), "--to", str(to), "--quiet"]
        if asked is not None:
            arguments += ["--trial", str(asked)]

        def check(_: str) -> Any:
            return checks.check_export(truth, run, to, asked)

        return Case(arguments, check, kept=(run,), absent=(to,))
    if name == "resume":
        arguments = ["resume", str(run), "--quiet"]
        return Case(arguments, lambda _: checks.check_resume(truth, run), kept=(run,))
    if name == "front":
        arguments = ["front", str(run), "--json"]
        return Case(arguments, lambda out: checks.check_front(truth, out), kept=(run,))
    if name == "geometry":
        arguments = ["geometry", str(run), "--json", "--quiet"]
        return Case(arguments, lambda out: checks.check_geometry(truth, out), kept=(run,))
    if name == "reproduce":
        to = place.folder / "to"
        arguments = ["reproduce", str(run / "record.json"), "--out", str(to), "--quiet"]
        return Case(
            arguments, lambda _: checks.check_rebuilt(truth, run, to), kept=(run,), absent=(to,)
        )
    return Case(["report", str(run)], lambda _: checks.check_page(run), kept=(run,))


def _run(place: Place) -> tuple[Path, str]:
    method = place.draw.choice(METHODS)
    return place.copied(f"run-{method}"), method


def record(place: Place) -> Case:
    """The record."""
    run, method = _run(place)
    ways = (change_json, _change_record, _change_record)
    place.change(run / "record.json", *ways, harmless=[respaced, extended])
    return _command(place, run, method, _OF_A_RECORD)


_RECORD_WAYS = (
    "param param-lost score score-lost number front selected schema path layers state prompts "
    "fingerprint engine trial-lost artifact config text objectives"
).split()


def _change_record(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A change of what commands go by."""
    tree = json.loads(data)
    trial = draw.choice(tree["trials"])
    name = draw.choice(sorted(trial["params"]))
    score = draw.choice(sorted(trial["scores"]))
    value: Any = odd(draw)
    how = draw.choice(_RECORD_WAYS)
    if how == "param":
        value = trial["params"][name] = draw.choice([value, 0.5, 1, -3.0, 1e9])
    elif how == "param-lost":
        del trial["params"][name]
    elif how == "score":
        value = trial["scores"][score] = draw.choice(
            [value, {"value": 0.0, "n": 6}, {"value": "x", "n": -1}]
        )
    elif how == "score-lost":
        del trial["scores"][score]
    elif how == "number":
        trial["number"] = draw.choice([0, 99, -1, 2**70])
    elif how in ("front", "selected"):
        numbers: list[Any] = [0, 1, 99, -1, None]
        value = draw.choice(numbers)
        tree[how] = draw.choice([[value], [], [0, 0]]) if how == "front" else value
    elif how == "schema":
        tree["schema"] = draw.choice([0, 2, "1", None, 1.0])
    elif how == "path":
        tree["artifacts"][0]["path"] = draw.choice(
            ["..", "/tmp", "", "model/../..", "no/where", "\x1b[2J", "a\nb"]
        )
    elif how == "layers":
        tree["model"]["layers"] = draw.choice([0, -1, 10**9, 2**63])
    elif how == "state":
        trial["state"] = draw.choice(["failed", "running", "screened", "x"])
    elif how == "prompts":
        role = draw.choice(sorted(tree["prompts"]))
        tree["prompts"][role] = draw.choice([{**tree["prompts"][role], "sha256": "0" * 64}, value])
    elif how == "fingerprint":
        tree["model"]["fingerprint"] = draw.choice([None, "0" * 64])
    elif how == "engine":
        tree["engine"][draw.choice(sorted(tree["engine"]))] = draw.choice([0, -1, 10**12, value])
    elif how == "trial-lost":
        tree["trials"].remove(trial)
    elif how == "artifact":
        tree["artifacts"][0][draw.choice(sorted(tree["artifacts"][0]))] = value
    elif how == "config":
        section = tree["config"][draw.choice(["prompts", "scores", "search", "export", "model"])]
        section[draw.choice(sorted(section))] = value
    elif how == "text":
        key = draw.choice(["behaviour", "description", "method", "selection"])
        value = tree[key] = draw.choice(
            ["\x1b[31mx", "<script>alert(1)</script>", "x" * 10**5, "| a | b\n# c", "\u202ex"]
        )
    else:
        tree["objectives"] = draw.choice([[], ["drift"], ["x", "y"], ["drift", "drift"], value])
    return to_json(tree).encode("utf-8", "surrogatepass"), f"{how} {name} {score} {shown(value)}"


def journal(place: Place) -> Case:
    """The study, of a finished run or of one that was cut short; signed anew, as by who knows how."""
    run, method = _run(place)
    path, cut = run / "study.journal", place.draw.random() < 0.5
    if cut:
        _interrupt(run, path, place)
    ways = (change_bytes, change_lines, _change_log, _change_log, _change_log)
    place.change(path, *ways, harmless=[torn] if cut else ())
    if place.draw.random() < 0.5 and not place.harmless and not place.sound and _sign(path):
        place.said.append("signed")
        return Case(["resume", str(run), "--quiet"], lambda _: (), kept=(run,))
    return _command(place, run, method, ("resume",))


def _sign(path: Path) -> bool:
    """Give the lines of a journal their sums, as Excise does; False where they are no logs."""
    from excise.search.journal import Journal

    try:
        logs = (
            [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        )
    except (ValueError, RecursionError):
        return False
    if not logs or not all(isinstance(log, dict) for log in logs):
        return False
    path.write_bytes(b"")
    Journal(path).append_logs([{k: v for k, v in log.items() if k != "sum"} for log in logs])
    return True


def _interrupt(run: Path, path: Path, place: Place) -> None:
    """The run as a kill in its last batch leaves it."""
    (run / "record.json").unlink()
    (run / "report.html").unlink()
    shutil.rmtree(run / "model")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    ends = [at for at, line in enumerate(lines) if json.loads(line)["op_code"] == 6]
    path.write_text(
        "".join(lines[: ends[TRIALS // 2 - 1] + 1 + place.draw.choice([0, 0, 9, 20])]),
        encoding="utf-8",
    )


def _change_log(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A change of one log, or of the study's own values."""
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    log = json.loads(lines[at])
    how = draw.choice(
        [
            "renamed",
            "range",
            "range",
            "drop",
            "value",
            "code",
            "trial",
            "attribute",
            "attribute",
            "garbage",
        ]
    )
    if how == "renamed" and "param_name" in log:
        log["param_name"] = draw.choice(["x", log["param_name"] + "s", "", "strength", "rank"])
    elif how == "range" and "param_value_internal" in log:
        log["param_value_internal"] = draw.choice([1e9, -1e9, 0.5, "x", None, 10**400])
    elif how == "value" and log.get("values"):
        log["values"] = draw.choice([[0.0, 0.0], [1.0], [], None, ["x", 1], [-5.0, 1e9]])
    elif how == "code":
        log["op_code"] = draw.choice([0, 1, 3, 6, 9, 99, "x", None])
    elif how == "trial" and "trial_id" in log:
        log["trial_id"] = draw.choice([0, 1, 5, 99, -1, "0", None])
    elif how == "attribute":
        at = draw.choice([n for n, line in enumerate(lines) if "user_attr" in line])
        log = json.loads(lines[at])
        key = draw.choice(sorted(log["user_attr"]))
        inner = log["user_attr"][key]
        log["user_attr"][key] = draw.choice([odd(draw), _without(inner, draw), [], {}])
    elif how == "garbage":
        lines.insert(
            draw.choice([0, at]),
            draw.choice(["garbage", "{", "null", "[]", "\x00" * 50, '{"op_code": 0}']),
        )
        return ("\n".join(lines) + "\n").encode(), f"garbage about line {at}"
    else:
        key = draw.choice(sorted(log))
        del log[key]
        how = f"{key} dropped"
    lines[at] = to_json(log)
    return ("\n".join(lines) + "\n").encode(
        "utf-8", "surrogatepass"
    ), f"line {at}: {how} {shown(lines[at][:60])}"


def _without(inner: Any, draw: Random) -> Any:
    if isinstance(inner, dict) and inner:
        key = draw.choice(sorted(inner))
        return draw.choice(
            [{k: v for k, v in inner.items() if k != key}, {**inner, key: odd(draw)}]
        )
    return odd(draw)


_EDITS: dict[str, list[Any]] = {
    "method": ["ridge", "directional", "subspace", "ara"],
    "goal": ["strengthen"], "seed": [1, -1, "x"],
    "model.source": ["none", "demo", ""], "model.dtype": ["bfloat16", "float16", "x"],
    "prompts.direction_size": [5, 7, 16], "prompts.eval_size": [3, 10], "prompts.prefix": ["e "],
    "prompts.suffix": ["?"], "prompts.system": ["Be kind."], "prompts.thinking": [True],
    "prompts.response_prefix": ["e"], "prompts.target.column": ["group", "x"],
    "prompts.target.group_column": ["group"], "prompts.chat_template": ["none"],
    "directions.projected": [True], "directions.winsor": [0.9],
    "directions.center": ["geometric_median"],
    "edit.components": [["attn.o_proj"], ["mlp.down_proj"], ["x"]], "edit.row_norms": ["none", "pre"],
    "edit.post_norms": [False], "ridge.rank": [1, 4], "ridge.basis": [16], "ridge.neighbours": [2],
    "scores.objectives": [["drift", "behaviour_rate"], ["drift"], ["false_rate", "drift"]],
    "scores.report": [["false_rate"], []], "scores.markers": [["x"], ["e"]],
    "scores.max_new_tokens": [2, 9],
    "scores.files": [["none.py"]], "scores.final": [["false_rate"]], "scores.show": [[]],
    "search.trials": [3, 9, 6], "search.startup_trials": [1], "search.batch": [2],
    "search.select": ["drift<=1", "rate<=1", "x"], "search.ei_candidates": [5],
    "engine.rows": [7, 0], "engine.reuse": [False], "export.formats": [["adapter"], []],
    "export.adapter_rank": [1],
    "description": ["another"], "behaviour": ["another", "\x1b[2J"], "export.llama_cpp": ["/nowhere"],
}  # fmt: skip


def run_config(place: Place) -> Case:
    """The settings that a run folder holds."""
    run, method = _run(place)

    def known(data: bytes, draw: Random) -> tuple[bytes, str]:
        tree, key = tomllib.loads(data.decode()), draw.choice(list(_EDITS))
        value = draw.choice(_EDITS[key])
        holder: Any = tree
        *sections, name = key.split(".")
        for part in sections:
            holder = holder.setdefault(part, {})
        holder[name] = value
        return to_toml(tree).encode("utf-8", "surrogatepass"), f"{key} = {shown(value)}"

    ways = (change_toml, known, known, known)
    place.change(run / "config.toml", *ways, harmless=[reedited, commented])
    return _command(place, run, method, ("export", "export", "geometry", "resume"))


def captured(place: Place) -> Case:
    """Directions, or what the method captured; also with the hashes that are known of it made anew."""
    run, method = _run(place)
    names = sorted(path.name for path in run.glob("*.safetensors"))
    name = place.draw.choice(names)
    other = place.ground.run(METHODS[METHODS.index(method) - 1]) / name

    def swapped(_: bytes, draw: Random) -> tuple[bytes, str]:
        files = [other] if other.is_file() else []
        source = draw.choice([*files, run / draw.choice(names)])
        return source.read_bytes(), f"the {source.name} of {source.parent.name}"

    ways = (change_safetensors, change_safetensors, change_safetensors, swapped)
    place.change(run / name, *ways)
    signed = place.draw.random() < 0.5 and not place.sound and (run / name).is_file()
    if signed:
        _hash_anew(run, name)
        place.said.append("signed")
    case = _command(place, run, method, ("export", "resume"))
    return replace(case, check=lambda _: ()) if signed else case


def _hash_anew(run: Path, name: str) -> None:
    """Put a file's hash where the run folder holds it: in the record, and in the study."""
    digest = hashlib.sha256((run / name).read_bytes()).hexdigest()
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    record["files"] = {**record.get("files", {}), name: digest}
    (run / "record.json").write_text(json.dumps(record), encoding="utf-8")
    journal = run / "study.journal"
    logs = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    for log in logs:
        if "files" in log.get("user_attr", {}):
            log["user_attr"]["files"][name] = digest
    journal.write_text("".join(json.dumps(log) + "\n" for log in logs), encoding="utf-8")
    _sign(journal)


def from_gguf(place: Place) -> Case:
    """A GGUF of the run's model, which an export folds its edit into."""
    run, method = _run(place)
    file, to = place.copied("model.gguf"), place.folder / "to"
    place.change(file, change_gguf, harmless=[named])
    arguments = ["export", str(run), "--to", str(to), "--format", "gguf", "--from-gguf", str(file)]

    def check(_: str) -> Any:
        return checks.check_patched(file, place.ground.run(method) / "model", to)

    return Case([*arguments, "--quiet"], check, kept=(run,), absent=(to,))

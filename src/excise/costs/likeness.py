"""What the figures of runs depend on, and which of them may not be compared where that differs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excise.record import Record
from excise.report import formatting
from excise.report.views import behaviour, setting

MEASURED_HERE = "a model without a record, measured here"

_VERDICTS = {"verdict_shows", "verdict_answers", "verdict_other", "verdict_broken", "severity"}
_TARGET = frozenset({"behaviour_rate", "restored", "no_answer", *_VERDICTS})
_CONTRAST = frozenset({"drift", "drift_first", "kept"})
_JUDGED = frozenset({"behaviour_rate", "false_rate", *_VERDICTS})
_KNOWN = _TARGET | _CONTRAST | {"false_rate"}
_NOT_KNOWN = "not on the record"


@dataclass(frozen=True)
class Fact:
    """Something that figures depend on.

    Attributes:
        key: what it is, by a hash or a name; None where the record does not tell.
        shown: the same for people.
        instead: what stands for the key where the other record is of a version that had none.
    """

    key: str | None
    shown: str
    instead: str | None = None


Facts = dict[str, Fact]


@dataclass(frozen=True)
class Unlike:
    """A fact that differs between sides.

    Attributes:
        what: its name.
        shown: side's name -> what it is there.
        scores: the built-in scores that depend on it.
        holdout: whether it is of the holdout prompts alone.
    """

    what: str
    shown: dict[str, str]
    scores: frozenset[str]
    holdout: bool

    def touches(self, name: str) -> bool:
        """Return whether a score depends on it; of scores that are not built in, any may."""
        return name in self.scores or name not in _KNOWN

    def words(self) -> str:
        """Return what differs and what may not be compared, in a sentence."""
        if len(set(self.shown.values())) > 1:
            each = "; ".join(f"{name}: {value}" for name, value in self.shown.items())
        else:
            each = next(iter(self.shown.values()))
        where = " on the holdout" if self.holdout else ""
        return f"{self.what} ({each}): {_listed(self.scores)}{where} may not be compared"


def _listed(scores: frozenset[str]) -> str:
    if not scores:
        return "scores of your own"
    if scores == _KNOWN:
        return "all figures"
    names = [("behaviour rates", "behaviour_rate"), ("KL", "drift"), ("false rates", "false_rate")]
    words = [word for word, name in names if name in scores]
    if "verdict_shows" in scores:
        words.append("verdicts")
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# Fact -> the scores that depend on it; facts of the holdout begin with that word.
_DEPEND = {
    "original model": _KNOWN,
    "precision of the model": _KNOWN,
    "behaviour": _KNOWN,
    "target prompts": _TARGET,
    "contrast prompts": _CONTRAST,
    "borderline prompts": frozenset({"false_rate"}),
    "holdout target prompts": _TARGET,
    "holdout contrast prompts": _CONTRAST,
    "holdout borderline prompts": frozenset({"false_rate"}),
    "markers": _JUDGED,
    "judge": _JUDGED,
    "limit of a response": _KNOWN,
    "form of the prompts": _KNOWN,
    "scorer files": frozenset[str](),
}


def facts_of(record: Record) -> Facts:
    """Return what a run's figures depend on, as far as its record says."""
    model = record.model
    limit = setting(record, "scores", "max_new_tokens")
    quantize = setting(record, "model", "quantize")
    precision = model.dtype if quantize is None else f"{model.dtype}, {quantize}"
    found = {
        "original model": Fact(
            model.fingerprint,
            f"{formatting.model_name(model.source)}, {(model.fingerprint or model.config_sha256)[:8]}",
            f"{formatting.model_name(model.source)} {model.config_sha256}",
        ),
        "precision of the model": Fact(precision, precision),
        "behaviour": Fact(record.behaviour, behaviour(record)),
        "markers": _markers(record),
        "judge": _judge(record),
        "limit of a response": Fact(
            None if limit is None else str(limit),
            _NOT_KNOWN if limit is None else formatting.count(int(limit), "token"),
        ),
        "form of the prompts": _form(record),
        "scorer files": Fact(record.identity.get("scorer files", ""), "of other content"),
    }
    for part, prefix in (("eval", ""), ("holdout", "holdout ")):
        for side in ("target", "contrast", "borderline"):
            found[f"{prefix}{side} prompts"] = _prompts(record, f"{side}_{part}")
    return found


def _prompts(record: Record, role: str) -> Fact:
    known = record.prompts.get(role)
    if known is None:
        # Borderline prompts and a holdout are not of every run; then both sides have none.
        optional = "holdout" in role or "borderline" in role
        return Fact("", "none") if optional else Fact(None, _NOT_KNOWN)
    # With known answers and groups: accuracies depend on them.
    key = f"{known.sha256} {known.labels_sha256 or ''}"
    name = formatting.public_source(known.source)
    return Fact(key, f"{known.n:,} of {name}, SHA-256 {known.sha256[:8]}")


def _markers(record: Record) -> Fact:
    phrases = setting(record, "scores", "markers", default=[])
    own = phrases and not setting(record, "scores", "markers_file")
    shown = formatting.count(len(phrases), "phrase") if own else "those of a file"
    return Fact(record.identity.get("markers"), shown, _text(phrases) if own else None)


def _judge(record: Record) -> Fact:
    judge = record.judge
    if judge is None:
        return Fact("none", "markers alone", "none")
    return Fact(
        record.identity.get("judge"), judge.name, _text({"name": judge.name, **judge.facts})
    )


def _form(record: Record) -> Fact:
    """Return how prompts are put to the model; shares of an opening are what was seen, not what is put."""
    prompts: Mapping[str, Any] = record.config.get("prompts") or {}
    own = {name: prompts.get(name) or "" for name in ("system", "prefix", "suffix")}
    known = record.formatting
    opening = (known.get("opening") or {}).get("ids") or []
    put = [known.get(name) for name in ("template_sha256", "variables", "header")]
    shown = [name.replace("_", " ") for name, value in own.items() if value]
    shown += [f"template {str(put[0])[:8]}"] if put[0] else []
    return Fact(_text([own, put, opening]), ", ".join(shown) or "as they are")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def unlike(names: Sequence[str], sides: Sequence[Facts]) -> list[Unlike]:
    """Return the facts that differ between sides, or that some record does not tell."""
    found = []
    for what, scores in _DEPEND.items():
        facts = [side[what] for side in sides]
        keys = {fact.key for fact in facts}
        if None in keys:  # of some record: what they all have, then
            keys = {fact.instead for fact in facts}
        if len(keys) == 1 and None not in keys:
            continue
        shown = {name: fact.shown for name, fact in zip(names, facts, strict=True)}
        found.append(Unlike(what, shown, scores, what.startswith("holdout")))
    return found

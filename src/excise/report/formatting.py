"""Numbers and judgements in plain words, the same in the console, the card and the report.

Plain text only: whoever writes Markdown or HTML escapes it. Knows the built-in scorers' units; a
score that it does not know is a bare number.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from excise.formats import FORMATS
from excise.named_models import ORIGINS, TITLES
from excise.record import BenchmarkRecord, JudgeRecord, Record, ScoreRecord, Scores, TrialRecord
from excise.search.pareto import SHARES

Change = Literal["less", "same", "more", "unmeasured"]
RATES = SHARES
NATS = frozenset({"drift", "drift_first"})

_TITLES = {
    "behaviour_rate": "Behaviour rate",
    "false_rate": "Behaviour where it does not belong",
    "drift": "KL divergence (full response)",
    "drift_first": "KL (first token)",
    "restored": "Accuracy on target prompts",
    "kept": "Accuracy on contrast prompts",
    "verdict_shows": "Shows the behaviour",
    "verdict_answers": "Answers",
    "verdict_other": "Answers something else",
    "verdict_broken": "Broken",
    "severity": "Severity (0 to 1)",
    "no_answer": "No answer within the limit",
}

_ROLES = {
    "target": "trigger the behaviour; used for directions",
    "contrast": "do not trigger it; used for directions",
    "target_eval": "trigger the behaviour; score trials",
    "contrast_eval": "do not trigger it; score trials",
    "target_confirm": "trigger the behaviour; measure again what could be chosen",
    "contrast_confirm": "do not trigger it; measure again what could be chosen",
    "target_holdout": "trigger the behaviour; final measurement",
    "contrast_holdout": "do not trigger it; final measurement",
    "borderline_eval": "harmless, and look otherwise; score trials",
    "borderline_holdout": "harmless, and look otherwise; final measurement",
    "keep": "ordinary use; their responses are kept",
}

_PHASES = {
    "prompts": "Reading prompts",
    "load": "Loading the model",
    "capture": "Capturing residuals",
    "capture target": "target prompts",
    "capture contrast": "contrast prompts",
    "capture keep": "keep set",
    "capture moments": "contrast prompts, moments in bases",
    "plan": "Finding the batch size",
    "baseline": "Measuring the original model",
    "search": "Searching",
    "responses": "generating responses",
    "passes": "forward passes",
    "judge": "judging responses",
    "tasks": "Reading tasks",
    "bench original": "Benchmarks of the original",
    "bench edited": "Benchmarks of the edited model",
    "confirm": "Measuring again what could be chosen",
    "holdout": "Measuring on holdout prompts",
    "export": "Exporting",
    "load edited": "Loading the edited model",
    "load judge": "Loading the judge",
    **{f"measure {form.name}": f"Measuring the {form.label}" for form in FORMATS.values()},
    "push": "Uploading",
}
_VERBS = {"convert": "Converting to", "quantise": "Quantising to", "measure": "Measuring"}

# Share of the behaviour that is gone, (original - edited) / original, at or above which the words
# apply.
REMOVAL_WORDS = (
    (0.95, "removes nearly all of the behaviour"),
    (0.65, "removes most of the behaviour"),
    (0.35, "removes about half of the behaviour"),
    (0.10, "removes some of the behaviour"),
)
# KL divergence below which the words apply. On two small models with known answers, 0.0004 cost no
# true answer, 0.004 about one in a hundred, 0.01 about five, 0.3 about thirty.
DRIFT_WORDS = ((0.001, "negligible"), (0.01, "low"), (0.05, "moderate"), (0.2, "high"))
_TINY = 1e-6
_SHARE = "behaviour_rate"  # any score in percent
MISSING = "–"
_FILE = re.compile(r"\.(txt|jsonl?|csv|parquet|toml|py|gguf)$", re.IGNORECASE)


def title(name: str) -> str:
    """Return a score's name as a table shows it."""
    words = name.replace("_", " ").strip()
    return _TITLES.get(name) or words[:1].upper() + words[1:]


def unit(name: str) -> str:
    """Return the unit beside a score's name; empty where the value carries its own."""
    return "nats/token" if name in NATS else ""


def heading(name: str) -> str:
    """Return title and unit of a score, for the head of a row or column."""
    return f"{title(name)}, {unit(name)}" if unit(name) else title(name)


def inline(name: str) -> str:
    """Return a score's title within a sentence: 'behaviour rate', 'KL (first token)'."""
    words = title(name)
    return words if words[:2].isupper() else words[:1].lower() + words[1:]


def role_words(role: str, record: Record) -> str:
    """Return what a record's prompts of a role are and are used for, or an empty string."""
    known = record.engine.get("keep")
    used = known.get("used") if isinstance(known, dict) else None
    if role == "keep" and isinstance(used, int):
        return f"{_ROLES[role]} ({used} of them used)"
    return _ROLES.get(role, "")


def phase_words(phase: str) -> str:
    """Return what a phase of a run does; phases of file types are named by their verb."""
    verb, _, kind = phase.partition(" ")
    return _PHASES.get(phase) or (f"{_VERBS[verb]} {kind}" if verb in _VERBS else phase)


def number(name: str, value: float) -> str:
    """Return a score's value without interval or unit: '7.0 %', '0.0103'."""
    return percent(value) if name in RATES else significant(value)


def difference(name: str, value: float) -> str:
    """Return a difference of two values of a score: '14.6 points', '0.00103'."""
    return number(name, value).replace(" %", " points")


def parameter(value: object) -> str:
    """Return a parameter's value as tables show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def points(one: BenchmarkRecord) -> str:
    """Return a difference of shares and its interval: '-1.5 points (-4.0 to 1.0)'."""
    low, high = (f"{100 * bound:+.1f}" for bound in one.interval)
    return f"{100 * one.difference:+.1f} points ({low} to {high})"


def percent(value: float) -> str:
    """Return a share in [0, 1] as percent with one decimal."""
    return f"{100 * value:.1f} %"


def significant(value: float) -> str:
    """Return three significant digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if abs(value) < _TINY:
        return "< 0.000001" if value > 0 else "> -0.000001"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return f"{value:.6f}" if "e" in text else text.rstrip(".")


def interval(name: str, score: ScoreRecord) -> str:
    """Return the 95 % interval in the value's unit, '3.4 to 13.7'; empty for none or next to zero."""
    if score.interval is None or max(map(abs, score.interval)) < _TINY:
        return ""
    low, high = (number(name, bound).removesuffix(" %") for bound in score.interval)
    return f"{low} to {high}"


def measured(name: str, score: ScoreRecord | None) -> str:
    """Return value and interval: '7.0 % (3.4 to 13.7)'; a dash where nothing was measured."""
    if score is None:
        return MISSING
    around = interval(name, score)
    return f"{number(name, score.value)} ({around})" if around else number(name, score.value)


_SPREAD = {"median": "median", "p95": "95th percentile", "max": "largest"}


def spread(score: ScoreRecord | None) -> str:
    """Return how the samples behind a mean lie: 'median 0.0002, 95th percentile 0.04, largest 1.9'."""
    found = (score.spread or {}) if score is not None else {}
    return ", ".join(f"{_SPREAD.get(k, k)} {significant(v)}" for k, v in found.items())


def with_unit(name: str, score: ScoreRecord) -> str:
    """Return value, unit and interval in running text: '0.0103 nats/token (0.0081 to 0.0125)'."""
    around = interval(name, score)
    value = f"{number(name, score.value)} {unit(name)}".strip()
    return f"{value} ({around})" if around else value


def sample(name: str, score: ScoreRecord | None) -> str:
    """Return the sample size of a score: '100 prompts', '3,212 tokens'."""
    if score is None:
        return MISSING
    return count(score.n, "token" if name == "drift" else "prompt")


def judged_by(name: str, record: Record) -> str:
    """Return who gave the verdicts behind a score, and how far to believe it; empty without a judge.

    'by deberta-refusal, kappa 0.81 (0.75 to 0.86)', 'by deberta-refusal, not certified'.
    """
    judge = record.judge
    return f"by {judge.name}, {trust(judge, name)}" if judge and name in judge.scores else ""


def trust(judge: JudgeRecord, name: str) -> str:
    """Return how far a judge agrees with people: 'kappa 0.81 (0.75 to 0.86)', 'not certified'.

    Labelled responses have verdicts and no severity: that is not certified.
    """
    if judge.certificate is None or name == "severity":
        return "not certified"
    return f"kappa {kappa(judge.certificate.kappa)}"


def kappa(score: ScoreRecord) -> str:
    """Return Cohen's kappa with its interval, two decimals: '0.81 (0.75 to 0.86)'."""
    low, high = score.interval or (score.value, score.value)
    return f"{score.value:.2f} ({low:.2f} to {high:.2f})"


def judge_words(judge: JudgeRecord) -> str:
    """Return who judged and what is known of it, in a sentence."""
    found = judge.certificate
    if found is None:
        return (
            f"Judge {judge.name} is not certified: how often it errs is not known (set "
            "scores.judge.labelled, and see `excise judge`)."
        )
    recall = ", ".join(f"{name} {measured(_SHARE, one)}" for name, one in found.recall.items())
    return (
        f"Judge {judge.name}, on {count(found.n, 'labelled response')} ({found.labelled}): kappa (Cohen's) "
        f"{kappa(found.kappa)}, of whether the behaviour shows {kappa(found.kappa_shows)}; recall: "
        f"{recall}."
    )


def assess(scores: Scores, baseline: Scores) -> str:
    """Say what an edit does, by fixed thresholds: 'removes most of the behaviour, at low KL'.

    Where the intervals of edit and original overlap, there is no measurable change.
    """
    removal = _removal(scores.get("behaviour_rate"), baseline.get("behaviour_rate"))
    if "drift" not in scores:
        return removal or "is not assessed"
    drift = drift_words(scores["drift"].value)
    return f"{removal}, at {drift}" if removal else f"comes at {drift}"


def drift_words(value: float) -> str:
    """Return a KL divergence in words, by `DRIFT_WORDS`."""
    word = next((word for limit, word in DRIFT_WORDS if value < limit), None)
    return f"{word} KL" if word is not None else "very high KL: expect damage"


def change(after: ScoreRecord | None, before: ScoreRecord | None) -> Change:
    """Compare the behaviour rates of edit and original; overlapping intervals are the same."""
    if after is None or before is None:
        return "unmeasured"
    if _overlap(after, before):
        return "same"
    return "less" if after.value < before.value else "more"


def _removal(after: ScoreRecord | None, before: ScoreRecord | None) -> str:
    way = change(after, before)
    if after is None or before is None:
        return ""
    if way == "same":
        return "makes no measurable change of the behaviour"
    if way == "more":
        return "shows more of the behaviour"
    share = (before.value - after.value) / before.value
    return next(
        (words for limit, words in REMOVAL_WORDS if share >= limit),
        "removes hardly any of the behaviour",
    )


def _overlap(a: ScoreRecord, b: ScoreRecord) -> bool:
    if a.interval is None or b.interval is None:
        return a.value == b.value
    return a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]


def thresholds() -> str:
    """Return the limits behind `assess`, for the foot of a table."""
    short = [w.removeprefix("removes ").removesuffix(" of the behaviour") for _, w in REMOVAL_WORDS]
    removal = ", ".join(
        f"{words} from {100 * share:.0f} %"
        for words, (share, _) in zip(short, REMOVAL_WORDS, strict=True)
    )
    drift = ", ".join(f"{word} below {limit:g}" for limit, word in DRIFT_WORDS)
    return (
        f"The words follow fixed thresholds. Share of the behaviour that is gone: {removal}; no "
        "measurable change where the intervals of the edited and the original model meet. "
        f"{heading('drift')}: {drift}, else very high."
    )


def duration(seconds: float) -> str:
    """Return seconds in words: '0.4 s', '12 s', '3 min 20 s', '1 h 4 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def chance(trial: TrialRecord) -> str:
    """Return how often a trial is on the front of resampled prompts: '84 %'; a dash where unknown."""
    known = trial.front_probability
    return MISSING if known is None else f"{100 * known:.0f} %"


def count(n: int, noun: str) -> str:
    """Return a number with its noun: '1 trial', '3,212 tokens'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def large(n: int) -> str:
    """Return a large count in words: '1.24 billion', '5.03 million', '900'."""
    return _scaled(n, ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")))


def size(n: int) -> str:
    """Return bytes in decimal units: '2.47 GB'."""
    return _scaled(n, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")), " bytes")


def _scaled(n: int, scales: tuple[tuple[float, str], ...], small: str = "") -> str:
    for power, word in scales:
        if n >= power:
            return f"{n / power:.3g} {word}"
    return f"{n:,}{small}"


def public_source(source: str) -> str:
    """Return a source as it may be published: a Hub id stays, a path loses its folders."""
    if "\\" in source or re.match(r"^[A-Za-z]:", source):
        return PureWindowsPath(source).name or source
    path = PurePosixPath(source)
    is_path = source.startswith(("/", ".", "~")) or source.count("/") > 1
    return (path.name or source) if is_path or _FILE.search(source) else source


def model_name(source: str) -> str:
    """Return a model as it may be published: a named one by its title, others as `public_source`."""
    return TITLES.get(source) or public_source(source)


def origin(source: str) -> str:
    """Return where a model comes from that is on no Hub: 'a local folder'; empty for a Hub id."""
    if hub_id(source):
        return ""
    local = "a local file" if source.lower().endswith(".gguf") else "a local folder"
    return ORIGINS.get(source, local)


def hub_id(source: str) -> str | None:
    """Return `source` where it is a Hub id, owner/name, else None."""
    if source.count("/") != 1 or public_source(source) != source:
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source

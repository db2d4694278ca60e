"""What a study's trials belong to: everything that decides what a trial of the same parameters measures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from excise.checkpoints.loading import Loaded
from excise.checkpoints.model_folder import read_config, weight_files
from excise.errors import ConfigError
from excise.judges.verdicts import Judge
from excise.reading import read_bytes
from excise.runs.session import Session
from excise.search.scoring import Scoring

# Where a weight file is looked at, beside its beginning: models that were trained from one another
# have the same names, sizes and, often, the same embeddings.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def identity(session: Session, batch: int) -> dict[str, Any]:
    """Return what a study's trials belong to; two runs may share trials only if all of it is equal."""
    config, loaded, sets = session.config, session.loaded, session.sets
    return {
        "model": fingerprint(loaded.folder),
        "dtype": str(loaded.dtype),
        "quantize": loaded.quantize,
        "prompts": {s.role: s.sha256 for s in sets.values()},
        "answers": {s.role: s.labels_sha256 for s in sets.values()},
        "method": config.method,
        "goal": config.goal,
        config.method: config.model_dump(mode="json").get(config.method),
        "seed": config.seed,
        "directions": config.directions.model_dump(mode="json"),
        "edit": config.edit.model_dump(mode="json"),
        "scores": config.scores.model_dump(
            mode="json", exclude={"final", "show", "files", "markers", "markers_file", "judge"}
        ),
        "markers": list(session.scoring.markers.phrases),
        "scorer files": [
            hashlib.sha256(read_bytes(Path(file), "scores.files:", ConfigError)).hexdigest()
            for file in config.scores.files
        ],
        "template": {
            **config.prompts.model_dump(mode="json", include={"system", "prefix", "suffix"}),
            **sets.as_dict(),
        },
        "batch": batch,
        **_judge(session),
    }


def _judge(session: Session) -> dict[str, Any]:
    verdicts = session.scoring.judge
    if verdicts is None:
        return {}
    return {"judge": {**verdicts.judge.facts, "weights": weights_of(verdicts.judge)}}


def weights_of(judge: Judge) -> str:
    """Return what a judge's weights are: a hash where they are here, else its name."""
    return judge.name if judge.folder is None else fingerprint(judge.folder)


def check_judge(scoring: Scoring, loaded: Loaded) -> None:
    """Refuse a judge that is the model under test: it would be asked what it thinks of itself.

    Raises:
        ConfigError: it has the same weights, or the same name on a server.
    """
    verdicts = scoring.judge
    if verdicts is None:
        return
    folder, named = verdicts.judge.folder, verdicts.judge.facts.get("model")
    same = (
        named == loaded.source
        if folder is None
        else fingerprint(folder) == fingerprint(loaded.folder)
    )
    if same:
        raise ConfigError(
            f"scores.judge.source: judge {verdicts.name} is the model under test, which may not judge "
            "itself: name another one"
        )


def digests(found: dict[str, Any]) -> dict[str, str]:
    """Return the hash of each part of an identity, for the record."""
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
        for name, part in found.items()
    }


def fingerprint(folder: Path) -> str:
    """Hash of a checkpoint's configuration and of its weights' names, sizes, headers and samples."""
    digest = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            begin = stream.read(8)
            digest.update(begin + stream.read(int.from_bytes(begin, "little")))
            data = stream.tell()
            rest = max(0, size - data - _SAMPLE_BYTES)
            for number in range(_SAMPLES):
                stream.seek(data + number * rest // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()

"""Which file is run beside which: every edited GGUF beside the unedited one of its own type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_models
import pytest

from excise.events import ignore
from excise.export.exporter import Exported
from excise.gguf import measure as ggufcheck
from excise.gguf.export import GgufPlan
from excise.gguf.llamacpp import Tools
from excise.gguf.measure import measure_gguf
from excise.record import ScoreRecord


class Job:
    """In place of what is measured on: only the model's folder is looked at."""

    folder = gguf_models.DEMO

    @property
    def loaded(self) -> Job:
        return self


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(original, edited, adapter) of every measurement; the n-th of them says n and -n."""
    asked: list[tuple[Any, ...]] = []

    def measure(original: Path, edited: Path, adapter: Path | None, *_: Any) -> Any:
        asked.append((original, edited, adapter))
        number = len(asked)
        return [{"rate": ScoreRecord(value=value, n=1)} for value in (number, -number)]

    monkeypatch.setattr(ggufcheck, "_measure_pair", measure)
    monkeypatch.setattr(ggufcheck, "plain_copy", lambda source, folder: folder)

    def convert(tools: Any, plain: Any, room: Path, kinds: list[str], *_: Any) -> Any:
        yield from ((kind, Path(f"original-{kind}")) for kind in reversed(kinds))

    monkeypatch.setattr(ggufcheck, "convert_all", convert)
    return asked


def export(folder: Path, form: str, *files: tuple[str, str, str]) -> Exported:
    listed = [{"file": name, "type": kind, "part": part} for name, kind, part in files]
    return Exported(folder, form, "", 0, {"files": listed}, {})


def test_converted_files_stand_beside_originals_of_their_own_type(
    tmp_path: Path, pairs: list[tuple[Any, ...]]
) -> None:
    files = [("a-F16.gguf", "F16", "model"), ("a-Q8_0.gguf", "Q8_0", "model")]
    made = export(tmp_path, "gguf", *files, ("mmproj-a.gguf", "F16", "projector"))
    plan = GgufPlan(("F16", "Q8_0"), Tools(Path("x"), None))
    done, first = measure_gguf(made, plan, Job(), ignore)  # type: ignore[arg-type]
    assert pairs == [
        (Path(f"original-{kind}"), tmp_path / f"a-{kind}.gguf", None) for kind in ("Q8_0", "F16")
    ]
    half, eighth, projector = done.details["files"]
    assert half["original"]["rate"]["value"] == 2
    assert half["edited"]["rate"]["value"] == -2
    assert eighth["original"]["rate"]["value"] == 1
    assert eighth["edited"]["rate"]["value"] == -1
    assert "edited" not in projector
    assert first["rate"].value == -2  # the first file's, edited


def test_a_patched_file_stands_beside_its_base_and_a_split_one_counts_once(
    tmp_path: Path, pairs: list[tuple[Any, ...]]
) -> None:
    base = tmp_path / "base-00001-of-00002.gguf"
    names = [f"edited-base-0000{n}-of-00002.gguf" for n in (1, 2)]
    made = export(tmp_path, "gguf", *((name, "F16", "model") for name in names))
    _, first = measure_gguf(made, GgufPlan(base=base), Job(), ignore)  # type: ignore[arg-type]
    assert pairs == [(base, tmp_path / names[0], None)]
    assert first["rate"].value == -1


def test_a_name_that_only_looks_like_a_parts_is_measured(
    tmp_path: Path, pairs: list[tuple[Any, ...]]
) -> None:
    made = export(tmp_path, "gguf", ("edited-best-of-all.gguf", "F16", "model"))
    base = tmp_path / "best-of-all.gguf"
    measure_gguf(made, GgufPlan(base=base), Job(), ignore)  # type: ignore[arg-type]
    assert pairs == [(base, tmp_path / "edited-best-of-all.gguf", None)]


def test_an_adapter_stands_on_the_base_beside_the_base_alone(
    tmp_path: Path, pairs: list[tuple[Any, ...]]
) -> None:
    made = export(tmp_path, "gguf-adapter", ("a-LoRA-F32.gguf", "F32", "model"))
    base = tmp_path / "base.gguf"
    plan = GgufPlan(base=base)
    measure_gguf(made, plan, Job(), ignore, adapter=True)  # type: ignore[arg-type]
    assert pairs == [(base, base, tmp_path / "a-LoRA-F32.gguf")]

"""Child processes: a small environment, no code from the current folder, and an end with their parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from excise import children, launcher
from excise.errors import ExportError
from excise.gguf import engine, llamacpp
from excise.gguf.engine import GgufModel

SHOW = """
import json, os, sys
print(json.dumps([dict(os.environ), sys.path, sys.stdin.read()]), file=sys.stderr)
"""
# Says who it is, with a grandchild of its own, and stays.
STAY = """
import os, subprocess, sys, time
from pathlib import Path
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1] + ".new").write_text(f"{os.getpid()} {below.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
QUANTISING = """
import sys
from pathlib import Path
from excise.gguf.llamacpp import Tools, quantise
tools = Tools(Path("none"), (sys.executable, sys.argv[1]))
quantise(tools, Path(sys.argv[2]), Path("target"), "Q8_0")
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def comes(test: Callable[[], Any], seconds: float = 20) -> bool:
    """Whether something becomes true in that time."""
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_child_gets_what_it_needs_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/somewhere", ""]))
    monkeypatch.chdir(tmp_path)
    command = children.python(script(tmp_path, SHOW))
    code, said = children.run(command, "a test", [Path("/tools")])
    assert code == 0
    env, path, given = json.loads(said)
    assert "secret" not in env.values()
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["LC_ALL"] == "C.UTF-8"
    assert env["PATH"] == os.environ["PATH"]
    assert env["PYTHONPATH"] == os.pathsep.join(["/tools", "/somewhere"])
    assert not {"", ".", str(tmp_path)} & set(path)
    assert given == ""
    assert not Path(env["TMPDIR"]).exists()  # its temporary files went with it


def test_a_child_is_looked_at_while_it_runs(tmp_path: Path) -> None:
    looks: list[float] = []
    command = children.python(script(tmp_path, "import time; time.sleep(1.2)"))
    code, _ = children.run(command, "a test", look=lambda: looks.append(time.monotonic()))
    assert code == 0
    assert len(looks) >= 2
    assert looks[-1] - looks[0] < 60


def test_code_in_the_current_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a downloaded folder may hold it: the process that runs a GGUF, and the quantiser."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    for name in ("json", "ctypes", "llama_cpp", "numpy", "torch"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=r"llama\.cpp cannot run"):
        GgufModel(tmp_path / "x.gguf", 8)
    tools = llamacpp.Tools(tmp_path, llamacpp.find_tools(None, ["Q8_0"]).quantizer)
    with pytest.raises(ExportError, match="quantising to Q8_0 failed"):
        llamacpp.quantise(tools, tmp_path / "x.gguf", tmp_path / "y.gguf", "Q8_0")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_child_ends_with_its_parent(tmp_path: Path, end: signal.Signals) -> None:
    said = tmp_path / "pids"
    command = [sys.executable, "-c", QUANTISING, str(script(tmp_path, STAY)), str(said)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        assert comes(said.exists)
        child, below = map(int, said.read_text().split())
        assert not is_gone(child)
        parent.send_signal(end)
        parent.communicate(timeout=20)
        assert comes(lambda: is_gone(child), 5)
        if end == signal.SIGINT:
            assert comes(lambda: is_gone(below), 5)
        elif not is_gone(below):
            os.kill(below, signal.SIGKILL)
    finally:
        parent.kill()


def test_where_no_signal_tells_of_the_parents_end_it_is_watched(tmp_path: Path) -> None:
    said = tmp_path / "pids"
    watch = "import os, sys; from excise.launcher import supervise; "
    watch += "raise SystemExit(supervise(os.getppid(), sys.argv[1:]))"
    program = [sys.executable, str(script(tmp_path, STAY)), str(said)]
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    parent = subprocess.Popen([sys.executable, "-c", start, watch, *program])
    try:
        assert comes(said.exists)
        child, below = map(int, said.read_text().split())
        parent.kill()
        parent.wait()
        assert comes(lambda: is_gone(child), 5)
        os.kill(below, signal.SIGKILL)
    finally:
        parent.kill()
    assert launcher.supervise(os.getppid(), [sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_a_program_that_cannot_be_run_is_said(tmp_path: Path) -> None:
    code, said = children.run([str(tmp_path / "none")], "a test")
    assert code != 0
    assert "No such file" in said
    with pytest.raises(ExportError, match="a test cannot be run"):
        children.run(["a\0b"], "a test")


# -- a worker that does not do its work ------------------------------------------------------------

BOUND = "import sys, time\nout = sys.stdout.buffer\nout.write(b'{}\\n')\nout.flush()\ninput()\n"


@pytest.mark.parametrize(
    "answer",
    [
        "b'hello\\n'",
        "b'[]\\n'",
        "b'[' * 100000 + b'\\n'",
        "b'{}\\n'",
        'b\'{"tokens": [1.5], "shape": [1, 0]}\\n\'',
        'b\'{"tokens": "ab", "shape": [4, 1000000000000]}\\n\'',
        'b\'{"tokens": [], "shape": "ab"}\\n\'',
        "b'\\xff\\n'",
        "b'{\"shape\": [1, 300]'",
        "b'x' * (1 << 25)",
    ],
)
def test_nonsense_of_a_worker_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(engine, "_WORKER", script(tmp_path, f"{BOUND}out.write({answer})\n"))
    for ask in (
        lambda model: model.read([1, 2], 1),
        lambda model: model.greedy([1, 2], frozenset(), 4),
    ):
        with (
            GgufModel(tmp_path / "x.gguf", 8) as model,
            pytest.raises(ExportError, match=r"llama\.cpp cannot run .*x\.gguf") as error,
        ):
            ask(model)
        assert "\n" not in str(error.value)


def test_a_worker_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_PATIENCE", 0.5)
    monkeypatch.setattr(children, "_LOOK", 0.1)
    monkeypatch.setattr(engine, "_WORKER", script(tmp_path, f"{BOUND}time.sleep(60)\n"))
    begun = time.monotonic()
    with (
        GgufModel(tmp_path / "x.gguf", 8) as model,
        pytest.raises(ExportError, match="it did nothing for") as error,
    ):
        model.greedy([1], frozenset(), 4)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 20

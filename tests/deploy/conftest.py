"""A cluster that kubectl talks to, and stand-ins for the programs of other targets."""

import json
import os
import shutil
import sys

import api_server
import pytest

PROGRAMS = ("sbatch", "squeue", "tail", "scancel", "sky", "dstack")
RECORDER = """#!{python}
import json, os, pathlib, sys
files = [pathlib.Path(word).read_text() for word in sys.argv[1:] if word.endswith(".yaml")]
with open({log!r}, "a") as log:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], sys.stdin.read() + "".join(files)]), file=log)
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The server that kubectl talks to, with what it was sent: see ``api_server.serving``."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed here; Debian has it in the package kubernetes-client")
    with api_server.serving() as server:
        clusters = [{"name": "here", "cluster": {"server": server.url}}]
        contexts = [{"name": "here", "context": {"cluster": "here", "user": "me"}}]
        config = {"apiVersion": "v1", "kind": "Config", "clusters": clusters, "contexts": contexts, "current-context": "here"}
        (tmp_path / "config").write_text(json.dumps(config | {"users": [{"name": "me", "user": {}}]}))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        monkeypatch.setenv("HOME", str(tmp_path))  # where kubectl remembers what a server knows
        yield server


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Puts programs first on the path that note what they are given; a function that returns it: words, and what was read."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for program in PROGRAMS:
        (folder / program).write_text(RECORDER.format(python=sys.executable, log=str(tmp_path / "log")))
        (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

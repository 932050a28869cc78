"""The calls of kubectl, sbatch, sky and dstack: kubectl itself talks to a server that checks what it is sent."""

from pathlib import Path

import pytest

from osler.cli.main import main

RECIPE = str(Path(__file__).parent / "golden" / "recipe.yaml")
PAIR = ["--machines", "2", "--gpus", "1", "--name", "pair"]


@pytest.mark.parametrize(
    ("target", "options", "kinds"),
    [
        ("k8s-job", [], ["persistentvolumeclaims", "configmaps", "jobs"]),
        ("trainjob", PAIR, ["persistentvolumeclaims", "configmaps", "trainingruntimes", "trainjobs"]),
    ],
)
def test_kubectl_sends_what_the_server_takes(target, options, kinds, cluster, capfd):
    def deploy(verb: str, *words: str) -> tuple[int, str]:
        code = main(["deploy", verb, RECIPE, "--target", target, *options, *words])
        return code, "".join(capfd.readouterr())

    assert deploy("apply")[0] == 0
    assert [path.partition("?")[0].rpartition("/")[2] for method, path in cluster.requests if method == "POST"] == kinds
    assert all("fieldValidation=Strict" in path for method, path in cluster.requests if method == "POST")
    if target == "k8s-job":
        assert deploy("apply")[0] == 0 and "PATCH" not in dict(cluster.requests), "the same again changes nothing"
        assert "job.batch/recipe" in deploy("status")[1]
        assert "recipe-pod says: step 1" in deploy("logs")[1]
        code, told = deploy("apply", "total_tokens=5")
        assert code == 2 and "immutable" in told and "what it says is above" in told, told
    assert deploy("stop")[0] == 0
    assert list(cluster.objects) == [("persistentvolumeclaims", "osler")], "the volume stays"


def test_a_misspelt_manifest_is_refused_by_the_server(cluster, tmp_path, capfd, monkeypatch):
    from osler.deploy import targets

    job = targets.TARGETS["k8s-job"]
    spoilt = job._replace(render=lambda workload: job.render(workload).replace("backoffLimit", "backofLimit"))
    monkeypatch.setitem(targets.TARGETS, "k8s-job", spoilt)
    assert main(["deploy", "apply", RECIPE, "--target", "k8s-job"]) == 2
    assert "strict decoding error" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        ("slurm", ["sbatch", "squeue --me --name=recipe", "tail --lines=+1 recipe.log", "scancel --me --name=recipe"]),
        (
            "skypilot",
            [
                "sky jobs launch --yes --detach-run --secret HF_TOKEN FILE",
                "sky jobs queue",
                "sky jobs logs --name recipe --no-follow",
                "sky jobs cancel --yes --name recipe",
            ],
        ),
        (
            "dstack",
            ["dstack apply --yes --detach --file -", "dstack ps --all", "dstack logs recipe", "dstack stop --yes recipe"],
        ),
    ],
)
def test_what_other_programs_are_called_with(target, calls, recorded, monkeypatch, capfd):
    words = ["--target", target, "--token", "HF_TOKEN"]
    for verb in ("apply", "status", "logs", "stop"):
        assert main(["deploy", verb, RECIPE, *words]) == 0, capfd.readouterr().err
    made = recorded()
    assert [" ".join("FILE" if word.endswith(".yaml") else word for word in called) for *called, _ in made] == calls
    assert main(["deploy", "render", RECIPE, *words]) == 0
    assert [read for *_, read in made] == [capfd.readouterr().out, "", "", ""], "the first call alone is given the manifest"
    monkeypatch.setenv("ENDS_WITH", "3")
    assert main(["deploy", "status", RECIPE, *words]) == 2
    assert "ended with 3; what it says is above" in capfd.readouterr().err


def test_a_program_that_is_missing_is_named_with_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["deploy", "apply", RECIPE, "--target", "jobset", *PAIR]) == 2
    told = capsys.readouterr().err
    assert "driven by `kubectl`, which is not installed here" in told and "`osler deploy render`" in told

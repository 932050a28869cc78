"""What the command does before it serves: names, key, port, and the models that it opens."""

from pathlib import Path

import pytest
import torch

from osler.cli.main import main
from osler.inference.load import LoadedModel
from osler.runtime.errors import UserError
from osler.serve.config import ServeConfig
from osler.serve.process import KEY_VARIABLE, api_key, listening, names_of, opened


def test_models_have_the_names_of_their_folders_or_given_ones(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    assert names_of([str(run), str(checkpoint), f"mine={run}"]) == {
        "clinic": str(run), f"clinic@{checkpoint.name}": str(checkpoint), "mine": str(run),
    }  # fmt: skip
    for models in (["runs/a", "b/a"], ["x=a", "x=b"], ["=a"]):
        with pytest.raises(UserError, match="give names"):
            names_of(models)


def test_the_key_is_in_a_file_or_in_the_environment_and_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert api_key(ServeConfig()) is None
    monkeypatch.setenv(KEY_VARIABLE, "from outside")
    assert api_key(ServeConfig()) == "from outside"
    (tmp_path / "key").write_text(" from a file \nand a note\n")
    assert api_key(ServeConfig(api_key_file=str(tmp_path / "key"))) == "from a file"
    for content, told in ((b"", "is empty"), ("schlüssel".encode(), "printable ASCII"), (b"\xff", "cannot be read")):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(UserError, match=told):
            api_key(ServeConfig(api_key_file=str(tmp_path / "key")))
    with pytest.raises(UserError, match=r"cannot be read: .*no-key"):
        api_key(ServeConfig(api_key_file=str(tmp_path / "no-key")))


def test_a_port_that_is_taken_is_found_before_models_load(capsys: pytest.CaptureFixture[str]) -> None:
    with listening(ServeConfig(port=0)) as listener:
        assert main(["serve", "no-such-run", "--port", str(listener.getsockname()[1])]) == 2
    assert "cannot be listened on (Address already in use): give another --host or --port" in capsys.readouterr().err
    assert main(["serve", "no-such-run", "--port", "0"]) == 2
    assert "no-such-run" in capsys.readouterr().err
    assert main(["serve", "no-such-run", "--port", "70000"]) == 2
    assert "port: must be at least 0 and at most 65535" in capsys.readouterr().err


def test_a_folder_of_hugging_face_is_opened_as_it_is(models: dict[str, LoadedModel], checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    ready, expected = opened(str(tmp_path / "hf"), ServeConfig(device="cpu")), models["asked"]
    assert ready.answers_questions and ready.tokenizer.to_bytes() == expected.tokenizer.to_bytes()
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        logits = [one.model.logits(one.model(ids)) for one in (ready, expected)]
    torch.testing.assert_close(*logits)
    assert opened(str(checkpoint), ServeConfig(device="cpu")).path == checkpoint

"""The GGUF file, read back by the ``gguf`` package; LOG says what a real llama.cpp made of it."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from osler.cli.main import main
from osler.export.gguf import QWEN2_PIECES
from osler.export.huggingface import CHAT_TEMPLATE, qwen3_weights
from osler.inference.load import load_model
from osler.model.config import SparseAttentionConfig, YarnConfig
from osler.tokenizer import superbpe
from osler.tokenizer.bpe import EOS, Tokenizer, split_bytes
from tests.export.conftest import SHAPES
from tests.export.test_huggingface import TEXT, fuzzed

gguf = pytest.importorskip("gguf")


def read(path) -> tuple[dict, dict]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {one.name: one for one in reader.tensors}


def as_llama_cpp(fields: dict, text: str) -> list[int]:
    """What llama.cpp makes of a text, by the fields of the file alone: user-defined tokens, then GPT-2's cut and merges."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocab = {token: number for number, token in enumerate(tokens) if types[number] == gguf.TokenType.NORMAL}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab, [pair for pair in merges if "".join(pair) in vocab]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    whole = [number for number, kind in enumerate(types) if kind == gguf.TokenType.USER_DEFINED]

    def parts(text: str, whole: list[int]) -> Iterator[int]:
        if not whole:
            yield from backend.encode(text).ids if text else []
            return
        before, *others = text.split(tokens[whole[0]])
        yield from parts(before, whole[1:])
        for other in others:
            yield whole[0]
            yield from parts(other, whole[1:])

    return list(parts(text, sorted(whole, key=lambda number: -len(tokens[number]))))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_read_back_as_the_weights(shape, dtype, checkpoint, tmp_path):
    run, path = checkpoint(**SHAPES[shape]), tmp_path / "model.gguf"
    assert main(["export", str(run), "--to", "gguf", "--dtype", dtype, "--out", str(path)]) == 0
    fields, tensors = read(path)
    model = load_model(run).model
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.num_layers)
    expected = {
        names.get_name(name, try_suffixes=(".weight",)): weight.numpy()
        for name, weight in qwen3_weights(model.config, model.state_dict()).items()
    }
    assert expected.keys() == tensors.keys() and fields["qwen3.attention.key_length"] == model.config.head_dim
    steps = {"q8_0": 1 / 127, "q4_0": 1 / 8}
    for name, weight in expected.items():
        got = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).reshape(weight.shape)
        if weight.ndim == 1 or dtype == "f32":
            np.testing.assert_array_equal(got, weight)
        elif dtype in steps:  # a block of 32 weights has steps of its largest one's size over 127, or over 8
            blocks, error = weight.reshape(-1, 32), np.abs(got - weight).reshape(-1, 32)
            assert (error <= 1.02 * steps[dtype] * np.abs(blocks).max(1, keepdims=True)).all() and error.any()
        else:
            np.testing.assert_allclose(got, weight, rtol=2**-8, atol=1e-7)


def test_text_has_the_same_tokens_but_where_it_is_said(checkpoint, tmp_path, capsys):
    run, path = checkpoint(rope_scaling=YarnConfig(factor=2, original_max_seq_len=32)), tmp_path / "model.gguf"
    assert main(["export", str(run), "--to", "gguf", "--out", str(path)]) == 0
    said, ours, (fields, _) = capsys.readouterr().err, load_model(run).tokenizer, read(path)
    assert "combining marks" in said and "' (A)'" not in said and "'(A)'" not in said
    texts = [TEXT.replace("\n\n", "\n\n\n"), *(text for text in fuzzed(200) if text.isascii() and "<|" not in text)]
    for text in (text.replace("(A)", " (A)") for text in texts):
        assert as_llama_cpp(fields, text) == ours.encode(text)
    assert fields["tokenizer.ggml.tokens"][ours.eos_id] == EOS and len(fields["tokenizer.ggml.tokens"]) == 532
    assert fields["tokenizer.ggml.token_type"][ours.eos_id] == gguf.TokenType.CONTROL
    assert fields["tokenizer.chat_template"].startswith(CHAT_TEMPLATE) and fields["tokenizer.ggml.eos_token_id"] == ours.eos_id
    assert fields["qwen3.rope.scaling.type"] == "yarn" and fields["qwen3.rope.scaling.original_context_length"] == 32


def test_letters_of_options_that_are_cut_otherwise_are_named(checkpoint, tmp_path, capsys):
    run = checkpoint(Tokenizer.train(["a list(B) of(B) names(B) "] * 9, 300))  # without a space, so " (B)" is no token
    assert main(["export", str(run), "--to", "gguf", "--out", str(tmp_path / "model.gguf")]) == 0
    said = capsys.readouterr().err
    assert "than in training: ' (B)'. The model may answer" in said and "fewer options" not in said


def test_cuts_that_llama_cpp_has_are_named(checkpoint, tmp_path, capsys):
    backend = tokenizers.Tokenizer.from_str(Tokenizer.train([TEXT], 300).to_bytes().decode())
    for cut, pieces in (("qwen2", split_bytes(QWEN2_PIECES)), ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False))):
        backend.pre_tokenizer, path = pieces, tmp_path / f"{cut}.gguf"
        backend.normalizer = normalizers.NFC() if cut == "qwen2" else None
        assert main(["export", str(checkpoint(Tokenizer(backend))), "--to", "gguf", "--out", str(path)]) == 0
        assert read(path)[0]["tokenizer.ggml.pre"] == cut
        assert ("does not normalise text (NFC)" in capsys.readouterr().err) == (cut == "qwen2")


def test_rows_that_do_not_divide_into_blocks_stay_in_f16(checkpoint, tmp_path, capsys):
    run, path = checkpoint(intermediate_size=48), tmp_path / "model.gguf"
    assert main(["export", str(run), "--to", "gguf", "--dtype", "q4_0", "--out", str(path)]) == 0
    tensors = read(path)[1]
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert "2 matrices, such as blk.0.ffn_down.weight, stay in f16" in capsys.readouterr().err


def test_what_llama_cpp_cannot_hold_is_refused_and_leaves_nothing(checkpoint, tmp_path, capsys):
    command = ["--to", "gguf", "--out", str(tmp_path / "out" / "model.gguf")]
    assert main(["export", str(checkpoint(superbpe.train([TEXT], 330, 300))), *command]) == 2
    assert "not that of SuperBPE" in capsys.readouterr().err
    sparse = checkpoint(attention=SparseAttentionConfig(top_k=16, local_window=4))
    assert main(["export", str(sparse), *command]) == 2 and "`--max-tokens 16`" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(checkpoint, tmp_path, capsys):
    run, limits = checkpoint(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may be larger
    try:
        code = main(["export", str(run), "--to", "gguf", "--dtype", "f32", "--out", str(tmp_path / "out" / "model.gguf")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from longreach.engine import load_model, load_tokenizer
from longreach.engine.model import LoraConfig, ModelConfig, pick_device, read_config, save_model, stop_tokens

IDS = torch.arange(100)[None] % 61


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {f"w{i}": i for i in range(59)} | {"<end>": 59, "<unk>": 60}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


TOKENIZER = word_tokenizer(eos_token="<end>")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit(
    dtype: torch.dtype, family: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    model = load(family, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # as training would
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    save_model(model, TOKENIZER, tmp_path)
    again = load_model(tmp_path, dtype=dtype, device="cpu")
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(saved[name].dtype == dtype and torch.equal(saved[name], loaded[name]) for name in saved)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # transformers alone, with its own defaults
    assert type(plain) is type(model) and plain.dtype == dtype
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.state_dict().items())
    config = (tmp_path / "config.json").read_text()
    assert "longreach" not in config
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<end>"


@pytest.mark.parametrize("name, tied", [("qwen3", True), ("llama", False)])
def test_tied_weights_stay_tied(name: str, tied: bool, load: Callable[..., Any], tmp_path: Path) -> None:
    save_model(load(name), TOKENIZER, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    again: Any = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) is tied


def test_a_loaded_model_is_ready_to_train(load: Callable[..., Any]) -> None:
    model = load("qwen3")
    assert model.training and model.config._attn_implementation == "longreach"
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert load("qwen3", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_yarn_stretches_positions_and_a_saved_model_keeps_it(
    folders: dict[str, Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    plain, stretched = load("qwen3"), load("qwen3", yarn=4.0)
    assert read_config(folders["qwen3"]).max_position_embeddings == 128
    assert read_config(folders["qwen3"], yarn=4.0).max_position_embeddings == 512
    assert not torch.allclose(logits(plain), logits(stretched), atol=1e-2)
    rope = {**plain.config.rope_parameters, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    by_hand = AutoModelForCausalLM.from_pretrained(folders["qwen3"], rope_parameters=rope, max_position_embeddings=512)
    torch.testing.assert_close(logits(stretched), logits(by_hand), rtol=0, atol=1e-4)
    save_model(stretched, TOKENIZER, tmp_path)
    for again in (
        load_model(tmp_path, dtype=torch.float32, device="cpu"),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        torch.testing.assert_close(logits(again), logits(stretched), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"already stretches its positions \(rope_type 'yarn', window 512\)"):
        load_model(tmp_path, yarn=4.0)


@pytest.mark.parametrize("change", ["missing", "of another size"])
def test_weights_that_would_be_random_numbers_are_refused(change: str, build: Callable[..., Path]) -> None:
    folder, name = build("llama"), "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / "model.safetensors")
    removed = weights.pop(name)
    if change != "missing":
        weights[name] = removed[1:].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 weights are missing or don't fit its config \({name}\)"):
        load_model(folder)


def test_a_damaged_weight_file_is_named_in_one_line(build: Callable[..., Path]) -> None:
    folder = build("llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"nothing can be loaded from {folder}: ") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_never_loaded(build: Callable[..., Path]) -> None:
    folder = build("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"nothing can be loaded from .*safetensors"):
        load_model(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_an_error_of_one_line(missing: str, build: Callable[..., Path]) -> None:
    folder = build("llama")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=str(folder)) as error:
        load_model(folder)
    assert len(str(error.value).splitlines()) <= 2


def test_code_of_a_model_folder_runs_only_when_asked_for(
    build: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = build("llama"), tmp_path / "ran"
    (folder / "modeling_own.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(folder / "config.json", model_type="own", auto_map=code)
    TOKENIZER.save_pretrained(folder)
    own_tokenizer = {"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own_tokenizer)
    for refused in (read_config, load_model, load_tokenizer):
        with pytest.raises(ValueError, match="trust_remote_code"):
            refused(folder)
    assert not ran.exists()
    model = load_model(folder, trust_remote_code=True, dtype=torch.float32, device="cpu")
    assert type(model).__name__ == "OwnModel" and ran.exists()


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos token"):
        load_tokenizer(tmp_path)
    for reader in (load_tokenizer, read_config):
        with pytest.raises(ValueError, match=r"no model folder .*nowhere"):
            reader(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="no model folder runs/nowhere/model"):
            reader("runs/nowhere/model")


@pytest.mark.parametrize("own, wanted", [(None, (59,)), (7, (7, 59)), ([3, 59, 5], (3, 5, 59))])
def test_stop_tokens_are_the_tokenizers_and_the_models(
    own: int | list[int] | None, wanted: tuple[int, ...], load: Callable[..., Any]
) -> None:
    model = load("llama")
    model.generation_config.eos_token_id = own
    assert stop_tokens(model, TOKENIZER) == wanted
    model.generation_config = None
    assert stop_tokens(model, TOKENIZER) == (59,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "fp32"}, "model.dtype is 'fp32': it must be one of float32, bfloat16, float16"),
        ({"dtype": "bfloat16", "autocast": True}, "with dtype = 'bfloat16' it does nothing"),
        ({"yarn": 1.0}, "model.yarn must be a factor above 1, not 1.0"),
        ({"yarn": float("nan")}, "model.yarn"),
    ],
)
def test_model_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig("somewhere", **options)


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("inf")}, {"targets": ()}])
def test_adapter_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"lora.{name}"):
        LoraConfig(**options)


def test_the_device_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert pick_device().type == wanted
    assert pick_device("meta").type == "meta"

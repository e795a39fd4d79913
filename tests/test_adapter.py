"""Adapters: exact round trips, what is refused and by which words, and life beside LoRA, compile and other dtypes."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from training_run import ROW, fine_tune, make_base

from sla2.adapter import adapter_state, apply_adapter, fingerprint, read_adapter
from sla2.errors import UserError
from sla2.random_wan import random_pipeline
from sla2.wan import AttentionProcessor, self_attentions

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a stage-2 run."""
    folder = tmp_path_factory.mktemp("run")
    fine_tune(make_base(folder / "base"), folder / "stage2", steps=1, checkpoint_every=9)
    return folder / "stage2"


def trained(run, dtype=torch.float32):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(run / "transformer", torch_dtype=dtype).eval()


def predict(transformer):
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 2, 8, 8, generator=draw), torch.randn(1, 8, 16, generator=draw)
    with torch.no_grad():
        return transformer(x, torch.tensor([700.0]), text, return_dict=False)[0]


def test_the_lines_of_the_readme_make_a_video(run, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(from diffusers.*?)```", README.read_text(), re.S)
    assert len(code.split("\n\n", 1)[1].splitlines()) == 3, "two imports and three lines"
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "results/tiny/stage2/sla2-97"
    place.mkdir(parents=True)
    (place / "seed0").symlink_to(run)
    random_pipeline("tiny", torch.device("cpu")).save_pretrained("results/tiny/base_model/pipeline")
    names = {}
    exec(code, names)
    pipeline = names["pipeline"]
    assert all(isinstance(attn.processor, AttentionProcessor) for attn in self_attentions(pipeline.transformer))
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 8}
    assert pipeline("a circle", **size).frames[0].shape == (5, 32, 32, 3)


def test_what_was_trained_is_what_is_loaded(run):
    """To the last bit, and not what a fresh installation would compute."""
    transformer = apply_adapter(trained(run), run / "adapter.safetensors")
    expected, first = predict(transformer), adapter_state(transformer)
    fresh = trained(run)
    with safe_open(run / "adapter.safetensors", "pt") as file:
        assert all(torch.equal(first[name], file.get_tensor(name)) for name in first)
        assert set(file.keys()) == set(first)
    assert torch.equal(predict(apply_adapter(fresh, run / "adapter.safetensors")), expected)
    for tensor in adapter_state(fresh).values():
        tensor.zero_()
    assert not torch.equal(predict(fresh), expected)


@pytest.fixture
def changed(run, tmp_path):
    """A copy of the adapter with a change to its tensors or its description."""

    def write(change):
        description, state = read_adapter(run / "adapter.safetensors")
        change(description, state)
        save_file(state, tmp_path / "adapter.safetensors", {"sla2": json.dumps(description)})
        return tmp_path / "adapter.safetensors"

    return write


NAME = "blocks.0.attn1.processor.attention.mixing.logit"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, s: s.pop(NAME), f"missing {NAME} \\(1 in all\\)"),
        (lambda d, s: s.update({"blocks.9.attn1.processor.x": torch.zeros(1)}), "unexpected blocks.9"),
        (lambda d, s: s.update({NAME: torch.zeros(3)}), f"{NAME} is \\(3,\\), the model has \\(2, 4\\)"),
        (lambda d, s: d.update(version=99), "version 99, this code reads"),
        (lambda d, s: d.update(fingerprint="0"), "made for a transformer with other weights"),
    ],
    ids=["missing", "unexpected", "shape", "version", "weights"],
)
def test_refusals_name_what_is_wrong(run, changed, change, message):
    with pytest.raises(UserError, match=message):
        apply_adapter(trained(run), changed(change))


def test_other_weights_are_taken_when_told(run, changed):
    path = changed(lambda description, state: description.update(fingerprint="0"))
    apply_adapter(trained(run), path, any_base=True)


def test_files_that_are_no_adapter_are_refused(run, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"{")
    for path, words in (
        (tmp_path / "absent.safetensors", "cannot be read as safetensors"),
        (tmp_path / "broken.safetensors", "cannot be read as safetensors"),
        (run / "transformer/diffusion_pytorch_model.safetensors", "holds no description of an SLA2 adapter"),
    ):
        with pytest.raises(UserError, match=words):
            apply_adapter(trained(run), path)


def test_fingerprint_is_of_the_weights_whatever_their_dtype(run):
    transformer = trained(run)
    print_ = fingerprint(transformer.named_parameters())
    assert print_ == read_adapter(run / "adapter.safetensors")[0]["fingerprint"]
    assert print_ == fingerprint(trained(run, torch.bfloat16).named_parameters())
    assert print_ == fingerprint(apply_adapter(transformer, run / "adapter.safetensors").named_parameters())
    transformer.blocks[0].ffn.net[2].weight.data[0, 0] += 0.1
    assert print_ != fingerprint(transformer.named_parameters())


def test_compiled_transformer_is_the_same(run):
    """Compiled whole, its names have a prefix; the CPU's reference breaks the graph, the GPU's operator does not."""
    expected = predict(apply_adapter(trained(run), run / "adapter.safetensors"))
    compiled = torch.compile(trained(run), backend="eager")  # tracing is what could fail; code generation takes minutes
    apply_adapter(compiled, run / "adapter.safetensors")
    torch.testing.assert_close(predict(compiled), expected)


def test_lora_beside_the_adapter(run):
    """LoRA on the projections neither hides the adapter's parameters nor changes whose weights these are."""
    from peft import LoraConfig

    transformer = trained(run)
    expected = predict(apply_adapter(trained(run), run / "adapter.safetensors"))
    transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=True)
    )
    apply_adapter(transformer, run / "adapter.safetensors")
    torch.testing.assert_close(predict(transformer), expected)
    names = [name for name, _ in transformer.named_parameters() if ".lora_" in name]
    assert len(names) == 2 * 4 * 2 * 2
    assert set(adapter_state(transformer)) == set(read_adapter(run / "adapter.safetensors")[1])
    for name, parameter in transformer.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_()
    assert not torch.allclose(predict(transformer), expected)


def test_lora_after_the_adapter(run):
    from peft import LoraConfig

    transformer = apply_adapter(trained(run), run / "adapter.safetensors")
    expected = predict(transformer)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=True))
    torch.testing.assert_close(predict(transformer), expected)


def test_saved_by_diffusers_it_needs_its_adapter_again(run, tmp_path):
    """diffusers writes the adapter's tensors too and leaves them out when it loads: the folder alone is the dense model."""
    transformer = apply_adapter(trained(run), run / "adapter.safetensors")
    expected = predict(transformer)
    transformer.save_pretrained(tmp_path)
    loaded = type(transformer).from_pretrained(tmp_path)
    assert not torch.allclose(predict(loaded), expected)
    torch.testing.assert_close(predict(apply_adapter(loaded, run / "adapter.safetensors")), expected, rtol=0, atol=0)


def test_saved_row_is_the_one_that_was_trained(run):
    assert read_adapter(run / "adapter.safetensors")[0]["variant"] == ROW
    assert json.loads((run / "adapter.json").read_text())["variant"] == ROW

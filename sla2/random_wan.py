"""Wan2.1 at its real sizes with random weights, for measuring memory and time where the trained ones cannot be had.

Every part is the real diffusers or transformers class with Wan2.1's configuration, but for the tokenizer: UMT5's vocabulary cannot
be made up, so text becomes one token a character. Weights are drawn on the device, which is quick on a GPU.

    python -m sla2.random_wan --size 1.3b --output data/random-wan-1.3b
"""

import argparse
import string
from pathlib import Path

import torch
from torch import nn

from sla2.device import claim_device
from sla2.errors import run_main
from sla2.files import write_folder
from sla2.progress import say

# Sizes as in diffusers' converter for Wan2.1; what is absent is a default of the class. `tiny` is for tests of this module.
WAN_TRANSFORMER = {"patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
SIZES = {
    "1.3b": {"flow_shift": 3.0, "transformer": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}},
    "14b": {"flow_shift": 5.0, "transformer": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}},
    "tiny": {
        "flow_shift": 3.0,
        "transformer": {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "ffn_dim": 32,
            "text_dim": 16,
            "freq_dim": 16,
        },
        "text_encoder": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 128},
        "vae": {"base_dim": 4, "num_res_blocks": 1},
    },
}
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def random_transformer(size: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A `WanTransformer3DModel` of a size, drawn on the device; what diffusers keeps in fp32 stays so.

    Args:
        size: a key of `SIZES`.
        dtype: of the weights, as `from_pretrained(torch_dtype=...)` would leave them.
    """
    from diffusers import WanTransformer3DModel

    with torch.device(device):
        transformer = WanTransformer3DModel(**WAN_TRANSFORMER | SIZES[size]["transformer"])
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return transformer


def character_tokenizer():
    """One token a character of ASCII, closed by `</s>` and padded right with id 0, as UMT5's is."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *sorted(set(string.printable))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def random_pipeline(size: str, device: torch.device, text_layers: int | None = None):
    """A `WanPipeline` of a size: transformer and VAE in fp32, the text encoder in bf16 on a GPU, as Wan publishes it.

    Args:
        text_layers: layers of UMT5 in place of its own 24, where memory or disk is short.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    parts = SIZES[size]
    text = UMT5_XXL | parts.get("text_encoder", {}) | ({"num_layers": text_layers} if text_layers else {})
    with torch.device(device):
        encoder = UMT5EncoderModel(UMT5Config(**text, dropout_rate=0.0))
        vae = AutoencoderKLWan(**parts.get("vae", {}))
    return WanPipeline(
        tokenizer=character_tokenizer(),
        text_encoder=encoder.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval(),
        vae=vae.eval(),
        transformer=random_transformer(size, device).eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=parts["flow_shift"]
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder in diffusers' layout")
    parser.add_argument("--text-layers", type=int, help="layers of the text encoder, 24 in UMT5-XXL")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = claim_device({"device": args.device})
    torch.manual_seed(args.seed)
    pipeline = random_pipeline(args.size, device, args.text_layers)
    write_folder(args.output, pipeline.save_pretrained)
    counts = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters())
        for name in ("transformer", "vae", "text_encoder")
    }
    say(f"random_wan: {args.output}: {', '.join(f'{name} {count:,}' for name, count in counts.items())} parameters")


if __name__ == "__main__":
    run_main(main)

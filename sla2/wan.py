"""Wan2.1 in diffusers: our attention in its self-attention layers, and loading.

Only `attn1` is replaced, never cross-attention. A processor is a module, one instance per block, set on a plain
`WanTransformer3DModel`, so checkpointing, `torch.compile` and LoRA work as before. What a variant adds (router, alpha,
projection) is saved as an adapter (`sla2.adapter`) beside an ordinary diffusers folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla2.attention import AttentionSettings, build
from sla2.errors import UserError
from sla2.files import read_json
from sla2.variant import Variant


@dataclass(frozen=True)
class BaseModel:
    """What `base_model.json` says.

    Args:
        pipeline: folder or hub id for `WanPipeline.from_pretrained`; a relative folder is relative to the JSON file.
        weights_sha256: hash of the transformer's weight files.
        tokens: N of the study's videos; grid: (frames, rows, columns) of tokens.
        latents: folder with the cached latents and text embeddings.
        fingerprint: of the transformer's weights in memory, see `sla2.adapter.fingerprint`.
    """

    pipeline: str
    revision: str | None
    weights_sha256: str
    parameters: int
    tokens: int
    grid: tuple[int, int, int]
    layers: int
    heads: int
    head_dim: int
    frames: int
    height: int
    width: int
    fps: float
    text_length: int
    flow_shift: float
    latents: str
    fingerprint: str = ""

    @classmethod
    def read(cls, path: str | Path) -> "BaseModel":
        """Read the JSON file.

        Raises:
            UserError: when it is missing or lacks a key.
        """
        path = Path(path)
        values = read_json(path)
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
        if missing:
            raise UserError(f"{path}: lacks {', '.join(missing)}; run the base_model step again")
        values = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        beside = path.parent / values["pipeline"]
        if beside.is_dir():
            values["pipeline"] = str(beside)
        values["latents"] = str(path.parent / values["latents"])
        return cls(**{**values, "grid": tuple(values["grid"])})


class AttentionProcessor(nn.Module):
    """Wan's self-attention around an attention module that takes (B, H, N, D).

    Args:
        attention: maps q, k, v, all (B, H, N, D), to the output of that shape.
    """

    _attention_backend = None  # read by diffusers when a backend is chosen for the whole model
    _parallel_config = None

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Project, normalise, rotate, attend and project back; hidden states (B, N, H * D)."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this processor serves unmasked self-attention only; set it on block.attn1, not on attn2")
        if self._parallel_config is not None:
            raise ValueError("context parallelism would route on a part of the tokens; disable it for this model")
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = rms_norm(attn.norm_q, q), rms_norm(attn.norm_k, k)  # over all heads together, before they are split
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # (B, N, H, D)
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))  # (B, H, N, D)
        if not q.is_cuda:  # the kernels take any strides; the reference's matrix products are slower on views
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = self.attention(q, k, v).transpose(1, 2).flatten(2, 3).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](out))


def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm in the dtype of x, as at inference: under autocast the weight is wider, so torch would widen x and not fuse."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, N, H, D) by pairs of neighbouring channels; cos and sin (1, N, 1, D), each value twice."""
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2).type_as(x)


def self_attentions(transformer: nn.Module) -> list[nn.Module]:
    """The self-attention of every block, in order."""
    return [block.attn1 for block in transformer.blocks]


def install(transformer: nn.Module, variant: Variant, settings: AttentionSettings, tokens: int) -> None:
    """Put a row's attention into every block, for good; a row with attention `full` keeps diffusers' own.

    Args:
        tokens: N that alpha is laid out for.
    """
    if variant.attention == "full":
        return
    for attn in self_attentions(transformer):
        head_dim = attn.inner_dim // attn.heads
        module = build(variant, attn.heads, head_dim, tokens, settings)
        attn.set_processor(AttentionProcessor(module.to(attn.to_q.weight.device)))


def compile_blocks(transformer: nn.Module) -> None:
    """Fuse norms, modulation and rotary embedding of each block; one compilation serves all, and names stay as they are.

    Each size of batch is compiled by itself: a run has two of them, its own and that of the held-out loss, and a kernel for any
    size is slower.
    """
    for block in transformer.blocks:
        block.compile(dynamic=False)


@contextmanager
def processors(transformer: nn.Module, chosen: list) -> Iterator[None]:
    """Run blocks with these self-attention processors, one per block; the former ones come back, also after an exception."""
    layers = self_attentions(transformer)
    former = [attn.processor for attn in layers]
    try:
        for attn, processor in zip(layers, chosen, strict=True):
            attn.set_processor(processor)
        yield
    finally:
        for attn, processor in zip(layers, former, strict=True):
            attn.set_processor(processor)


def installed(transformer: nn.Module, attentions: list[nn.Module]):
    """Run blocks with these attention modules, one per block, as `processors` does."""
    return processors(transformer, [AttentionProcessor(module) for module in attentions])


def stock(transformer: nn.Module):
    """Run blocks with diffusers' own processor, so that the model has the parameters of an ordinary one and no more."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    return processors(transformer, [WanAttnProcessor() for _ in self_attentions(transformer)])


class _Capture(nn.Module):
    """Dense attention that keeps what went in and came out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        self.seen = {"q": q.detach(), "k": k.detach(), "v": v.detach(), "o": out.detach()}
        return out


@contextmanager
def capture_qkv(transformer: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Run the model densely and keep q, k, v and the output o of each layer, all (B, H, N, D).

    Yields:
        A list that holds one dict per layer once the block is left; read it after one forward.
    """
    captures = [_Capture() for _ in self_attentions(transformer)]
    found: list[dict[str, Tensor]] = []
    with installed(transformer, captures):
        yield found
    found.extend(capture.seen for capture in captures)


def load_transformer(
    base: BaseModel, trained: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The base model's transformer, or the fine-tuned one of a stage-2 folder; attention is still diffusers' own.

    Raises:
        UserError: when the folder or hub id cannot be loaded.
    """
    from diffusers import WanTransformer3DModel

    if trained is not None and (Path(trained) / "transformer").is_dir():
        return _from_pretrained(WanTransformer3DModel, str(Path(trained) / "transformer"), torch_dtype=dtype)
    return _from_pretrained(
        WanTransformer3DModel, base.pipeline, subfolder="transformer", revision=base.revision, torch_dtype=dtype
    )


def load_transformer_config(place: str, revision: str | None) -> dict:
    """Configuration of a pipeline's transformer."""
    from diffusers import WanTransformer3DModel

    return _loaded(WanTransformer3DModel.load_config, place, subfolder="transformer", revision=revision)


def vae_factors(place: str, revision: str | None) -> tuple[int, int]:
    """Temporal and spatial compression of a pipeline's VAE."""
    from diffusers import AutoencoderKLWan

    config = _loaded(AutoencoderKLWan.load_config, place, subfolder="vae", revision=revision)
    return config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)


def load_vae(place: str, revision: str | None) -> nn.Module:
    """The VAE of a folder or hub id, in fp32 as Wan runs it."""
    from diffusers import AutoencoderKLWan

    return _from_pretrained(AutoencoderKLWan, place, subfolder="vae", revision=revision)


def load_pipeline(place: str, revision: str | None, dtype: torch.dtype = torch.float32, **components: object):
    """`WanPipeline.from_pretrained` of a folder or hub id, the VAE in fp32; `components` replace parts, None leaves one out."""
    from diffusers import WanPipeline

    if "vae" not in components:
        components["vae"] = load_vae(place, revision)
    return _from_pretrained(WanPipeline, place, revision=revision, torch_dtype=dtype, **components)


def load_text_encoder(place: str, revision: str | None, device: torch.device):
    """A pipeline with tokenizer and text encoder only, on the device; in bf16 on a GPU, as Wan publishes UMT5."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_pipeline(place, revision, dtype, transformer=None, vae=None).to(device)


def _from_pretrained(kind: type, place: str, **options: object):
    return _loaded(kind.from_pretrained, place, use_safetensors=True, **options)


def _loaded(load, place: str, **options: object):
    try:
        return load(place, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"base_model.pretrained: {place}: not a diffusers Wan folder or hub id ({reason})") from error

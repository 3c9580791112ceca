"""Named model configurations, from ones that train on two cores to the published ones:
`preset("vit-b16")`."""

from mmvit.config import Config
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError, did_you_mean
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.clip import CLIPConfig
from mmvit.models.dvae import DiscreteVAEConfig
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.models.resnet import ResNetConfig
from mmvit.models.vq import VQConfig
from mmvit.models.vqgan import VQGANConfig


def core(width: int, depth: int, num_heads: int, **parts) -> TransformerConfig:
    return TransformerConfig(width=width, depth=depth, num_heads=num_heads, **parts)


def vit(patch_size: int, shape: TransformerConfig) -> ClassifierConfig:
    """A published ViT: 224 pixels, 1000 classes, [CLS] (2010.11929, Table 1)."""
    return ClassifierConfig(patch_size=patch_size, core=shape)


def hybrid(patch_size: int, blocks: tuple[int, ...], shape: TransformerConfig) -> ClassifierConfig:
    return ClassifierConfig(patch_size=patch_size, stem="resnet", stem_blocks=blocks, core=shape)


def dalle(shape: TransformerConfig, **parts) -> GeneratorConfig:
    """A DALL·E: by default captions of up to 256 tokens, 32 × 32 codes; attention by row, by column and by
    convolution; captions are never dropped (2102.12092, appendix B)."""
    published = {"vocab_size": 16384, "text_length": 256, "codebook_size": 8192, "grid": (32, 32)}
    return GeneratorConfig(
        **{**published, **parts},
        positions="learned_2d",
        attention="dalle",
        text_loss_weight=1.0,
        caption_dropout=0.0,
        core=shape,
    )


TINY, SMALL, BASE = core(192, 12, 3), core(384, 12, 6), core(768, 12, 12)
LARGE, HUGE = core(1024, 24, 16), core(1280, 32, 16)

CLASSIFIERS = {
    # for small data and CPUs: the parts that were best at equal FLOPs (docs/results.md), for 28 pixels
    "vit-modern": ClassifierConfig(
        image_size=28,
        patch_size=4,
        num_classes=10,
        stem="residual",
        stem_width=64,
        stem_blocks=(3, 2),
        pooling="mean",
        positions="learned_2d",
        patch_dropout=0.5,
        core=core(128, 4, 4),
    ),
    "vit-ti16": vit(16, TINY),
    "vit-s16": vit(16, SMALL),
    "vit-b16": vit(16, BASE),
    "vit-b32": vit(32, BASE),
    "vit-l16": vit(16, LARGE),
    "vit-l32": vit(32, LARGE),
    "vit-h14": vit(14, HUGE),
    # hybrids: ResNet-50 before the core; for patches of 16, its last stage's blocks move to the third
    "r50-b16": hybrid(16, (3, 4, 9), BASE),
    "r50-b32": hybrid(32, (3, 4, 6, 3), BASE),
    "r50-l16": hybrid(16, (3, 4, 9), LARGE),
    "r50-l32": hybrid(32, (3, 4, 6, 3), LARGE),
    "bit-r50": ResNetConfig(),
    "bit-r101": ResNetConfig(depths=(3, 4, 23, 3)),
}

# best at equal FLOPs (docs/results.md)
RECOMMENDED = {"mlp": "swiglu", "qk_norm": True, "dropout": 0.1}

GENERATORS = {
    "generator-tiny": GeneratorConfig(core=core(256, 6, 4, **RECOMMENDED)),
    "generator-small": GeneratorConfig(core=core(384, 12, 6, **RECOMMENDED)),
    # LlamaGen's sizes (2406.06525, Table 1): 256 pixels at factor 16, captions of up to 120 tokens
    "generator-b": GeneratorConfig(
        vocab_size=16384, text_length=120, codebook_size=16384, grid=(16, 16), positions="rotary_2d",
        core=core(768, 12, 12, norm="rmsnorm", mlp="swiglu", bias=False),
    ),
    "generator-xl": GeneratorConfig(
        vocab_size=16384, text_length=120, codebook_size=16384, grid=(16, 16), positions="rotary_2d",
        core=core(1280, 36, 20, norm="rmsnorm", mlp="swiglu", bias=False),
    ),
    # DALL·E (2102.12092, appendix B) with 64 layers of 62 heads; then smaller ones; the last trains on a CPU
    "dalle-12b": dalle(core(3968, 64, 62)),
    "dalle-1b": dalle(core(1792, 24, 28)),
    "dalle-300m": dalle(core(1024, 24, 16)),
    "dalle-tiny": dalle(
        core(256, 8, 4), vocab_size=4096, text_length=24, codebook_size=1024, grid=(8, 8), convolution=7
    ),
}  # fmt: skip

IMAGE_TOKENIZERS = {
    "vq-f8": VQConfig(),
    "dvae-tiny": DiscreteVAEConfig(
        codebook_size=1024, width=32, code_width=32, kl_weight=10.0, kl_warmup=50, temperature_steps=1500
    ),
    "dalle-dvae": DiscreteVAEConfig(),  # 2102.12092, appendix A
    "vqgan-f16": VQGANConfig(),  # 2012.09841, 16384 codes
}

CLIPS = {
    # 2103.00020, table 20: ViT-B/32, a text Transformer of width 512, and 512 dimensions in common
    "clip-b32": CLIPConfig(
        image=vit(32, BASE), text=core(512, 12, 8), vocab_size=49408, text_length=77, embedding_width=512
    ),
}

PRESETS = {**CLASSIFIERS, **GENERATORS, **CLIPS, **IMAGE_TOKENIZERS}


def preset(name: str) -> Config:
    """The configuration called `name`. Raises UserError, with the nearest name, for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]

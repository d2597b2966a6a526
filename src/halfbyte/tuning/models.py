"""The layers that the package brings tables of: those that `halfbyte bench` knows, and more models."""

from __future__ import annotations

from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape
from halfbyte.experts import DEEPSEEK_V4_SWIGLU, GPT_OSS_SWIGLU
from halfbyte.formats import MXFP4

MODELS = NAMED_SHAPES | {
    shape.name: shape
    for shape in (
        MoEShape("qwen3-next", 2048, 512, 512, 10),
        MoEShape("qwen3.5", 4096, 1024, 512, 10),
        MoEShape("deepseek-v4", 4096, 2048, 256, 6, DEEPSEEK_V4_SWIGLU, published=MXFP4),
        MoEShape("kimi-k2", 7168, 2048, 384, 8),
        MoEShape("glm-4.5", 5120, 1536, 160, 8),
        MoEShape("minimax-m2", 3072, 1536, 256, 8),
        MoEShape("gptoss-20b", 2880, 2880, 32, 4, GPT_OSS_SWIGLU, has_bias=True, published=MXFP4),
        MoEShape("maverick", 5120, 8192, 128, 1),
    )
}

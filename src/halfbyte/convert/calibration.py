"""Input scales: run the source model on text and record the largest input of every quantised matrix.

The model runs through transformers with its own code, except that the experts are computed by `_Recorder.run_experts`, which sees the inputs of
gate and up and of down for each expert separately. Only the first 512 windows of up to 1024 tokens are used, one at a time and without padding,
so no made-up token enters the statistics.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from halfbyte.checkpoint.json_files import json_lines, parse_object, read_json, read_text
from halfbyte.convert.plan import Matrix
from halfbyte.device import model_dtype
from halfbyte.errors import CheckpointError, UnsupportedError, foreign

logger = logging.getLogger(__name__)
MAX_WINDOWS = 512
WINDOW_TOKENS = 1024
_TEXT_KEYS = ("text", "prompt", "question", "completion", "response", "solution", "answer")
FEW_TOKENS = 1_000  # of an expert, below which its largest input may not have been seen
_LAYER = re.compile(r"(?:^|\.)((?:mtp\.)?layers\.\d+)\.")
_IMPLEMENTATION = "halfbyte_calibration"
_WITHOUT = "run `halfbyte inspect` on it, or leave --calibrate out"


@dataclass
class Calibration:
    """amax of the input of every quantised module, the experts no token reached (by container), and the tokens run."""

    amax: dict[str, float] = field(default_factory=dict)
    never_routed: dict[str, list[int]] = field(default_factory=dict)
    tokens: int = 0


def calibrate(
    model_dir: Path, matrices: Sequence[Matrix], file: Path, *, device: str = "cpu", progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Measure the inputs of `matrices` while the model in `model_dir` reads `file`.

    An expert that no token reaches gets the largest amax of its layer, and is listed: its own would be 0 or wild, and some engines spread one bad
    scale over the layer. Experts that fewer than `FEW_TOKENS` tokens reach are counted in a warning.

    Args:
        model_dir: the source model; loaded whole, in the dtype of `model_dtype`.
        matrices: what will be quantised.
        file: text, or JSONL with "text", "prompt", "question", "completion", "response", "solution", "answer" or "messages".
        device: where the model runs.
        progress: called with (tokens done, tokens in all) after every window.

    Raises:
        UnsupportedError: transformers is missing, or its model has no experts or modules of these names.
        CheckpointError: no text in the file or no tokens of it; transformers cannot run the model; activations that are not finite.
    """
    texts = read_texts(file)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise UnsupportedError(f"calibration needs transformers: {error}", next_step="run: pip install 'halfbyte[hf]'") from error
    recorder = _Recorder()
    ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION] = recorder.run_experts
    try:
        with foreign("transformers cannot run the model", where=str(model_dir), next_step=_WITHOUT):
            fp8 = "quantization_config" in read_json(model_dir / "config.json")
            arguments: dict[str, Any] = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if fp8 else {}
            dtype = model_dtype(torch.device(device))
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, experts_implementation=_IMPLEMENTATION, **arguments)
            # What is FP8 in the files came as bf16, whatever was asked for.
            model = (model.float() if dtype == "float32" else model).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
            windows = [window for window in _windows(texts, tokenizer) if window]
            if not windows:
                raise CheckpointError("the model's tokenizer makes no tokens of the calibration text", where=str(model_dir), next_step=_WITHOUT)
            with recorder.attached(model, matrices), torch.inference_mode():
                for window in windows:
                    model(torch.tensor([window], dtype=torch.int64, device=device), use_cache=False)
                    recorder.tokens += len(window)
                    if progress:
                        progress(recorder.tokens, sum(map(len, windows)))
    finally:
        del ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION]
    recorder.warn_of_few_tokens(matrices)
    return recorder.result(matrices)


def read_texts(file: Path) -> list[str]:
    """The texts of a JSONL file (one per line), or a text file as one; either may be compressed (.xz).

    Raises:
        CheckpointError: unreadable, empty, or a line without text.
    """
    try:
        content = read_text(file)
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot read the calibration file", where=str(file), given=error) from error
    if not file.name.removesuffix(".xz").endswith(".jsonl"):
        texts = [content]
    else:
        texts = [_text_of(line, f"{file}:{number}") for number, line in enumerate(json_lines(content), 1) if line.strip()]
    if not any(text.strip() for text in texts):
        raise CheckpointError("the calibration file has no text", where=str(file))
    return texts


def _text_of(line: str, where: str) -> str:
    try:
        record = parse_object(line.encode())
    except ValueError as error:
        raise CheckpointError("not a JSON line", where=where, given=error) from error
    messages = record.get("messages")
    said = [message.get("content") for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    if parts := [text for text in (*map(record.get, _TEXT_KEYS), *said) if isinstance(text, str)]:
        return "\n".join(parts)
    raise CheckpointError("no text in this line", where=where, needed=", ".join(_TEXT_KEYS) + " or messages")


def _windows(texts: Sequence[str], tokenizer: Callable[..., Any]) -> Iterator[list[int]]:
    count = 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for first in range(0, len(ids), WINDOW_TOKENS):
            if count == MAX_WINDOWS:
                return
            count += 1
            yield ids[first : first + WINDOW_TOKENS]


class _Recorder:
    """Collects amax: of linear modules by name, of experts by (layer, expert, what the input feeds)."""

    def __init__(self) -> None:
        self.tokens = 0
        self.linear: dict[str, float] = {}
        self.experts: dict[tuple[str, int, str], float] = {}
        self.tokens_of: Counter[tuple[str, int]] = Counter()  # (layer, expert)
        self._layer_of: dict[torch.nn.Module, str] = {}

    @contextmanager
    def attached(self, model: torch.nn.Module, matrices: Sequence[Matrix]) -> Iterator[None]:
        """Watch every module of `model` that computes one of `matrices`, or raise UnsupportedError naming the first that is not there."""
        modules = dict(model.named_modules())
        self._layer_of = {module: _layer(name) for name, module in modules.items() if hasattr(module, "has_gate") and hasattr(module, "down_proj")}
        layers = set(self._layer_of.values())
        for matrix in matrices:
            if (matrix.experts and _layer(matrix.module) not in layers) or (not matrix.experts and matrix.module not in modules):
                raise UnsupportedError(
                    "transformers does not run this module, so its input cannot be measured",
                    where=matrix.module,
                    given=type(model).__name__,
                    next_step=f"quantise without --calibrate, or leave it out: --skip '{matrix.experts + '.*' if matrix.experts else matrix.module}'",
                )
        hooks = [modules[m.module].register_forward_pre_hook(self._linear_hook(m.module)) for m in matrices if not m.experts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _linear_hook(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.linear[name] = _larger(self.linear.get(name, 0.0), inputs[0])

        return hook

    def run_experts(self, module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """transformers' experts interface: hidden [T, H], top_k_index and top_k_weights [T, k] to [T, H]."""
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedError("experts with a norm behind them cannot be calibrated", where=self._layer_of[module])
        layer = self._layer_of[module]
        first = "gate_up_proj" if module.has_gate else "up_proj"
        out = torch.zeros_like(hidden, dtype=torch.float32)

        def linear(x: torch.Tensor, name: str, expert: int) -> torch.Tensor:
            weight = getattr(module, name)[expert]
            bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
            return F.linear(x, weight.T if module.is_transposed else weight, bias)

        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            x = hidden[token]
            self.tokens_of[layer, expert] += len(x)
            inner = linear(x, first, expert)
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            self._see_expert(layer, expert, "in", x)
            self._see_expert(layer, expert, "inner", inner)
            out.index_add_(0, token, linear(inner, "down_proj", expert).float() * top_k_weights[token, slot, None].float())
        return out.to(hidden.dtype)

    def warn_of_few_tokens(self, matrices: Sequence[Matrix]) -> None:
        """Say how many of the experts, of all layers together, have had fewer than `FEW_TOKENS`."""
        tokens = [self.tokens_of[_layer(matrix.module), matrix.expert] for matrix in matrices if matrix.role == "down" and matrix.expert is not None]
        if few := sum(count < FEW_TOKENS for count in tokens):
            message = "calibration: %d of %d experts have had fewer than %d tokens, the fewest %d; input scales may be too small: give more text"
            logger.warning(message, few, len(tokens), FEW_TOKENS, min(tokens))

    def _see_expert(self, layer: str, expert: int, what: str, x: torch.Tensor) -> None:
        key = (layer, expert, what)
        self.experts[key] = _larger(self.experts.get(key, 0.0), x)

    def result(self, matrices: Sequence[Matrix]) -> Calibration:
        calibration = Calibration(tokens=self.tokens)
        layer_amax: dict[tuple[str, str], float] = {}
        for (layer, _, what), amax in self.experts.items():
            layer_amax[layer, what] = max(layer_amax.get((layer, what), 0.0), amax)
        for matrix in matrices:
            amax = self.linear.get(matrix.module, 0.0)
            if matrix.experts is not None and matrix.expert is not None:
                layer, what = _layer(matrix.module), "inner" if matrix.role == "down" else "in"
                seen = self.experts.get((layer, matrix.expert, what))
                amax = layer_amax[layer, what] if seen is None else seen
                if seen is None and matrix.role == "down":
                    calibration.never_routed.setdefault(matrix.experts, []).append(matrix.expert)
            if not math.isfinite(amax):
                raise CheckpointError("the model computes NaN or infinity on the calibration text", where=matrix.module, given=amax)
            calibration.amax[matrix.module] = amax
        for ids in calibration.never_routed.values():
            ids.sort()
        return calibration


def _layer(name: str) -> str:
    """`layers.3` of any module name in layer 3: families name what lies between differently in memory and on disk."""
    match = _LAYER.search(name)
    return match[1] if match else name


def _larger(amax: float, x: torch.Tensor) -> float:
    """max of amax and |x|; NaN if either is."""
    if x.numel() == 0:
        return amax
    new = x.abs().max().item()
    return new if math.isnan(new) or new > amax else amax

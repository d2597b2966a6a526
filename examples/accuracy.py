"""What FP4 experts cost: a quantised model beside its bf16 source, with bf16 and with fp8 activations.

python examples/accuracy.py demo ./demo-NVFP4      # needs halfbyte[hf]; DIRECTORY as quantise_model.py wrote it
"""

from __future__ import annotations

import sys

import torch

from halfbyte.integrations.transformers import load, set_activations

TEXT = (
    "Q: Kate has $75 and saves $17 a week for 8 weeks. How many dollars does Kate have then?\nA: Saved: 17*8=136. Has: 75+136=211.\n#### 211\n"
    "Q: A cinema has 29 rows of 23 seats. 283 seats are empty. Each taken seat pays $7. How many dollars are paid?\n"
    "A: Seats: 29*20=580. 29*3=87. 580+87=667. Taken: 667-283=384. Paid: 384*7=2688.\n#### 2688\n"
)


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[0, :-1].float().log_softmax(-1)


def main(source: str = "demo", quantised: str = "demo-NVFP4") -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference, tokenizer = load(source, dtype=torch.bfloat16, device=device)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids.to(device)
    expected = log_probabilities(reference, ids)
    model, _ = load(quantised, dtype=torch.bfloat16, device=device)

    print(f"{'experts':24} {'perplexity':>10} {'KL to bf16':>10}")
    print(f"{'bf16':24} {perplexity(expected, ids):10.3f}")
    for activations in ("bf16", "fp8"):
        set_activations(model, activations)
        found = log_probabilities(model, ids)
        kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
        print(f"{'FP4, ' + activations + ' activations':24} {perplexity(found, ids):10.3f} {kl:10.4f}")
        assert 0 < kl < 0.2


def perplexity(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    return (-log_probabilities.gather(-1, ids[0, 1:, None]).mean()).exp().item()


if __name__ == "__main__":
    main(*sys.argv[1:])

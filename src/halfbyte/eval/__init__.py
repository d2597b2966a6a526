"""How good a model is: exact match on questions, likelihood of their answers, perplexity of a text, KL divergence from a reference."""

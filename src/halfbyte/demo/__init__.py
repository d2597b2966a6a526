"""The demonstration: what FP4 does to a small real model, measured on a CPU in about a minute."""

QUESTION = "Mia has 12 apples. Mia buys 5 bags of 7 apples each. How many apples does Mia have now?"  # of the kind that the embedded model knows

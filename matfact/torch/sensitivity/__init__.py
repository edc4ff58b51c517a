"""How much a loss changes with weights or outputs."""

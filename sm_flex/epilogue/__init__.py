"""From ordinary causal attention's (out, lse) and log M to StableMask's (out', lse')."""

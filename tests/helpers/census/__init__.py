"""A census: every causal language model type that Transformers has, run with StableMask against eq. 11 in float64."""

"""torch's three attention functions, each with the signature of its namesake, for a StableMask too."""

"""What the launchers of other people's training scripts share: the flags --attn and --gamma, and how bad input ends."""

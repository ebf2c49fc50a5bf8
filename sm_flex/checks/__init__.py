"""What bad input gets: every refusal names the argument, the rule, what came and the way out.

Kinds, dtypes and shapes are checked under torch.compile too; values of a tensor only eagerly on the CPU,
since reading them elsewhere would wait for the device.
"""
